"""One training in several processes, one a card: each computes its share of every batch, and all of them hold one network.

A batch of the parameters is that of all processes together, so that N processes train what one trains: the same order,
augmentation, steps and rates. In one process all of this is inert.
"""

import itertools
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import torch
import torch.distributed as dist
import yaml
from fastai.callback.core import Callback
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import StochasticDepth

from charmlib import files, session
from charmlib.gpu_support import Unsupported

RUN = "TORCHELASTIC_RUN_ID"  # environment variable that torchrun sets


def join(device: torch.device, folder: str | Path) -> None:
    """In a process that torchrun started: join the others, with the card of its number, and leave the folder to the first."""
    if int(os.environ.get("RANK", 0)) and RUN in os.environ:
        files.OTHERS.add(Path(folder).resolve())
    if RUN not in os.environ or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        if (local := int(os.environ["LOCAL_RANK"])) >= (found := torch.cuda.device_count()):
            raise Unsupported(f"more processes than GPUs: say --nproc_per_node={found}, or -p device=cpu")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def own(n: int) -> slice:
    """The rows of a batch of n that this process computes."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def same(value):
    """The first process's value of a plain object, so that what is decided by it is decided once."""
    if size() == 1:
        return value
    dist.broadcast_object_list(box := [value])
    return box[0]


def in_order(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """The batches of all processes, each of which has every N-th, in their order; on the CPU where there are several."""
    if size() == 1:
        return batches
    dist.all_gather_object(found := [None] * size(), [batch.as_subclass(Tensor).cpu() for batch in batches])
    return [batch for turn in itertools.zip_longest(*found) for batch in turn if batch is not None]


@contextmanager
def as_one():
    """Let the first process alone print, and all end together: ChildProcessError says that another has ended."""
    if RUN in os.environ:
        session.die_with_parent(os.getppid())
    try:
        with redirect_stdout(open(os.devnull, "w")) if RUN in os.environ and int(os.environ["RANK"]) else nullcontext():
            yield
    except RuntimeError as error:
        if size() == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        raise ChildProcessError(f"process {rank()} of {size()} cannot go on, because another one has ended or lost its card; "
                                "the same command goes on after the last finished epoch, in any number of them") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launch(params: Mapping) -> None:
    """Train a run in its ``processes``, and print their lines; ChildProcessError if they fail. They end with this process."""
    with tempfile.TemporaryDirectory() as place:
        (path := Path(place, "params.yaml")).write_text(yaml.safe_dump(dict(params)), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={params['processes']}",
                   "-m", "charmlib", "train", str(path), "--out", params["run_dir"]]
        with Popen(command, stdout=PIPE, stderr=STDOUT, text=True, errors="replace", env=session.with_this_package(os.environ),
                   preexec_fn=partial(session.die_with_parent, os.getpid())) as child:
            try:
                for line in child.stdout:
                    print(line, end="", flush=True)
            except BaseException:
                child.terminate()
                raise
    if child.returncode:
        raise ChildProcessError(f"the training in {params['processes']} processes has failed: the lines above say why, and "
                                "the same command goes on after the last finished epoch")


class _Joined(torch.autograd.Function):
    """This process's rows -> those of all (n, ...). DistributedDataParallel takes the mean of the processes' gradients; that of
    a loss of all rows is their sum."""

    @staticmethod
    def forward(ctx, rows: Tensor, n: int) -> Tensor:
        out = rows.new_zeros(n, *rows.shape[1:])
        out[own(n)] = rows
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[own(len(grad))] * size(), None


def synced(twin: nn.Module, norm: _BatchNorm, x: Tensor) -> Tensor:
    """``norm(x)`` by a ``SyncBatchNorm`` that shares its weights; callbacks and optimizers go on seeing the norm itself."""
    return twin.train(norm.training)(x)


class Cards(Callback):
    """Trains in all processes: the network sees :func:`own` rows of a batch, the loss and the memory bank see all of them.

    Every process computes the loss of the joined logits: of the whole batch, whatever its unknown labels and the shares. Its
    gradients are equal on all, and so is what follows: clipping, a scaler's verdict, means of weights, the momentum encoder. A
    bank is written with the joined features in the order of the batch. Dropout and stochastic depth draw for the whole batch.

    Batch norms use the statistics of all processes on CUDA (``SyncBatchNorm``). On CPUs, for which torch has none, each uses
    those of its own rows, and their running statistics are averaged. In validation each process has every N-th batch
    (:func:`in_order`). ``before_fit`` refuses a batch of fewer than two images a process with ValueError.
    """

    order = 200  # the rows are taken after callbacks that mix images

    def before_fit(self):
        from timm.layers import DropPath, convert_sync_batchnorm  # takes a second, which one process does without

        if (bs := self.dls.train.bs) < 2 * size():
            raise ValueError(f"a batch of {bs} is too small for {size()} processes, which need two images each: raise it")
        self.net, bank, sync = self.model, getattr(self.model, "bank", None), self.dls.device.type == "cuda"
        norms = [module for module in self.net.modules() if isinstance(module, _BatchNorm)]
        self.norms, self.replaced = [] if sync else norms, [(bank, "write", self._write)] if hasattr(bank, "write") else []
        self.replaced += [(module, "forward", self._drawn) for module in self.net.modules()
                          if isinstance(module, nn.Dropout | StochasticDepth | DropPath)]
        self.replaced += [(norm, "forward", partial(synced, convert_sync_batchnorm(norm))) for norm in norms if sync]
        for module, name, replacement in self.replaced:
            setattr(module, name, partial(replacement, module))
        warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1x1 convolutions, laid out channels last
        self.together = DistributedDataParallel(self.net, broadcast_buffers=False)

    def _write(self, bank: nn.Module, *batch: Tensor | None) -> None:
        type(bank).write(bank, *(t if t is None else _Joined.apply(t.detach().as_subclass(Tensor), self.n) for t in batch))

    def _drawn(self, module: nn.Module, x: Tensor) -> Tensor:
        if not module.training:
            return x
        shape = x.shape[1:] if isinstance(module, nn.Dropout) else [1] * (x.dim() - 1)
        return x * type(module).forward(module, x.new_ones(self.n, *shape))[own(self.n)]

    def before_batch(self):
        if self.training:
            self.n = len(self.xb[0])
            self.learn.xb = tuple(x[own(self.n)] for x in self.xb)
            self.learn.model = self.together  # for the forward pass alone

    def after_pred(self):
        if self.training:
            self.learn.model = self.net
            self.learn.pred = _Joined.apply(self.pred.as_subclass(Tensor), self.n)
            if others := getattr(self.net, "also", None):
                self.net.also = [_Joined.apply(logits, self.n) for logits in others]

    def after_backward(self):  # which still needs the own statistics
        if stats := [t for norm in self.norms if norm.training for t in (norm.running_mean, norm.running_var)]:
            dist.all_reduce(flat := torch.cat(stats))
            torch._foreach_copy_(stats, list((flat / size()).split([len(t) for t in stats])))

    def before_validate(self):
        self.dl.share = (0, 1) if hasattr(self.learn, "gather_preds") else (rank(), size())

    def after_fit(self):
        for module, name, _ in self.replaced:
            delattr(module, name)
        self.together = None
