"""--compile: the same training, through torch.compile."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback

from lib import data, models, train
from lib.cli import BadInput
from lib.train import compiled, learner
from lib.train.schedules import fit
from tests.conftest import fingerprint


class Double(Callback):
    def before_batch(self):
        self.learn.xb = tuple(x.double() for x in self.xb)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_fit_is_the_plain_one_in_float64(make):
    """In float64 an epoch of 6 steps is apart by rounding alone: each weight by less than 1e-9."""
    found = []
    for flags in ([], ["--compile"]):
        config, learn = make(*flags, "--epochs", 2, "--augment", "none")
        learn.model.double()
        del learn.dls.test  # it is evaluated without callbacks
        learn.add_cb(Double)
        names = list(learn.model.state_dict())
        fit(learn, config, 0.05)
        assert list(learn.model.state_dict()) == names and learn.compiled is None
        found.append(([row["train_loss"] for row in learn.recorder.rows], learn.model.state_dict()))
    (losses, weights), (others, compiled_weights) = found
    assert losses == pytest.approx(others, rel=1e-9)
    for name, weight in weights.items():
        assert torch.allclose(weight, compiled_weights[name], rtol=1e-9, atol=1e-9), name


def test_steps_alone_are_compiled_and_it_ends_with_the_fit(make, monkeypatch):
    calls, modes = [], []

    def compile(model, **options):
        modes.append(options)
        return lambda *xb: calls.append(model.training) or model(*xb)

    plain = make("--epochs", 5)
    fit(plain[1], plain[0], 0.05)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(learner, "check_compiler", lambda *args: None)  # no compiler is needed for this one
    config, learn = make("--epochs", 5, "--compile")
    learning = []  # which parameters learn is a part of what is compiled: it stays, though some are held at last
    learn.model.register_forward_pre_hook(lambda m, x: learning.append([p.requires_grad for p in m.parameters()]))
    fit(learn, config, 0.05)
    n = len(learn.dls.train.dataset)
    assert (
        n % 16 and calls == [True] * (n // 16) * 5 and learn.compiled is None
    )  # the rest would be compiled for itself
    assert all(map(all, learning))
    assert modes == [dict(mode=None, dynamic=False)]
    assert fingerprint(learn.model.state_dict()) == fingerprint(plain[1].model.state_dict())


def test_what_it_needs_is_one_line(make, monkeypatch):
    with pytest.raises(BadInput, match="bf16 on a CPU to nan; pass --precision float32"):
        make("--compile", precision="bf16")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name)
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(BadInput, match="--compile: needs Python.h, such as that of Debian's python3-dev"):
        make("--compile")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="--compile: needs a compiler, such as Debian's g\\+\\+"):
        make("--compile")
    monkeypatch.setattr(compiled, "launched", lambda: True)
    with pytest.raises(BadInput, match="works in one process"):
        make("--compile")


def test_graphs_are_for_a_gpu_and_for_steps_of_one_batch(make, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: modes.append(options["mode"]) or model)
    for device, accumulate in (("cpu", 1), ("cuda", 1), ("cuda", 2)):
        callback = compiled.Compile()
        callback.learn = SimpleNamespace(device=torch.device(device), accumulate=accumulate, model=None)
        callback.before_fit()
    assert modes == [None, "reduce-overhead", None]


@pytest.mark.cuda
@pytest.mark.slow
def test_a_gpus_graphs_train_as_the_plain_model_does(bands, parse, monkeypatch):
    """In float32 (TF32 is coarser) the losses of 14 steps are apart by rounding, which training makes larger."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    for flags in ([], ["--compile"]):
        settings = parse("--data", bands, "--size", 32, "--model", "small", "-b", 16, "--epochs", 2, *flags)
        dls = data.get_dls(settings, "cuda")
        torch.manual_seed(0)
        learn = train.build(settings, dls, models.build("small", len(dls.vocab), images=dls.train.plain()[0]))
        fit(learn, settings, 0.05)
        found.append([row["train_loss"] for row in learn.recorder.rows])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
