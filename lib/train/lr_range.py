"""The LR range test: a mock training with a growing rate (Smith, arXiv 1506.01186; exponential form: fastai)."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from fastai.callback import schedule as fastai_schedule

from lib.cli import BadInput
from lib.config import SUGGESTIONS

SMOOTHING = 0.04  # width of the smoothing window (standard deviation), as a share of the test's length


DIVERGED = 4  # the test ends where the loss is so many times its least value


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw, and the learning rates that fastai's four rules suggest from it."""

    lrs: np.ndarray  # (n,) learning rate of each batch
    losses: np.ndarray  # (n,) raw loss at each batch: its own before its step, or that of valid after it
    smooth_losses: np.ndarray  # (n,) the same, smoothed without delay
    epochs: int  # passes over the training images, complete or not, that it took
    valley: float
    steep: float
    minimum: float
    slide: float

    @property
    def suggestions(self):
        """{rule: learning rate}"""
        return {name: getattr(self, name) for name in SUGGESTIONS}


def find(learn, start_lr=1e-5, end_lr=10, num_it=100, stop_div=True, linear=False, on_valid=False):
    """Runs the range test on a copy of the model and returns a RangeTest; `learn` and its loaders stay as they are.

    One batch for each of `num_it` rates in geometric progression (or `linear`: in equal steps, as Smith's) from
    `start_lr` to `end_lr`, in the order and with the augmentation of the epochs to come. The loss is that of the batch;
    or, `on_valid`, of a sample of valid after the step, in eval mode. Ends early where it diverges. Raises BadInput
    where it never falls.
    """
    if num_it < 10:
        raise ValueError(f"a range test needs at least 10 batches, not {num_it}")
    lrs = (np.linspace if linear else np.geomspace)(start_lr, end_lr, num_it)
    lrs, losses, epochs = run(learn, lrs, stop_div, on_valid)
    smooth = smoothed(losses, num_it * SMOOTHING)
    check_fall(losses, smooth)
    return RangeTest(lrs, losses, smooth, epochs, **suggest(lrs, smooth, num_it))


def run(learn, lrs, stop_div=True, on_valid=False):
    """(rates, raw losses, epochs begun) of one mock training step a rate; leaves no trace in `learn`."""
    dl, losses, epochs, best = learn.dls.train, [], 0, math.inf
    if len(dl) == 0:
        raise BadInput("the range test needs at least one training batch")
    epoch, dl.epoch = getattr(dl, "epoch", None), learn.epochs_trained
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(cuda):
        probe = learn.probe()
        probe.model.train()
        held = [learn.dls.valid.plain(learn.dls.valid.bs)] if on_valid else []
        try:
            while len(losses) < len(lrs):
                epochs += 1
                for i, batch in enumerate(dl):
                    probe.opt.set_hypers(lr=float(lrs[len(losses)]))
                    probe.one_batch(i, batch)
                    losses.append(probe.loss_and_accuracy(held)[0] if on_valid else probe.loss.item())
                    recent = np.mean(losses[-5:])
                    best = min(best, recent)
                    if len(losses) == len(lrs) or (stop_div and not recent <= DIVERGED * best):
                        return np.asarray(lrs[: len(losses)]), np.array(losses), epochs
        finally:
            dl.epoch = epoch


def smoothed(losses, width):
    """`losses` (n,) under a Gaussian window of standard deviation `width` points. Centred, so that no feature moves."""
    keep = np.isfinite(losses)
    at = np.arange(len(losses))
    weight = np.exp(-0.5 * ((at[:, None] - at) / max(width, 0.5)) ** 2) * keep
    return weight @ np.where(keep, losses, 0) / np.maximum(weight.sum(1), 1e-12)


def check_fall(losses, smooth):
    """Raises BadInput where the curve has no fall that stands out of its noise."""
    head = max(len(losses) // 10, 3)
    if len(losses) < 10 or not np.isfinite(losses[:head]).all():
        raise BadInput("--lr find: the loss diverged at once; pass --lr with a number, such as 0.01")
    noise = np.nanstd(np.where(np.isfinite(losses), losses - smooth, np.nan)[: int(smooth.argmin()) + 1])
    start = smooth[:head].mean()
    fall = start - smooth.min()
    if fall < max(0.02 * abs(start), noise):
        raise BadInput(
            f"--lr find: the loss never falls in the range test ({start:.3f} at first, {smooth.min():.3f} at best); "
            "pass --lr with a number, or more --lr-iters"
        )


def suggest(lrs, smooth, num_it):
    """{rule: learning rate} by fastai's own functions, on the curve without its first tenth and last five points."""
    from_, to = min(num_it // 10, len(lrs) - 10), max(len(lrs) - 5, 10)
    x, y = torch.tensor(lrs[from_:to]), torch.tensor(smooth[from_:to])
    rules = {name: getattr(fastai_schedule, name) for name in SUGGESTIONS}
    rules["slide"] = partial(rules["slide"], lr_diff=min(15, len(x) - 2))  # its interval must fit a short curve
    return {name: float(rule(x, y, num_it)[0]) for name, rule in rules.items()}
