"""The path of a GPU, as far as it can be tested without one; tests/benchmarks/gpu.py has what needs one."""

import contextlib
import importlib.util
import json
import math
import re
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lib import data, models, train
from lib.data import loader
from lib.train import learner, recorder, schedules
from lib.train.learner import Unscale
from tests.benchmarks import gpu, gpu_wheels
from tests.conftest import fingerprint


class Copies(TorchDispatchMode):
    """Notes where tensors go from one device to another, and from which line of lib/ or fastai."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.stack, torch.ops.aten.cat):
            assert len({t.device for t in args[0]}) == 1, "CUDA stacks no tensors of several devices"
        out = function(*args, **(kwargs or {}))
        if args and isinstance(args[0], torch.Tensor) and isinstance(out, torch.Tensor):
            way = args[0].device.type, out.device.type
            if way[0] != way[1]:
                lines = [f for f in traceback.extract_stack() if {"lib", "fastai"} & set(Path(f.filename).parts)]
                ours = [f"{Path(f.filename).name}:{f.name}" for f in lines if "site-packages" not in f.filename]
                self.seen.append((*way, ours[-1]))
        return out


@contextlib.contextmanager
def pretended(parse, monkeypatch, *argv):
    """Gives (settings, a learner on a CUDA device that is pretended, Copies): tensors have shapes, and no values.

    Whatever asks for a value (`item`, `if tensor`) raises. There is no backward pass: gradients are 0.
    """
    settings = parse("--data", "digits", "--model", "small", "-b", 64, "--epochs", 2, *argv)
    dls = data.get_dls(settings)
    batches = {id(dl.fake_l): [tuple(t.as_subclass(torch.Tensor) for t in b) for b in list(dl)[:8]] for dl in dls}
    monkeypatch.setattr(loader, "_loaders", [lambda fake_l: iter(batches[id(fake_l)])] * 2)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, enabled=True: contextlib.nullcontext())

    def backward(learn):
        for p in learn.model.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(learner.SGDLearner, "_backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        with torch.device("cuda"):
            model = models.build("small", len(dls.vocab))
        model.to = lambda *args, **kwargs: model
        for dl in (dls, *dls.loaders):
            dl.device = torch.device("cuda")
        yield settings, train.build(settings, dls, model, "bf16"), copies.seen


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_send_whole_batches_of_bytes(workers, make):
    """A quarter of the floats' size; they are normalised on the device, in the transforms of the batch."""
    _, learn = make()
    for dl in learn.dls:
        dl = dl.new(num_workers=workers)
        dl.idxs = dl.get_idxs()
        x, y = next(iter(loader._loaders[workers == 0](dl.fake_l)))
        assert x.dtype is torch.uint8 and y.dtype is torch.int64 and len(x) == len(y) == min(dl.bs, dl.n)
        assert x.is_contiguous(memory_format=torch.channels_last)  # as the network takes it
        assert dl.after_batch((x, y))[0].dtype is torch.float32


@pytest.mark.cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpus_batches_are_a_cpus(workers, bands, parse):
    """To the rounding of another chip; those of evaluation come without processes."""
    settings = parse("--data", bands, "--size", 32, "-b", 16, *(["--workers", workers] if workers else []))
    here, there = data.get_dls(settings, "cpu"), data.get_dls(settings, "cuda")
    assert there.train.pin_memory and [dl.fake_l.num_workers for dl in there.loaders[1:]] == [workers] * 2
    for one, other in zip(here, there):
        for (x, y), (x_there, y_there) in zip(one, other, strict=True):
            assert x_there.is_cuda and torch.allclose(x, x_there.cpu(), atol=1e-5) and (y == y_there.cpu()).all()


@pytest.mark.cuda
def test_half_precision_trains_and_goes_back_to_float32_on_a_cpu(bands, parse, tmp_path):
    settings = parse("--data", bands, "--size", 32, "--model", "small", "-b", 16, "--workers", 0)
    dls = data.get_dls(settings, "cuda")
    learn = train.build(settings, dls, models.build("small", len(dls.vocab)), "fp16")
    learn.path = tmp_path
    learn.fit(2, 0.05, cbs=[GradientAccumulation(32), GradientClip(0.5)])
    assert learn.recorder.rows[1]["train_loss"] < learn.recorder.rows[0]["train_loss"]
    learn.export("half.pkl")
    loaded = load_learner(tmp_path / "half.pkl")
    assert loaded.dtype is torch.float32 and loaded.scaler is None
    loaded.predict(dls.store.paths[0])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_no_batch_waits_for_the_device(parse, monkeypatch):
    """Only the look at the losses, every 50 batches, does, and what is read at the end of a pass."""
    looks, real = [], recorder.EpochRecorder.check

    def check(record):
        if record.pending:
            looks.append(len(record.pending))
            with pytest.raises(DynamicOutputShapeException):
                real(record)
            assert not any(loss.is_cuda for loss in record.losses)
            record.pending, record.latest = [], {"loss": 0.0, "acc": 0.0}

    monkeypatch.setattr(recorder.EpochRecorder, "check", check)
    monkeypatch.setattr(recorder, "CHECK_EVERY", 5)
    monkeypatch.setattr(recorder, "CHECK_SECONDS", math.inf)
    monkeypatch.setattr(recorder, "value_of", lambda metric: 0.0)
    monkeypatch.setattr(recorder.Evaluation, "accuracy", 0.0)
    with pretended(parse, monkeypatch, "--ema", 0.99, "--schedule", "one_cycle") as (settings, learn, copies):
        learn.loss_func.func.weight = torch.ones(10)
        copies.clear()
        schedules.fit(learn, settings, 0.05)
    assert looks == [5, 3] * 2
    assert {place for *way, place in copies if way == ["cuda", "cpu"]} == {"recorder.py:check", "recorder.py:settle"}
    there = [place for *way, place in copies if way == ["cpu", "cuda"] and place != "loader.py:__iter__"]
    assert sorted(there) == ["learner.py:_call_one", "recorder.py:accumulate"]  # class weights, metrics: once in all


def scaled(learn):
    """As `to_fp16` makes it, but for the device and the number format."""
    learn.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return learn.add_cb(Unscale)


def test_a_scaled_fit_is_the_plain_one_beside_fastais_accumulation_and_clipping(make):
    """A scale that is a power of two changes no gradient in float32."""
    steps = []

    class Norms(Callback):
        order = 99

        def before_step(self):
            steps.append(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm())

    found = []
    for prepare in (lambda learn: learn, scaled):
        learn = prepare(make()[1])
        learn.fit(1, 0.05, cbs=[GradientAccumulation(32), GradientClip(0.5), Norms()])
        found.append(fingerprint(learn.model.state_dict()))
    assert found[0] == found[1]
    assert len(steps) == 4 and steps[:2] == steps[2:] and 0 < max(steps) <= 0.501


def test_a_step_that_is_cancelled_leaves_the_scale_alone(make):
    class Cancel(Callback):
        order = 0  # before the gradients are looked at

        def before_step(self):
            raise CancelStepException

    learn = scaled(make()[1])
    before = fingerprint(list(learn.model.parameters()))
    learn.fit(1, 0.05, cbs=Cancel())
    assert fingerprint(list(learn.model.parameters())) == before and learn.scaler.get_scale() == 2.0**10
    learn.fit(1, 0.05)
    assert fingerprint(list(learn.model.parameters())) != before


def test_a_step_that_is_interrupted_leaves_the_scaler_whole(make, monkeypatch):
    """Ctrl-C in a notebook most often comes where the step waits for the card."""
    learn = scaled(make()[1])
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(learn.scaler, "_maybe_opt_step", lambda *args, **kwargs: exec("raise KeyboardInterrupt"))
        learn.fit(1, 0.05)
    learn.fit(1, 0.05)
    assert len(learn.recorder.rows) == 1


def test_half_precision_of_a_gpu_is_float32_on_a_cpu(make, tmp_path):
    _, learn = make()
    learn.path, learn.dtype = tmp_path, torch.float16
    scaled(learn).export("half.pkl")
    loaded = load_learner(tmp_path / "half.pkl")
    assert loaded.dtype is torch.float32 and loaded.scaler is None and not hasattr(loaded, "mixed_precision")
    kinds = []
    loaded.model.stem[0].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    loaded.predict(learn.dls.store.paths[0])
    assert set(kinds) == {torch.float32}


def test_a_check_that_fails_is_recorded_and_what_does_not_fit_is_skipped(tmp_path):
    bench = SimpleNamespace(end=time.monotonic() + 60, rehearse=False)
    failed = gpu.check(bench, lambda bench: 1 / 0, 5)
    assert failed["status"] == "failed" and failed["reason"].startswith("ZeroDivisionError: division by zero (test_gpu")
    skipped = gpu.check(bench, lambda bench: {}, 90)
    assert skipped["status"] == "skipped" and re.match("needs about 90 s, (59|60) are left", skipped["reason"])
    ok = gpu.check(bench, lambda bench: {"apart": 1 / 3, "top": {"left": "out"}}, 5)
    parts = {"right": {"one": failed, "two": skipped, "three": ok}}
    machine = {"torch": "2", "cuda": None, "python": "3", "cpu_count": 2}
    gpu.write(tmp_path, {"card": "A card", "command": "x", "machine": machine, "parts": parts})
    assert json.loads((tmp_path / "results.json").read_text())["parts"]["right"]["three"]["apart"] == 1 / 3
    table = (tmp_path / "README.md").read_text()
    assert "| right | three | ok | 0.0 | apart: 0.3333 |" in table and "cut off before its end" in table


def test_the_wheels_are_those_that_are_pinned():
    names = gpu_wheels.LACKED.split()
    pins = gpu_wheels.pins()
    assert names == sorted(set(names)) and not set(names) - set(pins) and set(gpu_wheels.SOURCES) < set(names)
    assert not set(names) & set(gpu_wheels.BASE.split())
    modules = {"opencv-python-headless": "cv2", "grad-cam": "pytorch_grad_cam", "plum-dispatch": "plum"}
    modules |= {"python-fasthtml": "fasthtml"}
    for name in names:
        assert importlib.util.find_spec(modules.get(name, name.replace("-", "_"))), name
