"""report.html: a run, or a comparison, on one page that needs nothing but itself. Made from its folder alone.

python -m lib.report runs/x [--open]

`report.html` beside this file is the page without its data. They go into it as JSON in one place, where names become
text and nothing else. The curves are inline SVG that the page's own script draws: a plotting library would be many
times the rest of the page. Needs neither torch nor numpy.
"""

import base64
import csv
import html
import io
import json
import math
import shlex
import statistics
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from lib import runs
from lib.advice import UNEVEN, advice, wilson
from lib.cli import BadInput, Parser, command, counted, duration, printable, read_json, read_yaml, refused
from lib.config import FIELDS, MOMENTUM, Config, flag_of

TEMPLATE = Path(__file__).with_suffix(".html")
ROWS = 700_000  # bytes of the page for mistakes; with the pictures of 100 the whole stays below 5 MB
BATCH = 400_000  # bytes of train_batch.png, before base64
MATRIX, PAIRS = 40, 60  # classes up to which there is a matrix; of more, the most frequent confusions
NO_EFFECT = ("out", "name", "resume", "cache", "progress", "dry_run", "lr_find_only", "open", "log")  # change no result
DOUBTS = 30  # rows of doubts.csv
LEFT_OUT = ("choices", "classes", "ended", "images", "lr_suggestions", "resumed", "command", "commit")  # of env.json
OVERALL = ("macro_f1", "balanced_acc", "calibration_error")  # of summary.json: what the page says in words
CURVES = ("test_acc", "test_loss", "lr")  # of a comparison
DISTURBED = 0.25  # if other programs used more cores than this, the seconds of the run are marked
MEASURED = ("valid_loss", "valid_acc", "test_loss", "test_acc")  # after an epoch, and again of the kept weights


def disturbed(run):
    """Whether other programs used so much of the machine that the seconds of a run are no good measure."""
    return float(run["summary"].get("other_load") or 0) > DISTURBED


def machine_of(run):
    """What the seconds of a run depend on, beside its settings and other programs."""
    return tuple(run["env"].get(fact) for fact in ("device_name", "cpu_model", "threads"))


def read_table(path):
    """A CSV file as lists of text, the header first; an empty header where there is no file."""
    if not path.exists():
        return [[]]
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as f:
        return list(csv.reader(f))


def number(text):
    """Six digits of a number; None where it is not finite."""
    x = float(text)
    return float(f"{x:.6g}") if math.isfinite(x) else None


def columns(path):
    """A CSV file of numbers as {column: numbers}."""
    head, *rows = read_table(path)
    return {name: [number(row[i]) for row in rows] for i, name in enumerate(head)}


def as_text(facts):
    """A dict with its values as text."""
    return {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in facts.items()}


def command_line(args, env):
    """The command line that gives the settings `args`. If another version wrote them: the one that was typed."""
    timm = ["--extra", "timm"] if str(args.get("model")).startswith("timm/") else []
    words, given = ["uv", "run", *timm, "train_fastai.py"], {}
    try:
        config = Config(**{k: v for k, v in args.items() if k not in NO_EFFECT}).to_dict()
        for name, value in config.items():
            if value == Config(**given).to_dict()[name]:  # the words so far imply it
                continue
            given[name] = value
            if isinstance(value, bool):
                words.append(flag_of(name) if value else "--no-" + flag_of(name)[2:])
            else:
                words += [flag_of(name), *map(str, value if isinstance(value, list) else [value])]
    except (BadInput, TypeError):
        return f"uv run {env.get('command', '')}"
    return shlex.join(words)


def progress(args, env, rows, live):
    """How far an unfinished run is, as [fact, value, note]."""
    n, epochs = len(rows.get("epoch", [])), args["epochs"]
    if not n:
        expected = f"all take about {duration(env['expected_seconds'])}" if "expected_seconds" in env else ""
        return [["epoch", f"0 of {epochs}", expected if live else ""]]
    best = max(range(n), key=lambda i: rows["valid_acc"][i])
    seconds = rows["seconds"][-1]
    when = f"about {duration(seconds / n * (epochs - n))} left" if live else f"{duration(seconds)} so far"
    return [
        ["epoch", f"{n} of {epochs}", when],
        ["test accuracy", f"{rows['test_acc'][-1]:.4f}", f"after epoch {n}"],
        [f"best {env['chosen_on']} accuracy", f"{rows['valid_acc'][best]:.4f}", f"epoch {best + 1}"],
        ["learning rate", f"{rows['lr'][-1]:.3g}", f"in epoch {n}"],
    ]


def result(run, interval):
    """The result of a finished run, as [fact, value, note]; `run` as `advice` takes it."""
    s, rows, n = run["summary"], run["rows"], run["n"]["test"]
    sizes = [size for *_, size in run["recalls"] if size]
    right = f"{n - s['mistakes']:,} of {n:,} images right; 95% interval {interval}"
    if "balanced_acc" in s and max(sizes) >= UNEVEN * min(sizes):
        right += f"; classes are uneven: balanced accuracy {s['balanced_acc']:.4f}, macro-F1 {s['macro_f1']:.4f}"
    if s.get("tta_test_acc") is not None:
        right += f"; {s['tta_test_acc']:.4f} with mirror images (tta)"
    if s.get("top5_acc") is not None:
        right += f"; {s['top5_acc']:.4f} with the truth among the first five (top-5)"
    if s["chosen_on"] != "valid":
        right += "; test chose the weights, so it is too good"
    reached = f"epoch {s['epochs_to_target']}", f"after {duration(s['seconds_to_target'] or 0)}"
    if not s["epochs_to_target"]:
        reached = "not reached", f"the most was {max(rows['test_acc']):.4f}"
    speed = f"{s['images_per_second']:,.0f} images/s, evaluation included"
    speed += f"; the whole run took {duration(s['total_seconds'])}" if "total_seconds" in s else ""
    chosen = f"of {len(rows['epoch'])}, best by {s['chosen_on']} {s.get('chosen_by', 'accuracy')}"
    chosen += f"; {s['chosen_on']} accuracy {s['valid_acc']:.4f}"
    return [
        ["test accuracy", f"{s['test_acc']:.4f}", right],
        ["weights kept", f"epoch {s['best_epoch']}", chosen],
        *([[f"test accuracy of {s['target']:g}", *reached]] if s["target"] else []),
        ["training", duration(s["train_seconds"]), speed],
    ]


def settings(args, env):
    """The settings that matter most, as [fact, value]."""
    sets = ", ".join(f"{n:,} {name}" for name, n in env["images"].items())
    source = f"found by the range test, rule {args['lr_suggest']}" if args["lr"] == "find" else "as given"
    cycle = f"{args['max_momentum']:g} to {args['min_momentum']:g} and back"
    momentum = f", momentum {cycle if args['schedule'] == 'one_cycle' else format(args['momentum'], 'g')}"
    momentum = momentum if args["optimizer"] in MOMENTUM else ""
    device = f" ({env['device_name']})" if env["device_name"] != env["device"] else ""
    plans = ", or ".join(f"{name} for {counted(n, 'epoch')}" for name, (n, _) in env.get("choices", {}).items())
    return [
        ["data", f"{args['data']}: {sets}; {len(env['classes'])} classes, {env['size']} x {env['size']} pixels"],
        ["network", f"{args['model']}, {env['params']:,} parameters"],
        ["learning rate", f"{env['lr']:.4g} ({source}), {args['schedule']}" if "lr" in env else args["schedule"]],
        ["optimizer", f"{args['optimizer']}{momentum}, weight decay {args['weight_decay']:g}"],
        ["batches, epochs", f"{env.get('batch_size', args['batch_size'])} images, {counted(args['epochs'], 'epoch')}"],
        *([["chosen for", f"{env['minutes']:g} minutes: {plans}"]] if plans else []),
        ["seed", " ".join(map(str, args["seeds"]))],
        ["computed on", f"{env['device']}{device}, {env['precision']}, {counted(env['threads'], 'thread')}"],
    ]


def mistakes(folder):
    """Of a finished run: classes, their recalls and scores, confusions, calibration, mistakes with pictures.

    Mistakes have `l`, the loss, and the probabilities of prediction (`p`) and truth (`q`).
    """
    (_, *classes), *lines = read_table(folder / "confusion_matrix.csv")
    counts, place = [[int(n) for n in line[1:]] for line in lines], {name: i for i, name in enumerate(classes)}
    pairs = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:PAIRS]
    pictures = read_json(folder / "gallery.json") if (folder / "gallery.json").exists() else {}
    rows, room = [], ROWS
    for _, file, truth, prediction, *numbers in read_table(folder / "mistakes.csv")[1:]:
        row = dict(zip("lpq", map(number, numbers)), file=file, truth=place[truth], prediction=place[prediction])
        room -= len(json.dumps(row))
        if room < 0:
            break
        if file in pictures:
            row["picture"] = pictures[file]
        rows.append(row)
    found = dict(classes=classes, confusion=counts if len(counts) <= MATRIX else None, pairs=pairs, mistakes=rows)
    found["recalls"] = [(name, counts[i][i], sum(counts[i])) for i, name in enumerate(classes)]
    if (folder / "classes.csv").exists():  # runs of older versions have none
        _, *scores = read_table(folder / "classes.csv")
        found |= dict(scores=[[name, *map(number, row)] for name, *row in scores])
        found |= dict(reliability=columns(folder / "calibration.csv"))
    return found


def train_batch(path):
    """train_batch.png as a data URI; a large one as a smaller JPEG; None where there is none, or even that is large."""
    from PIL import Image

    content = path.read_bytes() if path.exists() and not path.is_symlink() else b""
    with suppress(OSError, Image.DecompressionBombError), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        if len(content) <= BATCH:
            return f"data:image/png;base64,{base64.b64encode(content).decode()}"
        image.thumbnail((1000, 1000))
        uri = runs.data_uri(image.convert("RGB"), "jpeg")
        return uri if len(uri) <= 4 / 3 * BATCH else None


def of_run(folder, live):
    """What the page shows of a run, finished or not."""
    asked = read_yaml(folder / "args.yaml")
    args = {**{name: field.default for name, field in FIELDS.items()}, **asked}
    env, rows = read_json(folder / "env.json"), columns(folder / "results.csv")
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else None
    n, cuts, note = len(rows.get("epoch", [])), [], ""
    if n and args["schedule"] in ("plateau", "grow_batch"):
        steps = list(zip(rows["lr"], rows["batch_size"]))
        cuts = [i + 1.5 for i, (a, b) in enumerate(zip(steps, steps[1:])) if b[0] < a[0] or b[1] > a[1]]
    state = "done" if summary else "live" if live else "stopped"
    if state == "live":
        waits = "This page renews itself, but not while you read a curve, open a list or select text."
        trained = "Trained; the kept weights are evaluated, and the mistakes explained."
        note = f"In training: {n} of {args['epochs']} epochs. {waits}" if n < args["epochs"] else trained
    elif state == "stopped":
        why = f" {env['ended'][0].upper()}{env['ended'][1:]}." if env.get("ended") else " --resume goes on with it."
        after_test = args["lr_find_only"] and "lr_suggestions" in env
        note = "Stopped after the range test." if after_test else f"Not finished: {n} of {args['epochs']} epochs.{why}"
    found = mistakes(folder) if summary else dict(classes=[], confusion=None, mistakes=[])
    pace = rows["seconds"][-1] / n if n else env.get("expected_seconds", 120 * args["epochs"]) / args["epochs"]
    doubts = read_table(folder / "doubts.csv")[1:]
    facts = dict(args=args, n=env["images"], rows=rows, summary=summary, cuts=cuts, doubts=doubts)
    facts |= dict(sets=env.get("sets", ""), recalls=found.pop("recalls", ()))
    interval = summary and "{:.4f} to {:.4f}".format(*wilson(summary["test_acc"], env["images"]["test"]))
    headline = result(facts, interval) if summary else progress(args, env, rows, live)
    commit, exact = env.get("commit") or "", summary and env["precision"] != "float32"
    for name in (name for name in MEASURED if exact and name in summary):
        rows[name][summary["best_epoch"] - 1] = number(summary[name])  # one number for the kept weights: in float32
    return {
        "kind": "run", "name": folder.resolve().name, "state": state, "note": note, "pace": number(pace),
        "headline": headline, "settings": settings(args, env),
        "rows": rows, "cuts": cuts, "kept": summary and summary["best_epoch"], "target": args["target"] or None,
        "exact": exact, "interval": interval,
        "batch": train_batch(folder / "train_batch.png"), "advice": advice(facts),
        "chosen_on": env["chosen_on"], "wrong": summary and summary["mistakes"],
        "range": columns(folder / "lr_find.csv"), "linear": args["lr_scale"] == "linear",
        "suggestions": env.get("lr_suggestions", {}), "used": args["lr_suggest"],
        "doubts": doubts[:DOUBTS], "n_doubts": len(doubts), **found,
        "summary": {k: v for k, v in (summary or {}).items() if k in OVERALL},
        "command": command_line(asked, env), "typed": env.get("command", ""),
        "commit": commit[:12].rstrip("+") + (", with changes" if commit.endswith("+") else ""),
        "all": as_text(asked), "env": as_text({k: v for k, v in env.items() if v != [] and k not in LEFT_OUT}),
    }  # fmt: skip


def of_comparison(folder):
    """What the page shows of a comparison. It has curves of those run folders that comparison.csv still finds."""
    head, *lines = read_table(folder / "comparison.csv")
    rows, variants = [dict(zip(head, line)) for line in lines], {}
    _, table, *notes = (folder / "comparison.md").read_text(encoding="utf-8").strip().split("\n\n")
    for row in rows:
        run = folder / row["folder"]
        link = f"{row['folder']}/report.html"
        row["link"] = quote(link, errors="surrogateescape") if (run / "report.html").exists() else None
        row["disturbed"] = disturbed({"summary": row})
        variants.setdefault(row["variant"], []).append(columns(run / "results.csv"))
    curves = [{"name": name, **{c: band(group, c) for c in CURVES}} for name, group in variants.items()]
    shown = "variant seed fold test_acc best_epoch lr train_seconds disturbed folder link".split()
    return {
        "kind": "comparison", "name": folder.resolve().name, "state": "done", "notes": notes, "curves": curves,
        "table": [line[2:-2].split(" | ") for line in table.split("\n") if not line.startswith("| --- ")],
        "runs": [{k: row.get(k) for k in shown} for row in rows],
    }  # fmt: skip


def band(group, column):
    """[mean, mean - deviation, mean + deviation] of `column` over the runs of `group`, an epoch each.

    Of rates the mean is geometric and the deviation a factor, as on the logarithmic axis that shows them.
    """
    to, back = (math.log, math.exp) if column == "lr" else (float, float)
    epochs = zip(*[run[column] for run in group if run.get(column)])  # they end with the run that ends first
    epochs = [[to(v) for v in epoch if v is not None and (v > 0 or column != "lr")] for epoch in epochs]
    ends = lambda mean, deviation: [number(back(x)) for x in (mean, mean - deviation, mean + deviation)]
    return [ends(statistics.fmean(v), statistics.stdev(v) if v[1:] else 0) if v else [None] * 3 for v in epochs]


def page(data):
    """The HTML of what `of_run` or `of_comparison` found."""
    safe = json.dumps(data, allow_nan=False).translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})
    title = f"{data['headline'][0][1]}: {data['name']}" if data["state"] == "live" else data["name"]
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", safe, 1)
    return text.replace("{{title}}", html.escape(title), 1)  # the first: data may hold these letters too


def write(folder, live=False, show=False):
    """Writes report.html of a run folder or a comparison, and returns its path.

    `live`: it renews itself every few seconds; `show` opens it in the browser. Raises BadInput where the folder is
    neither, or cannot be written to.
    """
    folder = Path(folder)
    is_comparison, file = (folder / "comparison.csv").exists(), folder / "report.html"
    if not is_comparison and not (folder / "env.json").exists():
        raise BadInput(f"{folder}: is no run folder and no comparison")
    with refused(f"{folder}: its files are damaged, or missing", "start a new run"):
        content = page(of_comparison(folder) if is_comparison else of_run(folder, live))
    runs.write(file, content)
    if show:
        webbrowser.open(file.resolve().as_uri())
    return file


def say(folder):
    """Prints the result of a finished run, as its page has it."""
    for fact, value, note in of_run(folder, live=False)["headline"]:
        print(f"{fact}: {value} ({printable(note)})")
    print(f"open {printable(folder / 'report.html')}", flush=True)


def follow(run, log):
    """What a run does after each epoch: a function of the rows so far that writes results.csv, the page and the log."""
    log = runs.logger(log, run.path)

    def after_epoch(rows):
        runs.write_csv(run / "results.csv", rows)
        write(run.path, live=True)
        log(rows)

    return after_epoch


@command
def main(argv):
    p = Parser(prog="python -m lib.report", description="Write report.html, a run or a comparison on one page.")
    p.add_argument("folders", nargs="+", metavar="folder", help="a run folder, or that of a comparison")
    p.add_argument("--open", action="store_true", help="open it in the browser")
    args = p.parse_args(argv)
    for folder in args.folders:
        print(printable(write(folder, live=runs.in_use(Path(folder)), show=args.open)))


if __name__ == "__main__":
    sys.exit(main())
