"""The average of the weights, and the best weights."""

import copy

from fastai.callback.core import Callback
from safetensors.torch import save as to_safetensors
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Hold(Callback):
    """In some epochs `parameters` stay: without a gradient no optimizer touches them, their decay or their state.

    What stays is a function of the epochs trained, as fits that are resumed need it. One learning rate drives all.
    """

    order = 61  # ahead of gradient noise, which is of what has a gradient

    def __init__(
        self,
        parameters,  # those that stay
        epochs,  # in which they do, counted over all fits: a range
    ):
        self.parameters, self.epochs = [p for p in parameters if p.requires_grad], epochs

    def before_train(self):
        self.held = self.learn.epochs_trained in self.epochs
        if not self.learn.parallel:  # which waits for all the gradients that it has seen at its start
            self.learning(not self.held)

    def before_step(self):
        if self.held:
            for p in self.parameters:
                p.grad = None

    def after_fit(self):
        self.learning(True)

    def learning(self, on):
        for p in self.parameters:
            p.requires_grad_(on)


class SmallImages(Callback):
    """In the first epochs images are smaller, in training, range test and evaluation: progressive resizing.

    What an image of 3/4 of the side costs is about 9/16, and the rate is high meanwhile, when much is learned that
    needs no detail (Howard & Gugger, Deep Learning for Coders, ch. 7; Touvron et al., arXiv 1906.06423, on why
    evaluation goes along). A function of the epochs trained. Behind the fit images are as they are.
    """

    order = -1  # ahead of what looks at the images

    def __init__(
        self,
        epochs,  # so long, counted over all fits
        side,  # pixels
    ):
        self.epochs, self.small = epochs, side

    def after_create(self):
        self.learn.side = self.small if self.learn.epochs_trained < self.epochs else None

    before_train = after_create

    def after_fit(self):
        self.learn.side = None


class EMA(Callback):
    """Evaluates and keeps an exponential moving average a of the weights w: a <- d a + (1 - d) w behind each step.

    An average has less of the noise that a large rate leaves in the weights (Polyak & Juditsky, SIAM J. Control Optim.
    30, 1992). d is `decay`, at first (1 + t) / (10 + t) at step t, so that the start is soon forgotten. BatchNorm's
    statistics are averaged along. Training is as without it; behind the fit the model has the averaged weights.
    """

    order = 63  # ahead of what keeps or evaluates

    def __init__(
        self,
        decay,  # below 1; 1 / (1 - decay) is about the number of steps that count
    ):
        self.decay, self.steps = decay, 0

    def before_fit(self):
        self.learn.average, self.steps = copy.deepcopy(self.learn.model).requires_grad_(False), 0
        of = lambda model: [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self.tensors = of(self.learn.average), of(self.learn.model)  # they stay where they are until the fit's end

    def after_step(self):
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(*self.tensors, self.steps)
        self.steps += 1

    def after_fit(self):
        if self.learn.average is not None:
            self.learn.model.load_state_dict(self.learn.average.state_dict())
            self.learn.average = self.tensors = None

    def state_dict(self):
        return {"steps": self.steps, "average": self.learn.average.state_dict()}

    def load_state_dict(self, state):
        self.steps = int(state["steps"])
        self.learn.average.load_state_dict(state["average"])


class KeepBest(Callback):
    """Keeps the weights of the epoch with the best valid accuracy (ties: lower valid loss), in memory and as a file.

    An epoch on images of their own size is better than any on smaller ones.
    """

    order = 70

    def __init__(
        self,
        save=None,  # called with the safetensors bytes of each new best
    ):
        self.save, self.best, self.epoch_number, self.state = save, (), None, None

    def after_epoch(self):
        row = self.recorder.rows[-1]
        score = (self.learn.side is None, row["valid_acc"], -row["valid_loss"])
        if score > self.best:
            self.best, self.epoch_number = score, row["epoch"]
            self.state = {k: v.detach().cpu().clone().contiguous() for k, v in self.evaluated.state_dict().items()}
            if self.save:
                self.save(to_safetensors(self.state))

    def state_dict(self):
        return {"best": self.best, "epoch_number": self.epoch_number, "state": self.state}

    def load_state_dict(self, state):
        self.best, self.epoch_number, self.state = tuple(state["best"]), state["epoch_number"], state["state"]
