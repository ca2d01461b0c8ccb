"""Comparisons: a run for each variant and seed, then one table and one figure over the finished run folders.

python -m lib.compare runs/a runs/b … [--out FOLDER]        the same from runs that are there
"""

import csv
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np

from lib.cli import BadInput, Parser, command, one_line, printable, read_json
from lib.config import AXES, MACHINE, Config, read_file, resumed
from lib.machine import launched
from lib.runs import write, write_csv, write_figure

COLUMNS = (
    "variant", "seed", "test_acc", "last_test_acc", "last_train_acc", "valid_acc", "best_epoch",
    "epochs_to_target", "seconds_to_target", "train_seconds", "lr", "optimizer_state_bytes", "folder",
)  # fmt: skip
# Settings that do not tell variants, and those that a comparison may be gone on with under other values.
ASIDE, FREE = (*MACHINE, "out", "seeds", "name", "gallery"), (*MACHINE, "out")
NEEDED = {*COLUMNS, "target"} - {"variant", "seed", "last_train_acc", "folder"}  # numbers of a summary


def run(configs, train):
    """Trains each config into its own run folder, or leaves it where it is finished, and compares them all.

    A run that was cut short goes on. Returns the exit status: 3 where one diverged, else 0. Raises BadInput where a
    folder holds a run with other settings.
    """
    if launched():
        raise BadInput(
            "a comparison under torchrun: start its runs one by one, then python -m lib.compare (docs/ranks.md)"
        )
    status, folders = 0, []
    for i, config in enumerate(configs):
        path = Path(config.out).expanduser() / config.name
        folders.append(path)
        if (path / "env.json").exists():
            kept = Config(**read_file(path / "args.yaml")).to_dict()
            for name, value in config.to_dict().items():
                if name not in FREE and kept[name] != value:
                    raise BadInput(f"{path}: was made with {name} {kept[name]}, not {value}; pass another --name")
            if (path / "summary.json").exists() or config.lr_find_only:
                print(f"{path}: is {'there' if config.lr_find_only else 'finished'}", flush=True)
                continue
            here = {name: getattr(config, name) for name in ("cache", "device", "workers", "progress", "dry_run")}
            config = resumed({"resume": str(path), **here})
        elif path.exists():
            raise BadInput(f"{path}: is in the way, and no run folder; move it, or pass another --name")
        print(f"\nrun {i + 1} of {len(configs)}: {path.name}", flush=True)
        try:
            found = train(dataclasses.replace(config, open=False))
            if found == 130:
                print("the same command goes on with the comparison", file=sys.stderr)
                return found
            status = max(status, found)
        except BadInput as e:  # the other runs are none the worse for it
            print(f"error: {path.name}: {e}", file=sys.stderr)
            status = max(status, 2)
    if not (configs[0].dry_run or configs[0].lr_find_only):
        report(folders, folders[0].parent, configs[0].open)
    return status


def load(folder):
    """A finished run from its folder: {args, env, rows, summary}; None where it is not finished."""
    folder = Path(folder)
    try:
        args = Config(**read_file(folder / "args.yaml")).to_dict()
        if not (folder / "summary.json").exists():
            return None
        env, summary = read_json(folder / "env.json"), read_json(folder / "summary.json")
        with open(folder / "results.csv", newline="") as f:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
        [float(summary[name] or 0) for name in NEEDED]
        summary["chosen_on"], env["data_fingerprint"], rows[0]["test_acc"], rows[0]["train_acc"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise BadInput(f"{folder}: is no run folder, or damaged ({one_line(e)})") from None
    return {"folder": folder, "args": args, "env": env, "rows": rows, "summary": summary}


def worded(name, value):
    """A setting as part of a variant's name: 'balanced batches', 'no flip', 'warmup epochs 2'."""
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


def by_variant(runs):
    """{variant: [run, …]} in the order of `runs`, named by the settings that differ; and which those are."""
    names = [n for n in runs[0]["args"] if n not in ASIDE and len({repr(r["args"].get(n)) for r in runs}) > 1]
    first = runs[0]["args"]
    for shown in ([n for n in names if n in AXES], names):  # what follows from an axis is left out of the name
        found = {}
        for r in runs:
            axes = "-".join(str(r["args"][n]) for n in shown if n in AXES)
            words = [worded(n, r["args"][n]) for n in shown if n not in AXES and r["args"][n] != first[n]]
            found.setdefault(", ".join(filter(None, [axes, *words])) or r["args"]["schedule"], []).append(r)
        if all(len({repr(r["args"][n]) for r in group}) == 1 for group in found.values() for n in names):
            break
    for group in found.values():
        seeds = [r["args"]["seeds"] for r in group]
        if any(seeds.count(s) > 1 for s in seeds):
            folders = ", ".join(str(r["folder"]) for r in group)
            raise BadInput(f"{folders}: the same settings and seed more than once; leave out all but one")
    return found, names


def interval(differences):
    """Mean of paired differences, and half the width of its 95% interval (Student's t); None for fewer than 2."""
    from scipy.stats import t

    d = np.array(differences)
    if len(d) < 2:
        return d.mean(), None
    return d.mean(), t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))


def spread(values, form="{:.4f}"):
    """'mean ± standard deviation' of what is there; 'x of n' before it where some are None."""
    known = [v for v in values if v is not None]
    if not known:
        return "never"
    text = form.format(np.mean(known))
    if len(known) > 1:
        text += " ± " + form.format(np.std(known, ddof=1))
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def verdict(first, name, differences):
    """What the paired differences in test accuracy between two variants say, in a sentence."""
    mean, half = interval(differences)
    n = len(differences)
    if n > 1 and not np.any(differences):
        return f"{name} equals {first} in all {n} seeds."
    if half is None:
        return f"{name} against {first}: one common seed, which cannot tell chance from a difference ({mean:+.4f})."
    if abs(mean) <= half:
        return f"{name} against {first}: no difference seen; n = {n} tells only those above {half:.4f} or so."
    return f"{name} is {'better' if mean > 0 else 'worse'} than {first} by {abs(mean):.4f} ± {half:.4f} (n = {n})."


def table(variants):
    """The comparison as Markdown: a row a variant, then a sentence a pair."""
    first, *others = variants
    target = variants[first][0]["summary"]["target"]
    head = ["variant", "n", "test accuracy, best by valid", "test accuracy, last", "valid accuracy",
            f"epochs to {target:g}", f"seconds to {target:g}", "seconds", f"against {first}"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    verdicts = []
    for name, runs in variants.items():
        of = lambda key, runs=runs: [r["summary"][key] for r in runs]
        scores = {r["args"]["seeds"][0]: r["summary"]["test_acc"] for r in runs}
        base = {r["args"]["seeds"][0]: r["summary"]["test_acc"] for r in variants[first]}
        paired = [scores[seed] - base[seed] for seed in scores if seed in base]
        against = ""
        if name != first and paired:
            mean, half = interval(paired)
            against = f"{mean:+.4f}" + (f" ± {half:.4f}" if half is not None else "")
            verdicts.append(verdict(first, name, paired))
        cells = [name, str(len(runs)), spread(of("test_acc")), spread(of("last_test_acc")), spread(of("valid_acc")),
                 spread(of("epochs_to_target"), "{:.1f}" if len(runs) > 1 else "{:.0f}"),
                 spread(of("seconds_to_target"), "{:.0f}"), spread(of("train_seconds"), "{:.0f}"), against]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines), verdicts


def report(folders, out, show=False):
    """Writes comparison.csv, .md and .png and report.html of the run folders `folders` to `out`, prints the table.

    Raises BadInput where none of them is finished, or a folder is none of a run.
    """
    from lib import report as pages
    from lib.explain import plots

    loaded = {Path(folder): load(folder) for folder in folders}
    runs = [r for r in loaded.values() if r]
    missing = [str(folder) for folder, r in loaded.items() if not r]
    if not runs:
        raise BadInput(f"{', '.join(missing)}: none of the runs is finished")
    variants, differ = by_variant(runs)
    rows = []
    for name, group in variants.items():
        for r in group:
            more = dict(variant=name, seed=r["args"]["seeds"][0], last_train_acc=r["rows"][-1]["train_acc"])
            rows.append({**r["summary"], **more, "folder": Path(os.path.relpath(r["folder"], out)).as_posix()})
    write_csv(out / "comparison.csv", rows, COLUMNS)
    text, verdicts = table(variants)
    prints, chosen = {r["env"]["data_fingerprint"] for r in runs}, {r["summary"]["chosen_on"] for r in runs}
    lengths = sorted({len(r["rows"]) for r in runs})
    notes = [
        *verdicts,
        *([f"Not finished, and left out: {', '.join(missing)}."] if missing else []),
        *(["These runs saw different images: the comparison is not fair."] if len(prints) > 1 else []),
        *(["Test chose the weights (no held-out set), so test accuracies are too good."] if "test" in chosen else []),
        f"What differs: {', '.join(differ) or 'seeds alone'}. Runs of {' and '.join(map(str, lengths))} epochs; mean ± "
        "standard deviation over n seeds; differences are paired by seed, with 95% intervals (Student's t).",
    ]
    write(out / "comparison.md", "\n\n".join([f"# {Path(out).resolve().name}", text, *notes]) + "\n")
    curves = {
        name: [([row["epoch"], row["seconds"], row["test_acc"]]) for r in group for row in r["rows"]]
        for name, group in variants.items()
    }
    target = runs[0]["summary"]["target"]
    write_figure(out / "comparison.png", plots.comparison(curves, Path(out).resolve().name, target))
    page = pages.write(out, show=show)
    print("\n" + text + "\n\n" + "\n".join(notes) + f"\n-> {printable(page)}", flush=True)


@command
def main(argv):
    p = Parser(prog="python -m lib.compare", description="Compare finished runs.")
    p.add_argument("runs", nargs="+", help="run folders, or folders of them")
    p.add_argument("--out", default=".", help="folder of comparison.csv, .md, .png and report.html (.)")
    args = p.parse_args(argv)
    folders = []
    for given in map(Path, args.runs):
        inside = sorted(p.parent for p in given.glob("*/args.yaml"))
        folders += inside if inside and not (given / "args.yaml").exists() else [given]
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {args.out}: cannot be made ({e.strerror})") from None
    report(folders, Path(args.out))


if __name__ == "__main__":
    sys.exit(main())
