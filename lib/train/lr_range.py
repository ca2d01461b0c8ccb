"""The LR range test: a mock training with a growing rate (Smith, arXiv 1506.01186; exponential form: fastai)."""

import math
import time
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from fastai.callback import schedule as fastai_schedule
from fastai.callback.core import Callback, CancelEpochException, CancelFitException
from fastcore.basics import noop

from lib.cli import BadInput
from lib.config import SUGGESTIONS
from lib.train.randomness import preserved_generators

SMOOTHING = 0.04  # width of the smoothing window (standard deviation), as a share of the test's length
DIVERGED = 4  # the test ends where the loss is so many times its least value
REMEDY = "pass --lr with a number, such as 0.01, or more --lr-iters"


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw."""

    lrs: np.ndarray  # (n,) learning rate of each update, of the last layer group
    losses: np.ndarray  # (n,) raw loss of each update: its own before its step, or that of valid after it
    epochs: int  # passes over the training images, complete or not, that it took
    num_it: int  # updates that were asked for
    step_seconds: float = math.nan  # median of the updates

    @cached_property
    def smooth_losses(self):
        """(n,) losses, smoothed without delay."""
        return smoothed(self.losses, self.num_it * SMOOTHING)

    @property
    def suggestions(self):
        """{rule: learning rate} by our rule and fastai's four."""
        return {name: suggest(RULES[name], self)[0] for name in SUGGESTIONS}

    @property
    def noise(self):
        """Standard deviation of the raw losses about the smoothed ones, up to the least of these."""
        return float(np.std((self.losses - self.smooth_losses)[: int(self.smooth_losses.argmin()) + 1]))

    @property
    def fall(self):
        """How far the smoothed loss falls from its first tenth to its least value."""
        return float(self.smooth_losses[: max(len(self.losses) // 10, 3)].mean() - self.smooth_losses.min())


class RangeTestCallback(Callback):
    """Drives the mock training: one update for each rate, and the raw loss of each. Ends early where it diverges."""

    order, train_only = -5, True  # before what depends on how many epochs were trained
    name = "lr_finder"  # as fastai's, which callbacks ask for

    def __init__(
        self,
        lrs,  # (n,) or (n, layer groups) rates
        stop_div,  # whether it ends where the loss diverges
        batches,  # of valid: their loss after each update makes the curve; []: the loss of the training batches does
        on_update,  # called after each update with the number of updates so far, and the loss
    ):
        self.rates, self.stop_div, self.batches, self.curve, self.best = lrs, stop_div, batches, [], math.inf
        self.on_update = on_update
        self.times = []  # at the end of each update

    def before_fit(self):
        self.started_at, self.group = self.learn.epochs_trained, []

    def before_train(self):
        self.learn.epochs_trained = self.started_at  # so that what is frozen in the first pass stays frozen
        self.learn.dls.train.epoch = self.started_at + self.epoch

    def before_batch(self):
        self.opt.set_hypers(lr=self.rates[len(self.curve)].tolist())

    def after_batch(self):
        learn = self.learn
        self.group.append(learn.loss.item())
        if learn.updates_after(learn.iter):
            self.curve.append(learn.evaluate(self.batches).values[0] if self.batches else np.mean(self.group))
            self.times.append(time.perf_counter())
            self.on_update(len(self.curve), self.curve[-1])
            self.group, recent = [], np.mean(self.curve[-5:])  # of five: one noisy batch does not end the test
            self.best = min(self.best, recent)
            if len(self.curve) == len(self.rates) or (self.stop_div and not recent <= DIVERGED * self.best):
                raise CancelFitException

    def before_validate(self):
        raise CancelEpochException


def run(learn, lrs, stop_div=True, on_valid=False, on_update=noop):
    """The RangeTest of one update for each rate, on a copy of the model. It leaves no trace in `learn`.

    The first two updates, which allocate memory, do not count for the seconds.
    """
    if len(learn.dls.train) == 0:
        raise BadInput("the range test needs at least one training batch")
    sample = [learn.dls.valid.plain(learn.dls.valid.bs)] if on_valid else []
    with learn.undisturbed(), preserved_generators(learn.device):
        test = RangeTestCallback(lrs, stop_div, sample, on_update)
        twin = learn.twin()
        updates = -(-len(learn.dls.train) // twin.accumulate)  # in an epoch
        twin.fit(-(-len(lrs) // updates), cbs=test)
        epochs = twin.epoch + 1
        vars(twin).clear()  # it and its callbacks hold each other, and would keep the memory of its model for a while
    n = int(np.isfinite(test.curve).cumprod().sum())  # up to the first loss that is not finite, as fastai has it
    seconds = float(np.median(np.diff(test.times)[min(1, n - 2) :])) if n > 1 else math.nan  # from the third update on
    last = lrs[:n, -1] if lrs.ndim == 2 else lrs[:n]
    return RangeTest(last, np.array(test.curve[:n]), epochs, len(lrs), seconds)


def rates(start_lr, end_lr, num_it, linear=False):
    """`num_it` rates in geometric progression or, `linear`, in equal steps as Smith's: (n,) or (n, layer groups)."""
    if num_it < 10:
        raise ValueError(f"a range test needs at least 10 updates, not {num_it}")
    return (np.linspace if linear else np.geomspace)(start_lr, end_lr, num_it)


def find(learn, start_lr=1e-5, end_lr=10, num_it=100, stop_div=True, linear=False, on_valid=False, on_update=noop):
    """Runs the range test on a copy of the model and returns a RangeTest; `learn` and its loaders stay as they are.

    One update for each of the `rates`, in the order and with the augmentation of the epochs to come. The loss is that
    of the batch; or, `on_valid`, of a sample of valid after the step, in eval mode. Ends early where it diverges.
    `on_update` is called after each update with how many there were and its loss. Raises BadInput for a curve that
    never falls.
    """
    test = run(learn, rates(start_lr, end_lr, num_it, linear), stop_div, on_valid, on_update)
    check_fall(test)
    return test


def smoothed(losses, width):
    """`losses` (n,) under a Gaussian window of standard deviation `width` points. Centred, so that no feature moves."""
    position = np.arange(len(losses))
    weight = np.exp(-0.5 * ((position[:, None] - position) / max(width, 0.5)) ** 2)
    return weight @ losses / weight.sum(1)


def check_fall(test):
    """Raises BadInput where the curve of a RangeTest has no fall that stands out of its noise."""
    losses, smooth, head = test.losses, test.smooth_losses, max(len(test.losses) // 10, 3)
    if len(losses) < 10:
        raise BadInput(f"--lr find: the loss diverged at once; {REMEDY}")
    start = smooth[:head].mean()
    if test.fall < max(0.02 * abs(start), test.noise):
        seen = f"{start:.3f} at first, {smooth.min():.3f} at best"
        raise BadInput(f"--lr find: the loss never falls in the range test ({seen}); {REMEDY}")


def sixth(lrs, losses, num_it):
    """A sixth of the rate of the lowest loss, in the form of fastai's rules; chosen by tests.benchmarks.rates."""
    place = int(losses.argmin())
    lr = float(lrs[place]) / 6
    return lr, (lr, losses[int((lrs - lr).abs().argmin())])


RULES = {"sixth": sixth, **{name: getattr(fastai_schedule, name) for name in SUGGESTIONS if name != "sixth"}}


def suggest(rule, test):
    """(learning rate, point in the figure) that a rule of fastai's kind gives for a RangeTest."""
    n = len(test.lrs)
    kept = slice(min(test.num_it // 10, n - 10), max(n - 5, 10))  # without both ends, as fastai has it
    lrs, losses = torch.tensor(test.lrs[kept]), torch.tensor(test.smooth_losses[kept])
    if rule is fastai_schedule.slide:
        rule = partial(rule, lr_diff=min(15, len(lrs) - 2))  # its interval must fit a short curve
    lr, point = rule(lrs, losses, test.num_it)
    return float(lr), point
