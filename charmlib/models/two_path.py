"""Two paths as one network: the first sees the image, the second a part of it that the first chooses (AG-CNN, dual path)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charmlib.nn import LinearHead, Neck, find_scales, make_refine, recompute, split_backbone
from charmlib.nn.pyramid import NECKS, WIDTH
from charmlib.nn.region import CENTRE, CONNECT, HEATS, WHOLE, above, box_of, boxes, crop, heat_map, largest_region
from charmlib.nn.scales import STRIDES, maps_of

LOCALS, POOLS, FUSIONS = ("attention", "centre", "same", "other"), ("avg", "max"), ("linear", "mlp", "mean")
BRANCHES = {"g": "global", "l": "local", "f": "fusion"}
LAST = 32  # stride of the last map


class Branch(nn.Module):
    """A backbone, a neck with attention where asked for, a pool and a linear layer: images (B, 3, H, W) -> logits (B, C)."""

    def __init__(self, arch: str, weights: str | Path, norm: str, classes: int, neck: str, refine: str, refine_start: str,
                 pool: str):
        super().__init__()
        backbone = split_backbone(arch, weights, refine=refine if neck == "none" else "none", refine_start=refine_start)
        self.trunk, self.final, self.pool = backbone.trunk, backbone.final, pool
        self.mean, self.std = backbone.scale(norm, weights)
        self.ends, channels = find_scales(self.trunk)
        self.strides, widths = (LAST,), [backbone.features]  # of the maps that are pooled
        self.neck, self.refine = None, nn.ModuleList()
        if neck != "none":
            if len(channels) != len(STRIDES):
                raise ValueError(f"neck {neck}: {arch} does not offer maps at strides 4, 8 and 16 in sequence; say neck: none")
            self.strides, widths = (*STRIDES, LAST), [WIDTH] * (len(STRIDES) + 1)
            self.neck = Neck(neck, [*channels, backbone.features])
            self.refine.extend(make_refine(refine, WIDTH, refine_start) for _ in widths)
        self.features = sum(widths)
        self.head = LinearHead(self.features, classes)

    def forward(self, x: Tensor, run=nn.Module.__call__) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Logits (B, C) float32, the pooled feature (B, D), and the maps by stride, as the head reads them."""
        shared, maps = maps_of(self.trunk, self.ends, x, run)
        maps = [*maps, run(self.final, shared)]
        if self.neck is not None:
            maps = [refine(m) for refine, m in zip(self.refine, self.neck(maps), strict=True)]
        z = torch.cat([m.mean((2, 3)) if self.pool == "avg" else m.amax((2, 3)) for m in maps[-len(self.strides):]], 1)
        strides = (*STRIDES, LAST) if len(maps) == len(STRIDES) + 1 else range(LAST - len(maps) + 1, LAST + 1)
        return self.head(z).float(), z, dict(zip(strides, maps))

    def weight_at(self, stride: int) -> Tensor:
        """The head's weights (C, D) of the map at a stride."""
        return self.head[-1].weight.chunk(len(self.strides), 1)[self.strides.index(stride)]


class TwoPathNet(nn.Module):
    """Two networks of one kind, and a layer that reads both.

    ::

        g, z_g = global_path(x)                       logits (B, C) and pooled feature (B, D)
        box    = of the largest region of the heat map of global_path's maps above tau
        l, z_l = local_path(crop(x, box))             weights of its own
        f      = fusion([z_g, z_l])                   or the mean of g and l

    AG-CNN (Guan et al., arXiv 1801.09927) is ``pool='max', heat='max'``, ``fusion='linear'``, in ``order: g,l,f``. In eval mode
    ``forward`` gives f, in training mode the logits of the last trained branch; those of the others are in ``also``, so that a
    loss may be taken of each. Boxes carry no gradient.

    Parameters
    ----------
    arch, weights, norm, refine, refine_start, grad_checkpointing
        As in :class:`charmlib.models.CharmNet`. With a neck, attention stands behind its levels, not behind blocks.
    local : {'attention', 'centre', 'same', 'other'}
        What the second path sees. Controls: the middle half of each side, the whole image, and the box of another image, the
        one before it in the batch (its own in a batch of one).
    heat, heat_stride, tau, connect
        See :mod:`charmlib.nn.region`; the stride of the map, 8, 16 or 32, the last. 'cam' sums over all classes, 'No Finding'
        too. Without a region above ``tau`` the box is the whole image.
    input_size : int
        Pixels a side that each path gets; 0 is what the image has. The second path's box is cut from the full image, so that
        larger images give it detail of its own; the paper enlarges pixels that the first path has seen.
    crop : int
        Above 0, a square of so many pixels is the image: at random in training, without the paper's resize; else the centre.
    neck, pool
        See :class:`charmlib.nn.Neck`; 'avg' or 'max' of each map before the linear layer.
    fusion : {'linear', 'mlp', 'mean'}
        One layer that starts as the mean of both paths' logits, where published code starts at random; norms, 1024 and 512
        hidden units with dropout 0.5 and 0.3, as in public dual-path code; or that mean.

    Raises ValueError for a value outside its choices, a map or neck that the arch does not offer, 'cam' of a map that no layer
    reads.
    """

    branches = ("global", "local")

    def __init__(self, arch: str = "resnet50", classes: int = 14, *, weights: str | Path = "imagenet", norm: str = "auto",
                 local: str = "attention", heat: str = "mean", heat_stride: int = 32, tau: float = 0.7, connect: int = 8,
                 input_size: int = 0, crop: int = 0, neck: str = "none", refine: str = "none", refine_start: str = "identity",
                 pool: str = "avg", fusion: str = "linear", grad_checkpointing: bool = False):
        super().__init__()
        for name, value, allowed in (("local", local, LOCALS), ("heat", heat, HEATS), ("neck", neck, NECKS),
                                     ("pool", pool, POOLS), ("fusion", fusion, FUSIONS), ("connect", connect, CONNECT)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        self.arch, self.classes, self.grad_checkpointing = arch, classes, grad_checkpointing
        self.global_path, self.local_path = (
            Branch(arch, weights, norm, classes, neck, refine, refine_start, pool) for _ in range(2))
        self.mean, self.std = self.global_path.mean, self.global_path.std
        if local in ("attention", "other") and (heat_stride not in self.global_path.strides if heat == "cam" else
                                                heat_stride != LAST and len(self.global_path.ends) != len(STRIDES)):
            raise ValueError(f"heat {heat} at heat_stride {heat_stride}: {arch} has no such map that is read; say "
                             "heat_stride: 32" + (", or neck: laterals" if heat == "cam" else ""))
        self.local, self.heat, self.heat_stride, self.tau, self.connect = local, heat, heat_stride, tau, connect
        self.input_size, self.crop = input_size, crop
        make = {"linear": nn.Linear, "mlp": _mlp}.get(fusion, lambda *_: None)
        self.fusion = make(2 * self.global_path.features, classes)
        self.register_buffer("joined", torch.tensor(False))  # whether a linear fusion has started
        self.losses, self.shows = "glf", "f"
        self.also: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)[0]

    def read(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C), and by name: ``final`` (B, D, H, W) of the first path; logits ``global``, ``local``, ``fusion``;
        ``z``; ``heat`` (B, h, w); ``box`` (B, 4); ``view`` and ``crop``, what the paths saw. In phase g the first's alone."""
        again = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        run = recompute if again else nn.Module.__call__
        x = self._window(x)
        size = self.input_size or x.shape[-1]
        view = x if size == x.shape[-1] else F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        g, z, maps = self.global_path(view, run)
        seen = {"final": maps[LAST], "global": g, "view": view}
        if self.shows != "g" or (self.training and self.losses != "g"):
            seen |= self._look(x, view, g, maps, size)
            seen["local"], z_local, _ = self.local_path(seen["crop"], run)
            seen["z"] = torch.cat([z, z_local], 1)
            seen["fusion"] = (g + seen["local"]) / 2 if self.fusion is None else self.fusion(seen["z"]).float()
        *others, last = (seen[BRANCHES[letter]] for letter in (self.losses if self.training else self.shows))
        self.also = others if self.training else []
        return last, seen

    def _window(self, x: Tensor) -> Tensor:
        free = x.shape[-1] - self.crop
        if not self.crop or free <= 0:
            return x
        if not self.training:
            return x[..., free // 2:free // 2 + self.crop, free // 2:free // 2 + self.crop]
        corners = torch.randint(free + 1, (len(x), 2))  # on the CPU, so that a run is the same on every device
        box = torch.cat([corners, corners + self.crop], 1) / x.shape[-1]
        return crop(x, (box.pin_memory() if x.is_cuda else box).to(x.device, non_blocking=True), self.crop)

    def _look(self, x: Tensor, view: Tensor, logits: Tensor, maps: dict[int, Tensor], size: int) -> dict[str, Tensor]:
        if self.local in ("same", "centre"):
            box = boxes(WHOLE if self.local == "same" else CENTRE, x)
            return {"box": box, "crop": view if self.local == "same" else crop(x, box, size)}
        weight = self.global_path.weight_at(self.heat_stride) if self.heat == "cam" else None
        heat = heat_map(maps[self.heat_stride], self.heat, weight, logits)
        box = box_of(largest_region(above(heat, self.tau), self.connect))
        box = box.roll(1, 0) if self.local == "other" else box
        return {"heat": heat, "box": box, "crop": crop(x, box, size)}

    def enter(self, losses: str, shows: str) -> None:
        """Before a phase: the branches with a loss, and the one that eval mode shows, each by letter: g, l and f."""
        self.losses, self.shows = losses, shows
        if "f" in losses and isinstance(self.fusion, nn.Linear) and not self.joined:
            self._join()

    @torch.no_grad()
    def _join(self) -> None:
        heads = [path.head[-1] for path in (self.global_path, self.local_path)]
        self.fusion.weight.copy_(torch.cat([head.weight for head in heads], 1) / 2)
        self.fusion.bias.copy_(sum(head.bias for head in heads) / 2)
        self.joined.fill_(True)

    def parts(self) -> dict[str, nn.Module]:
        """The two paths and the fusion, which has no weights for 'mean'."""
        fusion = nn.Identity() if self.fusion is None else self.fusion
        return {"global": self.global_path, "local": self.local_path, "fusion": fusion}

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The backbones of both paths, then all that is new: necks, attention behind them, heads and fusion."""
        old = [p for path in (self.global_path, self.local_path) for p in (*path.trunk.parameters(), *path.final.parameters())]
        known = set(map(id, old))
        return [old, [p for p in self.parameters() if id(p) not in known]]


def _mlp(features: int, classes: int) -> nn.Sequential:
    net = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, 1024), nn.ReLU(inplace=True), nn.Dropout(0.5),
                        nn.BatchNorm1d(1024), nn.Linear(1024, 512), nn.ReLU(inplace=True), nn.Dropout(0.3),
                        nn.BatchNorm1d(512), nn.Linear(512, classes))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, gain=1.4)  # as in public dual-path code
            nn.init.zeros_(layer.bias)
    return net
