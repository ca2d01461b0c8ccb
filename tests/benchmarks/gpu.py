"""Everything that has to be known about a GPU, from one command, in under 9 minutes.

python -m tests.benchmarks.gpu --data FOLDER [--out results/gpu] [--minutes 9] [--only right fast good]
python -m tests.benchmarks.gpu --rehearse [--data FOLDER]      every part at toy size on any machine, in 3 minutes

FOLDER is CIFAR-10 as class folders in train/ and test/. Each check is written to results.json in `--out` as soon as it
is done, so that a command that is cut off still says something; README.md there has all as a table. A check that fails
is recorded with its reason, and the next one goes on. What does not fit into the time that is left is skipped, and so
is what only a card can show on a machine without one; both are counted. Exit status 1 where a check of `right` failed.
`--only` keeps what the file has of the other parts.

On a machine without a network, whose torch is another version (2.11 with CUDA 13 and Python 3.12, say), the packages
that it lacks travel as wheels, which `python -m tests.benchmarks.gpu_wheels` makes elsewhere. Two lines there:

python -m pip install --no-index --no-deps --find-links wheels wheels/*.whl
python -m tests.benchmarks.gpu --data FOLDER
"""

import argparse
import contextlib
import csv
import dataclasses
import faulthandler
import hashlib
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lib import config, data, machine, models, train
from lib.cli import BadInput
from lib.explain import maps
from lib.train import schedules
from tests.benchmarks import common, speed

ROOT, LATE = Path(__file__).parents[2], 60  # seconds after its time in which the command ends itself
DIGITS = ["--data", "digits", "--lr", "0.1", "--gallery", "1", "--threads", "2"]  # equal to the bit, whoever is busy
ONE_CYCLE = "--schedule one_cycle --epochs 12 --cutout 0 --crop-padding 2 --optimizer nesterov --weight-decay 1e-3"
KEPT = ("test_acc", "valid_acc", "epochs_to_target", "seconds_to_target", "train_seconds", "images_per_second", "lr")


class Skipped(Exception):
    """What this machine, or the time that is left, cannot show; the text says why."""


class Bench:
    """What every check needs: the arguments, the device, images, a folder for runs, and the time that is left."""

    def __init__(self, args, folder):
        self.folder, self.rehearse, self.data = Path(folder), args.rehearse, args.data
        self.device = machine.pick_device(config.Config())
        self.cuda = self.device.type == "cuda"
        self.end, self.made = time.monotonic() + 60 * args.minutes, {}
        if self.rehearse and self.data not in (None, "digits"):
            self.data = common.subset(Path(self.data), self.folder / "toy", 500, 100)
        self.source = ["--data", str(self.data or "digits"), "--size", "32", "--cache", str(self.folder / "cache")]
        self.source += ["--threads", str(torch.get_num_threads())]
        self.pool = ThreadPoolExecutor(2 if self.rehearse else 6)  # of commands that run beside each other

    def learner(self, *argv, precision=None):
        """(settings, a learner of the small network), made in this process."""
        settings = config.parse([*self.source, "--model", "small", *map(str, argv)])
        machine.seed_everything(settings.seed)
        dls = data.get_dls(settings, self.device)
        model = models.build(settings.model, len(dls.vocab), images=dls.train.plain()[0])
        precision = precision or machine.pick_precision(settings, self.device)
        return dataclasses.replace(settings, batch_size=dls.train.bs), train.build(settings, dls, model, precision)

    def command(self, *argv, kill_at=""):
        """Runs train_fastai.py as a user does: (exit status, what it printed), killed at a line that begins so."""
        words = [sys.executable, "train_fastai.py", *map(str, argv), "--no-progress"]
        options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with subprocess.Popen(words, **options) as process:
            late = threading.Timer(max(self.end + LATE / 2 - time.monotonic(), 1), process.kill)
            late.start()
            told = []
            for line in process.stdout:
                told.append(line)
                if kill_at and line.startswith(kill_at):
                    process.send_signal(signal.SIGKILL)
        late.cancel()
        return process.returncode, "".join(told)

    def finished(self, name, *argv):
        """The folder of a run that goes to its end."""
        words = [*argv, "--cache", self.folder / "cache", "--out", self.folder / "runs", "--name", name]
        status, told = self.command(*words)
        assert status == 0, f"exit status {status}: {told.strip().splitlines()[-1]}"
        return self.folder / "runs" / name

    def killed(self, name, *argv):
        """The same, killed behind its first epoch and resumed."""
        words = [*argv, "--cache", self.folder / "cache", "--out", self.folder / "runs", "--name", name]
        status, _ = self.command(*words, kill_at="epoch 1/")
        assert status == -signal.SIGKILL, f"exit status {status}, not that of a kill"
        status, told = self.command("--resume", self.folder / "runs" / name)
        assert status == 0, f"resumed: exit status {status}: {told.strip().splitlines()[-1]}"
        return self.folder / "runs" / name

    def begin(self, functions):
        """Begins {name: function of this} beside each other, those that have not begun."""
        for name, function in functions.items():
            if name not in self.made:
                self.made[name] = self.pool.submit(function, self)

    def beside(self, name):
        """What one of BESIDE comes to."""
        self.begin(BESIDE)
        return self.made[name].result()

    def needs_card(self):
        if not self.cuda:
            raise Skipped("needs a CUDA device")


def rows_of(folder):
    """results.csv without its seconds."""
    with open(folder / "results.csv") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def same(one, other):
    """Whether two run folders have equal weights and records, to the bit."""
    weights = "weights/best.safetensors"
    assert rows_of(one) == rows_of(other), f"results.csv differs: {rows_of(one)[-1]}, {rows_of(other)[-1]}"
    assert (one / weights).read_bytes() == (other / weights).read_bytes(), "weights differ"


def state(learn):
    """A hash of what a look must leave alone."""
    digest = hashlib.sha256()
    for tensor in [*learn.model.state_dict().values(), torch.get_rng_state()]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    if learn.device.type == "cuda":
        digest.update(torch.cuda.get_rng_state().numpy().tobytes())
    return digest.hexdigest(), [dl.epoch for dl in learn.dls.loaders]


# --- right


def every_precision_learns(bench):
    bench.begin(BESIDE)
    found = {}
    for precision in ("float32", "bf16", *(["fp16"] if bench.cuda else [])):
        settings, learn = bench.learner("--epochs", 2, precision=precision)
        schedules.fit(learn, settings, 0.1)
        found[precision] = [row["train_loss"] for row in learn.recorder.rows]
        assert found[precision][1] < found[precision][0], f"{precision}: {found[precision]}"
    return found


def the_range_test_leaves_no_trace(bench):
    _, learn = bench.learner()
    before = state(learn)
    found = {}
    try:
        found["valley"] = learn.lr_find(num_it=40, show_plot=False).valley
    except BadInput as e:  # on few images the loss may stand still; what it leaves behind counts here
        found["told"] = str(e)
    assert state(learn) == before, "weights, generators or loaders have changed"
    return found


def workers_make_no_difference(bench):
    hashes = {}
    for workers in (0, 2) if bench.rehearse else (0, 8, 16):
        _, learn = bench.learner("--workers", workers)
        digest = hashlib.sha256()
        for x, y in itertools.islice(learn.dls.train, 40):
            digest.update(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes())
        hashes[workers] = digest.hexdigest()[:16]
    assert len(set(hashes.values())) == 1, f"batches differ: {hashes}"


def without_tf32():
    """Inside, float32 convolutions on a card are computed in float32."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def maps_equal_the_cpus(bench):
    """In float32 as torch has it by default, which on a card is TF32 in convolutions; and without TF32, to compare."""
    _, learn = bench.learner()
    x, y = learn.dls.valid.plain(16)
    of = lambda model, x: maps(model, models.cam_layer(model, x.shape[-1]), x, y.tolist())
    default = of(learn.model, x)
    with without_tf32():
        exact = of(learn.model, x)
    cpus = of(learn.model.cpu(), x.cpu())
    found = {"apart": float(np.abs(default - cpus).max()), "apart_without_tf32": float(np.abs(exact - cpus).max())}
    assert found["apart_without_tf32"] < 1e-3, f"they differ: {found}"
    return found


def a_compiled_fit_is_the_plain_one(bench):
    """In float32: kernels add up in another order, and training makes that larger from step to step."""
    losses, seconds = [], []
    for flags in ([], ["--compile"]):
        try:
            settings, learn = bench.learner("--epochs", 2, "-b", 64, *flags, precision="float32")
        except BadInput as e:  # no C++ compiler is here
            raise Skipped(str(e)) from None
        start = time.monotonic()
        with without_tf32():  # which rounds by 1e-3 itself
            schedules.fit(learn, settings, 0.05)
        seconds.append(time.monotonic() - start)
        losses.append([float(loss) for loss in learn.recorder.losses])  # a moving average of the steps' losses
    apart = [abs(a - b) / a for a, b in zip(*losses, strict=True)]
    found = {"apart_in_10_steps": max(apart[:10]), "apart_at_the_end": apart[-1], "steps": len(apart)}
    assert found["apart_in_10_steps"] < 1e-3 and found["apart_at_the_end"] < 5e-2, f"losses differ: {found}"
    return {**found, "compile_seconds": seconds[1] - seconds[0]}


class Strict(Callback):
    """Notes each wait for the device between two batches."""

    order = -100

    def before_train(self):
        self.told = warnings.catch_warnings(record=True)
        self.waits = self.told.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def after_train(self):
        torch.cuda.set_sync_debug_mode("default")
        self.told.__exit__(None, None, None)


def nothing_waits_in_the_batch_loop(bench):
    bench.needs_card()
    settings, learn = bench.learner("--epochs", 1, "--ema", 0.999)
    strict, batches = Strict(), len(learn.dls.train)
    learn.add_cb(strict)
    schedules.fit(learn, settings, 0.1)
    told = [w for w in strict.waits if "synchroniz" in str(w.message)]
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told)
    looks = batches // 50 + 1  # at the losses
    assert not [n for n in places.values() if n > 2 * looks], f"waits in {batches} batches: {dict(places)}"
    return {"waits": dict(places), "batches": batches}


def run_of_digits(bench, name, how):
    return how(bench, name, *DIGITS, "--epochs", 2 if bench.rehearse else 3)


def without_memory(bench):
    bench.needs_card()
    code = "import sys, torch; torch.cuda.set_per_process_memory_fraction(3e-3); import train_fastai; "
    words = ["--data", "digits", "--model", "resnet18", "--size", "224", "-b", "1000", "--lr", "0.1"]
    words += ["--out", str(bench.folder / "runs"), "--name", "too-large", "--cache", str(bench.folder / "cache")]
    command = [sys.executable, "-W", "ignore", "-c", code + "sys.exit(train_fastai.main(sys.argv[1:]))", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def tests_for_a_card(bench):
    bench.needs_card()
    if not importlib.util.find_spec("pytest"):
        raise Skipped("pytest is not installed")
    words = "-m pytest -q -o addopts= -m cuda tests/test_gpu.py tests/test_compile.py"  # addopts may need a plugin
    command = [sys.executable, *words.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


BESIDE = {  # commands that run beside the checks of this process
    "one": partial(run_of_digits, name="one", how=Bench.finished),
    "two": partial(run_of_digits, name="two", how=Bench.finished),
    "killed": partial(run_of_digits, name="killed", how=Bench.killed),
    "without memory": without_memory,
    "tests": tests_for_a_card,
}


def too_little_memory_is_one_line(bench):
    done = bench.beside("without memory")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    told = done.stderr.strip()[-300:]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in told, f"status {done.returncode}: {told}"
    return {"line": errors[0][:200]}


def tests_marked_cuda_pass(bench):
    done = bench.beside("tests")
    told = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert done.returncode == 0, f"exit status {done.returncode}: {' '.join(told) or done.stderr[-300:]}"
    last = done.stdout.strip().splitlines()[-1]
    assert "passed" in last and "skipped" not in last, last  # a test is skipped where it sees no card
    return {"tests": last}


def loss_falls(bench):
    losses = [float(row["train_loss"]) for row in rows_of(bench.beside("one"))]
    assert losses[-1] < losses[0], f"training losses {losses}"
    return {"train_loss": losses}


def two_runs_are_equal(bench):
    same(bench.beside("one"), bench.beside("two"))


def a_killed_run_goes_on_to_the_bit(bench):
    same(bench.beside("one"), bench.beside("killed"))


def predictions_equal_the_cpus(bench):
    from lib.predict import load

    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    with without_tf32():
        (_, p), (_, q) = (load(bench.beside("one"), device)(images) for device in ("cpu", str(bench.device)))
    apart = float(np.abs(p - q).max())
    assert apart < 1e-3, f"probabilities differ by {apart:.2g}"
    return {"apart": apart}


def onnx_agrees(bench):
    from lib import export
    from lib.predict import load

    lacked = [name for name in ("onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    if lacked:
        raise Skipped(f"{' and '.join(lacked)} not installed")
    content, checked = export.onnx(load(bench.beside("one"), "cpu"))
    return {"bytes": len(content), "checked": checked}


# --- fast


def speeds(bench, batch):
    """Images a second of stock fastai, of this project, with --compile, and of a resident batch, in turn."""
    if bench.rehearse and batch > 64:
        raise Skipped("a rehearsal has one batch size")
    images, few, rounds = (256, 256, 1) if bench.rehearse else (25_600, 10_240, 5)
    roots = []
    for n in (images, few):  # stock fastai has fewer: it takes so much longer
        roots.append(bench.folder / f"speed-{n}")
        if not roots[-1].exists() and bench.data in (None, "digits"):
            common.generate(roots[-1], n, 32, test=100)
        elif not roots[-1].exists():
            common.subset(Path(bench.data), roots[-1], n, 100)
    words = ["--data", roots[0], "--size", 32, "--valid-pct", 0, "--cache", bench.folder / "cache", "--epochs", 1]
    words += ["-b", batch, "--model", "small" if bench.rehearse else "medium", "--ema", 0.999, "--no-progress"]
    settings = config.parse(list(map(str, words)))
    precision = machine.pick_precision(settings, bench.device)
    ours = speed.Ours(settings, bench.device, precision, bench.folder / f"ours-{batch}")
    ways = {"ours": ours.round, "resident batch": speed.Ceiling(ours, images // batch).round, "loader": ours.loader}
    if bench.cuda and batch < 1024:  # larger ones are not bound by launches
        compiled = dataclasses.replace(settings, compile=True)
        ways["ours, --compile"] = speed.Ours(compiled, bench.device, precision, bench.folder / f"graph-{batch}").round
    with speed.Stock.elsewhere(roots[1], settings, bench.device) as stock:
        ways["stock fastai"] = stock
        times = {name: [] for name in ways}
        for i in range(rounds + 1):  # the first, which warms up, is not counted
            for name, way in ways.items():
                with contextlib.redirect_stdout(None):
                    number = way()
                if i:
                    times[name].append(round(number))
    medians = {name: statistics.median(numbers) for name, numbers in times.items()}
    workers = {"ours": ours.dls.train.fake_l.num_workers, "loader": 0}
    facts = {"precision": precision, "workers": workers, "images": {"stock fastai": few, "others": images}}
    return {"images_per_second": medians, **facts, "rounds": times}


def batches_of_128(bench):
    return speeds(bench, 64 if bench.rehearse else 128)


def batches_of_512(bench):
    return speeds(bench, 512)


def batches_of_1024(bench):
    return speeds(bench, 1024)


KINDS = ProfilerActivity.CPU, ProfilerActivity.CUDA  # off and on a card


class Profiled(Callback):
    """Up to 50 batches in the middle of an epoch under torch's profiler."""

    order = -100

    def before_batch(self):
        self.first = min(10, self.n_iter // 4)
        if self.training and self.iter == self.first:
            self.profiler = profile(activities=[KINDS[torch.cuda.is_available()]])
            self.profiler.__enter__()

    def after_batch(self):
        if self.training and self.iter == min(self.first + 49, self.n_iter - 1):
            speed.clock(self.dls.device)
            self.profiler.__exit__(None, None, None)
            self.batches = self.iter - self.first + 1


def where_the_time_goes(bench):
    """The ten kernels that take most of a batch, the share in which the device idles, and the start of workers."""
    settings, learn = bench.learner("--epochs", 1, *([] if bench.rehearse else ["--model", "medium"]))
    timed, seen, n = speed.Timed(), Profiled(), len(learn.dls.train)
    schedules.fit(learn, settings, 0.1)  # warms up
    start = time.perf_counter()
    next(iter(learn.dls.train))
    first = time.perf_counter() - start
    schedules.fit(learn, settings, 0.1, [timed])  # the profiler takes time itself
    schedules.fit(learn, settings, 0.1, [seen])
    kind = DeviceType.CUDA if bench.cuda else DeviceType.CPU  # an operator has its kernels' time once more
    own = lambda event: (event.self_device_time_total if bench.cuda else event.self_cpu_time_total) / seen.batches / 1e3
    events = [event for event in seen.profiler.key_averages() if event.device_type == kind]
    events = sorted((e for e in events if not getattr(e, "is_user_annotation", False)), key=own, reverse=True)
    busy, whole = sum(map(own, events)), 1e3 * (timed.seconds - first) / n
    top = {event.key[:100]: {"ms": own(event), "calls": event.count / seen.batches} for event in events[:10]}
    found = {"ms_a_batch": whole, "busy_ms_a_batch": busy, "idle_share": max(0.0, 1 - busy / whole)}
    return {**found, "epoch_seconds": timed.seconds, "seconds_to_the_first_batch": first, "batches": n, "top": top}


# --- good


CROWD = (*(f"one-cycle-{seed}" for seed in range(5)), "large")  # their accuracies count, not their seconds
RUNS = {  # on all images; of a rehearsal one epoch of the small network
    "default": [],
    "default-compiled": ["--compile"],
    "large": ["--model", "large", "--cutout", 16],
    **{f"one-cycle-{seed}": [*ONE_CYCLE.split(), "--seeds", seed] for seed in range(5)},
}


def trained(bench, name):
    """What the summary of one of RUNS says."""
    defaults = [word for k, v in config.SOURCES["cifar10"].items() for word in (f"--{k.replace('_', '-')}", v)]
    toy = ["--model", "small", "--epochs", 1, "--lr", 0.1, "--gallery", 1] if bench.rehearse else []
    few = ["--workers", 2] if name in CROWD and bench.cuda else []
    start = time.monotonic()
    folder = bench.finished(name, *bench.source[:4], *defaults, *RUNS[name], *few, *toy)
    summary = json.loads((folder / "summary.json").read_text())
    return {**{key: summary[key] for key in KEPT if key in summary}, "seconds_in_all": time.monotonic() - start}


def results_of(bench, *names, also=()):
    """What some of RUNS come to, which run beside each other; `also` begins others with them."""
    bench.begin({name: partial(trained, name=name) for name in (*names, *also)})
    return [bench.made[name].result() for name in names]


def the_default(bench):
    return results_of(bench, "default", also=("one-cycle-0", "large") if bench.rehearse else ())[0]


def the_default_compiled(bench):
    bench.needs_card()
    return results_of(bench, "default-compiled")[0]


def one_cycle_of_12_epochs(bench):
    """Five seeds, and the large network, beside each other."""
    runs = results_of(bench, *CROWD[: 1 if bench.rehearse else 5], also=["large"])
    accuracies = [run["test_acc"] for run in runs]
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {"mean_test_acc": statistics.mean(accuracies), "deviation": spread, "n": len(runs), "runs": runs}


def large(bench):
    return results_of(bench, "large")[0]


# part -> checks, and the seconds that each is expected to take on a card: with fewer left it is skipped
PARTS = {
    "right": {
        every_precision_learns: 20, the_range_test_leaves_no_trace: 5, workers_make_no_difference: 10,
        maps_equal_the_cpus: 5, a_compiled_fit_is_the_plain_one: 45, nothing_waits_in_the_batch_loop: 5,
        loss_falls: 15, two_runs_are_equal: 5, a_killed_run_goes_on_to_the_bit: 15, predictions_equal_the_cpus: 5,
        too_little_memory_is_one_line: 10, tests_marked_cuda_pass: 20, onnx_agrees: 15,
    },
    "fast": {batches_of_128: 85, where_the_time_goes: 15, batches_of_512: 80, batches_of_1024: 40},
    "good": {the_default: 100, one_cycle_of_12_epochs: 90, large: 40, the_default_compiled: 100},
}  # fmt: skip


def check(bench, function, expected):
    """The result of one check: ok, failed or skipped, with its facts or its reason, and its seconds."""
    start = time.monotonic()
    left = bench.end - start
    if left < (0 if bench.rehearse else expected):
        return {"status": "skipped", "reason": f"needs about {expected} s, {max(left, 0):.0f} are left", "seconds": 0}
    try:
        found = {"status": "ok", **(function(bench) or {})}
    except Skipped as e:
        found = {"status": "skipped", "reason": str(e)}
    except Exception as e:  # whatever it is: the next check goes on
        where = traceback.extract_tb(e.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        found = {"status": "failed", "reason": f"{type(e).__name__}: {' '.join(str(e).split())[:600]} ({place})"}
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items() if k not in ("status", "seconds", "rounds", "runs", "top")}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def facts(found):
    """What a check found, as one line."""
    shown = json.dumps(rounded(found), default=str)[1:-1].replace('"', "")
    return found.get("reason", shown).replace("|", "/")[:500]


def table(results):
    """results.json as Markdown."""
    env = results["machine"]
    lines = [f"# {results['card']}", "", f"`{results['command']}`", ""]
    lines += [f"torch {env['torch']}, CUDA {env['cuda']}, Python {env['python']}, {env['cpu_count']} cores.", ""]
    lines += ["| part | check | status | seconds | what was found |", "| --- | --- | --- | --- | --- |"]
    for part, parts_checks in results["parts"].items():
        for name, found in parts_checks.items():
            cells = part, name, found["status"], str(found["seconds"]), facts(found)
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", results.get("ended", "It was cut off before its end."), ""]
    return "\n".join(lines)


def opening(bench, args, out):
    """What results.json begins with; of parts that `--only` leaves out what it had."""
    card = torch.cuda.get_device_name(bench.device) if bench.cuda else "No card: a rehearsal"
    words = " ".join("FOLDER" if word == args.data else word for word in sys.argv[1:])
    env = {**common.machine(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    before = {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        old = json.loads((out / "results.json").read_text())
        before = old["parts"] if old["card"] == card else {}
    parts = {part: {} if part in args.only else before.get(part, {}) for part in PARTS}
    return {"card": card, "command": f"python -m tests.benchmarks.gpu {words}", "machine": env, "parts": parts}


def write(out, results):
    """Writes results.json and README.md, each whole or not at all."""
    files = {"results.json": json.dumps(results, indent=1, default=str) + "\n", "README.md": table(results)}
    for name, content in files.items():
        (out / f".{name}").write_text(content)
        os.replace(out / f".{name}", out / name)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", help="folder of CIFAR-10; of a rehearsal any, or digits, which it takes by itself")
    p.add_argument("--out", default="results/gpu")
    p.add_argument("--minutes", type=float, default=9, help="the time that it may take (9)")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--rehearse", action="store_true", help="every part at toy size, on any machine")
    args = p.parse_args()
    if not args.rehearse and (not args.data or not (Path(args.data) / "train").is_dir()):
        p.error("--data FOLDER, with train/ and test/ in it; or --rehearse")
    if args.rehearse and args.data not in (None, "digits") and not (Path(args.data) / "train").is_dir():
        p.error(f"--data {args.data}: has no train/ and test/ in it")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles torch's Python anew
    faulthandler.dump_traceback_later(60 * args.minutes + LATE, exit=True)  # what hangs must not hold the card
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        results = opening(bench, args, out)
        for part in args.only:
            for function, expected in PARTS[part].items():
                name = function.__name__.replace("_", " ")
                found = results["parts"][part][name] = check(bench, function, expected)
                told = f"{part:6s}{name:34s}{found['status']:8s}{found['seconds']:6.1f} s  {found.get('reason', '')}"
                print(told, flush=True)
                write(out, results)
        statuses = [found["status"] for part in args.only for found in results["parts"][part].values()]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in ("ok", "failed", "skipped"))
        results["ended"] = f"{counts}."
        write(out, results)
        print(f"{counts} -> {out}")
        faulthandler.cancel_dump_traceback_later()
        bench.pool.shutdown()
    wrong = any(found["status"] == "failed" for found in results["parts"]["right"].values())
    return int(wrong or (args.rehearse and "failed" in statuses))


if __name__ == "__main__":
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    sys.exit(main())
