"""Schedules: what drives the learning rate of a fit. Each is one function and one entry in `SCHEDULES`."""

import math
from types import SimpleNamespace

import numpy as np

from lib.config import MOMENTUM


class Plateau:
    """Says "this is a plateau": the monitored value has not become better for more than `patience` steps.

    Counts as torch.optim.lr_scheduler.ReduceLROnPlateau does. A value that is not a number is never better.
    """

    def __init__(
        self,
        mode="min",  # min: lower is better; max: higher
        threshold=1e-4,  # change that counts as better
        threshold_mode="rel",  # rel: a share of the best so far; abs: an amount
        patience=10,  # bad steps forgiven
        cooldown=0,  # steps after a plateau in which bad ones are not counted
    ):
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, not {mode!r}")
        if threshold_mode not in ("rel", "abs"):
            raise ValueError(f"threshold_mode must be rel or abs, not {threshold_mode!r}")
        self.mode, self.threshold, self.threshold_mode = mode, threshold, threshold_mode
        self.patience, self.cooldown = patience, cooldown
        self.best, self.bad, self.cooling = math.inf if mode == "min" else -math.inf, 0, 0

    def better(self, value):
        """Whether `value` beats the best so far by more than the threshold."""
        change = self.threshold if self.mode == "max" else -self.threshold
        edge = self.best * (1 + change) if self.threshold_mode == "rel" else self.best + change
        return value < edge if self.mode == "min" else value > edge

    def step(self, value):
        """Takes the next monitored value; True where this is a plateau, and counting begins anew."""
        value = float(value)
        if self.better(value):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad = 0
        if self.bad <= self.patience:
            return False
        self.bad, self.cooling = 0, self.cooldown
        return True

    def state_dict(self):
        return {"best": self.best, "bad": self.bad, "cooling": self.cooling}

    def load_state_dict(self, state):
        self.best, self.bad, self.cooling = state["best"], state["bad"], state["cooling"]


def plateau(config, lr):
    """The rate stays, and falls by --factor on each plateau of --monitor."""
    from lib.callbacks import ReduceLROnPlateau

    return ReduceLROnPlateau(config.monitor, factor=config.factor, min_lr=config.min_lr, **plateau_options(config))


def grown(size, factor, most):
    """The batch size that follows `size` under grow_batch."""
    return max(min(max(round(size / factor), size + 1), most), size)


def batch_sizes(config):
    """The batch sizes that a fit may come to, in order: more than one under grow_batch. Here auto is 128."""
    sizes = [128 if config.batch_size == "auto" else config.batch_size]
    if config.schedule == "grow_batch":
        while (size := grown(sizes[-1], config.factor, config.max_batch_size)) > sizes[-1]:
            sizes.append(size)
    return sizes


def grow_batch(config, lr):
    """On a plateau the batch grows as plateau's rate would shrink, up to --max-batch-size; then the rate shrinks.

    Smith et al., arXiv 1711.00489: the noise of a step goes with lr / batch size.
    """
    from lib.callbacks import GrowBatchOnPlateau

    rate = dict(factor=config.factor, min_lr=config.min_lr)
    return GrowBatchOnPlateau(config.max_batch_size, config.monitor, **rate, **plateau_options(config))


def plateau_options(config):
    """The options of the `Plateau` that `config` asks for."""
    return dict(
        mode="max" if config.monitor.endswith("acc") else "min",
        patience=config.patience_epochs,
        threshold=config.threshold,
        threshold_mode=config.threshold_mode,
        cooldown=config.cooldown_epochs,
    )


def scheduled(function):
    """A schedule from `function(config, lr)`, which gives a function from epochs done to {hyperparameter: value}."""

    def owner(config, lr):
        from lib.callbacks import Scheduled

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
    from lib.callbacks import WarmUp

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
