"""What a run will do and how long that takes on this machine, said before it starts."""

import copy
import timeit
from collections.abc import Mapping

import torch

from charmlib import session
from charmlib.data.paths import resolve_data_root
from charmlib.param_sources import load_params
from charmlib.params import DEFAULTS, PARAMS, resolve
from charmlib.training.device import pick_device
from charmlib.training.machine import device_name
from charmlib.training.recipes import batches, validations

QUICK = "params/demo.yaml"
_PARTS = {"use_momentum": "momentum encoder", "use_attention": "attention", "use_bank": "memory"}
_STEP, _HEAD_STEP = 3, 1.5  # forward passes that take as long as a training step of the network, and of the head alone


def quick_without_data(params: Mapping) -> dict:
    """``params``, with the values of :data:`QUICK` in place of defaults where there is neither data nor a GPU, which it says.
    A cell of a grid keeps its own."""
    p = resolve(params)
    if session.in_grid() or p["csv"] or resolve_data_root(p["data_root"]) or pick_device(p["device"]).type != "cpu":
        return dict(params)
    taken = {name: value for name, value in load_params(QUICK).items() if name != "data_root" and p[name] == DEFAULTS[name]}
    print(f"no data and no GPU: a quick run on drawn phantoms with the values of {QUICK}: "
          f"{', '.join(f'{name}={value}' for name, value in taken.items())}. A data_root of your own gives a full run")
    return {**params, **taken}


@torch.no_grad()
def plan(run) -> str:
    """A run's network and phases, and outside a grid an estimate of their time from a forward pass of a copy of the network."""
    p, images, phases = run.params, run.data.train_images(), run.phases()
    parts = [f"memory that gives {p['answer']}" if name == "use_bank" else words for name, words in _PARTS.items() if p[name]]
    what = f" ({', '.join(parts or ['plain network'])})" if p["system"] == "charm" else ""
    lines = [f"system {p['system']}{what}: {p['arch']}, {sum(w.numel() for w in run.net.parameters()) / 1e6:.1f} million "
             f"weights, on {device_name(run.device)}"]
    lines += [f"phase {phase.name}: at most {phase.epochs} epochs of {batches(phase, images)} batches of {phase.batch}, loss "
              f"{phase.loss}" for phase in phases]
    if session.in_grid():
        return "\n".join(lines)
    net = copy.deepcopy(run.net).eval()
    x = torch.zeros(phases[0].batch if run.device.type == "cuda" else 8, 3, *[p["image_size"]] * 2, device=run.device)
    with torch.autocast("cuda", torch.float16, enabled=run.precision == "fp16"):  # item() waits for the device
        forward = min(timeit.repeat(lambda: net(x).sum().item(), number=1, repeat=3)) / len(x) / 60
    after = len(run.data.rows("valid")) + (min(p["bank_size"], images["all"]) if hasattr(run.bank.bank, "renew") else 0)
    looks = validations(phases, p["monitor"] if run.data.split.has_valid else "last")
    whole = forward * sum(looks[phase.name] * after + phase.epochs * images[phase.images]
                          * (_HEAD_STEP if phase.head_only else _STEP) for phase in phases)
    finder = "" if p["stage1_lr"] or p["system"] in PARAMS["stage1_lr"].not_of else \
        f"; before them about {forward * _STEP * 100 * phases[0].batch:.1f} minutes for the rate finder"
    about = f"{whole / 60:.1f} hours" if whole > 90 else f"{whole:.1f} minutes"
    return "\n".join([*lines, f"about {about} on this machine, if no phase ends early{finder}"])
