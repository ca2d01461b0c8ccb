"""Detecting a plateau, and what is done at one."""

import math

from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler


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


def plateau_options(config):
    """The options of the `Plateau` that `config` asks for."""
    return dict(
        mode="max" if config.monitor.endswith("acc") else "min",
        patience=config.patience_epochs,
        threshold=config.threshold,
        threshold_mode=config.threshold_mode,
        cooldown=config.cooldown_epochs,
    )


def check_sole_owner(learn):
    """Raises ValueError where two callbacks of `learn` set the learning rate."""
    owners = [cb for cb in learn.cbs if isinstance(cb, ParamScheduler) or getattr(type(cb), "owns_lr", False)]
    if len(owners) > 1:
        raise ValueError("two owners of the learning rate: " + " and ".join(type(cb).__name__ for cb in owners))


class ReduceLROnPlateau(Callback):
    """Multiplies the learning rate by `factor` where `Plateau` sees one. Same rates as torch's scheduler of that name.

    torch.optim.lr_scheduler.ReduceLROnPlateau is the reference, bad-epoch count and all: with patience 2 the third bad
    epoch reduces. It is the only owner of the learning rate: raises ValueError beside fastai's schedulers.
    """

    order, owns_lr = 60, True

    def __init__(
        self,
        monitor="valid_loss",  # a metric of the record
        mode="min",  # min: lower is better; max
        factor=0.1,  # below 1
        patience=10,  # bad epochs forgiven
        threshold=1e-4,  # change that counts as better
        threshold_mode="rel",  # rel: share of the best; abs
        cooldown=0,  # epochs after a reduction that are not counted
        min_lr=0.0,  # the rate does not go below
        eps=1e-8,  # a smaller change is not made
    ):
        if factor >= 1:
            raise ValueError(f"factor must be below 1, not {factor}")
        self.monitor, self.factor, self.min_lr, self.eps = monitor, factor, min_lr, eps
        self.options = dict(
            mode=mode, threshold=threshold, threshold_mode=threshold_mode, patience=patience, cooldown=cooldown
        )
        self.plateau = Plateau(**self.options)

    def before_fit(self):
        self.run = not hasattr(self, "lr_finder") and not hasattr(self, "gather_preds")  # as fastai's trackers
        if not self.run:
            return
        check_sole_owner(self.learn)
        self.plateau, self.reductions = Plateau(**self.options), []

    def after_epoch(self):
        recorder = self.learn.recorder
        found = dict(zip(recorder.metric_names[1:], recorder.values[-1]))
        if self.monitor not in found:
            raise ValueError(f"monitor {self.monitor!r} is not among {', '.join(found)}")
        if self.plateau.step(found[self.monitor]):
            self.reduce()

    def reduce(self, factor=None):
        old = [h["lr"] for h in self.opt.hypers]
        new = [max(lr * (factor or self.factor), self.min_lr) for lr in old]
        new = [n if o - n > self.eps else o for o, n in zip(old, new)]
        self.opt.set_hypers(lr=new)
        if new != old:
            self.old_lr = old[0]
            self.reductions.append((self.epoch + 1, new[0]))

    def state_dict(self):
        return {"plateau": self.plateau.state_dict(), "reductions": list(self.reductions)}

    def load_state_dict(self, state):
        self.plateau.load_state_dict(state["plateau"])
        self.reductions = [tuple(r) for r in state["reductions"]]
