"""The average of the weights, and the best weights."""

import torch
from fastai.callback.core import Callback
from safetensors.torch import save as to_safetensors
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(Callback):
    """Evaluates and keeps an exponential moving average a of the weights w: a <- d a + (1 - d) w after each step.

    An average has less of the noise that a large rate leaves in the weights (Polyak & Juditsky, SIAM J. Control Optim.
    30, 1992). d is `decay`, but at step t no more than (1 + t) / (10 + t), so that the first weights are soon
    forgotten. The statistics of BatchNorm are averaged too. The model holds the average from each validation until the
    next epoch of training, and after the fit. Training itself does not change.
    """

    order, train_only = 63, True  # before what keeps or evaluates weights

    def __init__(
        self,
        decay,  # below 1; 1 / (1 - decay) is about the number of steps that count
    ):
        self.decay, self.steps, self.average = decay, 0, None

    def before_fit(self):
        model = self.learn.model
        self.weights = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self.average, self.steps, self.in_model = [w.clone() for w in self.weights], 0, False

    def after_step(self):
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.average, self.weights, self.steps)
        self.steps += 1

    def before_train(self):
        self.swap(False)

    def before_validate(self):
        self.swap(True)

    def after_cancel_fit(self):
        if self.average is not None:
            self.swap(True)  # before SaveModelCallback loads its best

    def after_fit(self):
        self.after_cancel_fit()
        self.average = self.weights = None

    @torch.no_grad()
    def swap(self, into_model):
        """Puts the average into the model (True), or the weights back (False), unless that is done already."""
        if into_model != self.in_model:
            weights = [w.clone() for w in self.weights]
            torch._foreach_copy_(self.weights, self.average)
            torch._foreach_copy_(self.average, weights)
            self.in_model = into_model

    def state_dict(self):
        return {"steps": self.steps, "average": list(self.average), "in_model": self.in_model}

    def load_state_dict(self, state):
        self.steps, self.in_model = int(state["steps"]), bool(state["in_model"])
        for mine, saved in zip(self.average, state["average"], strict=True):
            mine.copy_(saved)


class KeepBest(Callback):
    """Keeps the weights of the epoch that is best by `column` (ties: lower valid loss), in memory and as a file."""

    order, train_only = 70, True

    def __init__(
        self,
        save=None,  # called with the safetensors bytes of each new best
        column="valid_acc",  # of the record; of a loss the lowest is best
    ):
        self.save, self.column = save, column
        self.best, self.epoch_number, self.state = (), None, None

    def after_epoch(self):
        row = self.learn.recorder.rows[-1]
        value = -row[self.column] if self.column.endswith("loss") else row[self.column]
        score = (value, -row["valid_loss"])
        if score > self.best:
            self.best, self.epoch_number = score, row["epoch"]
            weights = self.learn.model.state_dict()
            self.state = {name: w.detach().cpu().clone().contiguous() for name, w in weights.items()}
            if self.save:
                self.save(to_safetensors(self.state))

    def state_dict(self):
        return {"best": self.best, "epoch_number": self.epoch_number, "state": self.state}

    def load_state_dict(self, state):
        self.best, self.epoch_number, self.state = tuple(state["best"]), state["epoch_number"], state["state"]
