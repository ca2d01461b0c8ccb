"""Schedules: what drives the learning rate of a fit. Each is one function and one entry in `SCHEDULES`."""

import math
from types import SimpleNamespace

import numpy as np


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
        sign = -1 if self.mode == "min" else 1
        if self.threshold_mode == "rel":
            edge = self.best * (1 + sign * self.threshold)
        else:
            edge = self.best + sign * self.threshold
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

    mode = "max" if config.monitor.endswith("acc") else "min"
    return ReduceLROnPlateau(
        config.monitor,
        mode,
        config.factor,
        config.patience_epochs,
        config.threshold,
        config.threshold_mode,
        config.cooldown_epochs,
        config.min_lr,
    )


# name -> function(config, lr) that gives the callback which owns the learning rate of the fit
SCHEDULES = {"plateau": plateau}


def fit(learn, config, lr):
    """Trains `config.epochs` epochs from learning rate `lr` under the schedule `config.schedule`."""
    learn.fit(config.epochs, lr, cbs=[SCHEDULES[config.schedule](config, lr)])


def trace(config, steps_per_epoch, values=None):
    """Learning rate and momentum at each step of a fit under `config`: (epochs * steps_per_epoch, 2) array.

    `values` are the monitored values, one an epoch; without them no epoch is looked at. `config.lr` must be a number.
    The schedule's own callback runs, on an optimizer that moves nothing.
    """
    if not isinstance(config.lr, float):
        raise ValueError("trace needs a number for lr, not 'find'")
    opt = Hypers(config.lr, config.momentum)
    recorder = SimpleNamespace(metric_names=["epoch", config.monitor, "time"], values=[])
    owner = SCHEDULES[config.schedule](config, config.lr)
    learn = SimpleNamespace(opt=opt, recorder=recorder, cbs=[owner], n_epoch=config.epochs, training=True, epoch=0)
    owner.learn = learn
    rows = []
    call = lambda event: getattr(owner, event, lambda: None)()
    call("before_fit")
    for learn.epoch in range(config.epochs):
        for step in range(steps_per_epoch):
            learn.pct_train = (learn.epoch + step / steps_per_epoch) / config.epochs
            call("before_batch")
            rows.append((opt.hypers[0]["lr"], opt.hypers[0]["mom"]))
            call("after_batch")
        if values is not None:
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
