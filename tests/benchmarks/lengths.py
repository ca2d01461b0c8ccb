"""Schedules compared for few epochs and for many: one figure and one table from finished comparisons.

uv run train_fastai.py --model small --schedule plateau one_cycle --epochs 5 --seeds 0 1 2 --name epochs-5
(repeat this for each number of epochs)
uv run python -m tests.benchmarks.lengths runs/epochs-5 runs/epochs-15 --out runs/lengths

All folders are comparisons of the same variants. Each has another number of epochs. The figure has a dot for
each run, and a line through the means. The table has means, standard deviations, and paired differences with 95%
intervals.
"""

import argparse
from pathlib import Path

import pandas as pd

from lib.compare import interval, spread
from lib.explain import plots
from lib.runs import write, write_figure

LEGEND = """Test accuracy of the kept weights: mean ± standard deviation over n seeds. Differences are paired by seed,
with half the width of their 95% interval.
"""


def read(folders):
    """All runs of the comparisons: variant, seed, epochs, test_acc, last_test_acc, train_seconds."""
    runs = []
    for folder in map(Path, folders):
        table = pd.read_csv(folder / "comparison.csv")
        table["epochs"] = [len(pd.read_csv(folder / run / "results.csv")) for run in table["folder"]]
        runs.append(table)
    return pd.concat(runs).sort_values("epochs", kind="stable")


def table(runs):
    """The runs as Markdown: a row for each number of epochs, a column for each variant, and the paired difference."""
    first, *others = dict.fromkeys(runs["variant"])
    head = ["epochs", "n", first]
    for name in others:
        head += [name, f"{name} - {first}"]
    lines = [head, ["---"] * len(head)]
    for epochs, group in runs.groupby("epochs"):
        scores = {name: part.set_index("seed")["test_acc"] for name, part in group.groupby("variant")}
        row = [str(epochs), str(len(scores[first])), spread(list(scores[first]))]
        for name in others:
            both = scores[first].index.intersection(scores[name].index)
            mean, half = interval(scores[name][both], scores[first][both])
            row += [spread(list(scores[name])), f"{mean:+.4f}" + (f" ± {half:.4f}" if half is not None else "")]
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(runs):
    """Test accuracy against epochs: a dot for each run, and a line through the means."""
    drawing, grid = plots.axes(8, 5)
    ax, lengths = grid[0, 0], sorted(set(runs["epochs"]))
    for colour, (name, part) in zip(plots.COLOURS, runs.groupby("variant", sort=False)):
        means = part.groupby("epochs")["test_acc"].mean()
        ax.plot(means.index, means, color=colour, label=name)
        ax.scatter(part["epochs"], part["test_acc"], color=colour, s=20, alpha=0.6)
    ax.set(xscale="log", xlabel="epochs of the whole run", ylabel="test accuracy of the kept weights")
    ax.set_xticks(lengths, list(map(str, lengths)))
    ax.minorticks_off()
    ax.legend()
    ax.set_title("Which schedule, for how many epochs? A dot for each run, lines through the means")
    return drawing


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folders", nargs="+", help="comparisons of the same variants, each of one number of epochs")
    p.add_argument("--out", default="runs/lengths", help="folder of lengths.md and lengths.png")
    args = p.parse_args(argv)
    runs = read(args.folders)
    write(Path(args.out) / "lengths.md", f"{LEGEND}\n{table(runs)}\n")
    write_figure(Path(args.out) / "lengths.png", figure(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
