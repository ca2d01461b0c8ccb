"""Training steps through torch.compile. Weights, evaluation and what is saved stay those of the plain model."""

import os
import shutil

import torch
from fastai.callback.core import Callback

from lib.cli import BadInput
from lib.machine import launched


class Compile(Callback):
    """Has forward and backward passes of training run compiled; on CUDA as graphs, so that a step is one launch."""

    order, train_only = 90, True

    def before_fit(self):
        mode = "reduce-overhead" if self.learn.device.type == "cuda" else None
        self.learn.compiled = torch.compile(self.learn.model, mode=mode, dynamic=False)

    def after_fit(self):
        self.learn.compiled = None


def check_compiler(device, precision):
    """Raises BadInput where `--compile` cannot work on the torch.device `device` in `precision`."""
    if launched():
        raise BadInput("--compile: works in one process; leave it out under torchrun")
    if device.type == "cpu" and precision == "bf16":
        raise BadInput("--compile: torch 2.15 compiles bf16 on a CPU to nan; pass --precision float32, or leave it out")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise BadInput("--compile: needs a C++ compiler on a CPU, such as Debian's g++; install one, or leave it out")
