"""`--minutes`: the network and the number of epochs that promise most in a given time."""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np

from lib import models
from lib.cli import BadInput, counted, duration, read_json, refused
from lib.config import MODELS
from lib.train import ranks, timing
from lib.train.learner import build
from lib.train.lecture import batch_sizes

TABLE = Path(__file__).parents[2] / "results/networks.json"  # written by tests.benchmarks.networks
KEPT_FREE = 0.1  # share of the time that no plan uses: other programs may come
STEPS = 10  # that are timed of each network; the first two are not counted
FIGURES = 15  # seconds of the figures and explanations at the end


def learned():
    """{network: [(training images seen, valid accuracy, runs), …]} of runs on CIFAR-10, from TABLE."""
    with refused(f"{TABLE}: says what networks learn, and cannot be read", "restore it"):
        return {name: row["learned"] for name, row in read_json(TABLE)["rows"].items() if row.get("learned")}


def promised(points, images):
    """The accuracy after `images` images: on straight lines between `points`, over log(images); flat after the last."""
    seen, accuracy, _ = zip(*points)
    return float(np.interp(math.log(images), np.log([1.0, *seen]), [0.0, *accuracy]))


def measure(config, dls, precision, name):
    """(seconds of an epoch, of all else that the run will do) of the network `name`.

    All else is the range test, the figures, and the evaluations in float32 at the end: of valid and test, of their
    mirror images, and of images without classes.
    """
    model = models.build(name, len(dls.vocab), config.pretrained, dls.train.plain()[0])
    models.cam_layer(model, dls.store.size)
    one = dataclasses.replace(config, model=name, epochs=1, minutes=0.0, batch_size=dls.train.bs)
    models.check_batches(model, one, batch_sizes(one), len(dls.train.ids), dls.store.size, ranks.world())
    learn = build(one, dls, model, precision)
    step, evaluation = timing.step_seconds(learn, STEPS), timing.evaluation_seconds(learn)
    image = evaluation / (len(dls.valid.ids) + len(dls.test.ids))
    tried = step * ranks.world() + image * dls.valid.bs * (config.lr_find_on == "valid")  # an update of the range test
    end = 2 if precision == "float32" else 4  # twice for mirror images; float32 takes about twice as long as bf16
    rest = config.lr_iters * tried * (config.lr == "find") + end * (evaluation + image * len(dls.unlabelled)) + FIGURES
    return timing.epoch_seconds(learn, step, evaluation), rest


def choose(config, dls, precision, start):
    """(settings of the network and the epochs that promise most, all choices for env.json); prints the choice.

    The time began at `start`, as time.perf_counter has it. Without `--minutes` nothing is chosen. A network that is not
    in the table is promised nothing: it must be named. Raises BadInput if not even one epoch fits.
    """
    if not config.minutes:
        return {}, {}
    table, seconds, found = learned(), {}, {}
    usable = 60 * config.minutes * (1 - KEPT_FREE)
    for name in MODELS if config.model == "auto" else [config.model]:
        seconds[name] = measure(config, dls, precision, name)
        if sum(seconds[name]) > usable - (time.perf_counter() - start):
            break  # the next are slower
    gone = time.perf_counter() - start
    for name, (epoch, rest) in seconds.items():
        if (n := int((usable - gone - rest) / epoch)) > 0:
            found[name] = n, promised(table[name], n * len(dls.train.ids)) if name in table else None
    if not found:
        needed = math.ceil((gone + min(map(sum, seconds.values()))) / (1 - KEPT_FREE) / 60)
        raise BadInput(f"--minutes {config.minutes:g}: not one epoch fits; pass --minutes {needed}")
    best = max(found, key=lambda name: found[name][1] or 0)
    said = lambda name, n, acc: f"{name}, {counted(n, 'epoch')}" + ("" if acc is None else f" ({acc:.2f})")
    plans = {name: said(name, *plan) for name, plan in found.items()}
    chosen = plans.pop(best)
    others = f"; not chosen: {', or '.join(plans.values())}" if plans else ""
    which = "; in brackets: valid accuracy after as many images of CIFAR-10" if best in table else ""
    print(f"chosen for {duration(60 * config.minutes)}: {chosen}{others}{which}", flush=True)
    return dict(model=best, epochs=found[best][0], minutes=0.0), {"minutes": config.minutes, "choices": found}
