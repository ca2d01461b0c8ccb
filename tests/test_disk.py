"""A disk that fails during a run, a clock that is set back, a run that has moved: one line, and the run can go on."""

import csv
import errno
import os
import shutil
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from lib import runs
from lib.config import Config
from tests.test_bad_input import nobody, open_tmp  # noqa: F401
from tests.test_checkpoint import equal, results
from train_fastai import main

ARGS = "--size 16 --model small --epochs 2 -b 16 --lr-iters 10 --momentum 0.8 --gallery 2 --lr-suggest steep".split()
FILES = (  # name, and for which time it cannot be written
    ("lr_find.csv", 1), ("lr_find.png", 1), ("train_batch.png", 1), ("augment.yaml", 1), ("env.json", 2),
    ("model.json", 1), ("results.csv", 1), ("results.csv", 2), ("last.pt", 1), ("last.pt", 2), ("best.safetensors", 1),
    ("report.html", 1), ("report.html", 3), ("results.png", 1), ("confusion_matrix.csv", 1), ("mistakes.csv", 1),
    ("confusion_matrix.png", 1), ("summary.json", 1),
)  # fmt: skip
QUICK = (("results.csv", 2), ("last.pt", 1), ("summary.json", 1))
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.ESTALE, errno.EDQUOT, errno.EROFS)


def train(bands, out, *more):
    return main(["--data", str(bands), "--out", str(out), "--name", "run", *ARGS, *more])


@pytest.fixture(scope="module")
def whole(bands, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert train(bands, out) == 0
    return out / "run"


def failing(monkeypatch, name, nth, error):
    """From here on the `nth` time that a file `name` is put in its place fails, and each time after it."""
    replace, times = os.replace, []

    def fail(source, target, *args):
        if os.path.basename(target) == name:
            times.append(target)
            if len(times) >= nth:
                raise OSError(error, os.strerror(error))
        return replace(source, target, *args)

    monkeypatch.setattr(os, "replace", fail)


CASES = [
    pytest.param(i, marks=[] if f in QUICK else pytest.mark.slow, id="{} {}".format(*f)) for i, f in enumerate(FILES)
]


@pytest.mark.parametrize("i", CASES)
def test_a_file_that_cannot_be_written_ends_the_run_in_one_line(i, whole, bands, tmp_path, monkeypatch, capfd):
    (name, nth), error = FILES[i], ERRORS[i % len(ERRORS)]
    with monkeypatch.context() as m:
        failing(m, name, nth, error)
        assert train(bands, tmp_path) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"{name}: cannot be written ({os.strerror(error)})" in err
    assert [p.name for p in (tmp_path / "run").rglob(".*")] == [".lock"]
    assert main(["--resume", str(tmp_path / "run")]) == 0
    equal(tmp_path / "run", whole)


def test_a_log_that_takes_no_more_is_a_warning_an_epoch(bands, tmp_path, whole, monkeypatch, capsys):
    class SummaryWriter:
        def __init__(self, folder):
            pass

        def add_scalar(self, *args):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(runs, "check_log", lambda kind: None)
    assert train(bands, tmp_path, "--log", "tensorboard") == 0
    line = "warning: --log tensorboard: epoch {} was not logged (Input/output error)"
    assert capsys.readouterr().err.splitlines() == [line.format(1), line.format(2)]
    equal(tmp_path / "run", whole)


def test_a_clock_that_is_set_back_changes_no_duration(bands, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    assert train(bands, tmp_path) == 0
    with open(tmp_path / "run/results.csv") as f:
        seconds = [float(row["seconds"]) for row in csv.DictReader(f)]
    assert 0 < seconds[0] < seconds[1] < 600


def test_a_run_that_has_moved_goes_on_where_it_is(whole, bands, open_tmp, monkeypatch, capfd):  # noqa: F811
    """On a machine that has neither the folder it was written to nor the right to make it."""
    assert train(bands, open_tmp / "before", "--epochs", "1") == 0
    shutil.copytree(open_tmp / "before/run", open_tmp / "after")
    shutil.rmtree(open_tmp / "before")
    (open_tmp / "before").write_text("no folder")
    assert main(["--resume", str(open_tmp / "after"), "--epochs", "2"]) == 0
    assert len(results(open_tmp / "after")) == 2 and (open_tmp / "before").read_text() == "no folder"


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_a_run_folder_that_may_not_be_written_to_is_one_line(bands, open_tmp, capfd):  # noqa: F811
    assert train(bands, open_tmp) == 0
    capfd.readouterr()
    with nobody(open_tmp / "run", 0o555):
        assert main(["--resume", str(open_tmp / "run"), "--epochs", "2", "--data", str(bands)]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and str(open_tmp) in err


def test_weights_that_a_run_started_from_may_have_moved(bands, tmp_path, whole, capfd):
    shutil.copytree(whole / "weights", tmp_path / "weights")
    argv = ["--model", "small", "--pretrained", str(tmp_path / "weights/best.safetensors"), "--lr", "0.01"]
    assert train(bands, tmp_path, *argv) == 0
    (tmp_path / "weights").rename(tmp_path / "elsewhere")
    assert main(["--resume", str(tmp_path / "run"), "--epochs", "3"]) == 2
    assert "best.safetensors: not found" in capfd.readouterr().err
    moved = ["--pretrained", str(tmp_path / "elsewhere/best.safetensors")]
    assert main(["--resume", str(tmp_path / "run"), "--epochs", "3", *moved]) == 0


def test_commands_that_start_at_once_have_each_a_folder(tmp_path):
    config = Config(data="digits", out=str(tmp_path), name="same")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: runs.start(config).path.name, range(8)))
    assert sorted(made) == ["same", *(f"same-{i}" for i in range(2, 9))]


def test_data_that_has_changed_is_refused(bands, tmp_path, capfd):
    shutil.copytree(bands, tmp_path / "data")
    assert train(tmp_path / "data", tmp_path) == 0
    one = sorted((tmp_path / "data").rglob("*.png"))[5]
    for change in (lambda: one.write_bytes((bands / "class 3/00.png").read_bytes()), one.unlink):
        change()
        assert main(["--resume", str(tmp_path / "run"), "--epochs", "3"]) == 2
        assert "its images are not those that" in capfd.readouterr().err
