"""How far each rule of the range test is from the best learning rate: its regret, over tasks, rates and seeds.

uv run python -m tests.benchmarks.rates --data FOLDER [--minutes 90] [--out results/rates.json]

FOLDER holds CIFAR-10 as train/ and test/. Every task trains a short fixed budget (`flat_cos`: the rate stays, then
falls) at each rate of a grid, a factor of 2 apart, with 3 seeds, and is judged on images it does not train on. It also
runs the range test with 5 other seeds. The regret of a rule is the best mean accuracy of the grid less that at the
suggested rate, on a line between its neighbours in the grid. A rate that diverges, or lies above the grid, counts as
chance; one below it as the least rate. Rules are made on the tasks that do not say `apart`. What is finished is kept in
the file, and not run again;
the rules are worked out anew from the curves in it each time.
"""

import argparse
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
from fastai.callback.core import Callback, CancelValidException
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from lib import config, data, machine, models, train
from lib.train import lr_range, recorder
from tests.benchmarks import common

SEEDS, TESTS, START, POINTS, POWERS = (0, 1, 2), (10, 11, 12, 13, 14), 1e-5, 100, 9
GRID = {"small": 0.01, "adam": 2e-4, "resnet18": 6.25e-4}  # the least of nine rates, each twice the one before
ADAM = ["--optimizer", "adam"]
SMALL = ["--model", "small", "--size", "32"]
RESNET = ["--model", "resnet18", "--size", "32"]
LEGEND = """Regret: the best mean accuracy of a grid of rates, minus that at the rate of the rule. Each of 14 tasks has
5 range tests, so 7 tasks have 35. `apart`: the 7 tasks that no rule was made on.
"""
TASKS = {  # name: images, how many of them train, the command line, epochs, whether the rules are kept apart from it
    "digits, 64": ("digits", 1000, [*SMALL, "-b", "64", "--no-flip"], 6, False),
    "digits, 16, nesterov": ("digits", 1000, [*SMALL, "-b", "16", "--no-flip", "--optimizer", "nesterov"], 4, True),
    "photos, 16": ("photos", 240, [*SMALL[:2], "--size", "64", "-b", "16"], 8, False),
    "photos uneven, mislabelled, 32": ("photos uneven noisy", 240, [*SMALL[:2], "--size", "48", "-b", "32"], 8, True),
    "1,000 of CIFAR-10, 16": ("cifar", 1000, [*SMALL, "-b", "16"], 8, False),
    "2,000 of CIFAR-10, 32, nesterov": ("cifar", 2000, [*SMALL, "-b", "32", "--optimizer", "nesterov"], 5, True),
    "3,000 of CIFAR-10, 128": ("cifar", 3000, [*SMALL, "-b", "128"], 5, False),
    "digits uneven, 32, adam": ("digits uneven", 1000, [*SMALL, "-b", "32", "--no-flip", *ADAM], 6, False),
    "2,000 of CIFAR-10 uneven, 64, adam": ("cifar uneven", 2000, [*SMALL, "-b", "64", *ADAM], 5, True),
    "500 of CIFAR-10, 32, resnet18": ("cifar", 500, [*RESNET, "-b", "32"], 4, False),
    "digits uneven, 128": ("digits uneven", 1000, [*SMALL, "-b", "128", "--no-flip"], 8, True),
    "2,500 of CIFAR-10 mislabelled, 64": ("cifar noisy", 2500, [*SMALL, "-b", "64"], 4, False),
    "6,000 of CIFAR-10, 256": ("cifar", 6000, [*SMALL, "-b", "256"], 3, True),
    "400 of CIFAR-10, 16, resnet18, adam": ("cifar", 400, [*RESNET, "-b", "16", *ADAM], 4, True),
}  # fmt: skip


def digits():
    """[(image, label)] for train, and for test, of scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    pictures = [(Image.fromarray((x.reshape(8, 8) * 255 / 16).astype(np.uint8)), y) for x, y in zip(images, labels)]
    order = np.random.default_rng(0).permutation(len(pictures))
    return [pictures[i] for i in order[:1097]], [pictures[i] for i in order[1097:]]


def photos():
    """The same of crops of scikit-learn's two photographs: left and right half of each are a class."""
    rng = np.random.default_rng(0)
    images, pictures = load_sample_images().images, []
    for i in range(1000):
        label = i % 4
        photo = images[label // 2]
        side = int(rng.integers(60, 160))
        y, x = rng.integers(0, photo.shape[0] - side), rng.integers(0, photo.shape[1] // 2 - side)
        x += label % 2 * photo.shape[1] // 2
        pictures.append((Image.fromarray(photo[y : y + side, x : x + side]), label))
    return pictures[:400], pictures[400:]


def cifar(source):
    """The same of CIFAR-10, class by class in turn; images are opened where they are written."""
    sets = []
    for name, most in (("train", 1500), ("test", 200)):
        classes = [sorted(p.iterdir())[:most] for p in sorted((source / name).iterdir()) if p.is_dir()]
        sets.append([(path, k) for files in zip(*classes) for k, path in enumerate(files)])
    return sets


def folder_of(kind, n, source, cache):
    """The folder of a task's images, made where it is not there."""
    root = cache / f"{kind.replace(' ', '-')}-{n}"
    if root.exists():
        return root
    of, *how = kind.split()
    training, test = cifar(source) if of == "cifar" else globals()[of]()
    classes, rng = 1 + max(label for _, label in training), np.random.default_rng(1)
    share = lambda k: 0.25 ** (k / (classes - 1)) if "uneven" in how else 1.0  # of class k: the last has a quarter
    room = {k: round(n * share(k) / sum(map(share, range(classes)))) for k in range(classes)}
    for name, pictures in (("train", training), ("test", test)):
        for i, (picture, label) in enumerate(pictures):
            if name == "train":
                if room[label] == 0:
                    continue
                room[label] -= 1
                if "noisy" in how and rng.random() < 0.3:
                    label = int(rng.integers(classes))
            (root / name / str(label)).mkdir(parents=True, exist_ok=True)
            image = Image.open(picture) if isinstance(picture, Path) else picture
            image.save(root / name / str(label) / f"{i:05}.png")
    return root


class NotYet(Callback):
    """No validation while training: a task is judged once, at its end."""

    def before_validate(self):
        raise CancelValidException


def learner(root, options, epochs, seed, cache):
    """(config, learner) of a task."""
    always = ["--valid-pct", "0", "--schedule", "flat_cos", "--cache", str(cache), "--threads", "1"]
    settings = config.parse(["--data", str(root), *options, *always, "--epochs", str(epochs), "--seeds", str(seed)])
    device, precision, _ = machine.prepare(settings)
    dls = data.get_dls(settings)
    machine.seed_everything(seed)
    model = models.build(settings.model, len(dls.vocab), "", dls.train.plain()[0])
    del dls.test  # it is valid
    return settings, train.build(settings, dls, model, precision)


def accuracy_at(lr, *task):
    """Accuracy after a task's budget at the rate `lr`; None where it diverges."""
    settings, learn = learner(*task)
    learn.add_cb(NotYet)
    try:
        train.fit(learn, settings, lr)
    except recorder.Diverged:
        return None
    learn.remove_cb(NotYet)
    p, y = learn.get_preds()
    return float((p.argmax(1) == y).float().mean())


def curve(highest, *task):
    """(rates, losses, passes over the images) of a range test."""
    test, short = lr_range.run(learner(*task)[1], np.geomspace(START, highest, POINTS)), lambda x: float(f"{x:.6g}")
    return {"lrs": [*map(short, test.lrs)], "losses": [*map(short, test.losses)], "epochs": test.epochs}


def jobs(root, options, epochs, cache):
    """(part of the row, key, function that measures it) of a task."""
    for seed in TESTS:
        yield "tests", str(seed), partial(curve, 10, root, options, epochs, seed, cache)
    least = min(rate for word, rate in GRID.items() if word in options)
    for lr in (least * 2**k for k in range(POWERS)):
        for seed in SEEDS:
            yield "runs", f"{lr:g}, seed {seed}", partial(accuracy_at, lr, root, options, epochs, seed, cache)


def measure(args, done, save):
    """Runs what is missing in `done`, task by task, until the time is up."""
    end, cache = time.monotonic() + 60 * args.minutes, Path(args.cache)
    for name, (kind, n, options, epochs, apart) in TASKS.items():
        root, start = folder_of(kind, n, Path(args.data), cache), time.monotonic()
        classes = len(list((root / "train").iterdir()))
        row = done.setdefault(name, {"apart": apart, "classes": classes, "tests": {}, "runs": {}})
        for part, key, job in jobs(root, options, epochs, cache):
            if key in row[part]:
                continue
            if time.monotonic() > end:
                return
            row[part][key] = job()
            save()
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def grid(row):
    """{rate: mean accuracy over seeds} of a task; a diverged run counts as chance."""
    found = {}
    for key, accuracy in row["runs"].items():
        found.setdefault(float(key.split(",")[0]), []).append(1 / row["classes"] if accuracy is None else accuracy)
    return {lr: statistics.fmean(accuracies) for lr, accuracies in sorted(found.items())}


def accuracy_of(lr, found, chance):
    """Accuracy at a rate, on a line between the rates of the grid; chance above it, the lowest rate's below it."""
    rates = np.log(list(found))
    return float(np.interp(math.log(lr), rates, list(found.values()), right=chance)) if lr > 0 else chance


def steepest(test):
    """pytorch-lr-finder's: where the smoothed loss (an average with weight 0.05) falls fastest from point to point."""
    smooth = [test.losses[0]]
    for loss in test.losses[1:]:
        smooth.append(0.05 * loss + 0.95 * smooth[-1])
    return float(test.lrs[10:-5][np.gradient(np.array(smooth[10:-5])).argmin()])


def before_the_rise(test):
    """The largest rate before the smoothed loss has risen: that of its minimum."""
    return float(test.lrs[: test.smooth_losses.argmin() + 1][-1])


RULES = {
    **{name: lambda test, name=name: test.suggestions[name] for name in config.SUGGESTIONS},
    "steepest (pytorch-lr-finder)": steepest,
    "a tenth of the minimum": lambda test: before_the_rise(test) / 10,
    "before the rise": before_the_rise,
}


def judge(done):
    """{rule: {task: what its suggestions cost}} over the finished tasks."""
    rows = {name: row for name, row in done.items() if len(row["runs"]) >= len(SEEDS) * POWERS}
    found = {rule: {} for rule in RULES}
    for name, row in rows.items():
        accuracies, chance = grid(row), 1 / row["classes"]
        best = max(accuracies.values())
        best_lr = max(lr for lr, accuracy in accuracies.items() if accuracy == best)
        diverging = min(
            (lr for lr, accuracy in accuracies.items() if accuracy <= 1.5 * chance and lr > best_lr), default=math.inf
        )
        tests = [
            lr_range.RangeTest(np.array(t["lrs"]), np.array(t["losses"]), t["epochs"], POINTS)
            for t in row["tests"].values()
        ]
        for rule, suggest in RULES.items():
            lrs = [suggest(test) for test in tests]
            regrets = [best - accuracy_of(lr, accuracies, chance) for lr in lrs]
            found[rule][name] = {
                "apart": row["apart"], "best_lr": best_lr, "best": best, "lrs": lrs, "regrets": regrets,
                "regret": statistics.fmean(regrets), "over_twice": sum(lr > 2 * best_lr for lr in lrs),
                "diverges": sum(lr >= diverging for lr in lrs),
            }  # fmt: skip
    return found


def summary(found):
    """Rows of a table: rule, and median and worst regret over tasks, how often over twice the best rate, diverging."""
    rows = []
    for rule, tasks in found.items():
        cells = [rule]
        for apart in (False, True):
            some = [task for task in tasks.values() if task["apart"] is apart]
            n = sum(len(task["lrs"]) for task in some)
            cells += [f"{f([task['regret'] for task in some]):.3f}" for f in (statistics.median, max)]
            cells += [f"{sum(task[what] for task in some)} of {n}" for what in ("over_twice", "diverges")]
        rows.append(cells)
    return rows


def draw(done, found, rule):
    """A panel a task: accuracy over the rate, and where the rules' suggestions lie; `rule` is the default."""
    tasks = list(found[rule])
    figure = Figure(figsize=(16, 3.1 * math.ceil(len(tasks) / 4)), layout="constrained")
    panels = list(figure.subplots(math.ceil(len(tasks) / 4), 4, squeeze=False).flat)
    for ax, name in zip(panels, tasks):
        accuracies = grid(done[name])
        ax.semilogx(list(accuracies), list(accuracies.values()), "k.-", lw=1)
        for height, (other, colour) in enumerate(((rule, "#D55E00"), ("steep", "#0072B2"), ("valley", "#E69F00"))):
            lrs = found[other][name]["lrs"]
            ax.plot(lrs, [0.03 + 0.05 * height] * len(lrs), "|", ms=11, mew=2, color=colour, label=other,
                    transform=ax.get_xaxis_transform())  # fmt: skip
        ax.set_title(name + (" (apart)" if done[name]["apart"] else ""), fontsize=10)
        ax.grid(alpha=0.3)
    for ax in panels[len(tasks) :]:
        ax.set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Accuracy after a short training at each rate (mean of 3 seeds), and what 5 range tests suggest")
    return figure


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="folder of CIFAR-10")
    p.add_argument("--minutes", type=float, default=90, help="after which nothing more is begun (90)")
    p.add_argument("--cache", default="/tmp/rates", help="folder of the tasks' images")
    p.add_argument("--out", default="results/rates.json")
    args = p.parse_args()
    out = Path(args.out)
    done = json.loads(out.read_text())["tasks"] if out.exists() else {}
    command = "python -m tests.benchmarks.rates --data FOLDER"

    def save(**more):
        out.write_text(json.dumps({"command": command, "machine": common.machine(), **more, "tasks": done}) + "\n")

    measure(args, done, save)
    found = judge(done)
    save(rules=found)
    head = ["rule", *(f"{what}{where}" for where in ("", ", apart") for what in
                      ("median regret", "worst", "over twice the best rate", "diverges"))]  # fmt: skip
    table = [head, ["---"] * len(head), *summary(found)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    out.with_suffix(".md").write_text(f"# Regret of the rules of the range test\n\n{LEGEND}\n{text}\n")
    print(text)
    draw(done, found, config.Config().lr_suggest).savefig(out.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
