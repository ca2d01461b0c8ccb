"""--pretrained, --freeze-epochs and --class-weights."""

import dataclasses
import json
import urllib.request

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch.nn import functional as F

from lib import config, predict
from lib.cli import BadInput
from lib.data import loader
from lib.explain import gradcam
from lib.models import layers, zoo
from lib.train import checkpoint, learner, schedules
from tests.conftest import logits_of, picture, save, state_of
from train_fastai import main

NET = "shufflenet_v2_x0_5"  # torchvision's smallest


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights for 1000 classes, as torchvision's constructor makes them, in two kinds of file."""
    from safetensors.torch import save_file
    from torchvision.models import get_model

    torch.manual_seed(7)
    folder, state = tmp_path_factory.mktemp("weights"), get_model(NET, weights=None).state_dict()
    for key in state:
        if key.endswith("running_mean"):
            state[key] -= 0.1  # fresh statistics would not tell whether they were loaded; higher ones leave only zeros
    torch.save(state, folder / "net.pth")
    save_file(state, folder / "net.safetensors")
    return folder


@pytest.fixture
def tuned(make, weights):
    """tuned(*argv) -> (config, learner) from the file of weights."""

    def tuned(*argv, file="net.pth", cbs=None):
        argv = ["--model", NET, "--pretrained", weights / file, *argv]
        config, learn = make(*argv, cbs=cbs)
        torch.manual_seed(config.seed)
        model = zoo.build(config.model, len(learn.dls.vocab), config.pretrained)
        return config, learner.build(config, learn.dls, model, cbs=cbs)

    return tuned


@pytest.mark.parametrize("file", ["net.pth", "net.safetensors"])
def test_the_body_is_the_files_and_the_head_is_fresh(tuned, weights, file):
    _, learn = tuned(file=file)
    theirs, ours = torch.load(weights / "net.pth", weights_only=True), learn.model.state_dict()
    assert all((ours[k] == v).all() for k, v in theirs.items() if not k.startswith("fc."))
    assert ours["fc.weight"].shape == (4, 1024) and learn.model.fc is layers.heads(learn.model)[0]
    again = zoo.build(NET, 1000, str(weights / file))  # as many classes as the file has: a fresh head as well
    assert (again.state_dict()["conv1.0.weight"] == theirs["conv1.0.weight"]).all()
    assert (again.state_dict()["fc.weight"] != theirs["fc.weight"]).any()


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "densenet121", "googlenet", *zoo.MODELS])
def test_every_kind_of_head_and_torchvisions_older_names(name, tmp_path):
    from torchvision.models import get_model

    extra = {"init_weights": False} if name == "googlenet" else {}
    theirs = zoo.build(name, 7) if name in zoo.MODELS else get_model(name, weights=None, **extra)
    state = {
        k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in k else k: v
        for k, v in theirs.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "w.pth")
    model = zoo.build(name, 5, str(tmp_path / "w.pth"))
    (last,) = layers.heads(model)
    assert last.weight.shape[0] == 5
    of_head = {id(p) for p in last.parameters()}
    named = dict(theirs.named_parameters())
    assert all((p == named[k]).all() for k, p in model.named_parameters() if id(p) not in of_head)


def test_normalisation_is_that_of_the_weights_and_stands_in_the_card(tuned, tmp_path):
    config, learn = tuned()
    assert np.allclose(learn.dls.mean, [0.485, 0.456, 0.406]) and np.allclose(learn.dls.std, [0.229, 0.224, 0.225])
    card = zoo.card(NET, learn.dls)
    assert card["mean"] == [0.485, 0.456, 0.406]
    for name, mean in (("efficientnet_v2_l", 0.5), ("googlenet", 0.5), ("vit_b_16", 0.485)):
        assert loader.pretrained_stats(config_of(name))[0][0] == mean
    (tmp_path / "model.json").write_text(json.dumps({**card, "mean": [0.1, 0.2, 0.3]}))
    beside = config_of("small", tmp_path / "best.safetensors")  # a run's own weights
    assert loader.pretrained_stats(beside)[0].tolist() == [0.1, 0.2, 0.3]
    (tmp_path / "model.json").unlink()
    with pytest.raises(BadInput, match="model.json"):
        loader.pretrained_stats(beside)


def config_of(name, pretrained="torchvision"):
    return config.parse(["--data", "digits", "--model", name, "--pretrained", str(pretrained)])


def snapshot(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def changed(before, after):
    return {k for k in before if (before[k] != after[k]).any()}


def test_first_the_head_and_the_norms_learn_and_then_all(tuned):
    """fastai's freeze leaves the norms of a frozen body to learn (`train_bn`), and so does this."""
    states = []

    class Watch(Callback):
        order = 90

        def before_train(self):
            states.append(snapshot(self.learn))

        def after_epoch(self):
            names = {id(p): n for n, p in self.learn.model.named_parameters()}
            known.append({names[id(p)] for p in self.learn.opt.opt.state})

    known = []
    _, learn = tuned("--epochs", 3, "--freeze-epochs", 1, "--weight-decay", 0.1)
    learn.fit(3, 0.01, cbs=Watch())
    states.append(snapshot(learn))
    norms = {n for n, m in learn.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    frozen = {
        n for n, _ in learn.model.named_parameters() if not n.startswith("fc.") and n[: n.rindex(".")] not in norms
    }
    assert len(frozen) > 20 and {n for n, p in learn.model.named_parameters() if p.ndim == 4} == frozen
    assert changed(*states[:2]) == set(states[0]) - frozen  # BatchNorm's statistics follow the images too
    learning = set(dict(learn.model.named_parameters()))
    assert known[0] == learning - frozen and known[1] == learning  # the optimizer has no state of what stays
    assert changed(*states[1:3]) == changed(*states[2:]) == set(states[0])
    assert all(p.requires_grad for p in learn.model.parameters())


def test_the_freeze_is_counted_over_all_fits(tuned):
    _, learn = tuned("--freeze-epochs", 1)
    learn.fit(1, 0.01)
    before = snapshot(learn)
    learn.fit(1, 0.01)
    assert "conv1.0.weight" in changed(before, snapshot(learn))


def test_one_rate_under_the_schedule_and_a_range_test_of_the_whole_network(tuned):
    config, learn = tuned("--epochs", 2, "--schedule", "one_cycle")
    assert config.freeze_epochs == 1
    before = state_of(learn)
    learn.lr_find(num_it=20, stop_div=False)
    assert state_of(learn) == before
    rates = []

    class Rates(Callback):
        def before_step(self):
            rates.append({g["lr"] for g in self.learn.opt.opt.param_groups})

    learn.add_cb(Rates())
    schedules.fit(learn, config, 0.05)
    trace = schedules.trace(config_at(config, 0.05), len(learn.dls.train))
    assert all(len(r) == 1 for r in rates) and np.allclose([min(r) for r in rates], trace[:, 0])


def config_at(config, lr):
    import dataclasses

    return dataclasses.replace(config, lr=lr)


def test_gradcam_explains_it(tmp_path):
    torch.manual_seed(0)
    torch.save(zoo.build("resnet18", 1000).state_dict(), tmp_path / "w.pth")
    model = zoo.build("resnet18", 4, tmp_path / "w.pth")
    maps = gradcam.maps(model, layers.cam_layer(model, 32), torch.randn(8, 3, 32, 32), [0, 1, 2, 3] * 2)
    assert np.mean([m.max() > m.min() for m in maps]) >= 0.5  # of fresh weights some are empty


@pytest.mark.slow
def test_a_run_cut_short_while_frozen_ends_as_if_it_had_not_been(weights, bands, tmp_path, monkeypatch):
    argv = ["--data", bands, "--size", 32, "--model", NET, "--pretrained", weights / "net.pth", "-b", 32]
    argv += ["--epochs", 3, "--freeze-epochs", 2, "--lr", 0.01, "--class-weights", "--grad-noise", 1e-6, "--ema", 0.9]
    argv += ["--gallery", 0]
    argv = [str(a) for a in (*argv, "--precision", "float32", "--out", tmp_path)]
    assert main([*argv, "--name", "whole"]) == 0
    after_epoch = checkpoint.Checkpoint.after_epoch

    def killed(self):
        after_epoch(self)
        if self.learn.epochs_trained == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(checkpoint.Checkpoint, "after_epoch", killed)
        assert main([*argv, "--name", "cut"]) == 130
    assert main(["--resume", str(tmp_path / "cut")]) == 0
    one, two = ((tmp_path / name / "weights/best.safetensors").read_bytes() for name in ("whole", "cut"))
    last = [checkpoint.load(tmp_path / name / "weights/last.pt") for name in ("whole", "cut")]
    assert one == two and all((last[0]["model"][k] == v).all() for k, v in last[1]["model"].items())
    card = json.loads((tmp_path / "cut/weights/model.json").read_text())
    assert card["mean"] == [0.485, 0.456, 0.406]
    use = predict.load(tmp_path / "cut", "cpu")
    test = json.loads((tmp_path / "cut/summary.json").read_text())
    dls = loader.get_dls(config.parse(["-c", str(tmp_path / "cut/args.yaml")]))
    p = use([dls.store.paths[i] for i in dls.test.ids])[1]
    assert (p.argmax(1) == dls.test.labels).mean() == test["test_acc"]


def test_offline_is_one_line_that_says_what_to_pass(bands, tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    argv = ["--data", bands, "--size", 32, "--model", "resnet18", "--pretrained", "--out", tmp_path / "runs"]
    assert main(list(map(str, argv))) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: --pretrained: download of https://download.pytorch.org/models/resnet18")
    assert "no network" in err and "--pretrained FILE" in err and not (tmp_path / "runs").exists()


def test_torchvisions_own_loader_is_asked_safely(monkeypatch, weights):
    from torchvision.models import _api

    asked = []

    def loader(url, **options):
        asked.append((url, options))
        return torch.load(weights / "net.pth", weights_only=True)

    monkeypatch.setattr(_api, "load_state_dict_from_url", loader)
    model = zoo.build(NET, 3, "torchvision")
    theirs = torch.load(weights / "net.pth", weights_only=True)
    assert (model.conv5[0].weight == theirs["conv5.0.weight"]).all()
    (url, options), *more = asked
    assert not more and "shufflenetv2_x0.5" in url and options["check_hash"] and options["weights_only"]


def test_bad_weights_are_one_line(weights, tmp_path, bands, capsys):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "other.pth")
    evil = tmp_path / "evil.pth"
    torch.save({"conv1.weight": print}, evil)
    whole = torch.load(weights / "net.pth", weights_only=True)
    torch.save({k: v for k, v in whole.items() if k != "stage2.0.branch1.0.weight"}, tmp_path / "part.pth")
    cases = [
        (NET, "no/such/file.pth", "not found"),
        (NET, tmp_path / "text.pth", "cannot be read as weights"),
        (NET, tmp_path / "text.safetensors", "cannot be read as weights"),
        (NET, evil, "cannot be read as weights"),
        (NET, tmp_path / "list.pth", "is not of shufflenet"),
        (NET, tmp_path / "other.pth", "is not of shufflenet"),
        (NET, tmp_path / "part.pth", "stage2.0.branch1.0.weight"),
        ("shufflenet_v2_x1_0", weights / "net.pth", "is not of shufflenet_v2_x1_0"),
        ("resnet18", weights / "net.pth", "is not of resnet18"),
        ("small", weights / "net.pth", "model.json"),
        ("small", "torchvision", "--pretrained: 'small' has none; pass --model resnet18 or timm/NAME, or FILE"),
        ("small", "resnet18", "--pretrained resnet18: not found; pass a file of weights, or --model resnet18 --pre"),
    ]
    for name, file, words in cases:
        argv = ["--data", bands, "--size", 32, "--model", name, "--pretrained", file, "--out", tmp_path / "runs"]
        assert main(list(map(str, argv))) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, (name, file, err)
    with pytest.raises(BadInput, match="needs --pretrained"):
        config.parse(["--freeze-epochs", "1"])
    assert config.parse(["--epochs", "3"]).freeze_epochs == 0


# --- class weights ---------------------------------------------------------------------------------------------------


def test_class_weights_are_in_inverse_proportion_and_in_the_training_loss_alone(parse, tmp_path):
    counts, rng = (40, 10, 5), np.random.default_rng(0)
    for k, n in enumerate(counts):
        for i in range(n):
            save(tmp_path / f"{k}" / f"{i}.png", picture(rng, k))
    config = parse("--data", tmp_path, "--size", 32, "--model", "small", "--class-weights", "-b", 16)
    dls = loader.get_dls(config)
    learn = learner.build(config, dls, zoo.build("small", 3))
    n = np.bincount(dls.train.labels)
    expected = len(dls.train.labels) / (3 * n)
    assert np.allclose(learn.loss_func.func.weight, expected) and len(set(n)) == 3
    assert np.mean(expected[dls.train.labels]) == pytest.approx(1)
    x, y = (t.as_subclass(torch.Tensor) for t in dls.train.one_batch())
    log_p = learn.model.eval()(x).log_softmax(1).detach().numpy()
    w, k = expected[y], y.numpy()
    by_hand = -(w * log_p[range(len(k)), k]).sum() / w.sum()
    assert learn.loss_func(torch.tensor(log_p), y).item() == pytest.approx(by_hand, rel=1e-5)
    smooth = learner.build(dataclasses.replace(config, label_smoothing=0.3), dls, learn.model).loss_func
    by_hand = -(0.7 * w * log_p[range(len(k)), k] + 0.1 * log_p @ expected).sum() / w.sum()
    assert smooth(torch.tensor(log_p), y).item() == pytest.approx(by_hand, rel=1e-5)
    logits, targets = logits_of(learn, dls.valid)
    assert learn.validate()[0] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert learner.build(parse("--data", "digits"), dls, zoo.build("small", 3)).loss_func.func.weight is None
