"""Parameters that do not learn in some epochs. Only the number of epochs trained decides: there is no state to save."""

from fastai.callback.core import Callback


class Hold(Callback):
    """Holds `parameters` in some epochs: they get no gradient, so no optimizer touches them or their state."""

    order, train_only = 10, True  # before what reads gradients

    def __init__(
        self,
        parameters,  # those that stay
        epochs,  # the range of epochs in which they do, counted from 0 over all fits
        drop=False,  # whether gradients are computed and dropped: a compiled step stays as it is, which saves a minute
    ):
        self.parameters, self.epochs, self.drop, self.held = list(parameters), epochs, drop, []

    def before_train(self):
        self.after_fit()
        self.holds = self.learn.epochs_trained in self.epochs
        if self.holds and not self.drop:
            self.held = [p.requires_grad_(False) for p in self.parameters if p.requires_grad]

    def before_step(self):
        if self.holds and self.drop:
            for p in self.parameters:
                p.grad = None

    def after_fit(self):
        for p in self.held:
            p.requires_grad_(True)
        self.held = []
