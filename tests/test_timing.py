import csv
import json
import re
import time
import types
from pathlib import Path

import pytest

from lib.cli import duration, until
from lib.train import lr_range, progress, timing
from tests.conftest import state_of
from train_fastai import main

RECORDED = sorted((Path(__file__).parents[1] / "results").glob("cifar10-*/results.csv"))


def test_timing_leaves_no_trace(make):
    config, learn = make("--epochs", 3)
    learn.fit(1, 0.1)
    before = state_of(learn)
    seconds, line = timing.expectation(learn, config, "float32")
    assert state_of(learn) == before
    assert seconds > 0 and line.startswith("3 epochs take about ") and "--model small" not in line


def test_an_epoch_is_its_updates_and_its_evaluations(make, monkeypatch):
    config, learn = make("--accumulate", 2)
    clock = iter([3.0, 10.0, 10.5])  # the first evaluation, from 3 on, is not timed
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    n_eval, batch = len(learn.dls.valid.dataset) + len(learn.dls.test.dataset), len(learn.dls.valid.plain()[0])
    updates = -(-len(learn.dls.train) // 2)
    assert timing.epoch_seconds(learn, 3.0) == pytest.approx(updates * 3 + 0.5 / batch * n_eval)


def test_the_first_two_updates_alone_are_not_timed(make, monkeypatch):
    _, learn = make()
    ends = iter([3.0, 9.0, 10.0, 12.0])  # they take 3, 6, 1 and 2 seconds
    monkeypatch.setattr(lr_range, "time", types.SimpleNamespace(perf_counter=lambda: next(ends)))
    assert timing.step_seconds(learn, 4) == 1.5


def test_a_rank_times_its_slice_of_a_batch(make, monkeypatch):
    config, learn = make("-b", 16)
    monkeypatch.setattr(timing, "ranks", types.SimpleNamespace(world=lambda: 4))
    seen, run = [], lr_range.run
    spy = lambda *args, **kwargs: seen.append(len(learn.dls.train.one_batch()[0])) or run(*args, **kwargs)
    monkeypatch.setattr(lr_range, "run", spy)
    timing.expectation(learn, config, "float32", step=1.0)
    assert seen == [4] and len(learn.dls.train.one_batch()[0]) == 16
    monkeypatch.setattr(timing, "evaluation_seconds", lambda learn: 8.0)
    assert timing.epoch_seconds(learn, 1.0) == len(learn.dls.train) + 2.0


def test_a_long_run_names_a_faster_network(make, monkeypatch):
    config, learn = make("--epochs", 2)
    monkeypatch.setattr(timing, "LONG", 0)
    config = type(config)(**{**config.to_dict(), "model": "medium"})
    assert re.search(
        r"2 epochs take about .*; --model small: about \d+ s$", timing.expectation(learn, config, "float32")[1]
    )


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_after_one_epoch_what_is_left_is_known_within_15_percent(path):
    with open(path, newline="") as f:
        rows = [{"seconds": float(row["seconds"])} for row in csv.DictReader(f)]
    told = []
    original, progress.duration = progress.duration, lambda seconds: told.append(seconds) or ""
    try:
        progress.time_left(rows[:1], len(rows))
    finally:
        progress.duration = original
    assert told[0] == pytest.approx(rows[-1]["seconds"] - rows[0]["seconds"], rel=0.15)


def test_little_that_is_left_is_not_said():
    assert progress.time_left([{"seconds": 2.0}], 20) == ""
    assert re.fullmatch(r", 19 min left \(until (\w+ )?\d\d:\d\d\)", progress.time_left([{"seconds": 60.0}], 20))


def test_durations_and_times_are_as_people_say_them(monkeypatch):
    said = [duration(s) for s in (0.4, 119, 120, 3500, 5400, 12000, 36000, 200000)]
    assert said == ["0 s", "119 s", "2 min", "58 min", "1 h 30 min", "3 h 20 min", "10 h", "56 h"]
    monkeypatch.setattr(time, "time", lambda: time.mktime((2026, 5, 4, 23, 30, 0, 0, 0, -1)))  # a Monday
    real = time.localtime
    monkeypatch.setattr(time, "localtime", lambda *s: real(*(s or [time.time()])))
    assert until(600) == "until 23:40" and until(3600) == "until Tue 00:30"


def test_the_time_is_said_before_a_run_begins_and_by_a_dry_run(bands, tmp_path, capsys):
    options = ["--size", "16", "--model", "small", "-b", "16", "--epochs", "1", "--lr", "0.05", "--gallery", "0"]
    argv = ["--data", str(bands), *options, "--out", str(tmp_path), "--name", "x"]
    assert main([*argv, "--dry-run"]) == 0
    assert re.search(r"\n1 epoch takes about \d+ s here \(until .*\)\n$", capsys.readouterr().out)
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    told = next(i for i, line in enumerate(lines) if "takes about" in line)
    assert lines[told + 1].startswith("epoch 1/1")
    assert json.loads((tmp_path / "x/env.json").read_text())["expected_seconds"] > 0
