"""The two drawings of docs/lecture.md: Nesterov's look-ahead, and a rate that is too small, right and too large.

uv run python -m tests.benchmarks.teach [--epochs 10] [--seeds 0 1 2] [--out results/teach]

Writes nesterov.png, rates.png, and teach.json with all numbers that the page takes from them. It takes two minutes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback

from lib import models
from lib.config import Config
from lib.data import get_dls
from lib.explain.plots import BLUE, GREEN, GREY, VERMILION, axes
from lib.machine import seed_everything
from lib.runs import write_figure
from lib.train import SGDLearner, lr_range
from lib.train.optimizers import OPTIMIZERS
from lib.train.recorder import Diverged
from tests.benchmarks.common import machine, save

ROOT = Path(__file__).parent.parent.parent
BOWL = dict(curvatures=[1.0, 20.0], start=[-10.0, 2.0], lr=0.03, momentum=0.9, steps=60)
FACTORS = {"too small": 1 / 100, "right": 1, "too large": 10}  # multiples of the rate that the range test finds
COLOURS = dict(zip(FACTORS, (BLUE, GREEN, VERMILION)))


def descend(optimizer, curvatures, start, lr, momentum, steps):
    """The path of a torch optimizer down the bowl sum(curvature * w^2) / 2, (steps + 1, 2), and the loss on it."""
    w, curvatures = torch.tensor(start, requires_grad=True), torch.tensor(curvatures)
    opt, path = OPTIMIZERS[optimizer]([w], lr, momentum), [start]
    for _ in range(steps):
        opt.zero_grad()
        (curvatures * w**2 / 2).sum().backward()
        opt.step()
        path.append(w.tolist())
    path = np.array(path)
    return path, (curvatures.numpy() * path**2 / 2).sum(1)


def nesterov_figure(bowl):
    """A figure of one step, both paths and both losses; {optimizer: steps after which its loss stays below 1%}."""
    figure, ((one, both, fall),) = axes(15, 4.6, 1, 3)
    curvatures, lr, momentum = np.array(bowl["curvatures"]), bowl["lr"], bowl["momentum"]
    steps = {}
    for name, colour, label in (("sgd", BLUE, "momentum"), ("nesterov", VERMILION, "Nesterov")):
        path, heights = descend(name, **bowl)
        steps[name] = int(np.flatnonzero(heights >= heights[0] / 100)[-1]) + 1
        both.plot(*path.T, ".-", color=colour, lw=1, label=label)
        fall.semilogy(heights, color=colour, label=label)
    w, before = descend("sgd", **bowl)[0][[2, 1]]
    ahead = w + momentum * (w - before)
    arrow = lambda a, b, colour: one.annotate("", b, a, arrowprops=dict(arrowstyle="-|>", color=colour, lw=2))
    arrow(w, ahead, GREY)
    for place, colour, label in (
        (w, BLUE, "momentum: gradient at the black dot"),
        (ahead, VERMILION, "Nesterov: gradient at the tip of the grey arrow"),
    ):
        arrow(ahead, ahead - lr * curvatures * place, colour)
        one.plot(*(ahead - lr * curvatures * place), "o", color=colour, label=label)
    one.plot(*w, "ko", label="the weights; grey: where the velocity leads")
    x, y = np.meshgrid(np.linspace(-11, 8, 200), np.linspace(-3.4, 3.4, 200))
    for ax in (one, both):
        ax.contour(x, y, (curvatures[0] * x**2 + curvatures[1] * y**2) / 2, 12, colors=GREY, alpha=0.3, linewidths=0.8)
        ax.grid(False)
    one.set(title="One step, with the gradient of two places", xlim=(-10, -4), ylim=(-2.9, 2.9))
    both.set(title=f"{bowl['steps']} steps from the same place", xlim=(-11, 8), ylim=(-3.4, 3.4))
    fall.axhline(fall.get_lines()[0].get_ydata()[0] / 100, color=GREY, ls=":", label="1% of the start")
    fall.set(title="Loss", xlabel="step")
    for ax in (one, both, fall):
        ax.legend(loc="upper right", fontsize=9)
    return figure, steps


class BatchLosses(Callback):
    """The loss of each training batch."""

    def before_fit(self):
        self.batches = []

    def after_loss(self):
        if self.training:
            self.batches.append(float(self.loss))


def train(seed, factor, epochs):
    """A fit of the digits at a constant rate: (rate, losses of the batches, test accuracy or None if it diverged)."""
    config = Config(data="digits", seeds=(seed,))
    dls = get_dls(config)
    seed_everything(seed)
    model = models.build("small", len(dls.vocab), images=dls.train.plain()[0])
    learn, losses = SGDLearner(dls, model), BatchLosses()
    lr = factor * lr_range.find(learn).suggestions[config.lr_suggest]
    try:
        with learn.no_bar(), learn.no_logging():
            learn.fit(epochs, lr, cbs=losses)
    except Diverged:
        return lr, losses.batches, None
    return lr, losses.batches, learn.recorder.rows[-1]["test_acc"]


def rates_figure(runs, batches):
    """A figure of the loss of each step, a line for each run; `runs`: {name: [(rate, losses, test accuracy), …]}."""
    figure, ((ax,),) = axes(9, 4.6)
    for name, found in runs.items():
        lrs = sorted(lr for lr, _, _ in found)
        label = f"{name}: {lrs[0]:.2g}" + (f" to {lrs[-1]:.2g}" if len(lrs) > 1 else "")
        for i, (_, losses, _) in enumerate(found):
            ax.semilogy(losses, color=COLOURS[name], lw=1, alpha=0.7, label=None if i else label)
    ax.axhline(np.log(10), color=GREY, ls=":", label="loss of guessing, ln 10")
    ax.set(xlabel=f"step ({batches} make an epoch)", ylabel="training loss of the batch", title="Digits, constant rate")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", default=10, type=int)
    p.add_argument("--seeds", nargs="+", default=[0, 1, 2], type=int)
    p.add_argument("--out", default=ROOT / "results/teach", type=Path)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figure, steps = nesterov_figure(BOWL)
    write_figure(args.out / "nesterov.png", figure)
    runs = {name: [train(seed, factor, args.epochs) for seed in args.seeds] for name, factor in FACTORS.items()}
    batches = len(runs["right"][0][1]) // args.epochs
    write_figure(args.out / "rates.png", rates_figure(runs, batches))
    last = lambda losses: float(np.mean(losses[-batches:])) if np.isfinite(losses).all() else None
    rates = {
        name: [dict(lr=lr, steps=len(losses), last_loss=last(losses), test_acc=acc) for lr, losses, acc in found]
        for name, found in runs.items()
    }
    bowl = {**BOWL, "steps_to_1_percent": steps}
    save(args.out / "teach.json", {"bowl": bowl, "epochs": args.epochs, "rates": rates, "machine": machine()})


if __name__ == "__main__":
    main()
