"""A trained run as an ONNX file, with its preprocessing in a JSON beside it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from charmlib.data.loaders import grey_to_network
from charmlib.evaluation.ensemble import members_of
from charmlib.evaluation.runs import RunFolder
from charmlib.files import write_json, write_whole
from charmlib.training.run import Run
from charmlib.training.views import tensors

IMAGES, CLOSE = 32, 1e-4  # how many images are compared, and the largest difference of their logits


class _FromGrey(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.mean, self.std = (nn.Buffer(values) for values in tensors(net, "cpu"))

    def forward(self, grey: Tensor) -> Tensor:
        return self.net(grey_to_network(grey, self.mean, self.std))


def export_onnx(run: str | Path, out: str | Path = "", **where) -> tuple[Path, float]:
    """Write ``model.onnx`` and ``model.onnx.json`` into ``out``, by default the run's folder; returns the former and the
    largest difference of logits between onnxruntime and torch on 32 test images.

    Input ``grey`` (B, 1, S, S) float32 of 0 to 255, output ``logits`` (B, C): normalisation, head and votes are in the graph.
    The JSON says how a picture becomes grey: size, aspect, contrast, scale; and holds classes, thresholds and temperature.
    Views are not in the graph. ``where`` goes to :meth:`charmlib.training.run.Run.load`.

    Raises
    ------
    ImportError
        onnx, onnxscript or onnxruntime is missing.
    ValueError
        An ensemble, or logits that differ by more than 1e-4; then nothing is written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx writes with it)
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'charmlib[export]'") from error
    if members_of(run):
        raise ValueError(f"{run} is an ensemble: export its members one by one, and merge their probabilities")
    loaded, card = Run.load(run, **{"device": "cpu", **where}), RunFolder(run).card
    net = _FromGrey(loaded.net.eval()).eval()
    rows = loaded.data.rows("test")[:IMAGES]
    grey = torch.from_numpy(loaded.data.images.take(rows, axis=0))[:, None].float()
    path = Path(out or loaded.folder.path) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    net(grey[:2])  # a bank of votes finds its slots' sides, which no graph can
    program = torch.onnx.export(net, (grey[:2],), dynamo=True, verbose=False, input_names=["grey"], output_names=["logits"],
                                dynamic_shapes={"grey": {0: torch.export.Dim("images")}})
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        far = float(np.abs(session.run(None, {"grey": grey.numpy()})[0] - net(grey).numpy()).max())
    if not far <= CLOSE:
        raise ValueError(f"the logits of {run} in onnxruntime differ by {far:.2g} from torch's, above {CLOSE:g}: not exported")
    write_whole(path, lambda temporary: Path(temporary).write_bytes(content))
    params = card["params"]
    write_json(path.with_name("model.onnx.json"), {
        "input": "grey (B, 1, S, S) float32, 0 black to 255 white", "output": "logits (B, C)", "size": params["image_size"],
        "aspect": params["aspect"], "contrast": params["contrast"], "scale": card["data"]["scale"],
        "normalisation": "in the graph", "views": params["tta"], "classes": card["classes"], "thresholds": card["thresholds"],
        "temperature": card["temperature"], "sha256": card["sha256"], "use": "research only"})
    return path, far
