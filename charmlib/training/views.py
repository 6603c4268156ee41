"""Test-time augmentation: the network's logits of each view, kept in ``views.npz``, and what a menu of views makes of them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from charmlib.data.loaders import grey_to_network
from charmlib.data.views import MENUS, VIEWS
from charmlib.evaluation.combine import merge
from charmlib.evaluation.runs import RunFolder, chosen_on_validation, write_arrays
from charmlib.files import reading
from charmlib.nn import VotingBank

HEAD = "_head"  # of a view's name: the head's logits, which a voting bank blends with votes


@torch.no_grad()
def read_views(net: nn.Module, grey: Tensor, names: Iterable[str], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Logits (B, C) float32 of views of grey images (B, 1, S, S); with a voting bank and several views the head's, too; of a
    network of several branches theirs of the first view, as VIEW_BRANCH."""
    names, out, branches = list(names), {}, getattr(net, "branches", ())
    several = len(names) > 1 and isinstance(getattr(net, "bank", None), VotingBank)
    for name in names:
        x = grey_to_network(VIEWS[name].of(grey), mean, std)
        logits, seen = net.read(x) if several or (branches and name == names[0]) else (net(x), {})
        out[name] = logits.float()
        out |= {name + HEAD: seen["head"].float()} if several else {}
        out |= {f"{name}_{branch}": seen[branch].float() for branch in branches if seen}
    return out


def head_share(net: nn.Module) -> np.ndarray:
    """The head's share (C,) in the logits: 1 but for the classes that a voting bank votes on."""
    bank = getattr(net, "bank", None)
    return (1 - bank.weight * bank.fitted).cpu().numpy() if isinstance(bank, VotingBank) else np.ones(1)


def merged(views: Mapping[str, np.ndarray], menu: str, how: str, share: np.ndarray, *, votes: str = "once") -> np.ndarray:
    """Logits (n, C) float32 of a menu, from those of :func:`read_views`.

    ``votes`` 'once' merges the head's logits and takes the votes of the image as it is; 'each' merges logits with votes. The
    keys of a voting bank know left from right.
    """
    names = MENUS[menu]
    if len(names) == 1:
        return views[names[0]]
    if names[0] + HEAD not in views or votes == "each":
        return merge([views[name] for name in names], how).astype(np.float32)
    heads = [views[name + HEAD] for name in names]
    return (views[names[0]] + share * (merge(heads, how) - heads[0])).astype(np.float32)


def stored_views(folder: RunFolder, menus: Iterable[str], **where) -> Mapping[str, np.ndarray]:
    """``views.npz`` of a finished run, with the views of these menus; the network runs for those that it lacks.

    ``where`` goes to :meth:`charmlib.training.run.Run.load`. Its arrays are ``{valid,test}_VIEW`` (n, C) in the order of
    ``predictions.npz``, with a voting bank also ``{valid,test}_VIEW_head``; ``share`` (C,); ``sha256`` of the weights.
    """
    from charmlib.training.run import Run

    path, names, held = folder / "views.npz", list(dict.fromkeys(name for menu in menus for name in MENUS[menu])), {}
    if path.is_file():
        with reading(path, "file of views", "delete it; the network writes it again"), \
                np.load(path, allow_pickle=False) as file:
            held = dict(file) if str(file["sha256"]) == folder.card["sha256"] else {}
    if missing := [name for name in names if f"test_{name}" not in held]:
        run = Run.load(folder, **where)
        for part in ("valid", "test"):
            found, ids = run.views(part, [*dict.fromkeys(["id", *missing])])[0], run.data.index.frame["id"]
            if not np.array_equal(ids.iloc[run.data.rows(part)].to_numpy(str), getattr(folder, part).ids):
                raise ValueError(f"{run.data.index.root} does not hold the {part} images that {folder} was scored on")
            held |= {f"{part}_{name}": values for name, values in found.items()}
        held |= {"share": head_share(run.net), "sha256": np.array(folder.card["sha256"])}
        path = run.folder / "views.npz"  # a read-only run goes on in a copy
        write_arrays(path, **held)
    return held


def with_views(folder: RunFolder, menu: str, how: str = "mean", *, votes: str = "once", **where) -> RunFolder:
    """The run as if it had been scored with a menu of views: test and validation predictions, thresholds and temperature."""
    held, out = stored_views(folder, [menu], **where), RunFolder(folder.path)
    for part in ("valid", "test"):
        views = {name.removeprefix(f"{part}_"): values for name, values in held.items() if name.startswith(f"{part}_")}
        logits = merged(views, menu, how, held["share"], votes=votes)
        setattr(out, part, replace(getattr(folder, part), logits=logits))
    out.choices = chosen_on_validation(out.valid.labels, out.valid.logits, out.valid.classes)
    return out


def tensors(net, device) -> tuple[Tensor, Tensor]:
    """A network's ``mean`` and ``std`` as tensors (1, 3, 1, 1)."""
    return tuple(torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (net.mean, net.std))
