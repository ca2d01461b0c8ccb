"""Detecting a plateau, and the learning rate that falls at one."""

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback, TrackerCallback
from fastai.callback.tracker import ReduceLROnPlateau as FastaisReduceLROnPlateau
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchsReduceLROnPlateau

COUNTED = ("best", "num_bad_epochs", "cooldown_counter")  # by torch's scheduler


class Plateau(TorchsReduceLROnPlateau):
    """Says "this is a plateau": the monitored value has not become better for more than `patience` steps.

    torch.optim.lr_scheduler.ReduceLROnPlateau counts. A value that is not a number is never better.
    """

    def __init__(
        self,
        mode="min",  # min: lower is better; max: higher
        threshold=1e-4,  # change that counts as better
        threshold_mode="rel",  # rel: a share of the best so far; abs: an amount
        patience=10,  # bad steps forgiven
        cooldown=0,  # steps after a plateau in which bad ones are not counted
    ):
        options = dict(patience=patience, threshold=threshold, threshold_mode=threshold_mode, cooldown=cooldown)
        super().__init__(SGD([torch.zeros(1)]), mode, **options)  # it must have an optimizer; this one is not used

    def step(self, value):
        """Takes the next monitored value; True where this is a plateau, and counting begins anew."""
        self.reached = False
        super().step(value)
        return self.reached

    def _reduce_lr(self, epoch):
        self.reached = True

    def state_dict(self):
        return {name: getattr(self, name) for name in COUNTED}

    def load_state_dict(self, state):
        super().load_state_dict({name: state[name] for name in COUNTED})


def plateau_options(config):
    """The options of the `Plateau` that `config` asks for."""
    return dict(
        mode="min" if config.monitor.endswith("loss") else "max",
        patience=config.patience_epochs,
        threshold=config.threshold,
        threshold_mode=config.threshold_mode,
        cooldown=config.cooldown_epochs,
    )


def check_sole_owner(learn):
    """Raises ValueError where two callbacks of `learn` set the learning rate."""
    steers = lambda cb: getattr(type(cb), "owns_lr", False) or isinstance(cb, FastaisReduceLROnPlateau)
    owners = [cb for cb in learn.cbs if steers(cb) or (isinstance(cb, ParamScheduler) and "lr" in cb.scheds)]
    if len(owners) > 1:
        names = " and ".join(type(cb).__name__ for cb in owners)
        raise ValueError(f"two owners of the learning rate: {names}; leave one out")


def warm_up(epochs_done, warmup_epochs):
    """Gradual warm-up (Goyal et al., arXiv 1706.02677): a factor that rises from 1/4 to 1 in a straight line."""
    return 1.0 if epochs_done >= warmup_epochs else 0.25 + 0.75 * epochs_done / warmup_epochs


class ReduceLROnPlateau(Callback):
    """Multiplies the learning rate by `factor` where `Plateau` sees one: the rates of torch's scheduler of that name.

    With patience 2 the third bad epoch reduces. Raises ValueError beside another owner of the learning rate.
    """

    order, owns_lr, train_only, run_valid = 60, True, True, False

    def __init__(
        self,
        monitor="valid_loss",  # a name of `learn.recorder.metric_names`
        mode="min",  # min: lower is better; max
        factor=0.1,  # below 1
        patience=10,  # bad epochs forgiven
        threshold=1e-4,  # change that counts as better
        threshold_mode="rel",  # rel: share of the best; abs
        cooldown=0,  # epochs after a reduction that are not counted
        min_lr=0.0,  # the rate does not go below
        eps=1e-8,  # a smaller change is not made
        warmup_epochs=0.0,  # epochs in which the rate rises to its start
    ):
        if factor >= 1:
            raise ValueError(f"factor must be below 1, not {factor}")
        self.monitor, self.factor, self.min_lr, self.eps = monitor, factor, min_lr, eps
        self.plateau = Plateau(mode, threshold, threshold_mode, patience, cooldown)
        self.warmup_epochs = warmup_epochs

    def before_fit(self):
        self.run = not hasattr(self, "lr_finder") and not hasattr(self, "gather_preds")  # as fastai's trackers
        if self.run:
            check_sole_owner(self.learn)
            self.plateau._reset()
            self.changes, self.rates = [], [h["lr"] for h in self.opt.hypers]

    def before_batch(self):
        if self.warmup_epochs:
            factor = warm_up(self.epoch + self.iter / self.n_iter, self.warmup_epochs)
            self.opt.set_hypers(lr=[rate * factor for rate in self.rates])

    def after_epoch(self):
        self.changes = []  # what changes after this epoch, in words
        recorder = self.learn.recorder
        values = dict(zip(recorder.metric_names[1:], recorder.values[-1]))
        if self.monitor not in values:
            raise ValueError(f"monitor {self.monitor!r} is not among {', '.join(values)}")
        if self.plateau.step(values[self.monitor]):
            self.reduce(self.factor)

    def reduce(self, factor):
        """Multiplies the rate of each layer group by `factor`, within `min_lr` and `eps`."""
        smaller = [max(rate * factor, self.min_lr) for rate in self.rates]
        new = [s if rate - s > self.eps else rate for rate, s in zip(self.rates, smaller)]
        if new != self.rates:
            self.changes.append(f"lr {self.rates[-1]:.4g} -> {new[-1]:.4g}")
            self.rates = new
            self.opt.set_hypers(lr=new)

    def state_dict(self):
        return {"plateau": self.plateau.state_dict(), "rates": list(self.rates)}

    def load_state_dict(self, state):
        self.plateau.load_state_dict(state["plateau"])
        self.rates = list(state["rates"])


class StopEarly(EarlyStoppingCallback):
    """Like fastai's, but it ends the fit between two epochs.

    fastai's ends it in `after_epoch`, so callbacks that come later in order miss that epoch.
    """

    order, wait = 61, 0

    def before_epoch(self):
        if self.wait >= self.patience:
            raise CancelFitException

    def after_epoch(self):
        TrackerCallback.after_epoch(self)
        self.wait = 0 if self.new_best else self.wait + 1

    def state_dict(self):
        return {"best": float(self.best), "wait": self.wait}

    def load_state_dict(self, state):
        self.best, self.wait = state["best"], state["wait"]
