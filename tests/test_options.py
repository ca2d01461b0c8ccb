"""Settings reach what they are for: one run in which other code listens to what it is given."""

import csv
import json

import pytest

from lib.data import augment
from lib.explain import gradcam
from lib.train import checkpoint, learner, lr_range, schedules
from tests.conftest import SMALL
from train_fastai import main


def heard(monkeypatch, owner, name):
    """The (positional, keyword) arguments of each call of `owner.name`, which does what it always does."""
    calls, original = [], getattr(owner, name)

    def listening(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, listening)
    return calls


def test_settings_that_are_handed_on_arrive(bands, tmp_path, monkeypatch):
    tests, maps = heard(monkeypatch, lr_range, "find"), heard(monkeypatch, gradcam, "maps")
    saved = heard(monkeypatch, checkpoint.Checkpoint, "__init__")
    mixed = heard(monkeypatch, learner, "CutMix")
    given = "--lr find --lr-iters 12 --lr-high 0.3 --lr-scale linear --lr-find-on valid --lr-suggest minimum".split()
    given += "--cam hirescam --checkpoint-seconds 7 --cutmix 0.7 --no-progress".split()
    argv = [*SMALL, "--data", bands, "--out", tmp_path, "--name", "x", *given]
    assert main([*map(str, argv)]) == 0
    (((_, low, high, updates), options),) = tests
    assert (low, high, updates) == (1e-5, 0.3, 12) and options["linear"] and options["on_valid"]
    env = json.loads((tmp_path / "x/env.json").read_text())
    assert env["lr"] == env["lr_suggestions"]["minimum"] != env["lr_suggestions"]["sixth"]
    with open(tmp_path / "x/lr_find.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates[1] - rates[0] == pytest.approx(rates[2] - rates[1])
    assert {options["method"] for _, options in maps} == {"hirescam"}
    assert [args[3] for args, _ in saved] == [7] and [args for args, _ in mixed] == [(0.7,)]


def test_the_momenta_of_one_cycle_are_those_that_are_asked_for(make):
    momenta = ["--max-momentum", 0.9, "--min-momentum", 0.6]
    config, _ = make("--lr", 0.1, "--schedule", "one_cycle", *momenta)
    momenta = schedules.trace(config, 10)[:, 1]
    assert momenta[0] == pytest.approx(0.9) and momenta.min() == pytest.approx(0.6) and momenta.max() <= 0.9 + 1e-12


@pytest.mark.parametrize("size, padding, side", [(32, 4, 8), (64, 8, 16), (16, 2, 4)])
def test_cutout_and_padding_grow_with_the_image(size, padding, side, parse):
    """They are given in pixels of a side of 32."""
    crop, *_, cutout = augment.pipeline(parse("--crop-padding", 4, "--cutout", 8), size, (0, 0, 0))
    assert (crop.padding, cutout.size) == (padding, side)
