"""How long a fit will take, from a few real steps."""

import dataclasses
import math
import time

import numpy as np

from lib import models
from lib.cli import BadInput, duration, until
from lib.train import lr_range, ranks
from lib.train.learner import build
from lib.train.recorder import value_of

STEPS = 4  # updates that are timed; the first two, which allocate memory, do not count
PIXELS = 2**19  # of all images in the batch whose evaluation is timed
LONG = 1800  # seconds from which a faster network is named


def step_seconds(learn, steps=STEPS):
    """Median seconds of a real update, of this rank's slice of a batch, on a copy of the model; leaves no trace."""
    loader = learn.dls.train
    try:
        loader.world = ranks.world()
        seconds = lr_range.run(learn, np.full(steps, 1e-9), stop_div=False).step_seconds
    finally:
        loader.world = 1  # as before a fit
    if math.isnan(seconds):
        raise BadInput("the loss is not finite in the first steps; are the weights whole? or pass --precision float32")
    return seconds


def evaluation_seconds(learn):
    """Seconds of an evaluation of valid and test by one process, from one batch of valid."""
    valid, test = learn.dls.valid, getattr(learn.dls, "test", None)
    batch = valid.plain(max(PIXELS // learn.dls.store.size**2, 2))
    for _ in range(2):  # the first pass may load libraries, so it is not timed
        start = time.perf_counter()
        value_of(learn.evaluate([batch]).scores[0])  # waits for the device
    images = len(valid.dataset) + (len(test.dataset) if test is not None else 0)
    return (time.perf_counter() - start) * images / len(batch[0])


def epoch_seconds(learn, step, evaluation=None):
    """Seconds of an epoch whose updates take `step` seconds each: those of training, and of valid and test after it."""
    updates = -(-len(learn.dls.train) // learn.accumulate)
    return step * updates + (evaluation_seconds(learn) if evaluation is None else evaluation) / ranks.world()


def expectation(learn, config, precision, step=None):
    """How long the epochs of a run take, as (seconds, line). `step`: seconds of an update; None: a few are measured."""
    step = step if ranks.world() == 1 else None  # the range test ran whole batches, but each rank trains a slice
    seconds = config.epochs * epoch_seconds(learn, step or step_seconds(learn))
    takes = "epoch takes" if config.epochs == 1 else "epochs take"
    line = f"{config.epochs} {takes} about {duration(seconds)} here ({until(seconds)})"
    if seconds > LONG and config.model != "small" and not config.pretrained:
        model = models.build("small", len(learn.dls.vocab), images=learn.dls.train.plain()[0])
        small = build(dataclasses.replace(config, model="small", freeze_epochs=0), learn.dls, model, precision)
        line += f"; --model small: about {duration(config.epochs * epoch_seconds(small, step_seconds(small)))}"
    return seconds, line
