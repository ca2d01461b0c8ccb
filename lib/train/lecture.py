"""What exists for the lecture alone: gradient noise, batches that grow."""

import math

import numpy as np
import torch
from fastai.callback.core import Callback

from lib.train.plateau import ReduceLROnPlateau


def mixed(*numbers):
    """One seed of 32 bits (torch's CPU generator takes no more) from several whole numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


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


class GrowBatchOnPlateau(ReduceLROnPlateau):
    """On a plateau the training batch grows by 1 / factor, up to a largest; what is left shrinks the learning rate.

    "Don't decay the learning rate, increase the batch size" (Smith et al., arXiv 1711.00489): lr / batch size falls as
    under ReduceLROnPlateau. `growths` lists (epoch, batch size). The loader has its own batch size back after the fit.
    """

    def __init__(
        self,
        max_batch_size,  # images
        monitor="valid_loss",  # as ReduceLROnPlateau
        **options,  # as ReduceLROnPlateau
    ):
        super().__init__(monitor, **options)
        self.max_batch_size, self.growths = max_batch_size, []

    def before_fit(self):
        super().before_fit()
        self.first, self.growths = self.learn.dls.train.bs, []

    def reduce(self):
        dl = self.learn.dls.train
        old, new = dl.bs, grown(dl.bs, self.factor, self.max_batch_size)
        if new > old:
            dl.bs = new
            self.growths.append((self.epoch + 1, new))
        if new >= self.max_batch_size:
            super().reduce(min(self.factor * new / old, 1.0))

    def after_fit(self):
        self.learn.dls.train.bs = self.first

    def state_dict(self):
        return {**super().state_dict(), "growths": list(self.growths)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.growths = [tuple(g) for g in state["growths"]]
        if self.growths:
            self.learn.dls.train.bs = self.growths[-1][1]


class GradNoise(Callback):
    """Adds Gaussian noise to the gradient, of variance eta / (1 + t)^0.55 at step t (Neelakantan et al., 1511.06807).

    The noise is a function of (seed, step). With `plateau` it is added only in the epoch behind each plateau.
    """

    order, decay = 62, 0.55  # behind the record

    def __init__(
        self,
        eta,  # variance at the first step
        seed=0,  # whole number, 0 to 2**32 - 1
        monitor="valid_loss",  # with plateau: a metric of the record
        plateau=None,  # a Plateau that says when
    ):
        self.eta, self.seed, self.monitor, self.plateau = eta, seed, monitor, plateau
        self.steps, self.on = 0, plateau is None

    def before_step(self):
        step, self.steps = self.steps, self.steps + 1
        if not self.on:
            return
        learn = self.learn
        if learn.scaler:
            learn.scaler.unscale_(learn.opt.opt)
        sigma = math.sqrt(self.eta / (1 + step) ** self.decay)
        parameters = [p for p in learn.model.parameters() if p.grad is not None]
        generator = torch.Generator(parameters[0].device).manual_seed(mixed(self.seed, step))
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            p.grad.add_(noise, alpha=sigma)

    def after_epoch(self):
        if self.plateau:
            self.on = self.plateau.step(self.recorder.rows[-1][self.monitor])
            if self.on:
                print(f"plateau: {self.monitor} stands still; the next epoch's gradients are perturbed", flush=True)

    def state_dict(self):
        return {"steps": self.steps, "on": self.on, "plateau": self.plateau and self.plateau.state_dict()}

    def load_state_dict(self, state):
        self.steps, self.on = state["steps"], state["on"]
        if self.plateau:
            self.plateau.load_state_dict(state["plateau"])
