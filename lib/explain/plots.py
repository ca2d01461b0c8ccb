"""Figures from plain data. Each function returns a matplotlib Figure and touches no global state."""

import math
import textwrap

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator
from scipy import stats

# Okabe and Ito's colours, told apart by colour-blind readers as well
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, "#56B4E9", "#000000", GREY)
MEANINGS = {
    "sixth": "a sixth of the rate of the lowest loss",
    "valley": "in the middle of the longest fall",
    "steep": "where the loss falls fastest",
    "minimum": "a tenth of the rate of the lowest loss",
    "slide": "at the end of the fall",
}  # rule of the range test -> what it means
SETS = {"train": (BLUE, "-"), "valid": (ORANGE, "--"), "test": (VERMILION, "-")}


def axes(width, height, rows=1, cols=1, **kwargs):
    """A figure of so many inches, and its axes, (rows, cols), with a light grid."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, cols, squeeze=False, **kwargs)
    for ax in grid.flat:
        tidy(ax)
    return figure, grid


def tidy(ax):
    """Gives axes a light grid in the place of a frame."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3)


def short(name, most=16):
    """`name`, printable, cut to `most` characters."""
    name = "".join(c if c.isprintable() else "?" for c in str(name))
    return name if len(name) <= most else name[: most - 1] + "…"


def results(
    rows,  # dicts as in results.csv, an epoch each
    title,  # first line of the figure
    target=None,  # accuracy drawn as a line
    best_epoch=None,  # epoch whose weights were kept
    chosen_on="valid",  # the set that chose them
    chosen_by="accuracy",  # and by what
    rates=None,  # (steps, 3) place in epochs, learning rate and momentum of each step; None: those in `rows`
    plateaus=True,  # whether a lower rate, or a larger batch, from one epoch to the next is marked as a plateau
    label_smoothing=0.0,  # of the training loss; valid and test have none
    averaged=False,  # whether an average of the weights was evaluated
):
    """Accuracy, loss, learning rate and momentum over the epochs; vertical lines at plateaus."""
    figure, ((top,), (middle,), (bottom,)) = axes(11.5, 9, 3, sharex=True, height_ratios=(3, 3, 1.4))
    dots = "." if len(rows) < 15 else None
    for name, (colour, line) in SETS.items():
        if f"{name}_acc" not in rows[0] or (name == "valid" and chosen_on == "test"):
            continue
        label = "train (augmented batches)" if name == "train" else f"{name}, averaged weights" if averaged else name
        smoothing = f", label smoothing {label_smoothing:g}" if name == "train" and label_smoothing else ""
        for ax, kind, note in ((top, "acc", ""), (middle, "loss", smoothing)):
            points = [[row["epoch"], row[f"{name}_{kind}"]] for row in rows]
            ax.plot(*zip(*points), line, color=colour, label=label + note, marker=dots)
    if target:
        top.axhline(target, color=GREY, lw=1, ls=":", label=f"target {target:g}")
    if best_epoch and "test_acc" in rows[0]:
        label = f"kept: epoch {best_epoch}, best {chosen_on} {chosen_by}"
        top.plot(best_epoch, rows[best_epoch - 1]["test_acc"], "o", color=VERMILION, mec="black", ms=8, label=label)
    beside = dict(loc="upper left", bbox_to_anchor=(1.01, 1.0))  # no legend lies on a curve
    middle.legend(**beside)  # the legend above names the lines that come now
    for ax in (top, middle, bottom) if plateaus else ():
        mark_changes(ax, rows)
    noted = "\n(test chose the weights and the schedule: no held-out set)" if chosen_on == "test" else ""
    top.set_title(title + noted, parse_math=False)
    top.set(ylabel="accuracy")
    middle.set(ylabel="loss (cross-entropy)", ylim=(0, None))
    if rates is None:
        ends = [(-0.5, row) for row in rows] + [(0.5, rows[-1])]
        rates = np.array([[row["epoch"] + place, row["lr"], row.get("momentum", 0.0)] for place, row in ends])
    draw_rates(bottom, rates)
    top.legend(**beside)
    from_one(top, rows[-1]["epoch"])
    return figure


def from_one(ax, last):
    """An axis of epochs, from 1 to the `last`."""
    ax.set_xlim(0.5, last + 0.5)
    ax.set_xticks([1, *(tick for tick in ax.get_xticks() if 1.5 < tick <= last)])


def mark_changes(ax, rows):
    """Vertical lines where the rate fell, or the batch grew."""
    changed = lambda a, b: b["lr"] < a["lr"] or b.get("batch_size", 0) > a.get("batch_size", 0)
    cuts = [a["epoch"] + 0.5 for a, b in zip(rows, rows[1:]) if changed(a, b)]
    for i, cut in enumerate(cuts):
        label = None if i else "plateau: rate reduced, or batch grown"
        ax.axvline(cut, color=GREY, lw=1, ls="--", alpha=0.6, label=label)


def draw_rates(ax, rates):
    """Learning rate, on a log axis, and momentum over the epochs."""
    places, lrs, momenta = rates.T
    ax.semilogy(places, lrs, color=GREEN, drawstyle="steps-post")
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 2)))
    lrs = lrs[lrs > 0]
    ax.set(ylabel="learning rate", xlabel="epoch", ylim=(lrs.min() / 3, lrs.max() * 3))  # room for two labels
    ax.xaxis.get_major_locator().set_params(integer=True)
    if np.ptp(momenta) == 0:
        return
    right = ax.twinx()
    right.plot(places, momenta, "--", color=PURPLE, lw=1.2, drawstyle="steps-post")
    right.set_ylabel("momentum (dashed)", color=PURPLE)
    right.spines["top"].set_visible(False)


def lr_find(
    lrs,  # (n,) learning rates
    losses,  # (n,) raw losses
    smooth_losses,  # (n,) smoothed losses
    suggestions,  # {rule: learning rate}
    used,  # the rule whose suggestion is used
    title="Learning rate range test",
    linear=False,  # whether the rates rose in equal steps
    loss="training loss",
):
    """The range test: raw and smoothed loss over the rate, each rule's suggestion, the used one named."""
    figure, ((ax,),) = axes(12, 5.5)
    ax.plot(lrs, losses, color=BLUE, alpha=0.35, lw=1, label="loss at each batch")
    ax.plot(lrs, smooth_losses, color=BLUE, lw=2, label="smoothed")
    for (name, lr), colour, marker in zip(suggestions.items(), (BLUE, ORANGE, GREEN, VERMILION, PURPLE), "PosD^"):
        y = np.interp(np.log(lr), np.log(lrs), smooth_losses)
        note, size = ("  (used)", 12) if name == used else ("", 9)
        label = f"{name}: {lr:.3g}{note}" + (f"\n  {MEANINGS[name]}" if name in MEANINGS else "")
        ax.plot(lr, y, marker, color=colour, ms=size, mec="black", label=label, zorder=3)
    ax.axvline(suggestions[used], color=GREY, ls="--", lw=1)
    low, high = np.nanmin([losses, smooth_losses]), max(smooth_losses[: max(len(lrs) // 2, 1)])
    ax.set(xlabel="learning rate", ylabel=loss, ylim=(low - 0.1 * (high - low), high + 0.6 * (high - low)))
    ax.set_xscale("linear" if linear else "log")
    ax.set_title(title, parse_math=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), labelspacing=0.8)
    return figure


def confusion_matrix(counts, classes, title):
    """`counts`, (classes, classes) whole numbers, of how often each class, in rows, was taken for each other.

    Colours are shares of the row; mistakes have a scale of their own, so that few are seen as well.
    """
    n = len(classes)
    side = min(max(5.5, 0.62 * n + 2.2), 24)
    figure, ((ax,),) = axes(side + 2.4, side)
    ax.grid(False)
    share, diagonal = counts / np.maximum(counts.sum(1, keepdims=True), 1), np.eye(n, dtype=bool)
    worst = max(share[~diagonal].max(initial=0), 0.01)
    scales = (True, "Blues", 1, "right"), (False, "Oranges", worst, "wrong, on a scale of its own")
    for right, cmap, top, label in scales:
        shown = np.ma.masked_where(diagonal != right, share)
        bar = ax.imshow(shown, cmap=cmap, vmin=0, vmax=top)
        figure.colorbar(bar, ax=ax, label=f"share of the true class: {label}", shrink=0.8)
    size, turned = (10, dict(rotation=45, ha="right")) if n <= 15 else (7, dict(rotation=90, ha="center"))
    for i, j in zip(*np.nonzero(counts)) if n <= 40 else ():
        dark = share[i, j] > 0.6 * (1 if i == j else worst)
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=size, color="white" if dark else "black")
    places = range(0, n, max(n // 60, 1))
    names = [short(classes[i]) for i in places]
    ax.set_xticks(places, names, parse_math=False, **turned)
    ax.set_yticks(places, names, parse_math=False)
    ax.set(xlabel="prediction", ylabel="truth")
    ax.set_title(title, parse_math=False)
    return figure


def train_batch(images, labels, title):
    """Augmented images, (n, h, w, 3) uint8, and their labels, as one picture: so many axes would take seconds."""
    cols = min(8, len(images))
    rows, (h, w) = math.ceil(len(images) / cols), images.shape[1:3]
    high, wide = round(h * 1.22), round(w * 1.08)  # of a cell, with its name above and white between
    mosaic = np.full((rows * high, cols * wide, 3), 255, np.uint8)
    figure, ((ax,),) = axes(max(1.5 * cols + 0.4, 7), 1.7 * rows + 0.5)
    for i, (image, label) in enumerate(zip(images, labels)):
        y, x = i // cols * high + high - h, i % cols * wide
        mosaic[y : y + h, x : x + w] = image
        ax.text(x + w / 2, y - 0.06 * h, short(label), fontsize=11, ha="center", va="bottom", parse_math=False)
    ax.imshow(mosaic, interpolation="nearest")
    ax.set_title(title, parse_math=False)
    ax.axis("off")
    return figure


def gradcam(
    images,  # (n, h, w, 3) uint8
    why,  # (n, h, w) in 0..1: the map for the prediction
    where,  # (n, h, w) in 0..1: the map for the truth
    rows,  # n rows of mistakes.csv
    title,
):
    """Mistakes, three pictures each: the image, the map for the prediction, the map for the truth."""
    cols = 5 if len(images) > 4 else min(2, len(images))
    lines, wide, high = math.ceil(len(images) / cols), 3.7, 1.85  # of a cell; an image is 1 x 1
    figure, ((ax,),) = axes(max(1.3 * wide * cols, 8), 1.3 * high * lines + 1.5)
    for i, (image, row) in enumerate(zip(images, rows)):
        x, y = i % cols * wide, i // cols * high
        place_image(ax, x, y, image)
        named = dict(parse_math=False, va="bottom", clip_on=False)
        ax.text(x, y - 0.04, f"{row['rank']}.", fontsize=12, **named)
        ax.text(x, y + 1.17, short(row["file"].rsplit("/", 1)[-1], 40), fontsize=8.5, color=GREY, **named)
        for k, (cam, kind) in enumerate(((why[i], "prediction"), (where[i], "truth")), 1):
            left = x + 1.06 * k
            place_image(ax, left, y, image, cam)
            said = f"{'predicted' if k == 1 else 'truth'}, {row[f'p_{kind}']:.1%}"
            ax.text(left, y - 0.2, said, fontsize=10, color=GREY, **named)
            ax.text(left, y - 0.04, short(row[kind], 14), fontsize=12, weight="bold", **named)
    ax.set(xlim=(-0.1, cols * wide - 0.3), ylim=(lines * high - 0.4, -0.55))
    ax.set_aspect("equal")
    ax.axis("off")
    mapped = figure.colorbar(ScalarMappable(cmap="inferno"), ax=ax, location="bottom", shrink=0.25, aspect=40, pad=0.01)
    mapped.set_label("map of a class: where it was seen, from nothing to the most in this image (line: half of it)")
    ax.set_title(title, fontsize=16, pad=14, parse_math=False)
    return figure


def place_image(ax, x, y, image, cam=None):
    """Draws an image as the unit square at (x, y), with a map over it; its contour too, where pixels are few."""
    at = dict(extent=(x, x + 1, y + 1, y), zorder=1)
    ax.imshow(image, interpolation="nearest", **at)
    if cam is None:
        return
    small = len(cam) <= 64
    ax.imshow(cam, cmap="inferno", vmin=0, vmax=1, alpha=0.4 if small else 0.55, interpolation="bilinear", **at)
    if cam.max() <= 0:
        ax.text(x + 0.5, y + 0.5, "empty map:\nnothing speaks\nfor this class", ha="center", va="center", color="white")
    elif small:
        middles = (np.arange(len(cam)) + 0.5) / len(cam)
        ax.contour(x + middles, y + middles, cam, levels=[0.5], colors="#7FFFD4", linewidths=1.1, zorder=2)


def explanation(image, cam, title):
    """An image, (h, w, 3) uint8, and the map for its prediction, (h, w) in 0..1."""
    figure, (row,) = axes(6, 3.4, 1, 2)
    for ax, shown in zip(row, (None, cam)):
        place_image(ax, 0, 0, image, shown)
        ax.axis("off")
    figure.suptitle(title, parse_math=False)
    return figure


def means(points):
    """(epochs, mean seconds, mean accuracies, their deviations, number of runs) of [(epoch, seconds, accuracy), …].

    The points are those of several runs. The arrays end with the run that ends first.
    """
    epochs = pd.DataFrame(points, columns=["epoch", "seconds", "accuracy"]).groupby("epoch")
    n, of_all = epochs.size().max(), epochs.size() == epochs.size().max()
    mean, deviation = epochs.mean()[of_all], epochs.accuracy.std().fillna(0)[of_all]
    return mean.index.to_numpy(), *(a.to_numpy() for a in (mean.seconds, mean.accuracy, deviation)), n


def comparison(
    curves,  # {variant: [(epoch, seconds, test accuracy), …] of all its seeds}
    title,  # first line of the figure
    target=None,  # accuracy drawn as a line, where a curve comes to it
    finals=None,  # {variant: test accuracy of the kept weights of each seed}: a dot each
    timed=True,  # whether seconds can be compared; if not, nothing is drawn against them
):
    """Test accuracy of each variant: curves of the mean over seeds, band of ± 1 deviation; and the end of each seed.

    Up to 5 variants share their axes, against epochs and seconds; of more each has its own, the others in grey.
    """
    found, many = {name: means(points) for name, points in curves.items()}, len(curves) > 5
    rows, cols = (math.ceil(len(curves) / 4), 4) if many else (1, 1 + timed)
    figure = Figure(figsize=(17, min(max(3 * rows, 6), 500)), layout="constrained")  # up to 65,000 pixels, at 130 dpi
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1))
    grid = left.subplots(rows, cols, squeeze=False, sharex=many, sharey=True)
    for i, (name, (marks, seconds, mean, deviation, n)) in enumerate(found.items()):
        look = dict(color=COLOURS[i % len(COLOURS)], marker="." if len(marks) < 15 else None)
        for ax, x in [(grid.flat[i], marks)] if many else zip(grid.flat, (marks, seconds)):
            if many:
                for other in found.values():
                    ax.plot(other[0], other[2], color="#bbbbbb", lw=0.8)
                ax.set_title(textwrap.fill(short(name, 80), 34), fontsize=11, parse_math=False)
            ax.plot(x, mean, label=f"{name} (n = {n})", lw=2, **look)
            ends = mean - deviation, np.minimum(mean + deviation, 1)
            ax.fill_between(x, *ends, color=look["color"], alpha=0.2, lw=0) if n > 1 else None
    for k, ax in enumerate(grid.flat):
        tidy(ax)
        ax.set(xlabel="epoch" if many or k == 0 else "seconds of training, evaluation included")
        ax.set_visible(k < len(curves) or not many)
    highest = min(grid[0, 0].get_ylim()[1], 1.0)
    grid[0, 0].set(ylabel="test accuracy", ylim=(None, highest))
    grid[0, 0].xaxis.get_major_locator().set_params(integer=True)
    from_one(grid[0, 0], max(marks[-1] for marks, *_ in found.values()))
    for ax in grid.flat if target and target <= highest else ():
        ax.axhline(target, color=GREY, lw=1, ls=":", label=f"target {target:g}")
    if not many:
        handles, labels = grid[0, 0].get_legend_handles_labels()
        at = dict(loc="outside lower center", ncols=min(len(labels), 100 // max(map(len, labels))) or 1)
        for text in left.legend(handles, labels, **at).get_texts():
            text.set_parse_math(False)
    draw_finals(right, finals or {name: [] for name in curves})
    bands = ": mean over seeds, band of ± 1 standard deviation" if max(one[4] for one in found.values()) > 1 else ""
    figure.suptitle(f"{title}{bands}", parse_math=False)
    return figure


def draw_finals(figure, finals):
    """A line a variant: a dot for each seed, the mean, and its 95% interval (Student's t)."""
    ax = figure.subplots()
    for i, values in enumerate(finals.values()):
        colour, n = COLOURS[i % len(COLOURS)], len(values)
        ax.plot(values, [i] * n, "o", color=colour, alpha=0.45, ms=6)
        if n > 1:
            half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
            ax.errorbar(np.mean(values), i, xerr=half, fmt="|", color=colour, ms=14, mew=2, capsize=4)
    names = [textwrap.fill(short(name, 80), 26) for name in finals]
    ax.set_yticks(range(len(finals)), names, parse_math=False)
    ax.set(ylim=(len(finals) - 0.5, -0.5), xlabel="test accuracy\nof the kept weights:\nseeds, mean, 95% interval")
    ax.set_xlim(None, min(ax.get_xlim()[1], 1.0005))
    ax.xaxis.set_major_locator(MaxNLocator(4))  # their numbers are long
    tidy(ax)
