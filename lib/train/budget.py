"""`--minutes`: the network and the number of epochs that promise most in a given time."""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np

from lib import models
from lib.cli import BadInput, duration, one_line, read_json
from lib.config import MODELS
from lib.train import timing
from lib.train.learner import build

TABLE = Path(__file__).parents[2] / "results/networks.json"  # written by tests.benchmarks.networks
KEPT_FREE = 0.1  # share of the time that no plan uses: other programs may come
FIGURES = 15  # seconds of the figures and explanations at the end


def learned():
    """{network: [(training images seen, valid accuracy, runs), …]} of runs of one cycle on CIFAR-10, from TABLE."""
    try:
        return {name: row["learned"] for name, row in read_json(TABLE)["rows"].items() if row.get("learned")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise BadInput(f"{TABLE}: says what networks learn, and cannot be read ({one_line(e)}); restore it") from None


def promised(points, images):
    """The accuracy after `images` images, between `points` in the logarithm of the images; never above the last."""
    seen, accuracy, _ = zip(*points)
    return float(np.interp(math.log(images), np.log([1.0, *seen]), [0.0, *accuracy]))


def fitting(config, learn, start):
    """How many epochs fit into `config.minutes` that began at `start`, as time.perf_counter has it.

    Beside them there are the range test, and the last evaluation in float32, with mirror images.
    """
    step, evaluation = timing.step_seconds(learn), timing.evaluation_seconds(learn)
    test = config.lr_iters * step if config.lr == "find" else 0
    left = 60 * config.minutes * (1 - KEPT_FREE) - (time.perf_counter() - start) - test - 4 * evaluation - FIGURES
    return left / timing.epoch_seconds(learn, step)


def choose(config, dls, precision, start):
    """(`config` with the network and the epochs that promise most, all choices for env.json); prints the choice.

    Without `--minutes` nothing is chosen. A network that is not in the table is promised nothing: it must be named.
    Raises BadInput if not even one epoch fits.
    """
    if not config.minutes:
        return config, {}
    table, images, found = learned(), dls.train.plain()[0], {}
    for name in MODELS if config.model == "auto" else [config.model]:
        one = dataclasses.replace(config, model=name, epochs=1, minutes=0.0)
        learn = build(one, dls, models.build(name, len(dls.vocab), config.pretrained, images), precision)
        epochs = fitting(config, learn, start)
        if epochs < 1:
            break
        known = name in table
        found[name] = int(epochs), promised(table[name], int(epochs) * len(dls.train.ids)) if known else None
    if not found:
        raise BadInput(f"--minutes {config.minutes:g}: not one epoch of {name} fits; pass more minutes")
    best = max(found, key=lambda name: found[name][1] or 0)
    plans = [f"{name}, {n} epochs" + ("" if acc is None else f" ({acc:.2f})") for name, (n, acc) in found.items()]
    chosen = plans.pop(list(found).index(best))
    which = "; in brackets: valid accuracy after as many images of CIFAR-10" * (best in table)
    print("; else ".join([f"{duration(60 * config.minutes)}: {chosen}", *plans]) + which, flush=True)
    resolved = dict(model=best, epochs=found[best][0], minutes=0.0)
    resolved["patience_epochs"] = max(found[best][0] // 10, config.patience_epochs)
    return dataclasses.replace(config, **resolved), {"minutes": config.minutes, "choices": found}
