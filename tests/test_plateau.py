import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.schedule import ParamScheduler, SchedCos
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import config as configs
from lib.train import schedules
from lib.train.optimizers import maker
from lib.train.plateau import Plateau, ReduceLROnPlateau
from lib.train.progress import EpochLines

numbers = st.floats(-10, 10).map(lambda x: round(x, 2))  # coarse, so that ties and near misses happen
values_lists = st.lists(numbers | st.sampled_from([math.nan, math.inf, 0.0]), min_size=1, max_size=60)
options = st.fixed_dictionaries(
    dict(
        mode=st.sampled_from(["min", "max"]),
        factor=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
        patience=st.integers(0, 4),
        threshold=st.sampled_from([0.0, 1e-4, 0.1, 0.5]),
        threshold_mode=st.sampled_from(["rel", "abs"]),
        cooldown=st.integers(0, 4),
        min_lr=st.sampled_from([0.0, 1e-3, 0.05, 1.0]),
        eps=st.sampled_from([1e-8, 1e-2]),
    )
)


def torchs(values, lr=0.1, **options):
    """The learning rates that torch's scheduler leaves after each value."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    rates = []
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@settings(max_examples=200, deadline=None)
@given(values_lists, options)
def test_the_callback_gives_torchs_rates(values, options):
    callback, opt = ReduceLROnPlateau("valid_loss", **options), maker("sgd", 0.9)([[torch.zeros(1)]], lr=0.1)
    opt.split_by_decay()
    recorder = SimpleNamespace(metric_names=["epoch", "train_loss", "valid_loss", "time"], values=[])
    callback.learn = SimpleNamespace(opt=opt, recorder=recorder, cbs=[callback], epoch=0)
    callback.before_fit()
    rates = []
    for value in values:
        recorder.values.append([0.0, value])
        callback.after_epoch()
        rates.append(opt.hypers[0]["lr"])
    assert rates == torchs(values, **options)


@settings(max_examples=200, deadline=None)
@given(values_lists, options)
def test_plateau_alone_says_when_torch_reduces(values, options):
    options |= dict(min_lr=0.0, eps=0.0)
    plateau = Plateau(**{k: options[k] for k in ("mode", "threshold", "threshold_mode", "patience", "cooldown")})
    lr, rates = 0.1, []
    for value in values:
        lr = lr * options["factor"] if plateau.step(value) else lr
        rates.append(lr)
    assert rates == torchs(values, **options)


@settings(max_examples=100, deadline=None)
@given(st.lists(numbers, min_size=2, max_size=40), st.data())
def test_a_plateau_goes_on_from_its_state(values, draw):
    cut = draw.draw(st.integers(0, len(values)))
    one = Plateau(patience=1, cooldown=1)
    told = [one.step(v) for v in values]
    first, second = Plateau(patience=1, cooldown=1), Plateau(patience=1, cooldown=1)
    head = [first.step(v) for v in values[:cut]]
    second.load_state_dict(first.state_dict())
    assert head + [second.step(v) for v in values[cut:]] == told


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), options, st.integers(1, 4), st.sampled_from(configs.MONITORS))
def test_trace_is_torchs_scheduler(values, options, steps, monitor):
    config = configs.Config(
        epochs=len(values), lr=0.1, monitor=monitor, factor=options["factor"], patience_epochs=options["patience"],
        threshold=options["threshold"], threshold_mode=options["threshold_mode"], min_lr=options["min_lr"],
        cooldown_epochs=options["cooldown"],
    )  # fmt: skip
    trace = schedules.trace(config, steps, values)
    options |= dict(mode="min" if monitor.endswith("loss") else "max", eps=1e-8)
    expected = [0.1, *torchs(values, **options)][:-1]  # a value changes the rate of the epoch after it
    assert trace.shape == (len(values) * steps, 2)
    assert trace[:, 0].tolist() == list(np.repeat(expected, steps)) and (trace[:, 1] == 0.9).all()


def test_trace_without_values_never_reduces():
    assert (schedules.trace(configs.Config(lr=0.2, epochs=30), 3)[:, 0] == 0.2).all()
    with pytest.raises(ValueError, match="number"):
        schedules.trace(configs.Config(), 3)


def test_a_fit_has_the_rates_of_its_trace(make, capsys):
    config, learn = make("--epochs", 6, "--patience-epochs", 0, "--lr", 0.3, "--factor", 0.5)
    learn.add_cb(EpochLines())
    schedules.fit(learn, config, config.lr)
    rows = learn.recorder.rows
    trace = schedules.trace(config, len(learn.dls.train), [row["valid_loss"] for row in rows])
    assert [row["lr"] for row in rows] == trace[:: len(learn.dls.train), 0].tolist()
    cuts = sum(b["lr"] < a["lr"] for a, b in zip(rows, rows[1:]))
    assert cuts and capsys.readouterr().out.count("plateau: valid_loss stands still; lr ") >= cuts


def test_one_owner_of_the_learning_rate(make):
    _, learn = make()
    other = ParamScheduler({"lr": SchedCos(0.1, 0.0)})
    with pytest.raises(ValueError, match="two owners"):
        learn.fit(1, 0.1, cbs=[ReduceLROnPlateau(), other])
    with pytest.raises(ValueError, match="two owners"):
        learn.fit_one_cycle(1, 0.1, cbs=[ReduceLROnPlateau()])


def test_wrong_arguments_raise(make):
    for wrong in (dict(mode="lowest"), dict(threshold_mode="relative")):
        with pytest.raises(ValueError):
            Plateau(**wrong)
    with pytest.raises(ValueError):
        ReduceLROnPlateau(factor=1.0)
    _, learn = make()
    with pytest.raises(ValueError, match="'val_loss' is not among train_loss"):
        learn.fit(1, 0.1, cbs=ReduceLROnPlateau("val_loss"))


def test_the_callback_works_on_fastais_own_learner(make):
    """Its monitor is read from fastai's Recorder, and fastai's optimizer takes its rate."""
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    from fastai.optimizer import SGD

    _, ours = make()
    learn = Learner(ours.dls, ours.model, CrossEntropyLossFlat(), SGD, metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit(
            3, 1e-4, cbs=ReduceLROnPlateau("accuracy", "max", 0.5, patience=0, threshold=1.0, threshold_mode="abs")
        )
    assert learn.opt.hypers[0]["lr"] == pytest.approx(1e-4 * 0.25)
