import gc
import sys
import weakref

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import steep
from torch_lr_finder import LRFinder

from lib.cli import BadInput
from lib.models import networks
from lib.train import lr_range, progress, schedules
from lib.train.optimizers import undecayed
from tests.conftest import fingerprint, state_of
from train_fastai import main


class Batches(torch.utils.data.IterableDataset):
    """The batches of a fastai loader, as pytorch-lr-finder takes them."""

    def __init__(self, dl):
        self.batches = [[t.as_subclass(torch.Tensor) for t in b] for b in dl]

    def __iter__(self):
        return iter(self.batches)


def sgd(model, lr):
    """torch's SGD with the default's weight decay."""
    spared = undecayed(model)
    ids = {id(p) for p in spared}
    groups = [dict(params=[p for p in model.parameters() if id(p) not in ids], weight_decay=5e-4)]
    return torch.optim.SGD([*groups, dict(params=spared, weight_decay=0.0)], lr, 0.9)


def test_raw_losses_are_pytorch_lr_finders(make):
    """Same model, batches and rates: raw losses agree to 1e-4, over more than one pass."""
    _, learn = make("-b", 8)
    n, batches = 22, []
    for epoch in range(3):
        batches += Batches(learn.dls.train.new(epoch=epoch)).batches
    assert len(learn.dls.train) < n <= len(batches)
    found = lr_range.find(learn, 1e-4, 1, n, stop_div=False)
    model = learn.twin().model
    optimizer = sgd(model, 1e-4)
    finder = LRFinder(model, optimizer, torch.nn.CrossEntropyLoss(), "cpu")
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    finder.range_test(loader, end_lr=1, num_iter=n, smooth_f=0, diverge_th=1e9)
    assert np.allclose(found.lrs, finder.history["lr"], rtol=1e-9)
    assert np.allclose(found.losses, finder.history["loss"], rtol=1e-4)
    assert found.epochs == -(-n // len(learn.dls.train))


def test_linear_rates_and_valid_losses_are_pytorch_lr_finders(make):
    _, learn = make("-b", 16)
    batches, valid = Batches(learn.dls.train).batches, Batches(learn.dls.valid).batches[:1]
    learn.dls.train.epoch = 0
    n = len(batches)
    model = learn.twin().model
    optimizer = sgd(model, 1e-3)
    test = lr_range.run(learn, np.linspace(1e-3, 0.1, n), stop_div=False, on_valid=True)
    finder = LRFinder(model, optimizer, torch.nn.CrossEntropyLoss(), "cpu")
    loaders = [torch.utils.data.DataLoader(b, batch_size=None) for b in (batches, valid)]
    finder.range_test(loaders[0], loaders[1], 1e-3, 0.1, n, step_mode="linear", smooth_f=0, diverge_th=1e9)
    theirs = np.array(finder.history["loss"]) / len(valid[0][1])  # it divides by the number of batches
    assert np.allclose(test.lrs, finder.history["lr"], rtol=1e-9) and np.allclose(test.losses, theirs, rtol=1e-4)


def test_the_sample_of_valid_has_all_classes(make):
    _, learn = make("--valid-pct", 0.5)
    learn.dls.valid.bs = 8
    x, y = learn.dls.valid.plain(learn.dls.valid.bs)
    assert np.bincount(y).tolist() == [2, 2, 2, 2] and x.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, dict(linear=True, on_valid=True, end_lr=0.2)])
def test_it_leaves_no_trace(make, options):
    _, learn = make()
    learn.fit(1, 0.1)  # so that there is an optimizer state, and a record
    before = state_of(learn)
    lr_range.find(learn, num_it=30, **options)
    assert state_of(learn) == before


def test_the_memory_of_the_copy_is_free_at_once(make, monkeypatch):
    """Not when Python next looks for garbage: a large network may fit into a card twice, and not three times."""
    _, learn = make("--mixup", 0.4)
    made, twin = [], learn.twin

    def noted():
        copy = twin()
        made.append(weakref.ref(next(copy.model.parameters())))
        return copy

    monkeypatch.setattr(learn, "twin", noted)
    gc.collect()
    gc.disable()
    try:
        lr_range.run(learn, np.full(12, 1e-3), stop_div=False)
    finally:
        gc.enable()
    assert [weight() for weight in made] == [None]


def test_interrupted_it_leaves_no_trace(make, monkeypatch):
    _, learn = make()
    before, dl = state_of(learn), learn.dls.train
    do_batch, calls = dl.do_batch, []

    def interrupt(b):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return do_batch(b)

    monkeypatch.setattr(dl, "do_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lr_range.find(learn, num_it=30)
    monkeypatch.undo()
    assert state_of(learn) == before


def test_a_run_that_finds_x_equals_a_run_with_x(make):
    config, found = make()
    lr = found.lr_find(1e-5, suggest_funcs=steep, show_plot=False).steep
    schedules.fit(found, config, lr)
    _, told = make()
    schedules.fit(told, config, lr)
    rows = lambda learn: [{k: v for k, v in row.items() if k != "seconds"} for row in learn.recorder.rows]
    assert rows(found) == rows(told)
    assert fingerprint(found.model.state_dict(), found.opt.state_dict()) == fingerprint(
        told.model.state_dict(), told.opt.state_dict()
    )


def curve(of, n=100):
    lrs = np.geomspace(1e-5, 10, n)
    noise = np.random.default_rng(0).normal(0, 0.05, n)
    return lrs, of(np.log10(lrs)) + noise


FALLING = lambda x: 2.3 - 1.2 / (1 + np.exp(-6 * (x + 2))) + 5 * np.maximum(x + 0.3, 0) ** 2  # steepest at 1e-2


def test_the_steepest_point_is_where_it_is():
    """Trap 10: a moving average moves it from 7e-3 to 2.6e-2; a centred window leaves it."""
    lrs, losses = curve(FALLING)
    test = lr_range.RangeTest(lrs, losses, 1, 100)
    lr_range.check_fall(test)
    found = test.suggestions
    assert 5e-3 < found["steep"] < 2e-2
    assert 0.005 < found["minimum"] < 0.06  # a tenth of where the loss is least
    assert found["sixth"] == pytest.approx(found["minimum"] * 10 / 6)
    assert set(found) == {"sixth", "valley", "steep", "minimum", "slide"} and all(
        1e-5 <= lr <= 10 for lr in found.values()
    )


@pytest.mark.parametrize(
    "of",
    [lambda x: 2.3 + 0 * x, lambda x: 2.3 + np.maximum(x + 2, 0), lambda x: np.where(x < -4.9, 2.3, np.nan)],
    ids=["flat", "rising", "nan"],
)
def test_a_curve_without_a_fall_is_refused(of):
    lrs, losses = curve(of)
    kept = np.isfinite(losses)
    with pytest.raises(BadInput, match="--lr"):
        lr_range.check_fall(lr_range.RangeTest(lrs[kept], losses[kept], 1, 100))


def test_with_accumulation_it_counts_updates(make):
    batches = Callback(before_backward=lambda self: seen.append(1))
    seen, (_, learn) = [], make("--accumulate", 2)
    learn.add_cb(batches)
    assert len(lr_range.find(learn, num_it=12, stop_div=False).lrs) == 12 and len(seen) == 24


def test_a_curve_ends_before_its_first_loss_that_is_no_number(make):
    """Also where it is asked to go on: what follows says nothing, and must not count as a low loss."""

    class Breaks(Callback):
        order = -6  # before the range test looks

        def after_batch(self):
            seen.append(1)
            if len(seen) == 12:
                self.learn.loss = torch.tensor(torch.nan)

    seen, (_, learn) = [], make()
    learn.add_cb(Breaks())
    test = lr_range.run(learn, lr_range.rates(1e-5, 1e-4, 20), stop_div=False)
    assert len(seen) == 20 and len(test.lrs) == len(test.losses) == 11 and np.isfinite(test.smooth_losses).all()


@pytest.mark.parametrize("noise, high, said", [(0.01, 10, ""), (0.9, 10, "little against"), (0.01, 0.1, "still falls")])
def test_a_noisy_or_short_curve_says_so(make, tmp_path, monkeypatch, capsys, noise, high, said):
    """The fall of the curve, about 1.1, is little against a noise of 0.9; up to a rate of 0.1 it has no end."""
    from lib.explain import evaluate

    lrs = np.geomspace(1e-5, high, 100)
    losses = FALLING(np.log10(lrs)).clip(0, 4) + np.random.default_rng(0).normal(0, noise, 100)
    test = lr_range.RangeTest(lrs, losses, 1, 100)
    assert (test.fall < 3 * test.noise) is (noise > 0.5) and test.noise == pytest.approx(noise, abs=0.3)

    class Folder:
        path = tmp_path

        def __truediv__(self, name):
            return tmp_path / name

        def note(self, **facts):
            self.facts = facts

    config, learn = make()
    monkeypatch.setattr(evaluate.lr_range, "find", lambda *args, **kwargs: test)
    run = Folder()
    lr, _ = evaluate.range_test(learn, config, run)
    assert lr == run.facts["lr_suggestions"]["sixth"]
    out = capsys.readouterr().out
    assert [words for words in ("little against", "still falls") if words in out] == [said] * bool(said)


def test_a_model_that_cannot_learn_ends_in_status_2(bands, cache, tmp_path, capsys, monkeypatch):
    forward = networks.SmallResNet.forward
    monkeypatch.setattr(networks.SmallResNet, "forward", lambda self, x: forward(self, x) * 0.0)
    argv = ["--data", bands, "--size", "32", "-b", "16", "--model", "small", "--cache", cache, "--out", tmp_path]
    assert main([*map(str, argv)]) == 2
    err = capsys.readouterr().err
    assert "never falls" in err and err.count("\n") == 1


def test_a_loss_that_is_not_a_number_ends_the_test(make):
    _, learn = make()
    test = lr_range.run(learn, np.geomspace(1e-3, 1e30, 40))
    assert len(test.losses) < 40 and len(test.lrs) == len(test.losses)


@pytest.mark.parametrize("terminal", [True, False])
def test_it_says_how_far_it_is(make, capsys, monkeypatch, terminal):
    _, learn = make()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    lines = progress.RangeTestLines(30, pause=0)
    with lines.tqdm:
        test = lr_range.find(learn, num_it=30, on_update=lines.after_update)
    out, err = capsys.readouterr()
    expected = [f"range test: {k} of 30 batches, loss {loss:.4f}" for k, loss in enumerate(test.losses, 1)]
    assert out.splitlines() == ([] if terminal else expected)
    assert ("range test:" in err and "/30" in err) is terminal


def test_its_lines_are_not_many(capsys):
    lines = progress.RangeTestLines(30, bar=False, pause=3600)
    for k in range(30):
        lines.after_update(k, 2.0)
    assert capsys.readouterr() == ("", "")
