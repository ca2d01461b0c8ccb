"""Optimizers: torch's own, and which parameters decay."""

import torch
from torch import nn

from lib.models import head

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def decay_split(model):
    """Two lists of parameters: those that weight decay acts on, and those it spares (norms and biases)."""
    spared = [
        p for m in model.modules() for n, p in m.named_parameters(recurse=False) if isinstance(m, NORMS) or n == "bias"
    ]
    ids = {id(p) for p in spared}
    return [
        [p for p in model.parameters() if p.requires_grad and id(p) not in ids],
        [p for p in spared if p.requires_grad],
    ]


def body(model):
    """The parameters that stay while a new head learns: all but those of the head and of norms (fastai's freeze)."""
    learning = [m for m in model.modules() if isinstance(m, NORMS) or m is head(model)]
    ids = {id(p) for m in learning for p in m.parameters(recurse=False)}
    return [p for p in model.parameters() if id(p) not in ids]


OPTIMIZERS = {
    "sgd": lambda params, lr, mom: torch.optim.SGD(params, lr, mom),
    "nesterov": lambda params, lr, mom: torch.optim.SGD(params, lr, mom, nesterov=mom > 0),
    "rmsprop": lambda params, lr, mom: torch.optim.RMSprop(params, lr),
    "adagrad": lambda params, lr, mom: torch.optim.Adagrad(params, lr),
    "adam": lambda params, lr, mom: torch.optim.Adam(params, lr, (mom, 0.999)),
}  # name -> function(parameter groups, learning rate, momentum); weight decay is set on all
