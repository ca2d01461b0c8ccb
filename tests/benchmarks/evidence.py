"""The claims of docs/lecture.md, tried: the network `small` on all of CIFAR-10, 30 epochs, 5 seeds for each variant.

uv run python -m tests.benchmarks.evidence [--groups schedules …] [--jobs 2]

A variant is trained by train_fastai.py with one thread, `--jobs` runs at a time, seed by seed. A finished run leaves
its numbers in OUT/runs, and is not run again: stop this at any time, and the same command goes on. Optimizers and
momenta run twice: at the rate of their own range test, and at the best rate of a grid. The grid has steps of about 3
and runs 10 epochs of flat_cos with seed 0; the accuracy on valid chooses. (In 10 epochs of plateau, one cut more or
less counts for more than the rate.) Such a grid is rough: the table of best rates has a variant at its range tests'
rates, if its mean accuracy on valid is higher there. The tables and figures go to OUT (results/evidence).
"""

import argparse
import fcntl
import math
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from lib import compare
from lib.cli import read_json
from lib.config import MACHINE, PATHS, Config, parse
from lib.explain import plots
from lib.runs import write, write_csv, write_figure

ROOT = Path(__file__).parent.parent.parent
COMMON = "--model small --ema 0 --threads 1 --gallery 0 --target 0 --no-progress".split()
FILES = ("args.yaml", "env.json", "results.csv", "lr_find.csv")
SAME = ("data_fingerprint", "precision", "cpu_capability")  # in the env.json of all runs
ASIDE = (*MACHINE, *PATHS, "name")  # settings that do not make a variant
RATES_CSV = "variant grid n range_test_acc grid_test_acc gain half_of_95_interval".split()
RATES = [float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 3)]  # of the grid
TUNED = {
    **{name: ["--optimizer", name] for name in ("nesterov", "rmsprop", "adagrad", "adam")},
    "momentum 0": ["--momentum", "0", "--lr-high", "100"],  # its best rates are ten times those of momentum 0.9
    "momentum 0.75": ["--momentum", "0.75"],
    "momentum 0.99": ["--momentum", "0.99", "--lr-iters", "100"],
}
VARIANTS = {
    "momentum 0.99, a longer range test": ["--momentum", "0.99"],
    "plateau": [],
    "constant": ["--schedule", "constant"],
    "one cycle": ["--schedule", "one_cycle"],
    "warm-up": ["--warmup-epochs", "2"],
    "constant, averaged": ["--schedule", "constant", "--ema", "0.999"],
    "growing batch": ["--schedule", "grow_batch", "--max-batch-size", "5000"],  # plateau cuts three times: 4,743
    "batches of 512": ["-b", "512"],
    "balanced": ["--balanced-batches"],
    "noise 1e-6": ["--grad-noise", "1e-6"],
    "noise 1e-4": ["--grad-noise", "1e-4"],
    "constant, perturbed": ["--schedule", "constant", "--grad-noise", "1e-2", "--perturb-on-plateau"],
    **TUNED,
}
# group: its question, and its variants (SGD with momentum 0.9 under plateau, unless they say otherwise). The others are
# compared with the first.
GROUPS = {
    "schedules": (
        "Does a constant rate stall, where plateau goes on? Does an average of the weights make up for it? "
        "Does one cycle, or a warm-up, end higher in the same 30 epochs?",
        ["plateau", "constant", "constant, averaged", "one cycle", "warm-up"],
    ),
    "averaging": (
        "Does an average of the weights help at a constant rate?",
        ["constant", "constant, averaged"],
    ),
    "batches": (
        "Is growing the batch as good as lowering the rate? Are larger batches, with less noise and fewer steps in as "
        "many epochs, worse? Does it matter that every batch has all classes?",
        ["plateau", "growing batch", "batches of 512", "balanced"],
    ),
    "noise": (
        "Does noise on the gradient help, or is the noise of the mini-batches enough?",
        ["plateau", "noise 1e-6", "noise 1e-4"],
    ),
    "perturbation": (
        "Does noise in the epoch after a plateau bring a constant rate further?",
        ["constant", "constant, perturbed"],
    ),
    "momentum": (
        "Which momentum from 0 to 0.99 ends highest, at the rate of its range test and at its best rate?",
        ["plateau", "momentum 0", "momentum 0.75", "momentum 0.99"],
    ),
    "longer": (
        "Does a range test of 1,000 updates find a better rate for a momentum of 0.99 than one of 100?",
        ["momentum 0.99", "momentum 0.99, a longer range test"],
    ),
    "optimizers": (
        "Is SGD with momentum better on test than Nesterov, RMSProp, Adagrad and Adam, each at its best rate, all with "
        "the same L2 penalty? Is its gap between train and test smaller? What do they store?",
        ["plateau", "nesterov", "rmsprop", "adagrad", "adam"],
    ),
}
TUNED_GROUPS = ("momentum", "optimizers")


def run(options, name, words, epochs, seed):
    """Trains a variant with one seed, if that is not done yet. Returns the folder of its numbers; None if it diverged.

    Whatever else goes wrong ends the command, after the runs that have begun. Called again, it goes on from there.
    """
    slug = re.sub("[ ,]+", "-", name)
    folder, numbers = options.runs / f"{slug}-s{seed}", options.out / "runs" / f"{slug}-s{seed}"
    options.runs.mkdir(parents=True, exist_ok=True)
    with open(options.runs / f"{folder.name}.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # held by the run too: another command, or the next, waits until it has ended
        if (numbers / "diverged").exists():
            return None
        if not (numbers / "summary.json").exists():
            status = train(options, folder, [*words, "--epochs", epochs, "--seeds", seed], log)
            print(f"{folder.name}: exit status {status}", flush=True)
            if status == 3:
                return write(numbers / "diverged", "")
            if status:
                raise SystemExit(f"{log.name}: says why")
            check(options, folder, words, epochs)
            copy(options, folder, numbers)
    return check(options, numbers, words, epochs)


def train(options, folder, words, log):
    """Trains in the run folder `folder`, or goes on there. Returns the exit status."""
    given = ["--resume", folder]
    if not (folder / "weights/last.pt").exists():  # there is no run, or it was stopped before its first checkpoint
        shutil.rmtree(folder, ignore_errors=True)
        given = ["--out", options.runs, "--name", folder.name, *COMMON, *words]
    where = [word for name in ("data", "cache") if (value := getattr(options, name)) for word in (f"--{name}", value)]
    command = [sys.executable, "train_fastai.py", *map(str, given), *where]
    return subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode


def check(options, folder, words, epochs):
    """`folder`, a finished run's. Ends the command if it has other settings than asked for, or other images or numbers
    than the runs in OUT."""
    made = Config(**yaml.safe_load((folder / "args.yaml").read_text())).to_dict()
    given = ["--epochs", epochs, "--seeds", made["seeds"][0], "--data", options.data or "cifar10"]
    asked = parse([*COMMON, *words, *map(str, given)]).to_dict()
    differ = [name for name in asked if name not in ASIDE and asked[name] != made[name]]
    there = min((options.out / "runs").glob("*/summary.json"), default=folder / "summary.json").with_name("env.json")
    differ += [name for name in SAME if read_json(folder / "env.json")[name] != read_json(there)[name]]
    if differ:
        raise SystemExit(f"{folder}: differs in {', '.join(differ)}; pass another --out")
    return folder


def copy(options, folder, numbers):
    """Takes the numbers of a finished run to OUT."""
    numbers.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        if (folder / file).exists():
            shutil.copyfile(folder / file, numbers / file)
    publishable(options, numbers)
    write(numbers / "summary.json", (folder / "summary.json").read_text())  # the last: it says that the rest is there


def publishable(options, numbers):
    """Takes this machine's folders out of a run's settings, and out of its command."""
    settings = yaml.safe_load((numbers / "args.yaml").read_text())
    settings |= {"cache": "", "out": "runs/evidence"} | ({"data": "cifar10"} if not options.data else {})
    write(numbers / "args.yaml", yaml.safe_dump(settings, sort_keys=False))
    env = (numbers / "env.json").read_text()
    write(numbers / "env.json", re.sub(r" --(cache|out|resume) [^ \"]+", "", env))
    return numbers


def score(options, name, words, rate):
    """Valid accuracy after the short run of the grid at `rate`; 0 if it diverged."""
    given = [*words, "--schedule", "flat_cos", "--lr", f"{rate:g}"]
    numbers = run(options, f"grid {name} {rate:g}", given, options.grid_epochs, 0)
    return read_json(numbers / "summary.json")["valid_acc"] if numbers else 0


def best_rate(options, name, words):
    """The rate with the best valid accuracy, of a grid about the range test's rate that grows where its end is best."""
    first = run(options, name, words, options.epochs, 0)
    found = read_json(first / "summary.json")["lr"] if first else 0.01
    k = min(range(1, len(RATES) - 1), key=lambda i: abs(math.log(RATES[i] / found)))
    tried = {i: score(options, name, words, RATES[i]) for i in (k - 1, k, k + 1)}
    while (best := max(tried, key=tried.get)) in (min(tried), max(tried)) and 0 < best < len(RATES) - 1:
        new = best - 1 if best == min(tried) else best + 1
        tried[new] = score(options, name, words, RATES[new])
    return RATES[best]


def tables(options, group):
    """Yields (table, {variant: words}) of a group; best rates, where the question is about them, in a later one."""
    variants = {name: VARIANTS[name] for name in GROUPS[group][1]}
    yield group, variants
    if not group.startswith(TUNED_GROUPS):
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        rates = list(pool.map(lambda pair: best_rate(options, *pair), variants.items()))
    best = {f"{name} at {rate:g}": [*variants[name], "--lr", f"{rate:g}"] for name, rate in zip(variants, rates)}
    yield f"{group}-best-rates", best


def better(found, grid):
    """Each variant at its range tests' rates or at the grid's, whichever have the higher mean accuracy on valid.

    Both are {variant: [folder of a finished run; None if it diverged, …]}, in the same order. So is what is returned.
    """
    accuracy = lambda folder: read_json(folder / "summary.json")["valid_acc"] if folder else 0
    pairs = zip(found.items(), grid.items())
    return dict(max(pair, key=lambda item: statistics.fmean(map(accuracy, item[1]))) for pair in pairs)


def rates(found, grid):
    """Rows of rates.csv: how much better the rate of the grid is than those of the range tests (`better` has both)."""
    for (name, first), (best, second) in zip(found.items(), grid.items()):
        pairs = [pair for pair in zip(first, second) if None not in pair]
        scores = [[read_json(folder / "summary.json")["test_acc"] for folder in side] for side in zip(*pairs)]
        if scores:
            gain, half = compare.interval(scores[1], scores[0])
            means = dict(range_test_acc=statistics.fmean(scores[0]), grid_test_acc=statistics.fmean(scores[1]))
            yield dict(variant=name, grid=best, n=len(pairs), **means, gain=gain, half_of_95_interval=half)


def gap_and_state(runs):
    """Two bars for each variant: training minus test accuracy after the last epoch; bytes that its optimizer keeps."""
    drawing, ((gap, state),) = plots.axes(13, 5, 1, 2)
    runs = {name: group for name, group in runs.items() if group}
    for i, group in enumerate(runs.values()):
        gaps = [run["rows"][-1]["train_acc"] - run["rows"][-1]["test_acc"] for run in group]
        gap.plot(gaps, [i] * len(gaps), "o", color=plots.COLOURS[i % len(plots.COLOURS)], alpha=0.6)
        state.barh(i, group[0]["summary"]["optimizer_state_bytes"], color=plots.COLOURS[i % len(plots.COLOURS)])
    for ax, text in ((gap, "train (augmented) minus test accuracy, last epoch"), (state, "bytes of optimizer state")):
        ax.set_yticks(range(len(runs)), list(runs))
        ax.set(ylim=(len(runs) - 0.5, -0.5), xlabel=text)
    return drawing


def report(options, table, question, finished):
    """The table and the figures of {variant: [folder of a finished run; None if it diverged, …]}."""
    out = options.out / table
    out.mkdir(parents=True, exist_ok=True)
    lost = {name: f"{folders.count(None)} of {len(folders)}" for name, folders in finished.items() if None in folders}
    finished = {name: list(filter(None, folders)) for name, folders in finished.items()}
    compare.report([folder for folders in finished.values() for folder in folders], out)
    diverged = [f"\nDiverged, and left out of the table: {n} runs of {name}.\n" for name, n in lost.items()]
    write(out / "question.md", "".join([question, "\n", *diverged]))
    if table.startswith("optimizers"):
        name_of = lambda name: name.replace("plateau", "sgd")  # all have that schedule
        runs = {name_of(name): [compare.load(folder) for folder in folders] for name, folders in finished.items()}
        write_figure(out / "gap.png", gap_and_state(runs))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS, help="what to run, in this order")
    p.add_argument("--epochs", default=30, type=int)
    p.add_argument("--grid-epochs", default=10, type=int)
    p.add_argument("--seeds", nargs="+", default=list("01234"))
    p.add_argument("--jobs", default=2, type=int, help="runs at a time")
    p.add_argument("--data", help="images other than CIFAR-10")
    p.add_argument("--cache", help="train_fastai.py's --cache")
    p.add_argument("--runs", default=ROOT / "runs/evidence", type=lambda path: Path(path).resolve())
    p.add_argument("--out", default=ROOT / "results/evidence", type=lambda path: Path(path).resolve())
    options = p.parse_args()
    for group in options.groups:
        question = GROUPS[group][0]
        print(f"{group}: {question}", flush=True)
        earlier = {}
        for table, variants in tables(options, group):
            todo = [(name, words, seed) for seed in options.seeds for name, words in variants.items()]
            with ThreadPoolExecutor(options.jobs) as pool:
                done = list(pool.map(lambda job: run(options, *job[:2], options.epochs, job[2]), todo))
            finished = {}
            for (name, _, _), numbers in zip(todo, done):
                finished.setdefault(name, []).append(numbers)
            report(options, table, question, better(earlier, finished) if earlier else finished)
            if earlier:
                write_csv(options.out / table / "rates.csv", list(rates(earlier, finished)), RATES_CSV)
            earlier = finished


if __name__ == "__main__":
    main()
