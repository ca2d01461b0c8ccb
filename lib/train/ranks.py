"""Several processes: torchrun starts them, torch's DistributedDataParallel joins their gradients."""

import os
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from torch.nn.parallel import DistributedDataParallel

from lib.cli import BadInput, OneLine, one_line
from lib.machine import launched

TIMEOUT = timedelta(hours=2)  # how long others wait for the first to decode images or test learning rates


class Lost(OneLine):
    """Another process of the run ended (exit status 1)."""


@contextmanager
def joined(device):
    """Joins the processes that torchrun started, for one run: gloo between CPUs, nccl between GPUs.

    Raises Lost where another rank is gone.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device: several processes run on cpu or cuda, not {device.type}")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    except BadInput as e:
        raise BadInput(e.text if leads() else f"rank {rank()}: {e}") from None
    except RuntimeError as e:
        if not any(word in str(e) for word in ("gloo", "NCCL", "Connection")):
            raise
        told = f"rank {rank()}: another rank, or the way to it, is gone; see its message"
        raise Lost(f"{told} ({one_line(e)[:200]})") from None
    dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leads():
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def on_first(function, elsewhere=None):
    """`function`, which only the first rank runs. On the others a call does nothing and gives `elsewhere`."""
    return function if leads() else lambda *args, **kwargs: elsewhere


def any_of(*flags):
    """Whether each flag is set on any of the ranks."""
    if world() == 1:
        return flags
    on_any = torch.tensor([bool(flag) for flag in flags], dtype=torch.int32)
    dist.all_reduce(on_any, dist.ReduceOp.MAX)
    return on_any.tolist()


def same(value):
    """The first rank's `value` (tensors, plain values, dicts and lists of them) on every rank."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"), weights_only=True)
    return values[0]


def check_same(what, value):
    """Raises BadInput on a rank whose `value` is not that of the first."""
    if same(value) != value:
        raise BadInput(f"{what} differs from that of the first rank")


def gathered(part, sizes):
    """The rows of all ranks, one rank after another; `sizes` says how many of each count. Every rank gets the same."""
    padded = part.new_zeros(max(*sizes, len(part)), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([rows[:n] for rows, n in zip(parts, sizes)])


@contextmanager
def first_alone():
    """The first rank runs the block, then the first of each other machine, then the rest: they find what was written.

    Only the first rank prints there.
    """
    turn = 0 if leads() else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for _ in range(turn):
        dist.barrier()
    with nullcontext() if leads() else redirect_stdout(None):
        yield
    for _ in range(2 - turn if world() > 1 else 0):
        dist.barrier()


class DataParallel(Callback):
    """Trains one model on several ranks, as one process would: each has its slice of every batch.

    Slices may be uneven: DistributedDataParallel takes the mean of the ranks' gradients, so a rank's loss counts by its
    share of the batch's images. In validation predictions and targets of all ranks are brought together, so loss and
    metrics see whole batches. BatchNorm sees its rank's slice alone; the first rank's running statistics are kept.
    """

    order = 90  # after what freezes parameters: DistributedDataParallel waits for the gradient of each that learns

    def before_fit(self):
        self.learning = None
        for dl in self.learn.dls:
            dl.rank, dl.world = rank(), world()

    def before_train(self):
        learn = self.learn
        learning = [id(p) for p in learn.model.parameters() if p.requires_grad]
        if learning != self.learning:
            device, self.learning, learn.parallel = next(learn.model.parameters()).device, learning, None
            learn.parallel = DistributedDataParallel(learn.model, [device] if device.type == "cuda" else None)

    def after_pred(self):
        learn = self.learn
        if not learn.training and getattr(learn.dl, "world", 1) > 1:
            sizes = learn.dl.shares(learn.iter)
            learn.pred, learn.yb = gathered(learn.pred, sizes), tuple(gathered(y, sizes) for y in learn.yb)

    def after_loss(self):
        learn = self.learn
        if learn.training:
            sizes = learn.dl.shares(learn.iter)
            learn.loss_grad = learn.loss_grad * (sizes[rank()] / sum(sizes) * world())

    def after_train(self):
        ema = getattr(self.learn, "ema", None)
        for tensor in (*self.learn.model.buffers(), *(ema.average if ema else ())):
            dist.broadcast(tensor, 0)

    def after_fit(self):
        self.learn.parallel = None
        for dl in self.learn.dls:
            dl.rank, dl.world = 0, 1
