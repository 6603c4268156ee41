"""``python -m charmlib.training.size``: bytes of the checkpoint and the resume file of parameters given as JSON."""

import json
import sys
from collections.abc import Mapping

import torch

from charmlib.models.registry import create
from charmlib.nih import NIH14, NIH15


def file_sizes(params: Mapping) -> tuple[int, int]:
    """Bytes of ``model.safetensors`` and of ``resume.pt``: the network, its best epoch, and AdamW's two moments."""
    with torch.device("meta"):
        net = create({**params, "weights": "none", "norm": "half"}, NIH15 if params["classes"] == "nih15" else NIH14)
    model = sum(v.numel() * v.element_size() for v in net.state_dict().values())
    moments = sum(2 * p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    return model, 2 * model + moments


if __name__ == "__main__":
    found = [file_sizes(p) for p in json.load(sys.stdin)]
    print(json.dumps([max(m for m, _ in found), max(r for _, r in found)]))
