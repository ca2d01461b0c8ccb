import json
from itertools import pairwise

import pytest
import torch
from fastai.callback.core import Callback

from lib.cli import BadInput
from lib.models import layers, networks, zoo
from train_fastai import main


@pytest.mark.parametrize(
    "name, size, side",
    [("resnet18", 32, 4), ("resnet18", 224, 7), ("mobilenet_v3_small", 128, 4), ("densenet121", 32, 4)],
)
def test_torchvisions_networks_have_a_layer_by_rule(name, size, side):
    model, shapes = zoo.build(name, 3), []
    layer = layers.cam_layer(model, size)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    layer.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert shapes[0][2:] == (side, side)


def test_the_layer_is_the_last_that_fits():
    model = zoo.build("resnet18", 3)
    assert layers.cam_layer(model, 224) is model.layer4
    model.layer3.eval()  # as where its BatchNorm is frozen
    modes = [m.training for m in model.modules()]
    assert layers.cam_layer(model, 32) is model.layer2
    assert [m.training for m in model.modules()] == modes


def test_a_network_that_does_not_fit_the_images_is_one_line():
    with torch.device("meta"):
        vit = zoo.build("vit_b_16", 3)
    with pytest.raises(BadInput, match="does not take images of 32 pixels"):
        layers.cam_layer(vit, 32)
    with pytest.raises(BadInput, match="--model maxvit_t: does not take images of 64 pixels"):
        zoo.build("maxvit_t", 3, size=64)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    with pytest.raises(BadInput, match="no layer with a map of 4 x 4"):
        layers.cam_layer(flat, 32)


@pytest.mark.slow
def test_a_run_with_a_torchvision_network_rebuilds_from_its_card(bands, tmp_path):
    from safetensors.torch import load_file

    argv = ["--data", bands, "--size", 32, "--model", "squeezenet1_1", "--epochs", 1, "--lr", 0.01, "-b", 16]
    assert main([*map(str, argv), "--out", str(tmp_path), "--name", "x"]) == 0
    card = json.loads((tmp_path / "x/weights/model.json").read_text())
    assert card["architecture"] == "torchvision.squeezenet1_1"
    zoo.rebuild(card).load_state_dict(load_file(tmp_path / "x/weights/best.safetensors"))
    assert (tmp_path / "x/gradcam.png").exists()


def test_a_network_has_the_convolutions_that_its_arguments_say_and_its_card_rebuilds_it():
    args = dict(n_classes=4, stem=8, widths=[8, 16, 24], depths=[2, 3, 1], squeeze=False)
    model = networks.SmallResNet(**args)
    shapes = [tuple(m.weight.shape[:2]) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [(8, 3), *[(8, 8)] * 3, (16, 8), *[(16, 16)] * 3, (24, 16), (24, 24)]
    assert not any(isinstance(m, networks.SqueezeExcite) for m in model.modules())
    zoo.rebuild({"architecture": "SmallResNet", "args": args}).load_state_dict(model.state_dict())


def test_squeeze_excite_scales_channels():
    torch.manual_seed(0)
    model = zoo.build("small", 4).eval()
    block = next(m for m in model.modules() if isinstance(m, networks.SqueezeExcite))
    x = torch.randn(2, block.scale[0].in_features, 5, 5)
    ratio = block(x) / x
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio), atol=1e-5)
    assert (ratio > 0).all() and (ratio < 1).all()


def images_of_edges(n=64, side=16):
    """Images in which neighbouring pixels are alike, as in photographs: (n, 3, side, side), mean 0, deviation 1."""
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.randn(n, 3, side // 2, side // 2), scale_factor=2, mode="bilinear")
    x = x + 0.3 * torch.randn_like(x)
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_first_convolution_whitens(name):
    images = images_of_edges()
    conv = zoo.build(name, 4, images=images).stem[0]
    assert "weight" in dict(conv.named_buffers()) and not conv.bias.any()
    out = conv(images).double().movedim(1, 3).flatten(0, 2)
    half = out.shape[1] // 2
    assert torch.allclose(out[:, half:], -out[:, :half], atol=1e-5)
    second_moment = out[:, :half].T @ out[:, :half] / len(out)
    assert torch.allclose(second_moment, torch.eye(half).double(), atol=0.02)


def test_grey_images_whiten_to_finite_filters():
    images = images_of_edges()[:, :1].expand(-1, 3, -1, -1)
    conv = zoo.build("small", 4, images=images).stem[0]
    assert torch.isfinite(conv.weight).all() and conv(images).abs().max() < 20
    coloured = images_of_edges()  # the colours that training has not shown do not matter
    assert torch.allclose(conv(coloured), conv(coloured.mean(1, keepdim=True).expand_as(coloured)), atol=1e-4)


def test_training_leaves_the_whitening_as_it_is_and_its_bias_after_three_epochs(make):
    biases = []

    class Watch(Callback):
        order = 90

        def before_train(self):
            biases.append((conv.bias.detach().clone(), conv.bias.requires_grad))

    _, learn = make("--epochs", 5)
    conv = learn.model.stem[0]
    before = conv.weight.clone()
    learn.fit(2, 0.1, cbs=Watch())
    assert conv.bias.requires_grad  # another fit makes its optimizer of all that may learn
    learn.fit(3, 0.1, cbs=Watch())  # the epochs are counted over all fits
    assert torch.equal(before, conv.weight)
    biases.append((conv.bias.detach(), None))
    assert [not torch.equal(a, b) for (a, _), (b, _) in pairwise(biases)] == [True] * 3 + [False] * 2
    assert [learns for _, learns in biases[:-1]] == [True] * 3 + [False] * 2  # no gradient, no time


def test_a_whitened_network_is_rebuilt_by_one_that_is_not():
    images = images_of_edges()
    model = zoo.build("small", 4, images=images).eval()
    again = zoo.build("small", 4)
    assert again.state_dict().keys() == model.state_dict().keys() and "stem.0.weight" in model.state_dict()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), model(images))
    assert model.early == [model.stem[0].bias] and again.early == []
    names = [name for name, _ in model.named_parameters()]
    assert "stem.0.weight" not in names and "stem.0.bias" in names


@pytest.mark.parametrize("name", ["small", "resnet18", "densenet121", "squeezenet1_1"])
def test_the_layer_groups_are_body_and_head(name):
    model = zoo.build(name, 3, images=images_of_edges() if name == "small" else None)
    body, last = zoo.split(model)
    assert [len(p) for p in last] == [3, 3] and {id(p) for p in last} == {
        id(p) for p in layers.heads(model)[0].parameters()
    }
    assert [id(p) for p in body + last] == [id(p) for p in model.parameters()]
    assert [len(group) for group in zoo.split(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))] == [2]
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    tied[0].weight = tied[1].weight
    assert [len(group) for group in zoo.split(tied)] == [1, 2]


def test_without_images_the_first_convolution_learns():
    assert zoo.build("small", 4).stem[0].weight.requires_grad
