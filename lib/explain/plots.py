"""Figures from plain data. Each function returns a matplotlib Figure and touches no global state."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator

# Okabe and Ito's colours, told apart by colour-blind readers as well
BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, "#56B4E9", "#000000", GREY)
SETS = {"train": (BLUE, "-"), "valid": (ORANGE, "--"), "test": (VERMILION, "-")}


def axes(width, height, rows=1, cols=1, **kwargs):
    """A figure of so many inches, and its axes, (rows, cols), with a light grid."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, cols, squeeze=False, **kwargs)
    for ax in grid.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    return figure, grid


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
    rates=None,  # (steps, 3) place in epochs, learning rate and momentum of each step; None: an epoch's first step
    plateaus=True,  # whether a fall of the rate, or a rise of the batch size, between epochs is one
    label_smoothing=0.0,  # that the training loss has and the others have not
    averaged=False,  # whether an average of the weights was evaluated
    small=None,  # (epochs, side): so long images were of so many pixels
):
    """Accuracy, loss, learning rate and momentum over the epochs; vertical lines at plateaus and where images grow."""
    figure, ((top,), (middle,), (bottom,)) = axes(9, 9, 3, sharex=True, height_ratios=(3, 3, 1.4))
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
    if best_epoch:
        label = f"kept: epoch {best_epoch}, best {chosen_on} accuracy"
        top.plot(best_epoch, rows[best_epoch - 1]["test_acc"], "o", color=VERMILION, mec="black", ms=8, label=label)
    middle.legend(loc="upper right")  # the legend above names the lines that come now
    for ax in (top, middle, bottom):
        mark_changes(ax, rows, plateaus, small)
    noted = "\n(test chose the weights and the schedule: no held-out set)" if chosen_on == "test" else ""
    top.set_title(title + noted, parse_math=False)
    top.set(ylabel="accuracy")
    middle.set(ylabel="loss (cross-entropy)", ylim=(0, None))
    if rates is None:
        rates = np.array([[row["epoch"] - 0.5, row["lr"], row.get("momentum", 0.0)] for row in rows])
    draw_rates(bottom, rates)
    top.legend(loc="lower right")
    return figure


def mark_changes(ax, rows, plateaus, small):
    """Vertical lines where the rate fell, or the batch grew, and where images grew."""
    changed = lambda a, b: b["lr"] < a["lr"] or b.get("batch_size", 0) > a.get("batch_size", 0)
    cuts = [a["epoch"] + 0.5 for a, b in zip(rows, rows[1:]) if plateaus and changed(a, b)]
    for i, cut in enumerate(cuts):
        label = None if i else "plateau: rate reduced, or batch grown"
        ax.axvline(cut, color=GREY, lw=1, ls="--", alpha=0.6, label=label)
    if small and small[0] < len(rows):
        label = f"before: images of {small[1]} x {small[1]} pixels"
        ax.axvline(small[0] + 0.5, color=BLUE, lw=1.5, ls=":", label=label)


def draw_rates(ax, rates):
    """Learning rate, on a log axis, and momentum over the epochs."""
    places, lrs, momenta = rates.T
    ax.semilogy(places, lrs, color=GREEN, drawstyle="steps-post")
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 2)))
    lrs = lrs[lrs > 0]
    ax.set(ylabel="learning rate", xlabel="epoch", ylim=(lrs.min() / 3, lrs.max() * 3))  # room for two labels
    ax.xaxis.get_major_locator().set_params(integer=True)
    right = ax.twinx()
    right.plot(places, momenta, "--", color=ORANGE, lw=1.2, drawstyle="steps-post")
    right.set(ylim=(0, 1))
    right.set_ylabel("momentum (dashed)", color=ORANGE)
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
    figure, ((ax,),) = axes(9, 5.5)
    ax.plot(lrs, losses, color=BLUE, alpha=0.35, lw=1, label="loss at each batch")
    ax.plot(lrs, smooth_losses, color=BLUE, lw=2, label="smoothed")
    for (name, lr), colour, marker in zip(suggestions.items(), (ORANGE, GREEN, VERMILION, PURPLE), "osD^"):
        y = np.interp(np.log(lr), np.log(lrs), smooth_losses)
        label, side = f"{name}: {lr:.3g}" + ("  (used)" if name == used else ""), 12 if name == used else 9
        ax.plot(lr, y, marker, color=colour, ms=side, mec="black", label=label, zorder=3)
    ax.axvline(suggestions[used], color=GREY, ls="--", lw=1)
    low, high = np.nanmin([losses, smooth_losses]), max(smooth_losses[: max(len(lrs) // 2, 1)])
    ax.set(xlabel="learning rate", ylabel=loss, ylim=(low - 0.1 * (high - low), high + 0.6 * (high - low)))
    ax.set_xscale("linear" if linear else "log")
    ax.set_title(title, parse_math=False)
    ax.legend()
    return figure


def confusion_matrix(counts, classes, title):
    """`counts`, (classes, classes) whole numbers, of how often each class, in rows, was taken for each other.

    The colour is the share of the row.
    """
    n = len(classes)
    side = min(max(5.5, 0.62 * n + 2.2), 24)
    figure, ((ax,),) = axes(side + 1, side)
    ax.grid(False)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure.colorbar(ax.imshow(share, cmap="Blues", vmin=0, vmax=1), ax=ax, label="share of the true class", shrink=0.8)
    size, turned = (10, dict(rotation=45, ha="right")) if n <= 15 else (7, dict(rotation=90, ha="center"))
    for i, j in zip(*np.nonzero(counts)) if n <= 40 else ():
        colour = "white" if share[i, j] > 0.55 else "black"
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=size, color=colour)
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
    draw_image(ax, mosaic, title)
    return figure


def draw_image(ax, image, title="", cam=None, **font):
    """An image, with a map over it where there is one."""
    ax.imshow(image, interpolation="nearest")
    if cam is not None:
        ax.imshow(cam, cmap="inferno", vmin=0, vmax=1, alpha=0.55)
    ax.set_title(title, parse_math=False, **font)
    ax.axis("off")


def gradcam(
    images,  # (n, h, w, 3) uint8
    why,  # (n, h, w) in 0..1: the map for the prediction
    where,  # (n, h, w) in 0..1: the map for the truth
    rows,  # n rows of mistakes.csv
    title,
):
    """Mistakes, three pictures each: the image, the map for the prediction, the map for the truth."""
    cols = 5 if len(images) > 4 else min(2, len(images))
    lines = math.ceil(len(images) / cols)
    figure = Figure(figsize=(4.6 * cols, 2.3 * lines + 0.7), layout="constrained")
    cells = figure.subfigures(lines, cols, squeeze=False).flat
    for cell, image, *cams, row in zip(cells, images, why, where, rows):
        p_truth = "<0.1%" if row["p_truth"] < 0.001 else f"{row['p_truth']:.1%}"
        heading = f"{row['rank']}. predicted {short(row['prediction'])} {row['p_prediction']:.0%}"
        cell.suptitle(f"{heading}, truth {short(row['truth'])} {p_truth}", fontsize=13, parse_math=False)
        names = "image", f"why {row['prediction']}", f"where {row['truth']}"
        for ax, cam, name in zip(cell.subplots(1, 3), (None, *cams), names):
            draw_image(ax, image, short(name), cam, fontsize=11.5)
    figure.suptitle(title, fontsize=17, parse_math=False)
    return figure


def explanation(image, cam, title):
    """An image, (h, w, 3) uint8, and the map for its prediction, (h, w) in 0..1."""
    figure, ((left, right),) = axes(6, 3.4, 1, 2)
    draw_image(left, image)
    draw_image(right, image, cam=cam)
    figure.suptitle(title, parse_math=False)
    return figure


def comparison(
    curves,  # {variant: [(epoch, seconds, test accuracy), …] of all its seeds}
    title,  # first line of the figure
    target=None,  # accuracy drawn as a line, where a curve comes to it
):
    """Test accuracy of each variant against epochs and against seconds: mean over seeds, band of ± 1 deviation."""
    figure, ((left, right),) = axes(13, 6, 1, 2, sharey=True)
    for i, (name, points) in enumerate(curves.items()):
        points = np.array(points, float)
        marks = np.unique(points[:, 0])
        groups = [points[points[:, 0] == mark] for mark in marks]
        n, (_, seconds, mean) = max(map(len, groups)), np.array([group.mean(0) for group in groups]).T
        deviation = np.array([group[:, 2].std(ddof=1) if len(group) > 1 else 0 for group in groups])
        colour, line = COLOURS[i % len(COLOURS)], ("-", "--", "-.", ":")[i // len(COLOURS) % 4]
        for ax, x in ((left, marks), (right, seconds)):
            ax.plot(x, mean, line, color=colour, label=f"{name} (n = {n})", marker="." if len(marks) < 15 else None)
            if n > 1:
                ax.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
    reached = target and target <= left.get_ylim()[1]
    for ax, unit in ((left, "epoch"), (right, "seconds of training, evaluation included")):
        if reached:
            ax.axhline(target, color=GREY, lw=1, ls=":", label=f"target {target:g}")
        ax.set(xlabel=unit)
    left.set(ylabel="test accuracy")
    left.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = left.get_legend_handles_labels()
    columns = min(len(labels), 5 if max(map(len, labels)) < 30 else 3)
    for text in figure.legend(handles, labels, loc="outside lower center", ncols=columns).get_texts():
        text.set_parse_math(False)
    bands = ": mean over seeds, band of ± 1 standard deviation" if left.collections else ""
    figure.suptitle(f"{title}{bands}", parse_math=False)
    return figure
