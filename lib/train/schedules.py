"""Schedules: what drives the learning rate of a fit. Each is one function and one entry in `SCHEDULES`."""

import math
from types import SimpleNamespace

import numpy as np
from fastai.callback.core import Callback

from lib.config import MOMENTUM
from lib.train.lecture import GrowBatchOnPlateau, batch_sizes
from lib.train.plateau import ReduceLROnPlateau, check_sole_owner, plateau_options


class Scheduled(Callback):
    """Sets learning rate and momentum before each batch. What it sets is a function of the epochs done: no state."""

    owns_lr = True
    order = 40  # ahead of the record, which writes down the first step of an epoch

    def __init__(
        self,
        at,  # function: epochs done (with fraction) -> {"lr": …} or {"lr": …, "mom": …}
    ):
        self.at = at

    def before_fit(self):
        check_sole_owner(self.learn)

    def before_batch(self):
        learn = self.learn
        if learn.training:
            hypers = self.at(learn.epoch + learn.iter / learn.n_iter)
            if not learn.has_momentum:
                hypers.pop("mom", None)
            learn.opt.set_hypers(**hypers)


class WarmUp(Callback):
    """Holds the learning rate back in the first epochs: times a factor that rises from 1/4 to 1, straight.

    Gradual warm-up: Goyal et al., arXiv 1706.02677. Between batches the rate is what its owner set.
    """

    order, start = 45, 0.25

    def __init__(
        self,
        epochs,  # until the factor is 1; may have a fraction
    ):
        self.epochs, self.kept = epochs, None

    def before_batch(self):
        learn = self.learn
        done = (learn.epoch + learn.iter / learn.n_iter) / self.epochs
        if learn.training and done < 1:
            self.kept = [h["lr"] for h in learn.opt.hypers]
            factor = self.start + (1 - self.start) * done
            learn.opt.set_hypers(lr=[lr * factor for lr in self.kept])

    def after_batch(self):
        if self.kept:
            self.learn.opt.set_hypers(lr=self.kept)
            self.kept = None


def plateau(config, lr):
    """The rate stays, and falls by --factor on each plateau of --monitor."""
    return ReduceLROnPlateau(config.monitor, factor=config.factor, min_lr=config.min_lr, **plateau_options(config))


def grow_batch(config, lr):
    """On a plateau the batch grows as plateau's rate would shrink, up to --max-batch-size; then the rate shrinks.

    Smith et al., arXiv 1711.00489: the noise of a step goes with lr / batch size.
    """
    rate = dict(factor=config.factor, min_lr=config.min_lr)
    return GrowBatchOnPlateau(config.max_batch_size, config.monitor, **rate, **plateau_options(config))


def scheduled(function):
    """A schedule from `function(config, lr)`, which gives a function from epochs done to {hyperparameter: value}."""

    def owner(config, lr):
        return Scheduled(function(config, lr))

    owner.__doc__ = function.__doc__
    return owner


def two_halves(config, start, top, end):
    """Half a cosine from `start` to `top` in the first pct_start of the epochs, one to `end` in the rest."""

    def at(t):
        done, share = t / config.epochs, config.pct_start
        a, b, part = (start, top, done / share) if done < share else (top, end, (done - share) / (1 - share))
        return a + (b - a) * (1 - math.cos(math.pi * part)) / 2

    return at


@scheduled
def constant(config, lr):
    """The rate stays."""
    return lambda t: {"lr": lr}


@scheduled
def one_cycle(config, lr):
    """Half a cosine up from lr / div, one down to lr / div_final, momentum against it (Smith & Topin, 1708.07120)."""
    low, high = config.min_momentum, config.max_momentum
    rate = two_halves(config, lr / config.div, lr, lr / config.div_final)
    momentum = two_halves(config, high, low, high)
    return lambda t: {"lr": rate(t), "mom": momentum(t)}


@scheduled
def flat_cos(config, lr):
    """The rate stays, then falls to lr / div_final along half a cosine (fastai's fit_flat_cos)."""
    rate = two_halves(config, lr, lr, lr / config.div_final)
    return lambda t: {"lr": rate(t)}


def cyclical(shrink):
    """The triangular policies of Smith, arXiv 1506.01186; the height of each cycle is `shrink` times the one before."""

    @scheduled
    def triangular(config, lr):
        """Straight from lr / cycle_div to lr and back, cycle by cycle."""
        low, length = lr / config.cycle_div, config.cycle_length * config.epochs

        def at(t):
            cycle = math.floor(t / length)
            height = 1 - abs(2 * (t / length - cycle) - 1)
            return {"lr": low + (lr - low) * height * shrink**cycle}

        return at

    return triangular


@scheduled
def warm_restarts(config, lr):
    """Half a cosine from lr to 0, again and again, each time cycle_mult as long (Loshchilov & Hutter, 1608.03983)."""

    def at(t):
        length = config.cycle_length * config.epochs
        while t >= length:
            t, length = t - length, length * config.cycle_mult
        return {"lr": lr * (1 + math.cos(math.pi * t / length)) / 2}

    return at


# name -> function(config, lr) that gives the callback which owns the learning rate of the fit; lr is its largest
SCHEDULES = {
    "plateau": plateau,
    "one_cycle": one_cycle,
    "constant": constant,
    "triangular": cyclical(1),
    "triangular2": cyclical(0.5),
    "warm_restarts": warm_restarts,
    "flat_cos": flat_cos,
    "grow_batch": grow_batch,
}


def owners(config, lr):
    """The callback that owns the learning rate and, with --warmup-epochs, the one that holds it back at first."""
    warmup = [WarmUp(config.warmup_epochs)] if config.warmup_epochs else []
    return [SCHEDULES[config.schedule](config, lr), *warmup]


def fit(learn, config, lr, cbs=()):
    """Trains `config.epochs` epochs from learning rate `lr` under the schedule `config.schedule`."""
    learn.fit(config.epochs, lr, cbs=[*owners(config, lr), *cbs])


def trace(config, steps_per_epoch, values=None):
    """Learning rate and momentum at each step of a fit under `config`: (epochs * steps_per_epoch, 2) array.

    `values` are the monitored values of the first epochs; behind them no epoch is looked at. `config.lr` must be a
    number. The schedule's own callbacks run, on an optimizer that moves nothing. grow_batch's epochs keep their steps.
    """
    if not isinstance(config.lr, float):
        raise ValueError("trace needs a number for lr, not 'find'")
    recorder = SimpleNamespace(metric_names=["epoch", config.monitor, "time"], values=[])
    callbacks = sorted(owners(config, config.lr), key=lambda cb: cb.order)
    learn = SimpleNamespace(
        opt=Hypers(config.lr, config.momentum if config.optimizer in MOMENTUM else 0.0),
        has_momentum=config.optimizer in MOMENTUM,
        recorder=recorder,
        cbs=callbacks,
        dls=SimpleNamespace(train=SimpleNamespace(bs=batch_sizes(config)[0])),
        n_epoch=config.epochs,
        n_iter=steps_per_epoch,
        training=True,
        epoch=0,
    )
    rows = []

    def call(event):
        for cb in callbacks:
            getattr(cb, event, lambda: None)()

    for cb in callbacks:
        cb.learn = learn
    call("before_fit")
    for learn.epoch in range(config.epochs):
        for learn.iter in range(steps_per_epoch):
            call("before_batch")
            rows.append((learn.opt.hypers[0]["lr"], learn.opt.hypers[0]["mom"]))
            call("after_batch")
        if values is not None and learn.epoch < len(values):
            recorder.values.append([values[learn.epoch]])
            call("after_epoch")
    call("after_fit")
    return np.array(rows).reshape(-1, 2)


class Hypers:
    """The part of a fastai optimizer that schedules touch."""

    def __init__(self, lr, mom):
        self.hypers = [{"lr": lr, "mom": mom}]

    def set_hypers(self, **values):
        for name, value in values.items():
            self.hypers[0][name] = value[0] if isinstance(value, (list, tuple)) else value
