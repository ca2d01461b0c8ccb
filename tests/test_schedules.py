import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch.optim import lr_scheduler

from lib import config
from lib.cli import BadInput
from lib.config import Config
from lib.data.augment import shuffled
from lib.train import build, checkpoint, lecture, optimizers, plateau, progress, schedules
from tests.test_checkpoint import same
from train_fastai import main

STEPS = 7


def optimizer(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def stepped(opt, scheduler, n):
    rates = []
    for _ in range(n):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return rates


class Hypers(Callback):
    """What the optimizer steps with."""

    order = 99

    def before_fit(self):
        self.seen = []

    def before_step(self):
        h = self.opt.hypers[0]
        self.seen.append((h["lr"], h.get("mom", 0.0)))


@pytest.mark.parametrize("name, mode", [("triangular", "triangular"), ("triangular2", "triangular2")])
@pytest.mark.parametrize("epochs, length, div", [(20, 0.2, 4.0), (12, 0.5, 3.0)])
def test_triangular_rates_are_torchs(name, mode, epochs, length, div):
    c = Config(schedule=name, epochs=epochs, lr=0.3, cycle_length=length, cycle_div=div)
    trace = schedules.trace(c, STEPS)
    opt, half = optimizer(0.3), length * epochs * STEPS / 2
    theirs = lr_scheduler.CyclicLR(opt, 0.3 / div, 0.3, half, half, mode, cycle_momentum=False)
    np.testing.assert_allclose(trace[:, 0], stepped(opt, theirs, epochs * STEPS), rtol=1e-9)
    assert (trace[:, 1] == 0.9).all()


@pytest.mark.parametrize("epochs, first, mult", [(14, 2, 2), (10, 5, 1), (13, 1, 3), (12, 1.2, 1), (30, 0.3, 2)])
def test_warm_restarts_are_torchs(epochs, first, mult):
    c = Config(schedule="warm_restarts", epochs=epochs, lr=0.2, cycle_length=first / epochs, cycle_mult=mult)
    opt = optimizer(0.2)
    scale = 1 if first % 1 == 0 else 10  # torch's first cycle is a whole number: in these units
    theirs = lr_scheduler.CosineAnnealingWarmRestarts(opt, round(first * scale), mult)
    expected = []
    for epoch in range(epochs):
        for i in range(STEPS):
            theirs.step((epoch + i / STEPS) * scale)
            expected.append(opt.param_groups[0]["lr"])
    found = schedules.trace(c, STEPS)[:, 0]
    restart = np.isclose(found, 0.2, rtol=1e-6) != np.isclose(expected, 0.2, rtol=1e-6)  # rounding at a cycle's edge
    assert restart.sum() == 0
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)


def test_the_default_restarts_end_with_the_fit():
    trace = schedules.trace(Config(schedule="warm_restarts", epochs=21, lr=1.0), 100)[:, 0]
    assert (np.flatnonzero(np.diff(trace) > 0.5) + 1).tolist() == [300, 900] and trace[-1] < 1e-3


@pytest.mark.parametrize("name", ["one_cycle", "flat_cos"])
def test_fastais_own_fits_have_the_same_rates_and_weights(name, make):
    settings = ["--epochs", 3, "--lr", 0.2, "--schedule", name]
    ours, theirs = (make(*settings, cbs=[Hypers()]) for _ in range(2))
    for _, learn in (ours, theirs):  # in float32, training makes of a difference in rounding a thousandfold one
        learn.model.double().register_forward_pre_hook(lambda model, x: (x[0].double(),))
    schedules.fit(ours[1], ours[0], 0.2)
    if name == "one_cycle":
        theirs[1].fit_one_cycle(3, 0.2, moms=(0.95, 0.85, 0.95))
    else:
        theirs[1].fit_flat_cos(3, 0.2)
    trace = schedules.trace(ours[0], len(ours[1].dls.train))
    assert ours[1].hypers.seen == [tuple(row) for row in trace]
    np.testing.assert_allclose(trace, theirs[1].hypers.seen, rtol=1e-5)  # fastai computes them in float32
    for a, b in zip(ours[1].model.parameters(), theirs[1].model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_cycle_by_its_equations():
    c = Config(schedule="one_cycle", epochs=8, lr=0.4, pct_start=0.5, div=10, div_final=100, min_momentum=0.8)
    lr, momentum = schedules.trace(c, 50).T
    t = np.arange(400) / 400
    cosine = lambda a, b, p: a + (b - a) * (1 - np.cos(np.pi * p)) / 2
    up = t < 0.5
    expected = np.where(up, cosine(0.04, 0.4, 2 * t), cosine(0.4, 0.004, 2 * t - 1))
    np.testing.assert_allclose(lr, expected, rtol=1e-9)
    expected = np.where(up, cosine(0.95, 0.8, 2 * t), cosine(0.8, 0.95, 2 * t - 1))
    np.testing.assert_allclose(momentum, expected, rtol=1e-9)


@pytest.mark.parametrize("name", config.SCHEDULES)
def test_lr_is_the_largest_rate_of_every_schedule(name):
    trace = schedules.trace(Config(schedule=name, epochs=20, lr=0.25), 40, [1.0] * 20)
    assert trace.shape == (800, 2) and trace[:, 0].max() == pytest.approx(0.25, rel=1e-3) and (trace[:, 0] > 0).all()
    assert (trace[:, 1] == 0.9).all() or name == "one_cycle"


@pytest.mark.parametrize("name", ["constant", "plateau", "one_cycle"])
def test_warm_up_rises_from_a_quarter(name):
    settings = dict(schedule=name, epochs=10, lr=0.25)
    plain, warm = (schedules.trace(Config(**settings, warmup_epochs=w), 20) for w in (0, 2.5))
    factor = np.minimum(0.25 + 0.75 * np.arange(200) / 50, 1)
    np.testing.assert_allclose(warm[:, 0], plain[:, 0] * factor, rtol=1e-12)
    assert (warm[:, 1] == plain[:, 1]).all()


def test_warm_up_leaves_the_owner_its_rate(make):
    c, learn = make("--epochs", 4, "--lr", 0.1, "--warmup-epochs", 1.5, "--patience-epochs", 0, "--threshold", 0.9)
    learn.add_cb(Hypers())
    schedules.fit(learn, c, 0.1)
    rows, n = learn.recorder.rows, len(learn.dls.train)
    trace = schedules.trace(c, n, [row["valid_loss"] for row in rows])
    assert learn.hypers.seen == [tuple(row) for row in trace]
    assert [row["lr"] for row in rows] == trace[::n, 0].tolist() and rows[0]["lr"] == 0.025


def test_the_batch_grows_where_the_rate_would_shrink(make, capsys):
    settings = "--epochs 5 --lr 0.1 -b 10 --patience-epochs 0 --threshold 9 --threshold-mode abs --factor 0.5".split()
    c, learn = make(*settings, "--schedule", "grow_batch", "--max-batch-size", 30)
    learn.add_cb(progress.EpochLines())
    schedules.fit(learn, c, 0.1)
    rows = learn.recorder.rows
    assert [row["batch_size"] for row in rows] == [10, 10, 20, 30, 30]
    np.testing.assert_allclose([row["lr"] for row in rows], [0.1, 0.1, 0.1, 0.075, 0.0375])
    shrunk = [row["lr"] / row["batch_size"] for row in rows]
    np.testing.assert_allclose(shrunk, 0.01 * np.array([1, 1, 0.5, 0.25, 0.125]))
    assert learn.dls.train.bs == 10 and "batch size 10 -> 20" in capsys.readouterr().out


def test_a_batch_grows_to_all_images_and_no_further(make):
    settings = "--epochs 4 --lr 0.1 -b 40 --patience-epochs 0 --threshold 9 --threshold-mode abs --factor 0.3".split()
    c, learn = make(*settings, "--schedule", "grow_batch")
    n = learn.dls.train.n
    schedules.fit(learn, c, 0.1)
    assert n < 100 and [row["batch_size"] for row in learn.recorder.rows] == [40, 40, n, n]
    shrunk = [row["lr"] / row["batch_size"] for row in learn.recorder.rows]
    np.testing.assert_allclose(shrunk, 0.1 / 40 * np.array([1, 1, 0.3, 0.09]))


def test_a_batch_that_cannot_grow_leaves_the_rate_to_shrink(make):
    settings = "--epochs 3 --lr 0.1 -b 20 --patience-epochs 0 --threshold 9 --threshold-mode abs --factor 0.5".split()
    c, learn = make(*settings, "--schedule", "grow_batch", "--max-batch-size", 10)
    schedules.fit(learn, c, 0.1)
    assert [row["batch_size"] for row in learn.recorder.rows] == [20, 20, 20]
    np.testing.assert_allclose([row["lr"] for row in learn.recorder.rows], [0.1, 0.1, 0.05])


@pytest.mark.parametrize("name", ["rmsprop", "adagrad"])
def test_one_cycle_gives_no_momentum_to_optimizers_without_one(name, make):
    c, learn = make("--optimizer", name, "--schedule", "one_cycle", "--epochs", 1, "--lr", 0.001)
    learn.add_cb(Hypers())
    schedules.fit(learn, c, 0.001)
    assert all(momentum == 0 for _, momentum in learn.hypers.seen)
    assert (schedules.trace(c, STEPS)[:, 1] == 0).all()


def test_two_owners_are_refused(make):
    _, learn = make()
    with pytest.raises(ValueError, match="two owners"):
        learn.fit(1, 0.1, cbs=[schedules.Scheduled(lambda t: {"lr": 1}), plateau.ReduceLROnPlateau()])


@pytest.mark.parametrize("name", config.OPTIMIZERS)
def test_optimizers_are_torchs(name, make):
    """Three steps of the learner equal three steps of torch's class, groups and all."""
    c, learn = make("--optimizer", name, "--lr", 0.01, "--momentum", 0.8, "--no-flip")
    _, twin = make("--optimizer", name)
    torchs = dict(
        sgd=lambda p: torch.optim.SGD(p, 0.01, 0.8),
        nesterov=lambda p: torch.optim.SGD(p, 0.01, 0.8, nesterov=True),
        rmsprop=lambda p: torch.optim.RMSprop(p, 0.01),
        adagrad=lambda p: torch.optim.Adagrad(p, 0.01),
        adam=lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.999)),
    )
    spared = {id(p) for p in optimizers.undecayed(twin.model)}
    decayed = [p for p in twin.model.parameters() if id(p) not in spared]
    spared = optimizers.undecayed(twin.model)
    opt = torchs[name]([{"params": decayed, "weight_decay": 5e-4}, {"params": spared, "weight_decay": 0}])
    twin.model.train()
    for x, y in learn.dls.train:
        opt.zero_grad()
        logits = twin.model(x.as_subclass(torch.Tensor))
        torch.nn.functional.cross_entropy(logits, y.as_subclass(torch.Tensor)).backward()
        opt.step()
    learn.dls.train.epoch = 0
    learn.fit(1, 0.01)
    for a, b in zip(learn.model.parameters(), twin.model.parameters()):
        torch.testing.assert_close(a, b)


def test_sgd_needs_less_memory_than_adam(make):
    from lib.explain.evaluate import optimizer_state_bytes

    sizes = {}
    for name in config.OPTIMIZERS:
        _, learn = make("--optimizer", name)
        learn.fit(1, 0.001)
        sizes[name] = optimizer_state_bytes(learn.opt.opt)
    parameters = 4 * sum(p.numel() for p in learn.model.parameters() if p.requires_grad)
    assert sizes["sgd"] == sizes["nesterov"] == parameters
    assert parameters <= sizes["rmsprop"] < 1.01 * parameters and parameters <= sizes["adagrad"] < 1.01 * parameters
    assert 2 * parameters <= sizes["adam"] < 2.02 * parameters


def noise_alone(seed):
    """Parameters whose gradient is the noise of step 0."""
    model = torch.nn.Linear(50, 50, bias=False)
    model.weight.grad = torch.zeros_like(model.weight)
    noise = lecture.GradNoise(0.04, seed)
    noise.learn = SimpleNamespace(model=model, scaler=None)
    noise.before_fit()
    noise.before_step()
    return list(model.parameters())


def test_gradient_noise_has_the_papers_variance_and_repeats(make):
    class Gradients(Callback):
        order = 99

        def before_step(self):
            grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            self.seen.append(torch.cat(grads))

    def gradients(*argv):
        keep = Gradients()
        keep.seen = []
        _, learn = make("--epochs", 1, *argv)
        learn.add_cb(keep)
        learn.fit(1, 1e-12)
        return keep.seen

    plain, noisy = gradients(), gradients("--grad-noise", 0.04)
    for t, (a, b) in enumerate(zip(plain, noisy)):
        assert (b - a).std().item() == pytest.approx(math.sqrt(0.04 / (1 + t) ** 0.55), rel=0.05)
    assert all((a == b).all() for a, b in zip(noisy, gradients("--grad-noise", 0.04)))
    noise = [b - a for a, b in zip(plain, noisy)]
    assert abs(torch.corrcoef(torch.stack(noise[:2]))[0, 1]) < 0.1
    seeds = [[p.grad.clone() for p in noise_alone(seed)] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*seeds[:2]))
    assert abs(torch.corrcoef(torch.stack([s[0].flatten() for s in seeds[1:]]))[0, 1]) < 0.1


def test_noise_only_behind_a_plateau(make, capsys, monkeypatch):
    plateaus = "--patience-epochs 1 --threshold 1 --threshold-mode abs".split()
    _, learn = make("--epochs", 6, "--grad-noise", 1e-6, "--perturb-on-plateau", *plateaus)
    seen = []
    before_step = lecture.GradNoise.before_step
    noise = next(cb for cb in learn.cbs if isinstance(cb, lecture.GradNoise))
    noise.before_step = lambda: (seen.append((learn.epoch, noise.on)), before_step(noise))
    learn.fit(6, 1e-6)
    assert [on for epoch, on in dict(seen).items()] == [False, False, False, True, False, True]
    assert capsys.readouterr().out.count("are perturbed") == 2
    monkeypatch.setattr(lecture.ranks, "leads", lambda: False)  # another rank prints nothing
    learn.fit(6, 1e-6)
    assert "perturbed" not in capsys.readouterr().out
    with pytest.raises(BadInput, match="--grad-noise"):
        Config(perturb_on_plateau=True)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_step_with_the_mean_of_their_losses(accumulate, make):
    c, learn = make("--accumulate", accumulate, "-b", 20)
    _, twin = make("-b", 20)
    for m in [*learn.model.modules(), *twin.model.modules()]:
        if isinstance(m, torch.nn.BatchNorm2d):
            m.train = lambda mode=True, m=m: torch.nn.Module.train(m, False)  # else it would see other batches
    twin.model.train()
    batches = [tuple(t.as_subclass(torch.Tensor) for t in b) for b in twin.dls.train]
    opt = torch.optim.SGD(twin.model.parameters(), 0.01, 0.9)
    for at in range(0, len(batches), accumulate):
        group = batches[at : at + accumulate]
        opt.zero_grad()
        sum(torch.nn.functional.cross_entropy(twin.model(x), y) for x, y in group).div(len(group)).backward()
        opt.step()
    learn.add_cb(Hypers())
    learn.fit(1, 0.01, wd=0)
    assert len(learn.hypers.seen) == math.ceil(len(batches) / accumulate)
    for a, b in zip(learn.model.parameters(), twin.model.parameters()):
        torch.testing.assert_close(a, b)


def test_balanced_batches_of_a_thousand_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(1000), 4))
    found = labels[lecture.balanced_order(3, 1, labels)].reshape(-1, 250)
    for i in range(len(found) - 3):
        assert len(set(found[i : i + 4].ravel())) == 1000


def test_balanced_batches_have_the_datas_proportions():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [600, 250, 50]))
    for epoch in range(3):
        found = lecture.balanced_order(0, epoch, labels)
        assert sorted(found) == list(range(900))
        for at in range(0, 900, 90):
            counts = np.bincount(labels[found[at : at + 90]], minlength=3)
            assert (abs(counts - [60, 25, 5]) <= 2).all()
    assert (lecture.balanced_order(0, 0, labels) != lecture.balanced_order(0, 1, labels)).any()
    assert (lecture.balanced_order(0, 0, labels) == lecture.balanced_order(0, 0, labels)).all()


def test_the_loader_takes_balanced_batches(make):
    _, learn = make("--balanced-batches", "-b", 8)
    dl = learn.dls.train
    seen = [np.bincount(y, minlength=4).tolist() for _, y in dl]
    assert all(max(counts) - min(counts) <= 2 for counts in seen[:-1])
    plain = make("-b", 8)[1].dls.train
    assert any(max(counts) - min(counts) > 2 for counts in [np.bincount(y, minlength=4) for _, y in plain])
    assert dl.new().order is lecture.balanced_order
    build(Config(), learn.dls, learn.model)  # the same loaders again, without
    assert dl.order is shuffled


RUN = "--size 32 --model small --epochs 3 --lr 0.02 -b 16 --gallery 0".split()


@pytest.mark.parametrize(
    "more",
    [
        pytest.param("--schedule one_cycle --optimizer adam --warmup-epochs 1 --accumulate 2", marks=pytest.mark.slow),
        # its dropout draws from torch's generator
        pytest.param("--model squeezenet1_1 --schedule triangular2", marks=pytest.mark.slow),
        "--schedule grow_batch --patience-epochs 0 --threshold 0.9 --grad-noise 0.001 --perturb-on-plateau "
        "--balanced-batches",
    ],
)
def test_a_run_with_everything_goes_on_where_it_was_cut(more, bands, tmp_path, monkeypatch):
    argv = ["--data", str(bands), "--out", str(tmp_path), *RUN, *more.split()]
    assert main([*argv, "--name", "whole"]) == 0
    after_epoch = progress.EpochLines.after_epoch

    def stop(self):
        after_epoch(self)
        if self.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(progress.EpochLines, "after_epoch", stop)
        assert main([*argv, "--name", "cut"]) == 130
    assert main(["--resume", str(tmp_path / "cut")]) == 0
    states = [checkpoint.load(tmp_path / name / "weights/last.pt") for name in ("whole", "cut")]
    for state in states:
        for row in state["callbacks"]["recorder"]["rows"]:
            row["seconds"] = 0
    assert same(*states)
    if "one_cycle" in more:
        assert main(["--resume", str(tmp_path / "cut"), "--epochs", "9"]) == 2
