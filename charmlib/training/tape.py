"""A training kept epoch by epoch, for runs that differ only in what acts when scoring."""

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import psutil
import torch
from fastai.callback.core import Callback, CancelTrainException
from torch import Tensor, nn

from charmlib import session
from charmlib.models.charm import Encoded
from charmlib.nn import VotingBank
from charmlib.nn.head import CSRAHead
from charmlib.training.average import RunningMean
from charmlib.training.checkpoint import fill, load_resume, save_resume

_SPARE = 4e9  # bytes of memory that kept features leave free


class Tape(Callback):
    """Plays back the epochs of a training that it holds, and records the others.

    Runs of one training have the same parameters but for those that the table marks ``scores``: how a bank's slots vote, the
    mean of the weights, views, and by which figure an epoch is chosen. The first run trains. For each further run an epoch of
    training is read from its file, and the rest of the epoch is the same code on the same numbers: its bank is renewed, the
    validation part scored, the best epoch chosen. It therefore ends in the bits of the run alone (on a CPU). A run that keeps
    another epoch of stage 1 trains its own stage 2, which is then on the tape, too.

    The files lie in ``folder``. ``tape_KEY.pt`` is the network after an epoch's training, with each mean of ``means`` (pairs of
    ``average`` and ``average_warmup``), loss and rate; its key names the ``training`` and all epochs up to this one.
    ``tape_KEY_opt.pt`` is the optimizer after a phase's newest epoch. A killed training goes on after the last epoch that the
    tape holds.

    What the network makes of an image is kept as well, while 4 GB of memory stay free (:meth:`remember`), and so is what the
    nearest slots say of it. ``trained`` counts the epochs that were not on the tape.

    Raises
    ------
    charmlib.files.Damaged
        A file of the tape is not as it was written.
    """

    order = 94  # after the hooks of the network and the loss, and before AverageWeights puts the mean into the network

    def __init__(self, folder: str | Path, training: str, means: Sequence[tuple[float, bool]] = ()):
        self.folder, self.training, self.at, self.trained = Path(folder), training, training, 0
        self.means = {_name(decay, warmup): RunningMean(decay, warmup) for decay, warmup in means if decay}
        self._seen: dict[tuple, Encoded] = {}
        self._votes: dict[tuple, Tensor] = {}

    def before_fit(self):
        self.own, self.fresh, self.entry = getattr(self.learn, "average_weights", None), True, None
        self.followed = dict(self.means)
        if self.own is not None:
            self.mine = _name(self.own.mean.decay, self.own.mean.warmup)
            self.followed[self.mine] = self.own.mean

    def before_train(self):
        self.before, self.at = self.at, _hash(self.at, self.learn.seed_epoch.phase, self.epoch)
        entry = load_resume(path := self._path(self.at))
        if entry is None or not self.followed.keys() <= entry["means"].keys():
            return self._go_on()
        fill(self.model, entry["model"] | self._own(), str(path))
        self.fresh, self.entry = False, entry
        if self.own is not None:
            self.own.resumed, self.own.started = entry["means"][self.mine], False
            self.own.before_train()
        self.learn.epoch_record.losses, self.learn.recorder.lrs = [torch.tensor(entry["loss"])], [entry["lr"]]
        raise CancelTrainException

    def _go_on(self) -> None:
        """Train from here, with optimizer and means as the epoch before left them."""
        if self.entry and (state := load_resume(self._path(self.before, "_opt"))):
            rates = self.learn.opt.state_dict()["param_groups"]  # the schedule has set those of this epoch
            self.learn.opt.load_state_dict(state["opt"] | {"param_groups": rates})
            if state["scaler"]:
                self.learn.scaler.load_state_dict(state["scaler"])
        elif self.entry:
            raise FileNotFoundError(f"{self._path(self.before, '_opt')} is not there: remove {self._path('*')} to train again")
        if self.entry or self.fresh:
            for name, mean in self.followed.items():
                if self.own is None or mean is not self.own.mean:
                    mean.begin(self.model, self.entry and self.entry["means"][name])
            if self.entry and self.own is not None:
                self.own.resumed, self.own.started = self.entry["means"][self.mine], False
        self.fresh, self.entry = False, None

    def after_cancel_train(self):
        self.learn.recorder.cancel_train = False  # fastai then leaves out the column of the training loss

    def after_step(self):
        if not self.learn.network_hooks.cancelled:
            for mean in self.followed.values():
                if self.own is None or mean is not self.own.mean:  # which AverageWeights keeps
                    mean.step(self.model, getattr(self.opt, "skipped", None))

    def after_train(self):
        if self.entry:
            return
        self.trained += 1
        scaler, losses = getattr(self.learn, "scaler", None), self.learn.epoch_record.losses
        save_resume(self._path(self.at, "_opt"), {"opt": self.opt.state_dict(), "scaler": scaler and scaler.state_dict()})
        save_resume(self._path(self.at), {
            "model": {name: value for name, value in self.model.state_dict().items() if name not in self._own()},
            "means": {name: mean.state() for name, mean in self.followed.items()},
            "loss": torch.stack(losses).mean().item() if losses else float("nan"), "lr": float(self.recorder.lrs[-1])})
        if self.epoch:
            self._path(self.before, "_opt").unlink(missing_ok=True)

    def _own(self) -> dict[str, Tensor]:
        """A bank that votes, which a run does not share with others."""
        bank = getattr(self.model, "bank", None)
        return {f"bank.{name}": buffer.clone() for name, buffer in bank.named_buffers()} if isinstance(bank, VotingBank) else {}

    def _path(self, key: str, more: str = "") -> Path:
        return self.folder / f"tape_{key}{more}.pt"

    def remember(self, net: nn.Module) -> None:
        """Let a network in eval mode look up what ``encode`` gave for the same images with the same weights."""
        encode, parts = net.encode, [net.trunk, net.final, *filter(None, [net.momentum, net.attention])]
        wanted, weights = isinstance(net.head, CSRAHead), {}
        tensors = [t for part in parts for t in itertools.chain(part.parameters(), part.buffers())]

        if isinstance(net.bank, VotingBank):
            self._remember_votes(net.bank)

        def remembered(x: Tensor) -> Encoded:
            if net.training or torch.is_grad_enabled():
                return encode(x)
            half = torch.is_autocast_enabled(x.device.type)
            key = net.keys, _current(tensors, weights), _digest([x[:, :1]]), tuple(x.shape), half
            if key not in self._seen:
                encoded = encode(x)
                if psutil.virtual_memory().available < _SPARE:
                    return encoded
                self._seen[key] = Encoded(*(None if t is None else t.cpu() for t in encoded._replace(
                    map=encoded.map if wanted else None)))
                return encoded
            return Encoded(*(None if t is None else t.to(x.device) for t in self._seen[key]))

        net.encode = remembered

    def _remember_votes(self, bank: VotingBank) -> None:
        """Let a bank look up its differences for the same keys and slots: cells that differ in temperature or weight of the
        votes have the same nearest slots."""
        differences, slots = bank.differences, {}
        stores = [bank.slots, bank.slot_ids, bank.slot_labels, bank.filled, bank.mean, bank.deviation, bank.usual]

        def remembered(keys: Tensor, ids: Tensor | None = None) -> Tensor:
            key = bank.k, _current(stores, slots), _digest([keys]), None if ids is None else _digest([ids])
            if key not in self._votes:
                self._votes[key] = differences(keys, ids).cpu()
            return self._votes[key].to(keys.device)

        bank.differences = remembered


@cache
def tape_of_grid() -> Tape | None:
    """The tape on which the cells of a grid share this process's training; None where none is shared."""
    shared = json.loads(os.environ.get(session.TAPE, "null"))
    return Tape(**shared) if shared else None


def _name(decay: float, warmup: bool) -> str:
    return f"{decay!r} {warmup}"


def _hash(*parts) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


def _current(tensors: Sequence[Tensor], kept: dict) -> bytes:
    """The digest of tensors, found anew once one was written to."""
    versions = tuple((id(t), t._version) for t in tensors)  # torch counts the writes to a tensor
    if kept.get("versions") != versions:
        kept.update(versions=versions, digest=_digest(tensors))
    return kept["digest"]


def _digest(tensors: Sequence[Tensor]) -> bytes:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.digest()
