"""Figures from plain data. Each function returns a matplotlib Figure and touches no global state."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator

# Okabe and Ito's colours, told apart by colour-blind readers as well
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"


SETS = {
    "train": (BLUE, "-", "train (augmented batches)"),
    "valid": (ORANGE, "--", "valid"),
    "test": (VERMILION, "-", "test"),
}


def axes(width, height, rows=1, cols=1, **kwargs):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False, **kwargs)


def plain(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3)
    return ax


def results(
    rows,  # dicts as in results.csv, an epoch each
    title,  # first line of the figure
    target=None,  # accuracy drawn as a line
    best_epoch=None,  # epoch whose weights were kept
    chosen_on="valid",  # the set that chose them
    trace=None,  # (steps, 2) learning rate and momentum of each step; None: the first step of each epoch
    plateaus=True,  # whether a fall of the rate, or a rise of the batch size, between epochs is one
    label_smoothing=0.0,  # that the training loss has and the others have not
    averaged=False,  # whether an average of the weights was evaluated
    small=None,  # (epochs, side): so long images were of so many pixels
):
    """Accuracy, loss, learning rate and momentum over the epochs; vertical lines at plateaus and where images grow."""
    figure, ((top,), (middle,), (bottom,)) = axes(9, 9, 3, sharex=True, height_ratios=(3, 3, 1.4))
    epochs = [r["epoch"] for r in rows]
    acted = lambda a, b: b["lr"] < a["lr"] or b.get("batch_size", 0) > a.get("batch_size", 0)
    cuts = [a["epoch"] + 0.5 for a, b in zip(rows, rows[1:]) if plateaus and acted(a, b)]
    shown = [s for s in SETS if f"{s}_acc" in rows[0] and not (s == "valid" and chosen_on == "test")]
    for ax, what in ((top, "acc"), (middle, "loss")):
        for name in shown:
            colour, line, label = SETS[name]
            if what == "loss" and name == "train" and label_smoothing:
                label = f"train (augmented batches, label smoothing {label_smoothing:g})"
            label += ", averaged weights" if averaged and name != "train" else ""
            marker, values = "." if len(rows) < 15 else None, [r[f"{name}_{what}"] for r in rows]
            ax.plot(epochs, values, line, color=colour, label=label, marker=marker)
    if target:
        top.axhline(target, color=GREY, lw=1, ls=":", label=f"target {target:g}")
    if best_epoch:
        kept = dict(color=VERMILION, mec="black", ms=8, label=f"kept: epoch {best_epoch}, best {chosen_on} accuracy")
        top.plot(best_epoch, rows[best_epoch - 1]["test_acc"], "o", **kept)
    top.set(ylabel="accuracy")
    noted = "\n(test chose the weights and the schedule: no held-out set)" if chosen_on == "test" else ""
    top.set_title(title + noted, parse_math=False)
    middle.set(ylabel="loss (cross-entropy)", ylim=(0, None))
    if trace is None:
        trace = np.array([[r["lr"], r.get("momentum", 0.0)] for r in rows])
    at = 0.5 + np.arange(len(trace)) * len(rows) / len(trace)  # the steps of epoch e lie around its mark
    bottom.semilogy(at, trace[:, 0], color=GREEN, drawstyle="steps-post")
    bottom.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    bottom.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 2)))
    rates = trace[trace[:, 0] > 0, 0]
    bottom.set(ylabel="learning rate", xlabel="epoch", ylim=(rates.min() / 3, rates.max() * 3))  # room for two labels
    right = bottom.twinx()
    right.plot(at, trace[:, 1], "--", color=ORANGE, lw=1.2, drawstyle="steps-post")
    right.set(ylim=(0, 1))
    right.set_ylabel("momentum (dashed)", color=ORANGE)
    right.spines["top"].set_visible(False)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for ax in (top, middle, bottom):
        for i, cut in enumerate(cuts):
            label = "plateau: rate reduced, or batch grown" if i == 0 and ax is top else None
            ax.axvline(cut, color=GREY, lw=1, ls="--", alpha=0.6, label=label)
        if small and small[0] < len(rows):
            label = f"before: images of {small[1]} x {small[1]} pixels" if ax is top else None
            ax.axvline(small[0] + 0.5, color=BLUE, lw=1.5, ls=":", label=label)
        plain(ax)
    top.legend(loc="lower right")
    middle.legend(loc="upper right")
    return figure


def lr_find(
    lrs,  # (n,) learning rates
    losses,  # (n,) raw losses
    smooth_losses,  # (n,) smoothed losses
    suggestions,  # {rule: learning rate}
    used,  # the rule whose suggestion is used
    title="Learning rate range test",
    linear=False,  # whether the rates rose in equal steps
    what="training loss",
):
    """The range test: raw and smoothed loss over the rate, each rule's suggestion, the used one named."""
    figure, ((ax,),) = axes(9, 5.5)
    ax.plot(lrs, losses, color=BLUE, alpha=0.35, lw=1, label="loss at each batch")
    ax.plot(lrs, smooth_losses, color=BLUE, lw=2, label="smoothed")
    ax.set_xscale("linear" if linear else "log")
    for (name, lr), colour, marker in zip(suggestions.items(), (ORANGE, GREEN, VERMILION, "#CC79A7"), "osD^"):
        y = np.interp(np.log(lr), np.log(lrs), smooth_losses)
        label = f"{name}: {lr:.3g}" + ("  (used)" if name == used else "")
        ax.plot(lr, y, marker, color=colour, ms=12 if name == used else 9, mec="black", label=label, zorder=3)
    ax.axvline(suggestions[used], color=GREY, ls="--", lw=1)
    low, high = np.nanmin([losses, smooth_losses]), max(smooth_losses[: max(len(lrs) // 2, 1)])
    ax.set(xlabel="learning rate", ylabel=what, ylim=(low - 0.1 * (high - low), high + 0.6 * (high - low)))
    ax.set_title(title, parse_math=False)
    plain(ax).legend()
    return figure


def confusion_matrix(
    counts,  # (classes, classes) whole numbers; rows are the truth
    classes,  # class names
    title,
):
    """How often each class was taken for each other; the colour is the share of the row."""
    n = len(classes)
    side = min(max(5.5, 0.62 * n + 2.2), 24)
    figure, ((ax,),) = axes(side + 1, side)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, label="share of the true class", shrink=0.8)
    size, turned = (10, dict(rotation=45, ha="right")) if n <= 15 else (7, dict(rotation=90, ha="center"))
    for i, j in zip(*np.nonzero(counts)) if n <= 40 else ():
        colour = "white" if share[i, j] > 0.55 else "black"
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=size, color=colour)
    step = max(n // 60, 1)
    names = [short(c) for c in classes]
    ax.set_xticks(range(0, n, step), names[::step], parse_math=False, **turned)
    ax.set_yticks(range(0, n, step), names[::step], parse_math=False)
    ax.set(xlabel="prediction", ylabel="truth")
    ax.set_title(title, parse_math=False)
    return figure


def train_batch(
    images,  # (n, h, w, 3) uint8, as the network is fed them
    labels,  # n class names
    title,
):
    """The first augmented images of training."""
    cols = min(8, len(images))
    rows, (h, w) = math.ceil(len(images) / cols), images.shape[1:3]
    high, wide = round(h * 1.22), round(w * 1.08)  # of a cell, with its name above and white between
    mosaic = np.full((rows * high, cols * wide, 3), 255, np.uint8)
    figure, ((ax,),) = axes(max(1.5 * cols + 0.4, 7), 1.7 * rows + 0.5)  # one picture: so many axes would take seconds
    for i, (image, label) in enumerate(zip(images, labels)):
        y, x = i // cols * high + high - h, i % cols * wide
        mosaic[y : y + h, x : x + w] = image
        ax.text(x + w / 2, y - 0.06 * h, short(label), fontsize=11, ha="center", va="bottom", parse_math=False)
    ax.imshow(mosaic, interpolation="nearest")
    ax.axis("off")
    ax.set_title(title, parse_math=False)
    return figure


def gradcam(
    images,  # (n, h, w, 3) uint8
    why,  # (n, h, w) in 0..1: the map for the prediction
    where,  # (n, h, w) in 0..1: the map for the truth
    rows,  # n rows of mistakes.csv
    title,
):
    """Mistakes, three pictures each: the image, the map for the prediction, the map for the truth."""
    cols = min(5, len(images)) if len(images) > 4 else min(2, len(images))
    lines = math.ceil(len(images) / cols)
    figure = Figure(figsize=(4.6 * cols, 2.3 * lines + 0.7), layout="constrained")
    cells = np.ravel(figure.subfigures(lines, cols, squeeze=False))
    for cell, image, a, b, row in zip(cells, images, why, where, rows):
        said = f"{row['rank']}. predicted {short(row['prediction'])} {row['p_prediction']:.0%}"
        p_truth = "<0.1%" if row["p_truth"] < 0.001 else f"{row['p_truth']:.1%}"
        cell.suptitle(f"{said}, truth {short(row['truth'])} {p_truth}", fontsize=13, parse_math=False)
        names = "image", f"why {row['prediction']}", f"where {row['truth']}"
        for ax, cam, name in zip(cell.subplots(1, 3), (None, a, b), names):
            ax.imshow(image, interpolation="nearest")
            if cam is not None:
                ax.imshow(cam, cmap="inferno", vmin=0, vmax=1, alpha=0.55)
            ax.set_title(short(name), fontsize=11.5, parse_math=False)
            ax.axis("off")
    figure.suptitle(title, fontsize=17, parse_math=False)
    return figure


def explanation(
    image,  # (h, w, 3) uint8
    cam,  # (h, w) in 0..1: the map for the prediction
    title,
):
    """One image, and what the prediction was made of."""
    figure, (pair,) = axes(6, 3.4, 1, 2)
    for ax in pair:
        ax.imshow(image, interpolation="nearest")
        ax.axis("off")
    pair[1].imshow(cam, cmap="inferno", vmin=0, vmax=1, alpha=0.55)
    figure.suptitle(title, parse_math=False)
    return figure


def short(name, most=16):
    """`name`, printable, cut to `most` characters."""
    name = "".join(c if c.isprintable() else "?" for c in str(name))
    return name if len(name) <= most else name[: most - 1] + "…"


def comparison(
    curves,  # {variant: [(epoch, seconds, test accuracy), …] of all its seeds}
    title,  # first line of the figure
    target=None,  # accuracy drawn as a line, where a curve comes to it
):
    """Test accuracy of each variant against epochs and against seconds: mean over seeds, band of ± 1 deviation."""
    figure, ((left, right),) = axes(13, 6, 1, 2, sharey=True)
    bands = ""
    colours = [BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000", GREY]
    for i, (name, points) in enumerate(curves.items()):
        epochs, seconds, acc = np.array(points, float).T
        marks = np.unique(epochs)
        each = [epochs == e for e in marks]
        mean = np.array([acc[at].mean() for at in each])
        deviation = np.array([acc[at].std(ddof=1) if at.sum() > 1 else 0 for at in each])
        n = max(int(at.sum()) for at in each)
        colour, line = colours[i % len(colours)], ["-", "--", "-.", ":"][i // len(colours) % 4]
        for ax, x in ((left, marks), (right, [seconds[at].mean() for at in each])):
            ax.plot(x, mean, line, color=colour, label=f"{name} (n = {n})", marker="." if len(marks) < 15 else None)
            if n > 1:
                bands = ": mean over seeds, band of ± 1 standard deviation"
                ax.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
    within = target and target <= left.get_ylim()[1]
    for ax, what in ((left, "epoch"), (right, "seconds of training, evaluation included")):
        if within:
            ax.axhline(target, color=GREY, lw=1, ls=":", label=f"target {target:g}")
        ax.set(xlabel=what)
        plain(ax)
    left.set(ylabel="test accuracy")
    left.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = left.get_legend_handles_labels()
    columns = min(len(labels), 5 if max(map(len, labels)) < 30 else 3)
    for text in figure.legend(handles, labels, loc="outside lower center", ncols=columns).get_texts():
        text.set_parse_math(False)
    figure.suptitle(f"{title}{bands}", parse_math=False)
    return figure
