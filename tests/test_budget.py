import dataclasses
import json
import re
import time

import pytest

from lib.cli import BadInput, counted
from lib.config import MODELS, parse
from lib.train import budget
from train_fastai import main

TABLE = {"small": [(1000, 0.5, 3), (4000, 0.7, 3)], "medium": [(1000, 0.4, 3), (4000, 0.9, 1)]}


@pytest.fixture
def planned(monkeypatch, get):
    """`choose` for digits, with a table and numbers of epochs that fit; returns (config, choices)."""

    def planned(fits, *options):
        monkeypatch.setattr(budget, "learned", lambda: TABLE)
        monkeypatch.setattr(budget, "measure", lambda config, dls, precision, name: (270 / fits[name], 0))
        config = parse(["--data", "digits", "--minutes", "5", *options])
        chosen, choices = budget.choose(config, get(config), "float32", time.perf_counter())
        return dataclasses.replace(config, **chosen), choices

    return planned


@pytest.fixture(scope="module")
def get():
    from lib.data import get_dls

    made = []
    return lambda config: made[0] if made else made.append(get_dls(config)) or made[0]


def test_what_is_promised_lies_between_the_points_and_not_above_the_last():
    promised = [budget.promised(TABLE["small"], n) for n in (500, 1000, 2000, 4000, 10**6)]
    assert promised[1:] == pytest.approx([0.5, 0.6, 0.7, 0.7]) and 0 < promised[0] < 0.5


def test_the_network_that_promises_most_is_chosen(planned, capsys):
    config, choices = planned(dict(small=3.9, light=0.7))  # the others are slower, and not measured
    assert (config.model, config.epochs, config.schedule, config.minutes) == ("small", 3, "one_cycle", 0)
    assert choices == {"minutes": 5, "choices": {"small": (3, pytest.approx(0.69, abs=0.01))}}
    fits = dict(small=40.9, light=30.9, medium=25.9, large=9.9)
    config, choices = planned(fits, "--schedule", "plateau")
    assert (config.model, config.epochs, config.patience_epochs, config.schedule) == ("medium", 25, 2, "plateau")
    assert list(choices["choices"]) == list(MODELS) and choices["choices"]["large"] == (9, None)
    told = "chosen for 5 min: medium, 25 epochs (0.90); not chosen: small, 40 epochs (0.70), or light, 30 epochs"
    assert told in capsys.readouterr().out
    config, _ = planned(fits, "--model", "large", "--schedule", "plateau", "--patience-epochs", "1")
    assert (config.model, config.epochs, config.patience_epochs) == ("large", 9, 1)
    assert planned(fits, "--patience-epochs", "0")[0].patience_epochs == 0  # what was typed stays
    with pytest.raises(BadInput, match="--minutes 5: not one epoch fits; pass --minutes 6"):
        planned(dict(small=0.9))


@pytest.mark.parametrize(
    "options, rest",
    [
        ([], 100 * 2 + 2 * 30 + 15),
        (["--lr", "0.1"], 2 * 30 + 15),
        (["--lr-find-on", "valid"], 100 * (2 + 30 / 502 * 500) + 2 * 30 + 15),
    ],
)
def test_all_that_a_run_does_is_counted(get, monkeypatch, options, rest):
    steps = []
    monkeypatch.setattr(budget.timing, "step_seconds", lambda learn, n: steps.append(n) or 2.0)
    monkeypatch.setattr(budget.timing, "evaluation_seconds", lambda learn: 30.0)
    config = parse(["--data", "digits", "--minutes", "5", "-b", "64", *options])
    dls = get(config)
    assert (len(dls.valid.ids) + len(dls.test.ids), dls.valid.bs, len(dls.train.ids)) == (502, 500, 1295)
    epoch, rest_found = budget.measure(config, dls, "float32", "small")
    assert (epoch, rest_found) == pytest.approx((21 * 2 + 30, rest)) and steps == [budget.STEPS]


def test_batches_of_one_image_are_looked_for_in_batches_of_the_size_that_the_run_has(get, monkeypatch):
    config, sizes = parse("--data digits --minutes 5 --lr 0.1".split()), []
    monkeypatch.setattr(budget.models, "check_batches", lambda model, c, *rest: sizes.append((c.batch_size, rest[0])))
    dls = get(config)
    budget.measure(config, dls, "float32", "small")
    assert config.batch_size == "auto" and sizes == [(dls.train.bs, [dls.train.bs])]


def test_the_table_is_there_for_each_network_of_ours():
    assert set(budget.learned()) >= set(MODELS)


@pytest.mark.parametrize("text", ["{}", "[", '{"rows": {"small": {"learned": []}}, "x": NaN}', '{"rows": []}'])
def test_a_damaged_table_is_one_line(monkeypatch, tmp_path, text):
    monkeypatch.setattr(budget, "TABLE", tmp_path / "networks.json")
    (tmp_path / "networks.json").write_text(text)
    with pytest.raises(BadInput, match=r"networks.json: says what networks learn, and cannot be read"):
        budget.learned()


@pytest.mark.parametrize(
    "options, text",
    [
        (["--epochs", "3"], "--minutes: chooses the epochs by the speed of plain steps; leave out --epochs 3"),
        (["--smoke"], "leave out --epochs 2 (or --epochs auto)"),
        (["--compile"], "leave out --compile"),
        (["--model", "alexnet"], "--model: does not take images of 32 pixels"),
        (["--model", "medium", "-b", "1", "--size", "16"], "--batch-size"),
        (["--seeds", "0", "1"], "--minutes: is for one run"),
        (["--pretrained"], "--pretrained: needs --model where --minutes chooses"),
        (["--minutes", "-1"], "--minutes: must be a number of at least 0"),
    ],
)
def test_what_minutes_cannot_do_is_one_line(options, text, capsys):
    assert main(["--data", "digits", "--minutes", "5", *options]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["epochs", "model"])
def test_auto_is_for_minutes_alone(name, capsys):
    assert main(["--data", "digits", f"--{name}", "auto"]) == 2
    assert f"--{name}: auto needs --minutes" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", [0.2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_ends_in_time_and_its_settings_repeat_it(bands, tmp_path, monkeypatch, capsys, minutes):
    monkeypatch.setattr(budget, "FIGURES", 3)
    options = "--size 16 -b 16 --model small --lr 0.05 --gallery 0 --name x".split()
    start = time.perf_counter()
    assert main(["--data", str(bands), *options, "--minutes", str(minutes), "--out", str(tmp_path)]) == 0
    if minutes == 1:  # a time of seconds is that of the machine's other programs
        assert time.perf_counter() - start < 60 * minutes
    told = int(re.search(r"s: small, (\d+) epoch", capsys.readouterr().out)[1])
    env = json.loads((tmp_path / "x/env.json").read_text())
    assert env["minutes"] == minutes and env["choices"]["small"][0] == told
    assert len((tmp_path / "x/results.csv").read_text().splitlines()) == told + 1
    page = (tmp_path / "x/report.html").read_text()
    assert f'["chosen for", "{minutes:g} minutes: small for {counted(told, "epoch")}"]' in page
    assert main(["-c", str(tmp_path / "x/args.yaml"), "--name", "y", "--dry-run"]) == 0
    assert f"one_cycle, {counted(told, 'epoch')}" in capsys.readouterr().out
