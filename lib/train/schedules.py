"""Schedules: what drives the learning rate of a fit. Each is one function and one entry in `SCHEDULES`."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from fastai.callback.core import Callback

from lib.train.lecture import GrowBatchOnPlateau, batch_sizes
from lib.train.optimizers import maker
from lib.train.plateau import ReduceLROnPlateau, plateau_options, warm_up


class Scheduled(Callback):
    """Sets learning rate and momentum before each batch. What it sets is a function of the epochs done: no state."""

    order, owns_lr, train_only, run_valid = 40, True, True, False

    def __init__(
        self,
        hypers,  # function: epochs done (with fraction) -> {"lr": …} or {"lr": …, "mom": …}
        warmup_epochs=0.0,  # epochs in which the rate is held back
    ):
        self.hypers_after, self.warmup_epochs = hypers, warmup_epochs

    def before_batch(self):
        epochs_done = self.epoch + self.iter / self.n_iter
        hypers = self.hypers_after(epochs_done)
        hypers["lr"] *= warm_up(epochs_done, self.warmup_epochs)
        self.opt.set_hypers(**hypers)


def plateau(config, lr, kind=ReduceLROnPlateau, **options):
    """The rate stays, and falls by --factor on each plateau of --monitor."""
    options |= dict(monitor=config.monitor, factor=config.factor, min_lr=config.min_lr)
    return kind(**options, warmup_epochs=config.warmup_epochs, **plateau_options(config))


def grow_batch(config, lr):
    """On a plateau the batch grows as plateau's rate would shrink, up to --max-batch-size; then the rate shrinks.

    Smith et al., arXiv 1711.00489: the noise of a step goes with lr / batch size.
    """
    return plateau(config, lr, GrowBatchOnPlateau, max_batch_size=config.max_batch_size)


def scheduled(function):
    """A schedule from `function(config, lr, epochs_done)`, which gives {hyperparameter: value}."""
    return lambda config, lr: Scheduled(partial(function, config, lr), config.warmup_epochs)


def two_halves(config, epochs_done, start, top, end):
    """Half a cosine from `start` to `top` in the first pct_start of the epochs, one to `end` in the rest."""
    done, share = epochs_done / config.epochs, config.pct_start
    a, b, part = (start, top, done / share) if done < share else (top, end, (done - share) / (1 - share))
    return a + (b - a) * (1 - math.cos(math.pi * part)) / 2


@scheduled
def constant(config, lr, epochs_done):
    """The rate stays."""
    return {"lr": lr}


@scheduled
def one_cycle(config, lr, epochs_done):
    """Half a cosine up from lr / div, one down to lr / div_final, momentum against it (Smith & Topin, 1708.07120)."""
    low, high = config.min_momentum, config.max_momentum
    rate = two_halves(config, epochs_done, lr / config.div, lr, lr / config.div_final)
    return {"lr": rate, "mom": two_halves(config, epochs_done, high, low, high)}


@scheduled
def flat_cos(config, lr, epochs_done):
    """The rate stays, then falls to lr / div_final along half a cosine (fastai's fit_flat_cos)."""
    return {"lr": two_halves(config, epochs_done, lr, lr, lr / config.div_final)}


def triangular(config, lr, epochs_done, shrink=1.0):
    """Straight from lr / cycle_div to lr and back, cycle by cycle (Smith, arXiv 1506.01186).

    The height of each cycle is `shrink` times that of the one before.
    """
    low, length = lr / config.cycle_div, config.cycle_length * config.epochs
    cycle = math.floor(epochs_done / length)
    height = 1 - abs(2 * (epochs_done / length - cycle) - 1)
    return {"lr": low + (lr - low) * height * shrink**cycle}


@scheduled
def warm_restarts(config, lr, epochs_done):
    """Half a cosine from lr to 0, again and again, each time cycle_mult as long (Loshchilov & Hutter, 1608.03983)."""
    length = config.cycle_length * config.epochs
    while epochs_done >= length * (1 - 1e-9):  # the lengths are rounded: a cycle may end a little late
        epochs_done, length = epochs_done - length, length * config.cycle_mult
    return {"lr": lr * (1 + math.cos(math.pi * epochs_done / length)) / 2}


# name -> function(config, lr) that gives the callback which owns the learning rate of the fit; lr is its largest
SCHEDULES = {
    "plateau": plateau,
    "one_cycle": one_cycle,
    "constant": constant,
    "triangular": scheduled(triangular),
    "triangular2": scheduled(partial(triangular, shrink=0.5)),
    "warm_restarts": warm_restarts,
    "flat_cos": flat_cos,
    "grow_batch": grow_batch,
}


def fit(learn, config, lr, cbs=()):
    """Trains `config.epochs` epochs from learning rate `lr` under the schedule `config.schedule`."""
    learn.fit(config.epochs, lr, cbs=[SCHEDULES[config.schedule](config, lr), *cbs])


def trace(config, steps_per_epoch, values=None):
    """Learning rate and momentum at each step of a fit under `config`: (epochs * steps_per_epoch, 2) array.

    `values` are the monitored values of the first epochs. After them the schedule sees no value. `config.lr` must be a
    number. The schedule's own callback runs, on an optimizer that moves nothing. grow_batch's epochs keep their steps.
    """
    if not isinstance(config.lr, float):
        raise ValueError("trace needs a number for lr, not 'find'")
    owner, rows = SCHEDULES[config.schedule](config, config.lr), []
    opt = maker(config.optimizer, config.momentum)([[torch.zeros(1)]], lr=config.lr)
    opt.split_by_decay()
    learn = owner.learn = SimpleNamespace(
        opt=opt,
        recorder=SimpleNamespace(metric_names=["epoch", config.monitor, "time"], values=[]),
        cbs=[owner],
        dls=SimpleNamespace(train=SimpleNamespace(bs=batch_sizes(config)[0], n=config.max_batch_size)),
        n_iter=steps_per_epoch,
        training=True,
        epoch=0,
    )
    owner("before_fit")
    for learn.epoch in range(config.epochs):
        for learn.iter in range(steps_per_epoch):
            owner("before_batch")
            rows.append([opt.hypers[0][name] for name in ("lr", "mom")])
        if values is not None and learn.epoch < len(values):
            learn.recorder.values.append([values[learn.epoch]])
            owner("after_epoch")
    return np.array(rows).reshape(-1, 2)
