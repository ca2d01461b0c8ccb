"""Everything that has to be known about a GPU, from one command, in under 9 minutes.

python -m tests.benchmarks.gpu --data FOLDER [--out results/gpu] [--minutes 9] [--only right fast good]
python -m tests.benchmarks.gpu --rehearse      every part at toy size on any machine, in 3 minutes

FOLDER is CIFAR-10 as class folders in train/ and test/. Each check is written to results.json in `--out` as soon as it
is done, so that a command that is cut off still says something; README.md there has all as a table. What only a card
can show is skipped elsewhere, and counted. Exit status 1 where a check of `right` failed.

On a machine without a network: `python -m tests.benchmarks.gpu_wheels` makes the folder wheels/ elsewhere; then
python -m pip install --no-index --no-deps --find-links wheels wheels/*.whl
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback

from lib import config, data, machine, models, train
from lib.explain import maps
from lib.train import schedules
from tests.benchmarks import common, speed

ROOT = Path(__file__).parents[2]


class Skipped(Exception):
    """What this machine cannot show; the text says why."""


class Bench:
    """What every check needs: the arguments, the device, a folder for runs, and the time that is left."""

    def __init__(self, args, folder):
        self.args, self.folder, self.rehearse = args, Path(folder), args.rehearse
        self.device = machine.pick_device(config.Config())
        self.end, self.made = time.monotonic() + 60 * args.minutes, {}

    def settings(self, *argv, seed=0):
        """The settings of a learner: the digits, or CIFAR-10 where `--data` is given."""
        source = ["--data", self.args.data, "--size", "32"] if self.args.data else ["--data", "digits"]
        always = ["--cache", str(self.folder / "cache"), "--model", "small", "--seeds", str(seed)]
        return config.parse([*source, *always, *map(str, argv)])

    def learner(self, *argv, precision=None):
        settings = self.settings(*argv)
        machine.seed_everything(settings.seed)
        dls = data.get_dls(settings, self.device)
        model = models.build(settings.model, len(dls.vocab), images=dls.train.plain()[0])
        precision = precision or machine.pick_precision(settings, self.device)
        return dataclasses.replace(settings, batch_size=dls.train.bs), train.build(settings, dls, model, precision)

    def command(self, name, *argv, kill_after=""):
        """Runs train_fastai.py on the digits as a user does: (exit status, what it printed, run folder)."""
        words = ["--data", "digits", "--epochs", "3", "--lr", "0.1", "--cache", self.folder / "cache"]
        words = argv if "--resume" in argv else [*words, "--out", self.folder / "runs", "--name", name, *argv]
        options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        process, told = subprocess.Popen([sys.executable, "train_fastai.py", *map(str, words)], **options), []
        for line in process.stdout:
            told.append(line)
            if kill_after and line.startswith(kill_after):
                process.send_signal(signal.SIGKILL)
        return process.wait(), "".join(told), self.folder / "runs" / name

    def run(self, name, *argv):
        """The folder of a finished run, made once."""
        if name not in self.made:
            status, told, folder = self.command(name, *argv)
            assert status == 0, f"exit status {status}: {told.strip().splitlines()[-1]}"
            self.made[name] = folder
        return self.made[name]

    def needs_card(self):
        if self.device.type != "cuda":
            raise Skipped("needs a CUDA device")


def rows_of(folder):
    """results.csv without its seconds."""
    lines = [line.split(",") for line in (folder / "results.csv").read_text().splitlines()]
    place = lines[0].index("seconds")
    return [line[:place] + line[place + 1 :] for line in lines]


def same(one, other):
    """Whether two run folders have equal weights and records, to the bit."""
    weights = "weights/best.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes(), "weights differ"
    assert rows_of(one) == rows_of(other), "results.csv differs"


def state(learn):
    """A hash of what a look must leave alone."""
    digest = hashlib.sha256()
    for tensor in [*learn.model.state_dict().values(), torch.get_rng_state()]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    if learn.device.type == "cuda":
        digest.update(torch.cuda.get_rng_state().numpy().tobytes())
    return digest.hexdigest(), [dl.epoch for dl in learn.dls.loaders]


# --- right


def loss_falls(bench):
    _, *rows = rows_of(bench.run("one"))
    losses = [float(row[4]) for row in rows]
    assert losses[-1] < losses[0], f"training losses {losses}"
    return {"train_loss": losses}


def two_runs_are_equal(bench):
    same(bench.run("one"), bench.run("two"))


def the_range_test_leaves_no_trace(bench):
    _, learn = bench.learner()
    before = state(learn)
    found = learn.lr_find(num_it=40, show_plot=False)
    assert state(learn) == before, "weights, generators or loaders have changed"
    return {"valley": found.valley}


def a_killed_run_goes_on_to_the_bit(bench):
    status, _, folder = bench.command("killed", kill_after="epoch 1/3")
    assert status == -signal.SIGKILL, f"exit status {status}"
    status, told, _ = bench.command("killed", "--resume", folder)
    assert status == 0, told.strip().splitlines()[-1]
    same(bench.run("one"), folder)


def workers_make_no_difference(bench):
    hashes, counts = {}, (0, 2) if bench.rehearse else (0, 8, 16)
    for workers in counts:
        dls = data.get_dls(bench.settings("--workers", workers), bench.device)
        digest = hashlib.sha256()
        for x, y in list(dls.train)[:40]:
            digest.update(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes())
        hashes[workers] = digest.hexdigest()
    assert len(set(hashes.values())) == 1, f"batches differ: {hashes}"


def every_precision_learns(bench):
    found = {}
    for precision in ("float32", "bf16", *(["fp16"] if bench.device.type == "cuda" else [])):
        settings, learn = bench.learner("--lr", 0.1, "--epochs", 2, "--valid-pct", 0.1, precision=precision)
        schedules.fit(learn, settings, 0.1)
        found[precision] = [row["train_loss"] for row in learn.recorder.rows]
        assert found[precision][1] < found[precision][0], f"{precision}: {found[precision]}"
    return found


def maps_equal_the_cpus(bench):
    _, learn = bench.learner()
    x, y = learn.dls.valid.plain(16)
    layer = models.cam_layer(learn.model, x.shape[-1])
    ours = maps(learn.model, layer, x, y.tolist())
    model = learn.model.cpu()
    theirs = maps(model, models.cam_layer(model, x.shape[-1]), x.cpu(), y.tolist())
    difference = float(np.abs(ours - theirs).max())
    assert difference < 1e-3, f"they differ by {difference:.2g}"
    return {"difference": difference}


def predictions_equal_the_cpus(bench):
    from lib.predict import load

    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    (_, p), (_, q) = (load(bench.run("one"), device)(images) for device in ("cpu", str(bench.device)))
    difference = float(np.abs(p - q).max())
    assert difference < 1e-3, f"probabilities differ by {difference:.2g}"
    return {"difference": difference}


def onnx_agrees(bench):
    from lib import export
    from lib.predict import load

    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise Skipped("onnxscript and onnxruntime are not installed") from None
    content, checked = export.onnx(load(bench.run("one"), "cpu"))
    return {"bytes": len(content), "checked": checked}


def too_little_memory_is_one_line(bench):
    bench.needs_card()
    code = "import sys, torch; torch.cuda.set_per_process_memory_fraction(2e-3); import train_fastai; "
    words = ["--data", "digits", "--model", "resnet18", "--size", "224", "-b", "1000", "--lr", "0.1"]
    words += ["--out", str(bench.folder / "runs"), "--name", "large"]
    command = [sys.executable, "-c", code + "sys.exit(train_fastai.main(sys.argv[1:]))", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, f"{done.returncode}: {done.stderr[-300:]}"
    return {"line": done.stderr.strip()}


class Strict(Callback):
    """Counts the waits for the device between two batches."""

    order, waits = 100, ()

    def before_train(self):
        torch.cuda.set_sync_debug_mode("warn")
        self.told = warnings.catch_warnings(record=True)
        self.waits = self.told.__enter__()
        warnings.simplefilter("always")

    def after_train(self):
        torch.cuda.set_sync_debug_mode("default")
        self.told.__exit__(None, None, None)


def nothing_waits_in_the_batch_loop(bench):
    bench.needs_card()
    settings, learn = bench.learner("--epochs", 1)
    strict = Strict()
    learn.add_cb(strict)
    schedules.fit(learn, settings, 0.1)
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in strict.waits if "synchroniz" in str(w.message)]
    allowed = 2 * (len(learn.dls.train) // 50 + 2)  # the looks at the losses
    assert len(lines) <= allowed, f"{len(lines)} waits in {len(learn.dls.train)} batches: {sorted(set(lines))}"
    return {"waits": len(lines), "batches": len(learn.dls.train), "where": sorted(set(lines))}


# --- fast


def speeds(bench):
    """Images a second of stock fastai, of this project, with --compile, and of a resident batch, in turn."""
    found, toy = {}, bench.rehearse
    images, rounds = (256, 1) if toy else (12_800, 5)
    for batch in (64,) if toy else (128, 512, 1024):
        folder = bench.folder / f"speed-{batch}"
        root = folder / "images"
        if bench.args.data:
            common.subset(Path(bench.args.data), root, images, 100)
        else:
            common.generate(root, images, 32, test=100)
        words = ["--data", root, "--size", 32, "--valid-pct", 0, "--cache", folder, "-b", batch, "--epochs", 1]
        words += ["--model", "small" if toy else "medium", "--ema", 0.999, "--no-progress"]
        settings = config.parse(list(map(str, words)))
        precision = machine.pick_precision(settings, bench.device)
        ours = speed.Ours(settings, bench.device, precision, folder)
        ways = {"ours": ours.round, "ceiling": speed.Ceiling(ours, images // batch).round, "loader": ours.loader}
        compiled, there = dataclasses.replace(settings, compile=True), bench.device.type == "cuda"
        ours = speed.Ours(compiled, bench.device, precision if there else "float32", folder / "compiled")
        ways["ours, --compile"] = ours.round
        with speed.Stock.elsewhere(root, settings, bench.device) as stock:
            ways["stock fastai"] = stock
            times = {name: [] for name in ways}
            for i in range(rounds + 1):  # the first, which warms up, is not counted
                for name, way in ways.items():
                    with contextlib.redirect_stdout(None):
                        number = way()
                    if i:
                        times[name].append(number)
        found[batch] = {name: statistics.median(numbers) for name, numbers in times.items()}
        found[batch]["rounds"] = times
    return found


def where_the_time_goes(bench):
    """The ten kernels that take the most time of an epoch, and the share of it in which the device idles."""
    from torch.profiler import ProfilerActivity, profile

    settings, learn = bench.learner("--epochs", 1, *([] if bench.rehearse else ["--model", "medium"]))
    schedules.fit(learn, settings, 0.1)  # warms up
    cuda = bench.device.type == "cuda"
    start = speed.clock(bench.device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        schedules.fit(learn, settings, 0.1)
    seconds = speed.clock(bench.device) - start
    own = lambda event: event.self_device_time_total if cuda else event.self_cpu_time_total
    events = sorted(seen.key_averages(), key=own, reverse=True)
    top = {event.key[:80]: {"share": own(event) / 1e6 / seconds, "calls": event.count} for event in events[:10]}
    busy = sum(event.self_device_time_total for event in events) / 1e6 if cuda else None
    return {"seconds": seconds, "idle_share": cuda and 1 - busy / seconds, "top": top}


# --- good


def trained(bench, name, *argv, seconds):
    """The summary of a run on all of CIFAR-10, where it fits into the time that is left."""
    if bench.end - time.monotonic() < seconds and not bench.rehearse:
        raise Skipped(f"needs about {seconds} s")
    toy = ["--data", "digits", "--epochs", "1", "--model", "small", "--lr", "0.1"]
    words = ["--data", bench.args.data or "cifar10", "--size", "32", "--label-smoothing", "0.1", "--ema", "0.999"]
    words += ["--threshold", "0.04", "--target", "0.88", *argv]
    start = time.monotonic()
    status, told, folder = bench.command(name, *(toy if bench.rehearse else words))
    assert status == 0, told.strip().splitlines()[-1]
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("test_acc", "valid_acc", "seconds_to_target", "train_seconds", "images_per_second", "lr")
    return {**{key: summary[key] for key in kept}, "seconds_in_all": time.monotonic() - start}


def the_default(bench):
    return trained(bench, "default", "--epochs", "50", "--lr", "find", seconds=150)


def one_cycle(bench):
    """12 epochs of one cycle, 5 seeds."""
    short = "--schedule one_cycle --epochs 12 --cutout 0 --crop-padding 2 --optimizer nesterov --weight-decay 1e-3"
    seeds = (0,) if bench.rehearse else range(5)
    words = [*short.split(), "--lr", "find", "--seeds"]
    return {f"seed {s}": trained(bench, f"one-cycle-{s}", *words, str(s), seconds=50) for s in seeds}


def large(bench):
    return trained(bench, "large", "--model", "large", "--cutout", "16", "--epochs", "50", "--lr", "find", seconds=240)


PARTS = {
    "right": [
        loss_falls, two_runs_are_equal, the_range_test_leaves_no_trace, a_killed_run_goes_on_to_the_bit,
        workers_make_no_difference, every_precision_learns, maps_equal_the_cpus, predictions_equal_the_cpus,
        onnx_agrees, too_little_memory_is_one_line, nothing_waits_in_the_batch_loop,
    ],
    "fast": [speeds, where_the_time_goes],
    "good": [the_default, one_cycle, large],
}  # fmt: skip


def check(bench, function):
    """The result of one check: ok, failed or skipped, with its facts or its reason, and its seconds."""
    start = time.monotonic()
    if start > bench.end:
        return {"status": "skipped", "reason": "no time was left", "seconds": 0}
    try:
        found = {"status": "ok", **(function(bench) or {})}
    except Skipped as e:
        found = {"status": "skipped", "reason": str(e)}
    except Exception as e:  # whatever it is: the next check goes on
        where = traceback.extract_tb(e.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        found = {"status": "failed", "reason": f"{type(e).__name__}: {' '.join(str(e).split())[:500]} ({place})"}
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def table(results):
    """results.json as Markdown."""
    lines = [f"# {results['card']}", "", f"`{results['command']}`, torch {results['machine']['torch']}.", ""]
    lines += ["| part | check | status | seconds | what was found |", "| --- | --- | --- | --- | --- |"]
    for part, checks in results["parts"].items():
        for name, found in checks.items():
            facts = {k: v for k, v in found.items() if k not in ("status", "seconds", "rounds", "top")}
            said = found.get("reason") or json.dumps(facts, default=str).replace("|", "/")[1:-1][:400]
            lines.append(f"| {part} | {name.replace('_', ' ')} | {found['status']} | {found['seconds']} | {said} |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", help="folder of CIFAR-10 (rehearsal: the digits)")
    p.add_argument("--out", default="results/gpu")
    p.add_argument("--minutes", type=float, default=9, help="after which no check begins (9)")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--rehearse", action="store_true", help="every part at toy size, on any machine")
    args = p.parse_args()
    if not args.data and not args.rehearse:
        p.error("--data FOLDER, or --rehearse")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        card = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "no card: a rehearsal"
        words = " ".join("FOLDER" if word == args.data else word for word in sys.argv[1:])
        results = {"card": card, "command": f"python -m tests.benchmarks.gpu {words}", "machine": common.machine()}
        results["parts"] = {part: {} for part in args.only}
        for part in args.only:
            for function in PARTS[part]:
                found = results["parts"][part][function.__name__] = check(bench, function)
                print(f"{part:6s} {function.__name__:34s} {found['status']:8s} {found['seconds']:6.1f} s  "
                      f"{found.get('reason', '')}", flush=True)  # fmt: skip
                (out / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
                (out / "README.md").write_text(table(results))
    statuses = [found["status"] for checks in results["parts"].values() for found in checks.values()]
    print(f"{statuses.count('ok')} ok, {statuses.count('failed')} failed, {statuses.count('skipped')} skipped -> {out}")
    wrong = any(found["status"] == "failed" for found in results["parts"].get("right", {}).values())
    return int(wrong or (args.rehearse and "failed" in statuses))


if __name__ == "__main__":
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    sys.exit(main())
