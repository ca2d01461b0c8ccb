"""A run that is killed or stopped anywhere goes on and ends equal, to the bit, to one that nothing disturbed."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import fastai.interpret  # noqa: F401  once, ahead of the forks
import pytest
import pytorch_grad_cam  # noqa: F401
import torch
from matplotlib.figure import Figure

from lib.explain import evaluate
from lib.train import checkpoint, learner
from tests.conftest import on_ranks
from tests.test_checkpoint import equal
from train_fastai import main

ROOT = Path(__file__).parent.parent

# a rate that leaves mistakes to explain
ARGS = """--size 32 --model small --epochs 3 -b 16 --lr-iters 20 --patience-epochs 0 --threshold 0.5 --gallery 2
--threads 1 --momentum 0.8 --ema 0.8 --grad-noise 0.001 --warmup-epochs 1.5
--lr-suggest minimum""".split()
# where a SIGKILL comes: what is called for the how-manieth time
RANGE_TEST = [("range", n) for n in (1, 12)] + [("lr_find.csv", 1), ("lr_find.png", 1)]
BATCHES = [("batch", n) for n in (1, 2, 4, 6, 7, 10, 12, 13, 18)]
VALIDATION = [("evaluate", n) for n in (1, 3, 4, 5, 8)]  # the first two are timed before training
SAVES = [("write last.pt", n) for n in (1, 2, 7, 21)] + [("last.pt", n) for n in (1, 2, 8)]
FILES = [("best.safetensors", 1), ("write best.safetensors", 1), ("results.csv", 1), ("write results.csv", 3)]
REPORT = [("confusion_matrix.csv", 1), ("gallery", 1), ("gradcam.png", 1), ("write summary.json", 1)]
POINTS = RANGE_TEST + BATCHES + VALIDATION + SAVES + FILES + REPORT
QUICK = [("batch", 10), ("last.pt", 8)]


def run(bands, out, every=1e-9):
    """The run of these tests, with a checkpoint behind each batch; its figures are empty, which saves seconds."""
    Figure.savefig = lambda figure, file, **kwargs: file.write(b"a figure")
    checkpoint.Checkpoint.every_seconds = property(lambda self: every, lambda self, value: None)
    return main(["--data", str(bands), "--out", str(out), "--name", "run", *ARGS])


def hooked(act):
    """From here on `act(what, n)` is called ahead of the n-th time that `what` happens in this process."""
    counts = {}

    def tick(what):
        counts[what] = counts.get(what, 0) + 1
        act(what, counts[what])

    def ahead(module, name, what):
        function = getattr(module, name)

        def both(*args, **kwargs):
            tick(what(*args))
            return function(*args, **kwargs)

        setattr(module, name, both)

    def kind(learn, *_):
        fits = any(isinstance(cb, checkpoint.Checkpoint) for cb in learn.cbs)
        return "evaluate" if not learn.training else "batch" if fits else "range"

    ahead(learner.SGDLearner, "one_batch", kind)
    ahead(evaluate, "explain", lambda *_: "gallery")
    ahead(os, "replace", lambda source, target: os.path.basename(target))
    name = lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
    ahead(os, "fsync", lambda fd: "write " + name(fd)[1:].rsplit(".", 1)[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_its_processes_is_a_signal_to_the_run(number, bands, tmp_path):
    """As a terminal, timeout or systemd send it. Loader processes leave it to the run; uv sends a second SIGTERM."""
    argv = [*ARGS, "--epochs", "99", "--workers", "2", "--name", "x", "--data", bands, "--out", tmp_path]
    options = dict(start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen([sys.executable, "train_fastai.py", *map(str, argv)], cwd=ROOT, **options) as process:
        next(line for line in process.stdout if line.startswith("epoch  2"))
        ends = time.monotonic() + 60  # loader processes come soon, which the main thread starts
        while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() and time.monotonic() < ends:
            time.sleep(0.002)
        for _ in range(1 + (number == signal.SIGTERM)):
            os.killpg(process.pid, number)
            time.sleep(0.01)
        said = process.communicate(timeout=100)[0]
    assert process.returncode == 130 and said.count("interrupted and saved") == 1, said
    assert "Traceback" not in said, said
    assert checkpoint.of_run(str(tmp_path / "x"))["epochs_trained"] >= 2


@pytest.fixture(scope="module")
def whole(bands, tmp_path_factory):
    """A run that nothing disturbed; no checkpoint within an epoch."""
    path = tmp_path_factory.mktemp("whole")
    assert on_ranks(1, lambda rank: run(bands, path, 0), path) == [0], (path / "rank0.txt").read_text()
    assert (path / "run/mistakes.csv").read_text().count("\n") > 1  # else nothing is explained, where kills come too
    return path / "run"


def kill(at, n, bands, path):
    """A run in a process of its own, killed at a point; half of what it was writing is on the disk."""

    def job(rank):
        def act(what, count):
            if (what, count) == (at, n):
                if what.startswith("write "):
                    (part,) = (p for p in (path / "run").rglob(f".{what[6:]}.*"))
                    os.truncate(part, part.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        hooked(act)
        return run(bands, path)

    assert on_ranks(1, job, path) == [-signal.SIGKILL], (path / "rank0.txt").read_text()


def go_on(path):
    def resume(rank):
        Figure.savefig = lambda figure, file, **kwargs: file.write(b"a figure")
        return main(["--resume", str(path / "run")])

    assert on_ranks(1, resume, path) == [0], (path / "rank0.txt").read_text()


@pytest.mark.parametrize("at, n", [p if p in QUICK else pytest.param(*p, marks=pytest.mark.slow) for p in POINTS])
def test_a_killed_run_goes_on_and_ends_equal_to_the_bit(at, n, whole, bands, tmp_path):
    kill(at, n, bands, tmp_path)
    run_folder = tmp_path / "run"
    before = checkpoint.load(run_folder / "weights/last.pt")
    if at == "batch":  # no more is lost than the batch since the last checkpoint
        done = before["epochs_trained"] * 6 + before["batches"] if before else 0
        assert n - 1 - done <= 1

    go_on(tmp_path)
    equal(run_folder, whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank0.txt", "run"]


@pytest.mark.parametrize(
    "at, n, number",
    [
        ("batch", 8, signal.SIGTERM),
        ("evaluate", 5, signal.SIGINT),
        pytest.param("results.csv", 1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("range", 3, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_names_the_command_that_goes_on(at, n, number, whole, bands, tmp_path):
    def job(rank):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the script does
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python does, but behind a shell's &
        hooked(lambda what, count: (what, count) == (at, n) and os.kill(os.getpid(), number))
        return run(bands, tmp_path, 0)

    assert on_ranks(1, job, tmp_path) == [130]
    said = (tmp_path / "rank0.txt").read_text()
    assert "Traceback" not in said and "--resume" in said
    for line in [line for line in said.splitlines() if line.startswith("interrupted and saved")]:
        assert shlex.split(line)[-2:] == ["--resume", str(tmp_path / "run")]
    assert ("interrupted and saved" in said) is (at != "range")
    saved = checkpoint.load(tmp_path / "run/weights/last.pt")
    found = saved and (saved["epochs_trained"], saved["batches"])
    assert found == {"batch": (1, 2), "evaluate": (2, 0), "results.csv": (1, 0), "range": None}[at]
    go_on(tmp_path)
    equal(tmp_path / "run", whole)


def test_a_second_signal_stops_at_once(bands, tmp_path):
    def act(what, count):
        if (what, count) == ("batch", 8):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    def job(rank):
        hooked(act)
        return run(bands, tmp_path, 0)

    assert on_ranks(1, job, tmp_path) == [130]
    assert checkpoint.load(tmp_path / "run/weights/last.pt")["batches"] == 0  # that of the epoch's end


def test_handlers_are_as_before_behind_a_fit(bands, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    argv = [*ARGS, "--epochs", "1", "--lr", "0.01", "--threads", str(torch.get_num_threads())]
    assert main(["--data", str(bands), "--out", str(tmp_path), *argv]) == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_500_epochs_take_no_more_memory_files_or_threads(bands, tmp_path, monkeypatch):
    seen = []
    save = checkpoint.Checkpoint.save

    def look(self, *args):
        save(self, *args)
        memory = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        seen.append((memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))

    monkeypatch.setattr(checkpoint.Checkpoint, "save", look)
    argv = ["--data", str(bands), "--out", str(tmp_path), *ARGS, "--epochs", "500", "--lr", "0.01", "--min-lr", "0.01"]
    argv += ["--threads", str(torch.get_num_threads()), "--checkpoint-seconds", "0"]
    assert main(argv) == 0 and len(seen) == 500
    early, late = seen[100], seen[-1]
    assert late[1] == early[1] and late[2] == early[2]
    assert late[0] - early[0] < 20e6, seen[::50]
