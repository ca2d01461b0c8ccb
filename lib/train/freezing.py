"""Parameters that do not learn in some epochs. Which they are depends on the epochs trained alone."""

from fastai.callback.core import Callback


class Freeze(Callback):
    """fastai's freeze for the first epochs of training: the head and the norms learn, the body stays."""

    order, train_only = 60, True
    name = "freeze_first"  # fastai makes it an attribute of the learner, whose `freeze` stays

    def __init__(
        self,
        epochs,  # so many, counted over all fits
    ):
        self.epochs = epochs

    def before_train(self):
        if self.learn.epochs_trained < self.epochs:
            self.opt.freeze_to(-1)
        elif self.opt.frozen_idx:
            self.opt.unfreeze()

    def after_fit(self):
        self.opt.unfreeze()


class Hold(Callback):
    """Holds `parameters` from some epoch on: they get no gradient, so no optimizer touches them or their state."""

    order, train_only = 61, True

    def __init__(
        self,
        parameters,  # those that stay
        first_epoch,  # the first epoch in which they do, counted from 0 over all fits
        drop=False,  # whether gradients are computed and dropped: a compiled step stays as it is, which saves a minute
    ):
        self.parameters, self.first_epoch, self.drop, self.held = list(parameters), first_epoch, drop, []

    def before_train(self):
        self.holds = self.learn.epochs_trained >= self.first_epoch
        if self.holds and not self.drop:
            self.held += [p.requires_grad_(False) for p in self.parameters if p.requires_grad]

    def before_step(self):
        if self.holds and self.drop:
            for p in self.parameters:
                p.grad = None

    def after_fit(self):
        for p in self.held:
            p.requires_grad_(True)
        self.held = []
