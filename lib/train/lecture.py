"""What exists for the lecture alone: gradient noise, batches that grow instead of rates that fall, balanced batches."""

import math

import numpy as np
import torch
from fastai.callback.core import Callback

from lib.data.augment import shuffled
from lib.train import ranks
from lib.train.plateau import ReduceLROnPlateau
from lib.train.randomness import seed_from


def balanced_order(seed, epoch, labels):
    """An order in which each stretch of images has nearly the class proportions of the data: (n,) int64.

    The image of rank r (in `shuffled`) among the n_c of its class c gets the place (r + u_c) / n_c. u_c is uniform,
    drawn for each epoch and class.
    """
    labels = np.asarray(labels)
    position, order = np.empty(len(labels)), shuffled(seed, epoch, labels)
    starts = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, 2]))
    for c in range(labels.max() + 1):
        of_class = order[labels[order] == c]
        position[of_class] = (np.arange(len(of_class)) + starts.random()) / max(len(of_class), 1)
    return np.argsort(position, kind="stable")


def grown(size, factor, most):
    """The batch size after `size` under grow_batch: size / factor, at least size + 1, at most `most`; never smaller."""
    return max(min(max(round(size / factor), size + 1), most), size)


def batch_sizes(config):
    """The batch sizes that a fit may come to, in order: more than one under grow_batch. auto counts as 128."""
    sizes = [128 if config.batch_size == "auto" else config.batch_size]
    if config.schedule == "grow_batch":
        while (size := grown(sizes[-1], config.factor, config.max_batch_size)) > sizes[-1]:
            sizes.append(size)
    return sizes


class GrowBatchOnPlateau(ReduceLROnPlateau):
    """On a plateau the training batch grows by 1 / factor, so that lr / batch size falls as under ReduceLROnPlateau.

    It grows up to `max_batch_size`, or to all training images if they are fewer. Beyond that, the learning rate falls.
    "Don't decay the learning rate, increase the batch size" (Smith et al., arXiv 1711.00489). After the fit the loader
    has its own batch size back.
    """

    def __init__(
        self,
        max_batch_size,  # images
        **options,  # as ReduceLROnPlateau
    ):
        super().__init__(**options)
        self.max_batch_size, self.first_size = max_batch_size, None

    def before_fit(self):
        super().before_fit()
        self.first_size = self.learn.dls.train.bs

    def reduce(self, factor):
        loader = self.learn.dls.train
        most = min(self.max_batch_size, loader.n)  # a batch has no more than all images
        old, new = loader.bs, grown(loader.bs, factor, most)
        if new > old:
            loader.bs = new
            self.changes.append(f"batch size {old} -> {new}")
        if new >= most:
            super().reduce(min(factor * new / old, 1.0))

    def after_fit(self):
        if self.first_size:
            self.learn.dls.train.bs, self.first_size = self.first_size, None

    def state_dict(self):
        return {**super().state_dict(), "batch_size": self.learn.dls.train.bs}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.learn.dls.train.bs = state["batch_size"]


class GradNoise(Callback):
    """Adds Gaussian noise to the gradient, of variance eta / (1 + t)^0.55 at step t (Neelakantan et al., 1511.06807).

    The noise is a function of (seed, step). With `plateau` it is added only in the epoch after each plateau.
    """

    order, decay, train_only = 62, 0.55, True  # after the record

    def __init__(
        self,
        eta,  # variance at the first step
        seed=0,  # whole number, 0 to 2**32 - 1
        monitor="valid_loss",  # with plateau: a column of the record
        plateau=None,  # a Plateau that says when
    ):
        self.eta, self.seed, self.monitor, self.plateau = eta, seed, monitor, plateau

    def before_fit(self):
        self.steps, self.on = 0, self.plateau is None
        if self.plateau:
            self.plateau._reset()

    def before_step(self):
        step, self.steps = self.steps, self.steps + 1
        if not self.on:
            return
        sigma = math.sqrt(self.eta / (1 + step) ** self.decay)
        parameters = [p for p in self.learn.model.parameters() if p.grad is not None]
        generator = torch.Generator(parameters[0].device).manual_seed(seed_from(self.seed, step))
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            p.grad.add_(noise, alpha=sigma)

    def after_epoch(self):
        if self.plateau:
            self.on = self.plateau.step(self.learn.recorder.rows[-1][self.monitor])
            if self.on and ranks.leads():
                print(f"plateau: {self.monitor} stands still; the next epoch's gradients are perturbed", flush=True)

    def state_dict(self):
        return {"steps": self.steps, "on": self.on, "plateau": self.plateau and self.plateau.state_dict()}

    def load_state_dict(self, state):
        self.steps, self.on = state["steps"], state["on"]
        if self.plateau:
            self.plateau.load_state_dict(state["plateau"])
