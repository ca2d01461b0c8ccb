"""The whole line, as a user runs it."""

import csv
import gc
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train_fastai
from lib import data, runs
from lib.cli import BadInput
from lib.config import Config
from lib.data import folders
from lib.data.loader import without_auto
from lib.explain import evaluate
from tests.conftest import SMALL, good, save
from train_fastai import main

ROOT = Path(__file__).parent.parent
FILES = """args.yaml augment.yaml doubts.csv env.json lr_find.csv lr_find.png results.csv results.png
calibration.csv classes.csv confusion_matrix.csv confusion_matrix.png mistakes.csv gradcam.png
train_batch.png summary.json weights/best.safetensors weights/model.json weights/last.pt
weights/last.pt.before gallery.json report.html""".split()
COLUMNS = "epoch,seconds,lr,momentum,batch_size,train_loss,train_acc,valid_loss,valid_acc,test_loss,test_acc"
CIFAR = ROOT / "../shared/data/cifar10.tgz"


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, cache):
    """(run folder, stdout, seconds of work) of `train_fastai.py --smoke` as a process of its own."""
    out, start = tmp_path_factory.mktemp("runs"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "train_fastai.py", "--smoke", "--precision", "float32", "--threads", 1, "--out", out]
    command += ["--cache", cache]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return out / "digits-plateau-s0", done.stdout, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start


def test_smoke_makes_every_file_within_a_minute(smoke):
    run, out, seconds = smoke
    made = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    assert made == sorted([*FILES, ".lock"])
    assert seconds < 60
    assert out.count("\nepoch ") == 2 and "range test:" in out and str(run) in out


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("lscpu"), reason="lscpu's words for x86")
def test_env_json_tells_the_chip_as_lscpu_does(smoke):
    env = json.loads((smoke[0] / "env.json").read_text())
    told = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    facts = {key: value.strip() for key, _, value in (line.partition(":") for line in told.stdout.splitlines())}
    assert env["cpu"] == facts["Model name"]
    assert env["cpu_model"] == f"cpu family {facts['CPU family']}, model {facts['Model']}"


def test_the_tables_agree(smoke):
    run, _, _ = smoke
    assert (run / "results.csv").read_text().splitlines()[0] == COLUMNS
    rows, summary = rows_of(run / "results.csv"), json.loads((run / "summary.json").read_text())
    mistakes = rows_of(run / "mistakes.csv")
    n = json.loads((run / "env.json").read_text())["images"]["test"]
    counts = np.array(
        [[int(v) for k, v in row.items() if k != "truth"] for row in rows_of(run / "confusion_matrix.csv")]
    )
    assert counts.sum() == n and counts.sum() - np.trace(counts) == len(mistakes) == summary["mistakes"]
    assert summary["test_acc"] == np.trace(counts) / n
    assert summary["valid_acc"] == pytest.approx(max(float(row["valid_acc"]) for row in rows))
    lr = float(rows[0]["lr"])
    assert lr == summary["lr"] == json.loads((run / "env.json").read_text())["lr"]
    found = rows_of(run / "lr_find.csv")
    assert list(found[0]) == ["lr", "loss", "smooth_loss"] and len(found) <= 100
    assert list(mistakes[0]) == "rank,file,truth,prediction,loss,p_prediction,p_truth".split(",")
    for png in run.glob("*.png"):
        with Image.open(png) as image:
            assert min(image.size) > 400


def test_args_yaml_runs_it_again_with_the_same_result(smoke, tmp_path):
    run, _, _ = smoke
    assert main(["-c", str(run / "args.yaml"), "--out", str(tmp_path)]) == 0
    again = tmp_path / run.name
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(rows_of(again / "results.csv")) == drop(rows_of(run / "results.csv"))
    for name in (
        "mistakes.csv",
        "confusion_matrix.csv",
        "lr_find.csv",
        "weights/best.safetensors",
        "weights/model.json",
    ):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_lr_find_equals_lr_x_to_the_bit(smoke, tmp_path, cache):
    run, _, _ = smoke
    lr = json.loads((run / "summary.json").read_text())["lr"]
    argv = ["--smoke", "--precision", "float32", "--lr", repr(lr), "--threads", 1, "--name", "told"]
    argv += ["--out", tmp_path, "--cache", cache]
    assert main([*map(str, argv)]) == 0
    assert (tmp_path / "told/weights/best.safetensors").read_bytes() == (run / "weights/best.safetensors").read_bytes()
    assert not (tmp_path / "told/lr_find.csv").exists()


def test_the_weights_reload_in_plain_torch(smoke):
    """The lines that docs/run-folder.md shows, and the same test accuracy."""
    from safetensors.torch import load_file

    from lib.models.zoo import rebuild

    run, _, _ = smoke
    card = json.loads((run / "weights/model.json").read_text())
    model = rebuild(card)
    model.load_state_dict(load_file(run / "weights/best.safetensors"))
    model.eval()
    args = yaml.safe_load((run / "args.yaml").read_text())
    _, _, test = folders.find_images(Path(args["cache"]) / "digits", args["valid_pct"], args["split_seed"])
    mean, std = (torch.tensor(card[k]).view(3, 1, 1) for k in ("mean", "std"))
    right = 0
    for path, name in test:
        image = Image.open(path).convert("RGB").resize((card["size"],) * 2, Image.Resampling.BICUBIC)
        x = (torch.tensor(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        right += card["classes"][model(x[None]).argmax()] == name
    assert right / len(test) == json.loads((run / "summary.json").read_text())["test_acc"]
    code = "import sys; from lib import models; assert 'fastai' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_photographs_of_mixed_sizes_in_train_and_val(tmp_path, cache):
    """Two classes, train/ and val/: val is valid, test is held out of train, images become 128 x 128."""
    rng = np.random.default_rng(0)
    for where, n in (("train", 12), ("val", 5)):
        for k, name in enumerate(("night sky", "Grün & weiß")):
            for i in range(n):
                h, w = rng.integers(90, 400, 2)
                array = rng.integers(0, 60, (h, w, 3), dtype=np.uint8) + np.uint8(170 * k)
                save(tmp_path / "photos" / where / name / f"IMG {i}.jpg", array if i % 4 else array[:, :, 0])
    argv = ["--data", tmp_path / "photos", *"--epochs 1 --lr 0.05 --model small".split()]
    argv += ["--out", tmp_path, "--cache", cache]
    assert main([*map(str, argv), "--name", "photos-run"]) == 0
    env = json.loads((tmp_path / "photos-run/env.json").read_text())
    assert env["images"] == {"train": 20, "valid": 10, "test": 4} and env["size"] == 128
    assert all(row["file"].startswith("train/") for row in rows_of(tmp_path / "photos-run/mistakes.csv"))


def test_with_few_valid_images_their_loss_chooses_unless_asked(tmp_path, bands, capsys):
    argv = ["--data", bands, "--out", tmp_path, *SMALL, "--epochs", 2]
    for name, more, by in (("auto", (), "loss"), ("asked", ("--keep", "valid_acc"), "accuracy")):
        assert main([*map(str, argv), "--name", name, *more]) == 0
        out, kept = capsys.readouterr().out, f"valid_{by[:4].replace('accu', 'acc')}"
        first = "8 valid images are few to choose with: one of them is 0.125 of accuracy, and the standard error of an "
        said = f"{first}accuracy of 0.5 is 0.177; the weights are kept by {kept}\n"
        assert out.endswith(f"open {tmp_path / name / 'report.html'}\n")
        assert said in out and f"best by valid {by}; valid accuracy" in out
        assert json.loads((tmp_path / name / "env.json").read_text())["keep"] == kept
        assert json.loads((tmp_path / name / "summary.json").read_text())["chosen_by"] == by


@pytest.mark.parametrize("n, by", [(99, "valid_loss"), (100, "valid_acc")])
def test_few_valid_images_are_fewer_than_100(n, by):
    dls = SimpleNamespace(valid=SimpleNamespace(ids=range(n)), train=SimpleNamespace(bs=32))
    config, given = without_auto(Config(), dls), without_auto(Config(keep="macro_f1"), dls)
    assert (config.keep, config.batch_size) == (by, 32) and given.keep == "macro_f1"


def test_valid_pct_0_says_that_test_chose(tmp_path, bands, cache, capsys):
    argv = ["--data", bands, "--size", 32, "--model", "small", "--epochs", 1, "--lr", 0.05, "--valid-pct", 0, "-b", 16]
    assert main([*map(str, argv), "--out", str(tmp_path), "--name", "x", "--cache", str(cache)]) == 0
    assert json.loads((tmp_path / "x/summary.json").read_text())["chosen_on"] == "test"
    assert "test chose the weights" in capsys.readouterr().out


def test_a_rate_that_explodes_is_status_3_and_names_the_place(tmp_path, bands, cache, capsys):
    argv = ["--data", bands, *"--size 32 --model small --lr 1e30 -b 16".split(), "--out", tmp_path, "--cache", cache]
    assert main([*map(str, argv)]) == 3
    err = capsys.readouterr().err
    assert "epoch 1, batch" in err and "lr 1e+30" in err and err.count("\n") == 1


def test_lr_find_only_and_dry_run(tmp_path, bands, cache, capsys):
    argv = [
        *map(str, ["--data", bands, "--size", 32, "--model", "small", "-b", 16, "--out", tmp_path, "--cache", cache])
    ]
    assert main([*argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and "88 train, 8 valid, 24 test" in out and "momentum: 0.9" in out
    assert main([*argv, "--lr-find-only", "--lr-iters", "40"]) == 0
    (run,) = tmp_path.iterdir()
    assert (run / "lr_find.png").exists() and not (run / "results.csv").exists()
    assert "passes over the training images" in capsys.readouterr().out


def test_no_garbage_is_looked_for_before_training_and_some_is_from_then_on(tmp_path, bands, cache, monkeypatch):
    argv = [*map(str, ["--data", bands, *SMALL, "--out", tmp_path, "--cache", cache, "--lr-find-only"])]
    looks, get_dls, range_test = [], data.get_dls, evaluate.range_test
    note = lambda function: lambda *args: (looks.append(gc.isenabled()), function(*args))[1]
    monkeypatch.setattr(data, "get_dls", note(get_dls))
    monkeypatch.setattr(evaluate, "range_test", note(range_test))
    assert main([*argv, "--lr", "find"]) == 0 and looks == [False, True]
    assert main([*argv, "--data", str(tmp_path / "none")]) == 2 and gc.isenabled() and not gc.get_freeze_count()
    with pytest.raises(BadInput, match="none"):
        train_fastai.train(Config(data=str(tmp_path / "none")))
    with pytest.raises(BadInput, match=r"seeds \(0, 1\): train\(\) makes one run"):
        train_fastai.train(Config(data="digits", seeds=(0, 1)))
    assert gc.isenabled() and not gc.get_freeze_count()


def test_the_test_set_chooses_nothing(tmp_path):
    """Other test images, with labels exchanged: the same rates, epochs and weights, to the bit."""
    for name, classes, n in (("one", "ab", 3), ("other", "ba", 6)):
        root = good(tmp_path / name / "photos/train", "ab", 12).parent
        good(root / "valid", "ab", 4), good(root / "test", classes, n)
        argv = ["--data", root, "--out", tmp_path / name, "--name", "x", *SMALL, "--epochs", 4, "--patience-epochs", 0]
        assert main([*map(str, argv)]) == 0
    one, other = (tmp_path / name / "x" for name in ("one", "other"))
    rows = [rows_of(run / "results.csv") for run in (one, other)]
    assert [row["test_loss"] for row in rows[0]] != [row["test_loss"] for row in rows[1]]
    rest = lambda rows: [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("test")} for row in rows]
    assert rest(rows[0]) == rest(rows[1])
    assert (one / "weights/best.safetensors").read_bytes() == (other / "weights/best.safetensors").read_bytes()


def test_one_process_at_a_time_trains_in_a_folder(tmp_path, bands, cache, capsys):
    argv = [*map(str, ["--data", bands, *SMALL, "--out", tmp_path, "--cache", cache, "--name", "x", "--lr", 0.02])]
    assert main(argv) == 0
    summary = (tmp_path / "x/summary.json").read_text()
    env = (tmp_path / "x/env.json").read_text()
    program = "import sys; from pathlib import Path; from lib.runs import locked; held = locked(Path(sys.argv[1])); "
    program += "print('held', flush=True); input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "x")], cwd=ROOT, **pipes)
    assert other.stdout.readline() == b"held\n" and runs.in_use(tmp_path / "x")
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert "x: another process trains in it" in err and err.count("\n") == 1
    assert (tmp_path / "x/summary.json").read_text() == summary and (tmp_path / "x/env.json").read_text() == env
    other.communicate(b"\n")
    assert not runs.in_use(tmp_path / "x") and not runs.in_use(tmp_path)
    runs.locked(tmp_path / "x").close()
    assert main(["--resume", str(tmp_path / "x"), "--epochs", "2"]) == 0


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    config = Config(data="digits", out=str(tmp_path))
    assert [runs.start(config).path.name for _ in range(3)] == [f"digits-plateau-s0{s}" for s in ("", "-2", "-3")]
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out"):
        runs.start(Config(out=str(tmp_path / "file")))


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    runs.write(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(BadInput, match="No space left"):
        runs.write(tmp_path / "a", "new, and longer")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_bad_data_is_one_line_on_stderr_of_the_whole_process(tmp_path):
    command = [sys.executable, "train_fastai.py", "--data", tmp_path / "nowhere", "--out", tmp_path / "runs"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr and done.stdout == ""


@pytest.mark.slow
def test_digits_end_above_97_percent_within_three_minutes(tmp_path, cache):
    start = time.perf_counter()
    command = [sys.executable, "train_fastai.py", "--data", "digits", "--out", tmp_path, "--cache", cache]
    assert subprocess.run(list(map(str, command)), cwd=ROOT).returncode == 0
    assert time.perf_counter() - start < 180
    assert json.loads((tmp_path / "digits-plateau-s0/summary.json").read_text())["test_acc"] > 0.97


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="needs ../shared/data/cifar10.tgz")
def test_cifar10_learns(tmp_path, cache):
    argv = ["--data", CIFAR, *"--size 32 --model small --epochs 1 --lr 0.1".split()]
    argv += ["--out", tmp_path, "--cache", cache]
    assert main([*map(str, argv)]) == 0
    (run,) = tmp_path.iterdir()
    rows = rows_of(run / "results.csv")
    assert float(rows[0]["test_acc"]) > 0.35 and float(rows[0]["train_loss"]) < math.log(10)
