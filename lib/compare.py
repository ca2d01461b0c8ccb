"""Comparisons: a run for each variant and seed, then one table and one figure over the finished run folders.

python -m lib.compare runs/a runs/b … [--out FOLDER]        the same from runs that are there
"""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import yaml

from lib.config import AXES, BadInput, parse
from lib.runs import write, write_csv, write_figure

COLUMNS = (
    "variant", "seed", "test_acc", "last_test_acc", "valid_acc", "best_epoch", "epochs_to_target", "seconds_to_target",
    "train_seconds", "lr", "optimizer_state_bytes", "folder",
)  # fmt: skip
ASIDE = ("seeds", "out", "name", "cache", "resume", "device", "workers", "progress", "gallery")  # do not tell variants


def run(configs, train):
    """Trains each config into its own run folder, or leaves it where it is finished, and compares them all.

    A run that was cut short goes on. Returns the exit status: 3 where one diverged, else 0. Raises BadInput where a
    folder holds a run with other settings.
    """
    status, folders = 0, []
    for i, config in enumerate(configs):
        path = Path(config.out).expanduser() / config.name
        folders.append(path)
        if (path / "env.json").exists():
            kept = yaml.safe_load((path / "args.yaml").read_text())
            for name, value in config.to_dict().items():
                if name not in ("out", "resume", "cache", "device", "workers", "threads", "progress") and (
                    kept.get(name) != value
                ):
                    raise BadInput(f"{path}: was made with {name} {kept.get(name)}, not {value}; pass another --name")
            if (path / "summary.json").exists():
                print(f"{path}: is finished", flush=True)
                continue
            config = parse(["--resume", str(path)])
        elif path.exists():
            shutil.rmtree(path)  # cut short before it had settings
        print(f"\nrun {i + 1} of {len(configs)}: {path.name}", flush=True)
        status = max(status, train(config))
    if not (configs[0].dry_run or configs[0].lr_find_only):
        report(folders, folders[0].parent)
    return status


def load(folder):
    """A finished run from its folder: {args, env, rows, summary}; None where it is not finished."""
    folder = Path(folder)
    try:
        args = yaml.safe_load((folder / "args.yaml").read_text())
        env = json.loads((folder / "env.json").read_text())
        if not (folder / "summary.json").exists():
            return None
        summary = json.loads((folder / "summary.json").read_text())
        with open(folder / "results.csv", newline="") as f:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise BadInput(f"{folder}: is no run folder, or damaged ({' '.join(str(e).split())})") from None
    return {"folder": folder, "args": args, "env": env, "rows": rows, "summary": summary}


def by_variant(runs):
    """{variant: [run, …]} in the order of `runs`, named by the settings that differ; and which those are."""
    names = [n for n in runs[0]["args"] if n not in ASIDE and len({repr(r["args"].get(n)) for r in runs}) > 1]
    shown = [n for n in names if n in AXES] or names  # what follows from an axis is left out of the name
    found = {}
    for r in runs:
        name = "-".join(str(r["args"][n]) for n in shown) or r["args"]["schedule"]
        found.setdefault(name, []).append(r)
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
                 spread(of("epochs_to_target"), "{:.1f}"), spread(of("seconds_to_target"), "{:.0f}"),
                 spread(of("train_seconds"), "{:.0f}"), against]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines), verdicts


def report(folders, out):
    """Writes comparison.csv, comparison.md and comparison.png of the run folders `folders` to `out`, prints the table.

    Raises BadInput where none of them is finished, or a folder is none of a run.
    """
    from lib import plots

    loaded = {Path(folder): load(folder) for folder in folders}
    runs = [r for r in loaded.values() if r]
    missing = [str(folder) for folder, r in loaded.items() if not r]
    if not runs:
        raise BadInput(f"{', '.join(missing)}: none of the runs is finished")
    variants, differ = by_variant(runs)
    rows = []
    for name, group in variants.items():
        for r in group:
            known = {**r["summary"], "variant": name, "seed": r["args"]["seeds"][0], "folder": r["folder"].name}
            rows.append({c: known[c] for c in COLUMNS})
    write_csv(out / "comparison.csv", rows)
    text, verdicts = table(variants)
    prints = {r["env"]["data_fingerprint"] for r in runs}
    notes = [
        *verdicts,
        *([f"Not finished, and left out: {', '.join(missing)}."] if missing else []),
        *(["These runs saw different images: the comparison is not fair."] if len(prints) > 1 else []),
        f"What differs: {', '.join(differ) or 'seeds alone'}. Accuracies are of {len(runs[0]['rows'])} epochs, mean ± "
        "standard deviation over n seeds; differences are paired by seed, with 95% intervals (Student's t).",
    ]
    write(out / "comparison.md", "\n\n".join([f"# {Path(out).resolve().name}", text, *notes]) + "\n")
    curves = {
        name: [([row["epoch"], row["seconds"], row["test_acc"]]) for r in group for row in r["rows"]]
        for name, group in variants.items()
    }
    target = runs[0]["summary"]["target"]
    write_figure(out / "comparison.png", plots.comparison(curves, Path(out).resolve().name, target))
    print("\n" + text + "\n\n" + "\n".join(notes) + f"\n-> {out}", flush=True)


def main(argv=None):
    import argparse

    p = argparse.ArgumentParser(prog="python -m lib.compare", description="Compare finished runs.")
    p.add_argument("runs", nargs="+", help="run folders, or folders of them")
    p.add_argument("--out", default=".", help="folder of comparison.csv, .md and .png (.)")
    args = p.parse_args(argv)
    try:
        folders = []
        for given in map(Path, args.runs):
            inside = sorted(p.parent for p in given.glob("*/args.yaml"))
            folders += inside if inside and not (given / "args.yaml").exists() else [given]
        Path(args.out).mkdir(parents=True, exist_ok=True)
        report(folders, Path(args.out))
        return 0
    except BadInput as e:
        print("error:", *str(e).split(), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
