"""Training steps through torch.compile. Weights, evaluation and what is saved stay those of the plain model."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.torch_core import find_bs

from lib.cli import BadInput
from lib.machine import launched

COMPILERS = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang")}  # of torch.compile: inductor, triton


class Compile(Callback):
    """Compiles the forward and backward passes of training.

    On CUDA, without `--accumulate`, they become graphs: a step is a few launches.

    If the last batch of an epoch is smaller, the plain model takes it: to compile for it would cost another minute.
    """

    order, train_only = 90, True  # after what changes the images of a batch

    def before_fit(self):
        # gradients that are added up over batches must outlive the graph that made them
        graphs = self.learn.device.type == "cuda" and self.learn.accumulate == 1
        self.network = torch.compile(self.learn.model, mode="reduce-overhead" if graphs else None, dynamic=False)

    def before_batch(self):
        if self.training:
            self.learn.compiled = self.network if find_bs(self.xb) == getattr(self.dl, "bs", None) else None

    def after_fit(self):
        self.network = self.learn.compiled = None


def check_compiler(device, precision):
    """Raises BadInput where `--compile` cannot work on the torch.device `device` in `precision`."""
    if launched():
        raise BadInput("--compile: works in one process; leave it out under torchrun")
    if device.type == "cpu" and precision == "bf16":
        raise BadInput("--compile: torch 2.15 compiles bf16 on a CPU to nan; pass --precision float32, or leave it out")
    variable, *names = COMPILERS.get(device.type, ("CC", "cc"))
    if not any(map(shutil.which, (os.environ.get(variable, names[0]), *names))):
        raise BadInput(f"--compile: needs a compiler, such as Debian's {names[0]}; install one, or leave it out")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():  # the compiled code is a module of Python
        raise BadInput("--compile: needs Python.h, such as that of Debian's python3-dev; install it, or leave it out")
