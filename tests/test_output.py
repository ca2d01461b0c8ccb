"""Where output goes: any encoding, a reader that has gone, closed streams, no home, a notebook's backend."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lib import predict
from tests.conftest import SMALL, good
from train_fastai import main

ROOT = Path(__file__).parent.parent
NOTEBOOK = {**os.environ, "MPLBACKEND": "nonsense"}  # matplotlib refuses it when it is imported


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch on classes with letters that few encodings have."""
    out = tmp_path_factory.mktemp("run")
    assert main([*map(str, ["--data", good(out / "photos", ("猫", "é")), "--out", out, "--name", "x", *SMALL])]) == 0
    return out


@pytest.mark.parametrize("command", ["train_fastai.py", "-m lib.predict", "-m lib.compare", "-m lib.export"])
def test_a_command_needs_no_backend_of_matplotlib(command):
    done = subprocess.run(
        [sys.executable, *command.split(), "x"], cwd=ROOT, env=NOTEBOOK, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_a_dry_run_needs_no_backend_and_a_notebook_keeps_its_own(photos):
    argv = ["--data", str(photos), *map(str, SMALL), "--dry-run"]
    done = subprocess.run([sys.executable, "train_fastai.py", *argv], cwd=ROOT, env=NOTEBOOK, capture_output=True)
    assert done.returncode == 0, done.stderr
    code = "import os; from lib import cli; print(os.environ['MPLBACKEND'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=NOTEBOOK, capture_output=True, text=True)
    assert done.stdout.strip() == NOTEBOOK["MPLBACKEND"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16"])
def test_predictions_are_utf8_where_stdout_is_no_terminal(encoding, run, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert predict.main([str(run / "x"), str(run / "photos")]) == 0
        text = sys.stdout.buffer.getvalue().decode("utf-8")
    assert text.count("\n") == 17 and "photos/猫/0.png" in text and text.count("photos/é/") == 8


def closed():
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


def test_a_run_outlives_its_reader(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", closed())
        m.setattr(sys, "stderr", closed())
        assert main([*map(str, ["--data", photos, "--out", tmp_path, "--name", "x", *SMALL])]) == 0
        assert main(["--data", str(tmp_path / "nowhere")]) == 2
        sys.stdout.close(), sys.stderr.close()  # what is left in them goes nowhere
    assert (tmp_path / "x/summary.json").exists()


@pytest.mark.parametrize("full", ["/dev/full"])
def test_a_run_outlives_a_full_disk_of_its_log(full, photos, tmp_path, monkeypatch):
    with monkeypatch.context() as m, open(full, "w", buffering=1) as log:
        m.setattr(sys, "stdout", log)
        assert main([*map(str, ["--data", photos, "--out", tmp_path, "--name", "x", *SMALL])]) == 0
    assert (tmp_path / "x/summary.json").exists()


def test_streams_that_are_closed_stop_nothing(photos, tmp_path):
    argv = [sys.executable, "train_fastai.py", "--data", photos, "--out", tmp_path, "--name", "x", *SMALL]
    line = shlex.join(map(str, argv)) + " --threads 1 >&- 2>&-"
    assert subprocess.run(line, shell=True, cwd=ROOT).returncode == 0
    assert (tmp_path / "x/summary.json").exists()


def test_a_program_without_streams_reads_images(photos):
    code = f"""import os, sys
os.close(2); sys.stderr = None
from lib.config import Config
from lib.data import get_dls
print(len(get_dls(Config(data={str(photos)!r}, size=16)).store))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "16\n"


def test_no_home_is_one_line():
    code = (
        "import os, pwd, sys; del os.environ['HOME'], os.environ['FASTAI_HOME']; pwd.getpwuid = {}.__getitem__\n"
        "from train_fastai import main; sys.exit(main(['--data', 'digits', '--dry-run']))"
    )
    env = {**os.environ, "MPLCONFIGDIR": "/tmp", "HOME": "/"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "pass a folder, or set HOME" in done.stderr and done.stderr.count("\n") == 1
