"""Comparisons: a run for each variant and seed, then one table and one figure over the finished run folders.

python -m lib.compare runs/a runs/b … [--out FOLDER]        compares runs that exist
"""

import dataclasses
import os
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path

import numpy as np
from fastcore.basics import groupby
from scipy import stats

from lib import report as pages
from lib.cli import BadInput, Parser, command, printable, read_json, refused
from lib.config import AXES, FIELDS, MACHINE, NOT_IN_RANGE_TEST, Config, data_name, read_file, resumed
from lib.machine import launched
from lib.runs import write, write_csv, write_figure

COLUMNS = """variant seed fold test_acc last_test_acc last_train_acc valid_acc best_epoch epochs_to_target
    seconds_to_target train_seconds lr optimizer_state_bytes other_load folder""".split()
# numbers that a summary must have
NEEDED = """test_acc last_test_acc valid_acc best_epoch epochs_to_target seconds_to_target train_seconds lr
    optimizer_state_bytes target""".split()
NAMES = ("schedule", "optimizer", "model")  # settings whose values say by themselves what they are
MAY_CHANGE = (*MACHINE, "out")  # settings that may change while a comparison goes on
UNNAMED = (*MAY_CHANGE, "seeds", "fold", "name", "gallery", "cam", "target")  # runs of one variant may differ in these


def run(configs, train):
    """Trains each config into its own run folder, unless that run is finished. Then compares all runs.

    Runs with equal range tests share that of the first. Returns the exit status: 130 if a run was interrupted, 3 if one
    diverged, 2 if one had bad input, else 0.
    """
    from lib import models

    if launched():
        raise BadInput("a comparison under torchrun: start its runs one by one, then lib.compare (docs/ranks.md)")
    spare(configs[0].out, "--name")
    status, folders = 0, [Path(config.out).expanduser() / config.name for config in configs]
    with redirect_stdout(None):  # what is wrong with one is said before hours of the others
        for config, folder in zip(configs, folders):
            models.check(config.model, config.pretrained)
            unfinished(config, folder)
    trains = not (configs[0].dry_run or configs[0].lr_find_only)
    tested = {}  # settings that a range test depends on -> the first run folder with them
    for i, (config, folder) in enumerate(zip(configs, folders), 1):
        same = repr([getattr(config, name) for name in FIELDS if name not in (*NOT_IN_RANGE_TEST, *MACHINE)])
        if not (config := unfinished(config, folder)):
            if (folder / "lr_find.csv").exists() and (folder / "lr_find.png").exists():
                tested.setdefault(same, folder)
            continue
        print(f"\nrun {i} of {len(configs)}: {folder.name}", flush=True)
        try:
            result = train(dataclasses.replace(config, open=False), tested.get(same))
        except BadInput as e:  # the other runs can still be made
            print(f"error: {folder.name}: {e}", file=sys.stderr)
            result = 2
        except KeyboardInterrupt:
            result = 130
        if result == 130:
            print("the same command goes on with the comparison", file=sys.stderr)
            return result
        status = max(status, result)
        if result == 0:
            tested.setdefault(same, folder)
            if trains and i < len(configs):
                with redirect_stdout(None), suppress(BadInput):
                    report(folders[:i], folders[0].parent)  # a page of the runs so far
    if trains:
        with suppress(BadInput) if status else nullcontext():  # if none came to its end, all have said why
            report(folders, folders[0].parent, configs[0].open)
    return status


def spare(folder, flag):
    """Raises BadInput if `folder`, which is to hold a comparison, is a run folder."""
    if (Path(folder).expanduser() / "env.json").exists():
        raise BadInput(f"{folder}: is a run folder, whose page would be lost; pass another {flag}")


def unfinished(config, folder):
    """The config that makes the run of `folder`, or goes on with it; None if the run, or its range test, is finished.

    Raises BadInput if the folder holds a run with other settings, or anything else.
    """
    if not (folder / "env.json").exists():
        if folder.exists():
            raise BadInput(f"{folder}: is in the way, and no run folder; move it, or pass another --name")
        return config
    before = Config(**read_file(folder / "args.yaml"))
    for name in FIELDS:
        value, made_with = getattr(config, name), getattr(before, name)
        if name not in MAY_CHANGE and value != made_with:
            raise BadInput(f"{folder}: was made with {name} {made_with}, not {value}; pass another --name")
    if (folder / "summary.json").exists():
        print(f"{folder}: is finished", flush=True)
        return None
    here = {name: getattr(config, name) for name in MACHINE if name not in ("resume", "lr_find_only", "open")}
    changed = {name: value for name, value in here.items() if value != getattr(before, name)}
    goes_on = resumed({"resume": str(folder), **changed})
    if config.lr_find_only and "lr" in read_json(folder / "env.json"):
        print(f"{folder}: is there", flush=True)
        return None
    return dataclasses.replace(goes_on, lr_find_only=config.lr_find_only)


def load(folder):
    """A finished run from its folder: {folder, args, env, rows, summary}; None if it is not finished."""
    folder = Path(folder)
    with refused(f"{folder}: is no run folder, or damaged"):
        if not (folder / "summary.json").exists():
            return None
        args = Config(**read_file(folder / "args.yaml")).to_dict()
        env, summary = read_json(folder / "env.json"), read_json(folder / "summary.json")
        head, *lines = pages.read_table(folder / "results.csv")
        rows = [{name: float(number) for name, number in zip(head, line, strict=True)} for line in lines]
        # read once here, so that what is missing or no number is named now
        [float(summary[name] or 0) for name in NEEDED], float(summary.get("other_load") or 0)
        summary["mistakes"], env["images"]["test"]
        summary["chosen_on"], env["data_fingerprint"], rows[0]["test_acc"], rows[0]["train_acc"]
    return {"folder": folder, "args": args, "env": env, "rows": rows, "summary": summary}


def worded(name, value):
    """A setting as part of a variant's name: 'balanced batches', 'no flip', 'warmup epochs 2'."""
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return f"{words} {value}" if value != "" else f"no {words}"


def implied(args, name):
    """What the setting `name` is if only the other `args` are given: --ema, for instance, implies a --threshold.

    None if the others are refused without it: --freeze-epochs, for instance, needs --pretrained.
    """
    with suppress(BadInput):
        return getattr(Config(**{k: v for k, v in args.items() if k in FIELDS and k != name}), name)


def by_variant(runs):
    """{variant: [run, …]} in the order of `runs`, named by the settings that differ; and those settings."""
    every, first = [run["args"] for run in runs], runs[0]["args"]
    differ = [name for name in first if name not in UNNAMED and len({repr(args.get(name)) for args in every}) > 1]
    axes = [name for name in AXES if name in differ]
    chosen = [name for name in differ if any(args[name] != implied(args, name) for args in every)]
    for shown in (axes, chosen, differ):  # the fewest words that tell the variants apart
        variants = {}
        for run, args in zip(runs, every):
            values = [args[name] if name in NAMES else worded(name, args[name]) for name in axes]
            words = [worded(name, args[name]) for name in shown if name not in AXES and args[name] != first[name]]
            variants.setdefault(", ".join([*values, *words]) or args["schedule"], []).append(run)
        if all(len({repr(run["args"][name]) for run in group}) == 1 for group in variants.values() for name in differ):
            break
    for group in variants.values():
        if len(set(map(pair_of, group))) < len(group):
            folders = ", ".join(str(run["folder"]) for run in group)
            raise BadInput(f"{folders}: the same settings, seed and fold more than once; leave out all but one")
    return variants, differ


def pair_of(run):
    """(seed, fold): runs of two variants that share them are compared with each other."""
    return run["args"]["seeds"][0], run["args"]["fold"]


def on_all_images(runs):
    """Accuracy on all images of runs on folds, one for each seed. Each image is in one fold, and counts once."""
    found = []
    for seed in dict.fromkeys(seed for seed, _ in map(pair_of, runs)):
        folds = [run for run in runs if pair_of(run)[0] == seed]
        images = sum(run["env"]["images"]["test"] for run in folds)
        right = images - sum(run["summary"]["mistakes"] for run in folds)
        found.append(right / images if len(folds) == folds[0]["args"]["folds"] else None)
    return found


def interval(scores, base, folds=0):
    """Mean of paired differences, and half the width of its 95% interval (Student's t); None for fewer than 2 pairs.

    With `folds`, each pair is of one fold. Folds share training images: the variance is larger by their correction
    (Nadeau & Bengio, Machine Learning 52, 2003).
    """
    apart = np.subtract(scores, base)
    if len(apart) < 2:
        return apart.mean(), None
    shared = 1 + len(apart) / (folds - 1) if folds else 1
    return apart.mean(), stats.t.ppf(0.975, len(apart) - 1) * stats.sem(apart) * shared**0.5


def differences(runs, base, key):
    """Mean, half-width of the interval, and number of the differences in `key` from the runs `base`; () for no pairs.

    Where there are several folds, the seeds of a fold count as one.
    """
    scores = [{pair_of(run): run["summary"][key] for run in group} for group in (runs, base)]
    pairs = [pair for pair in scores[0] if pair in scores[1]]
    folds = runs[0]["args"]["folds"] if len({fold for _, fold in pairs}) > 1 else 0
    units = [*groupby(pairs, 1).values()] if folds else [[pair] for pair in pairs]
    means = [[np.mean([of[pair] for pair in unit]) for unit in units] for of in scores]
    return (*interval(*means, folds), len(units)) if pairs else ()


def signed(mean, half):
    return f"{mean:+.4f}" + (f" ± {half:.4f}" if half is not None else "")


def verdict(first, name, mean, half, n):
    """What the paired differences in test accuracy between two variants show, in one sentence."""
    if half is None:
        return f"{name} against {first}: one common seed, which cannot tell chance from a difference ({mean:+.4f})."
    if half < 1e-9:  # without any spread, chance cannot be judged
        return f"{name} {f'differs from {first} by {mean:+.4f}' if mean else f'equals {first}'} in all {n} pairs."
    if abs(mean) <= half:
        return f"{name} against {first}: no difference seen; n = {n} shows only those above about {half:.4f}."
    return f"{name} is {'better' if mean > 0 else 'worse'} than {first} by {abs(mean):.4f} ± {half:.4f} (n = {n})."


def spread(values, form="{:.4f}"):
    """'mean ± standard deviation' of the values that are not None; '(x of n)' follows if some are."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    text = form.format(np.mean(known))
    if len(known) > 1:
        text += " ± " + form.format(np.std(known, ddof=1))
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def table(variants):
    """The comparison as Markdown, with a row for each variant; and a sentence for each variant against the first."""
    first = next(iter(variants))
    target = variants[first][0]["summary"]["target"]
    folds = max(run["args"]["folds"] for runs in variants.values() for run in runs)
    reached = [f"epochs to {target:g}", f"seconds to {target:g}"] if target else []
    against, chosen_on = (f"against {first}", f"against {first}, last"), variants[first][0]["summary"]["chosen_on"]
    rows = [["variant", "n", f"test accuracy, best by {chosen_on}", *["accuracy on all images"] * bool(folds),
             "test accuracy, last", "valid accuracy", *reached, "seconds", *against]]  # fmt: skip
    rows.append(["---"] * len(rows[0]))
    verdicts = []
    for name, runs in variants.items():
        forms = dict.fromkeys(("test_acc", "last_test_acc", "valid_acc"), "{:.4f}")
        if target:
            forms |= {"epochs_to_target": "{:.1f}" if len(runs) > 1 else "{:.0f}", "seconds_to_target": "{:.0f}"}
        forms |= {"train_seconds": "{:.0f}"}
        values = {key: [run["summary"][key] for run in runs] for key in forms}
        marked = [key for key in forms if "seconds" in key and any(values[key]) and any(map(pages.disturbed, runs))]
        cells = [spread(values[key], form) + " *" * (key in marked) for key, form in forms.items()]
        if folds:
            pooled = on_all_images(runs)
            cells.insert(1, spread(pooled) if pooled != [None] * len(pooled) else "")
        apart = [differences(runs, variants[first], key) for key in ("test_acc", "last_test_acc")]
        cells += [signed(*found[:2]) if name != first and found else "" for found in apart]
        verdicts += [verdict(first, name, *apart[0])] if name != first and apart[0] else []
        rows.append([name, str(len(runs)), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows), verdicts


def report(folders, out, show=False):
    """Writes comparison.csv, .md and .png and report.html of the run folders `folders` to `out`; prints the table.

    Raises BadInput if none of the runs is finished, or if the files of one are damaged.
    """
    from lib.explain import plots

    loaded = {str(folder): load(folder) for folder in folders}
    runs, missing = [run for run in loaded.values() if run], [folder for folder, run in loaded.items() if not run]
    if not runs:
        raise BadInput(f"{', '.join(missing)}: none of the runs is finished")
    if same_images(runs) and len({data_name(Config(data=run["args"]["data"])) for run in runs}) == 1:
        for run in runs:  # a machine's folders do not make a variant
            run["args"]["data"] = runs[0]["args"]["data"]
    (variants, differ), rows, curves, target = by_variant(runs), [], {}, runs[0]["summary"]["target"]
    for run in runs:  # each may have had a target of its own
        at = next((row for row in run["rows"] if target and row["test_acc"] >= target), None)
        run["summary"] |= dict(epochs_to_target=at and int(at["epoch"]), seconds_to_target=at and at["seconds"])
    for name, group in variants.items():
        for run in group:
            more = dict(variant=name, last_train_acc=run["rows"][-1]["train_acc"], other_load=None)
            more |= dict(zip(("seed", "fold"), pair_of(run)))
            rows.append({**more, **run["summary"], "folder": Path(os.path.relpath(run["folder"], out)).as_posix()})
        curves[name] = [(row["epoch"], row["seconds"], row["test_acc"]) for run in group for row in run["rows"]]
    write_csv(out / "comparison.csv", rows, COLUMNS)
    text, notes = table(variants)
    notes += remarks(runs, missing, differ)
    title = out.resolve().name
    write(out / "comparison.md", "\n\n".join([f"# {title}", text, *notes]) + "\n")
    finals = {name: [run["summary"]["test_acc"] for run in group] for name, group in variants.items()}
    timed = len(set(map(pages.machine_of, runs))) == 1 and not any(map(pages.disturbed, runs))
    write_figure(out / "comparison.png", plots.comparison(curves, title, target, finals, timed))
    page = pages.write(out, show=show)
    print("\n" + text + "\n\n" + "\n".join(notes) + f"\n-> {printable(page)}", flush=True)


def same_images(runs):
    """Whether all runs of one fold and size have one fingerprint: no two are known to have seen different images."""
    made = lambda run: (run["args"]["fold"], run["env"].get("size"))  # another fold or size is another fingerprint
    return len({(made(run), run["env"]["data_fingerprint"]) for run in runs}) == len(set(map(made, runs)))


def remarks(runs, missing, differ):
    """Sentences that a reader of the table of `runs` needs; `differ` names the settings that differ."""
    notes, folds = [], {run["args"]["folds"] for run in runs} - {0}
    if missing:
        notes.append(printable(f"Not finished, and left out: {', '.join(missing)}."))
    if not same_images(runs):
        notes.append("These runs saw different images: the comparison is not fair.")
    if "test" in {run["summary"]["chosen_on"] for run in runs}:
        notes.append("Test chose the weights (no held-out set), so test accuracies are too good.")
    if len(set(map(pages.machine_of, runs))) > 1:
        notes.append("Chips or numbers of threads differ between these runs: their seconds are not to be compared.")
    if any(map(pages.disturbed, runs)):
        notes.append(f"*: other programs used more than {pages.DISTURBED} cores; alone, these runs would be faster.")
    if folds:
        how = "intervals over them allow for it (Nadeau & Bengio, 2003), and take the mean of a fold's seeds"
        notes.append(f"Folds share training images, so deviations over folds are too small; {how}.")
    lengths = " and ".join(map(str, sorted({len(run["rows"]) for run in runs})))
    over, by = ("seeds and folds", "seed and fold") if folds else ("seeds", "seed")
    notes.append(
        f"What differs: {', '.join(differ) or f'{over} alone'}. Runs of {lengths} epoch{'s' * (lengths != '1')}; "
        f"mean ± standard deviation over n {over}; differences are paired by {by}, with 95% intervals (Student's t)."
    )
    return notes


@command
def main(argv):
    p = Parser(prog="python -m lib.compare", description="Compare finished runs.")
    p.add_argument("runs", nargs="+", help="run folders, or folders of them")
    p.add_argument("--out", default=".", help="folder of comparison.csv, .md, .png and report.html (.)")
    args = p.parse_args(argv)
    folders = []
    for given in map(Path, args.runs):
        found = [given] if (given / "args.yaml").exists() else sorted(p.parent for p in given.glob("*/args.yaml"))
        if not found:
            raise BadInput(f"{given}: is no run folder, and holds none")
        folders += found
    spare(args.out, "--out")
    report(folders, Path(args.out).expanduser())


if __name__ == "__main__":
    sys.exit(main())
