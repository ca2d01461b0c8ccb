"""Switches that are another library's part: early stopping, mixup and cutmix, grad-cam's methods."""

import json

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from fastai.callback.mixup import CutMix, MixUp
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from lib import config as settings
from lib.explain import gradcam
from lib.models import zoo
from lib.train.averaging import KeepBest
from lib.train.plateau import StopEarly
from lib.train.schedules import fit
from tests.conftest import SMALL, fingerprint
from train_fastai import main


@pytest.mark.parametrize("monitor", ["valid_loss", "valid_acc"])
def test_it_stops_after_so_many_epochs_that_are_no_better(make, monitor, monkeypatch):
    config, learn = make("--epochs", 9, "--stop-after", 2, "--monitor", monitor)
    values, best = iter([0.9, 0.5, 0.7, 0.6, 0.4]), KeepBest()
    sign = 1 if monitor == "valid_loss" else -1

    class Says(type(learn.recorder)):
        def after_validate(self):
            super().after_validate()
            self.row |= {monitor: sign * next(values)}
            if monitor == "valid_loss":
                self.evaluated[0] = self.row[monitor]

    learn.recorder.__class__ = Says
    learn.add_cb(best)
    fit(learn, config, 0.05)
    assert len(learn.recorder.rows) == 4  # the best is the second; the third and the fourth are no better
    assert learn.epochs_trained == 4 and best.epoch_number is not None  # what is later in order saw whole epochs


@pytest.mark.parametrize("mix", [[], ["--mixup", 0.4]])
def test_a_run_that_stops_says_so_and_is_whole(bands, tmp_path, capsys, mix):
    argv = [*SMALL, "--data", bands, "--epochs", 8, "--lr", 1e-9, "--stop-after", 2, "--monitor", "valid_acc"]
    argv += ["--schedule", "constant", *mix]
    assert main([*map(str, argv), "--out", str(tmp_path), "--name", "x"]) == 0
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    out = capsys.readouterr().out
    assert summary["epochs"] < 8 and f"no better since epoch {summary['epochs'] - 2}\n" in out
    assert out.count("\nepoch ") == summary["epochs"]
    assert main(["--resume", str(tmp_path / "x"), "--epochs", "9"]) == 2
    assert "stopped after epoch" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "x")]) == 0  # it has nothing to add
    assert json.loads((tmp_path / "x/summary.json").read_text())["epochs"] == summary["epochs"]


@pytest.mark.parametrize("words, least", [("", 7), ("--patience-epochs 1", 3), ("--schedule grow_batch", 7)])
def test_an_end_before_a_smaller_rate_can_act_is_refused(words, least, refused, photos):
    argv = ["--data", photos, "--epochs", 50, *words.split(), "--stop-after"]
    assert f"pass {least} or more, or --schedule constant" in refused(*argv, least - 1)
    assert settings.variants([*map(str, argv), str(least)])
    assert settings.variants([*map(str, argv), "1", "--schedule", "constant"])


def test_its_count_goes_on_after_a_resume():
    one, other = StopEarly(patience=3), StopEarly(patience=3)
    one.best, one.wait = 0.25, 2
    other.load_state_dict(one.state_dict())
    assert (other.best, other.wait) == (0.25, 2)


@pytest.mark.parametrize("flag, kind", [("--mixup", MixUp), ("--cutmix", CutMix)])
def test_mixtures_are_fastais_and_repeat(make, flag, kind):
    found = []
    for _ in range(2):
        config, learn = make(flag, 0.4, "--epochs", 2, "--label-smoothing", 0.1)
        assert [type(cb) for cb in learn.cbs if isinstance(cb, (MixUp, CutMix))] == [kind]
        fit(learn, config, 0.05)
        found.append(fingerprint(learn.model.state_dict()))
    plain = make("--epochs", 2, "--label-smoothing", 0.1)
    fit(plain[1], plain[0], 0.05)
    assert found[0] == found[1] != fingerprint(plain[1].model.state_dict())


def test_only_one_mixture_at_a_time(refused, photos):
    assert "pass one of them" in refused("--data", photos, "--mixup", 0.4, "--cutmix", 1)


@pytest.mark.parametrize("method", settings.CAMS)
def test_methods_are_grad_cams_own(method):
    assert gradcam.METHODS[method].lower() == method.replace("++", "plusplus")
    torch.manual_seed(0)
    model, images, targets = zoo.build("medium", 5).eval(), torch.randn(3, 3, 32, 32), [0, 4, 2]
    cam = getattr(pytorch_grad_cam, gradcam.METHODS[method])(model, [model.cam_layer])
    theirs = cam(images, [ClassifierOutputTarget(t) for t in targets])
    ours = gradcam.maps(model, model.cam_layer, images, targets, method=method)
    assert np.abs(ours - theirs).max() < 1e-5 and ours.std() > 0.01
