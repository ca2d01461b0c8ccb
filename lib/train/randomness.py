"""Randomness as a function: seeds made from numbers, and generators that a look leaves as they were."""

import random
from contextlib import contextmanager

import numpy as np
import torch


def seed_from(*numbers):
    """One seed of 32 bits (torch's CPU generator takes no more) from several whole numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def preserved_generators():
    """Puts the global generators of Python, numpy and torch back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
