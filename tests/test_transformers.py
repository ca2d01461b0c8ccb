"""Transformers, and networks of timm: trained a step, explained by a layer that says something."""

import json

import numpy as np
import pytest
import torch
import torchvision.models as torchvisions
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from lib import models
from lib.cli import BadInput
from lib.explain import gradcam
from lib.models import layers, zoo
from lib.train import learner
from lib.train.optimizers import undecayed
from train_fastai import main

SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 128, "vit_l_32": 128, "vit_h_14": 70}  # where 64 is none
ALL = torchvisions.list_models(module=torchvisions)
TIMM = {"timm/vit_tiny_patch16_224": 64, "timm/swin_tiny_patch4_window7_224": 64, "timm/convnext_atto": 64}


def one_step_and_a_map(name, size):
    """Trains a network on one batch; a map of some image and class tells places apart: GradCAM's may be empty."""
    torch.manual_seed(0)
    model, x = zoo.build(name, 3, size=size), torch.randn(4, 3, size, size)
    layer, before = layers.cam_layer(model, size), [p.clone() for p in model.parameters()]
    opt = torch.optim.SGD(model.parameters(), 0.01)
    torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    opt.step()
    assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
    with torch.no_grad():  # a fresh head may look at nothing; of two opposite classes, one has a map
        head = torch.nn.init.normal_([p for p in model.parameters() if p.ndim > 1][-1])
        head[1] = -head[0]
    maps = gradcam.maps(model, layer, x.repeat(3, 1, 1, 1), [k for k in range(3) for _ in x])
    assert maps.shape == (12, size, size) and np.isfinite(maps).all()
    assert max(m.max() - m.min() for m in maps) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_classifier_of_torchvision_learns_and_is_explained(name):
    one_step_and_a_map(name, SIDES.get(name, 64))


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_learn_and_are_explained(name):
    pytest.importorskip("timm")
    one_step_and_a_map(name, TIMM[name])


def test_a_vits_map_is_grad_cams_own_of_the_last_blocks_first_norm():
    torch.manual_seed(0)
    model, x, targets = zoo.build("vit_b_32", 4, size=128).eval(), torch.randn(3, 3, 128, 128), [0, 3, 1]
    torch.nn.init.normal_(model.heads.head.weight)  # a fresh head is zero
    layer = layers.cam_layer(model, 128)
    assert layer is model.encoder.layers[-1].ln_1
    reshape = lambda tokens: tokens[:, 1:].reshape(len(tokens), 4, 4, 768).permute(0, 3, 1, 2)
    theirs = GradCAM(model, [layer], reshape_transform=reshape)(x, [ClassifierOutputTarget(t) for t in targets])
    ours = gradcam.maps(model, layer, x, targets)
    assert np.abs(ours - theirs).max() < 1e-5 and ours.std() > 0.05


@pytest.mark.parametrize("shape", [(2, 8, 5, 5), (2, 5, 5, 8), (2, 25, 8), (2, 26, 8), (2, 30, 8)])
def test_maps_of_every_layout(shape):
    """Channels first, channels last, tokens without and with a class token and with registers."""
    x = torch.arange(2 * 8 * 5 * 5.0).view(2, 8, 5, 5)
    before = torch.full((2, shape[1] - 25, 8), -1.0) if len(shape) == 3 else None
    laid = {(5, 5): x, (5, 8): x.movedim(1, 3)}.get(shape[2:])
    laid = torch.cat([before, x.flatten(2).movedim(1, 2)], 1) if laid is None else laid
    assert laid.shape == shape and torch.equal(layers.as_map(laid), x)
    assert layers.as_map(torch.zeros(2, 7)) is None


@pytest.mark.parametrize("name", ["vit_b_32", "timm/vit_tiny_patch16_224"])
def test_tokens_positions_and_biases_of_transformers_are_not_decayed(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = zoo.build(name, 3, size=64)
    spared = {id(p) for p in undecayed(model)}
    decayed = [n for n, p in model.named_parameters() if id(p) not in spared]
    assert decayed and all(n.endswith("weight") for n in decayed)
    assert not any("norm" in n or "ln" in n or "pos_embed" in n or "token" in n for n in decayed)


def test_pretrained_positions_are_fitted_to_the_size(tmp_path):
    file = tmp_path / "vit.pth"
    torch.save(zoo.build("vit_b_32", 5, size=128).state_dict(), file)
    model = zoo.build("vit_b_32", 3, str(file), size=64)
    assert model.encoder.pos_embedding.shape[1] == 1 + 2 * 2 and model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_weights_of_a_network_of_timm_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    file, name = tmp_path / "vit.pth", "timm/vit_tiny_patch16_224"
    saved = timm.create_model("vit_tiny_patch16_224", img_size=64)  # of 1,000 classes
    torch.save(saved.state_dict(), file)
    model = zoo.build(name, 3, str(file), size=96)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, saved.blocks[3].mlp.fc1.weight)
    assert model.pos_embed.shape[1] == 1 + 6 * 6 and model.head.weight.shape == (3, 192)
    torch.save(model.state_dict(), file)  # of 3 classes, as a run of ours has it
    assert torch.equal(zoo.build(name, 5, str(file), size=96).pos_embed, model.pos_embed)
    torch.save({"x": torch.zeros(3)}, file)
    with pytest.raises(BadInput, match="vit.pth: is not of timm/vit_tiny"):
        zoo.build(name, 3, str(file), size=64)


def test_weights_of_timm_that_cannot_be_had_are_one_line(monkeypatch):
    timm = pytest.importorskip("timm")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(BadInput, match="weights of timm/convnext_atto cannot be had .*; without a network"):
        zoo.build("timm/convnext_atto", 3, "torchvision", size=64)


def test_a_network_that_timm_has_not_or_timm_itself_missing_is_one_line(monkeypatch):
    pytest.importorskip("timm")
    with pytest.raises(BadInput, match="did you mean timm/convnext_atto?"):
        models.check("timm/convnext_ato")
    with pytest.raises(BadInput, match="'timm/resnet18.nope' is not among"):
        models.check("timm/resnet18.nope")
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="timm is not installed; uv run --extra timm"):
        models.check("timm/convnext_atto")


def test_a_run_of_timm_is_rebuilt_from_its_folder(bands, tmp_path):
    pytest.importorskip("timm")
    from lib.predict import load

    argv = ["--data", bands, "--size", 32, "--model", "timm/convnext_atto", "--epochs", 1, "--lr", 0.01, "-b", 16]
    assert main([*map(str, argv), "--out", str(tmp_path), "--name", "x"]) == 0
    card = json.loads((tmp_path / "x/weights/model.json").read_text())
    assert card["architecture"] == "timm/convnext_atto"
    _, p = load(tmp_path / "x")(sorted((bands / "class 0").iterdir())[:3])
    assert p.shape == (3, 4)


def test_size_and_normalisation_are_those_of_timms_weights(parse, bands, monkeypatch):
    timm = pytest.importorskip("timm")
    from lib.data import loader

    found = timm.models.get_pretrained_cfg("vit_tiny_patch16_224")
    config = parse("--data", bands, "--model", "timm/vit_tiny_patch16_224", "--pretrained", "-b", 8)
    dls = loader.get_dls(config)
    assert dls.store.size == 224 and dls.mean.tolist() == list(found.mean) and dls.std.tolist() == list(found.std)
    split = learner.split(zoo.build("timm/vit_tiny_patch16_224", 3, size=64))
    assert [len(group) for group in split][1] == 2
