"""Randomness as a function: seeds made from numbers, and generators that a look leaves as they were."""

import random
from contextlib import contextmanager

import numpy as np
import torch


def seed_from(*numbers):
    """One seed of 32 bits (torch's CPU generator takes no more) from several whole numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def preserved_generators(device):
    """Puts the global generators of Python, numpy and torch, on the CPU and on the CUDA `device`, back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
