import csv
import json
import pickle
import shutil

import pytest
import torch
import yaml

from lib.train import checkpoint, recorder
from train_fastai import main

ARGS = "--size 32 --model small --epochs 4 --lr 0.05 -b 16 --patience-epochs 0 --threshold 0.5 --gallery 2".split()
COMPARED = ("weights/best.safetensors", "mistakes.csv", "confusion_matrix.csv")


def train(bands, out, name, *more):
    return main(["--data", str(bands), "--out", str(out), "--name", name, *ARGS, *more])


def results(run):
    with open(run / "results.csv") as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


def same(a, b):
    """Whether two states, of dicts and lists of tensors and plain values, are equal to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b


def equal(a, b):
    assert results(a) == results(b)
    for name in COMPARED:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [checkpoint.load(run / "weights/last.pt") for run in (a, b)]
    for state in states:
        for row in state["callbacks"]["recorder"]["rows"]:
            row["seconds"] = 0
    assert same(*states)


def stop_at(monkeypatch, epoch, batch):
    """From here on a fit is interrupted at that epoch and batch, both counted from 0."""
    after_batch = recorder.EpochRecorder.after_batch

    def stop(self):
        if (self.epoch, self.iter) == (epoch, batch):
            raise KeyboardInterrupt
        after_batch(self)

    monkeypatch.setattr(recorder.EpochRecorder, "after_batch", stop)


@pytest.fixture(scope="module")
def whole(bands, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert train(bands, out, "run") == 0
    assert len({row["lr"] for row in results(out / "run")}) > 1  # else the plateau's state would not be tested
    return out / "run"


@pytest.mark.parametrize("epoch", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_and_ends_equal_to_the_bit(epoch, whole, bands, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        stop_at(m, epoch, 1)
        assert train(bands, tmp_path, "run") == 130
    run = tmp_path / "run"
    assert not (run / "summary.json").exists()
    assert main(["--resume", str(run)]) == 0
    equal(run, whole)
    assert len(json.loads((run / "env.json").read_text())["resumed"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_finished_run_may_have_more_epochs(whole, bands, tmp_path):
    assert train(bands, tmp_path, "run", "--epochs", "2") == 0
    assert main(["--resume", str(tmp_path / "run"), "--epochs", "4"]) == 0
    equal(tmp_path / "run", whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, bands, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        stop_at(m, 3, 0)
        assert train(bands, tmp_path, "run") == 130
    last = tmp_path / "run/weights/last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 255
    last.write_bytes(content)
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert "last.pt: cannot be read" in capsys.readouterr().err
    equal(tmp_path / "run", whole)


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: pickle.dumps(print)])
def test_no_whole_checkpoint_is_one_line(damage, whole, bands, tmp_path, capsys):
    assert train(bands, tmp_path, "run", "--epochs", "2") == 0
    for file in (tmp_path / "run/weights").glob("last.pt*"):
        file.write_bytes(damage(file.read_bytes()))
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "last.pt" in err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--momentum", "0.5"], "has 0.9, not 0.5; leave it out, or start a new run"),
        (["--seeds", "1"], "--seeds"),
        (["--epochs", "2"], "--epochs"),
        (["--data", "digits"], "--data digits: its images are not those"),
        (["--lr-find-only"], "--lr-find-only: is for a new run; leave it out"),
        (["--minutes", "5"], "--minutes: is for a new run; leave it out"),
    ],
)
def test_what_would_change_the_result_is_refused(more, words, whole, cache, capsys):
    content = (whole / "args.yaml").read_bytes()
    assert main(["--resume", str(whole), "--cache", str(cache), *more]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert (whole / "args.yaml").read_bytes() == content


def test_resuming_what_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["--resume", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path) in err and err.count("\n") == 1


def test_a_file_of_a_run_is_not_its_folder(whole, capsys):
    assert main(["--resume", str(whole / "weights/last.pt")]) == 2
    assert f"pass --resume {whole}, which goes on from last.pt" in capsys.readouterr().err


def test_data_that_has_moved_is_asked_for(whole, tmp_path, bands, capsys):
    shutil.copytree(whole, tmp_path / "run")
    args = yaml.safe_load((tmp_path / "run/args.yaml").read_text())
    (tmp_path / "run/args.yaml").write_text(yaml.safe_dump({**args, "data": str(tmp_path / "before")}))
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert f"if it has moved, pass --resume {tmp_path / 'run'} --data" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "run"), "--data", str(bands)]) == 0


def test_the_checkpoint_is_a_plain_state_dict_and_no_damage_to_it_is_taken(whole, tmp_path):
    file, copy = whole / "weights/last.pt", tmp_path / "last.pt"
    state = torch.load(file, weights_only=True)
    assert state.pop("format") == checkpoint.FORMAT and state["epochs_trained"] == 4
    content, seen = file.read_bytes(), 0
    for place in range(0, len(content), len(content) // 200):
        copy.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        try:
            assert same(checkpoint.read(copy), state)  # no value lies there
        except Exception as error:
            assert not isinstance(error, AssertionError)
            seen += 1
    assert seen > 150
