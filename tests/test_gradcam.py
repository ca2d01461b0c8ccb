import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from lib.explain import gradcam
from lib.models import layers, zoo
from tests.conftest import state_of


def network():
    torch.manual_seed(0)
    return zoo.build("medium", 5).eval()


def test_maps_are_grad_cams_own():
    model, images = network(), torch.randn(7, 3, 32, 32)
    targets = [0, 1, 2, 3, 4, 0, 1]
    maps = gradcam.maps(model, model.cam_layer, images, targets)
    cam = GradCAM(model, [model.cam_layer])
    theirs = cam(images, [ClassifierOutputTarget(t) for t in targets])
    assert maps.shape == (7, 32, 32) and maps.dtype == np.float32
    assert np.abs(maps - theirs).max() < 1e-6
    assert maps.min() >= 0 and maps.max() <= 1
    in_threes = gradcam.maps(model, model.cam_layer, images, targets, batch_size=3)
    assert np.abs(in_threes - maps).max() < 1e-5  # float32 sums in another order


@pytest.mark.parametrize("size, side", [(32, 7), (64, 15), (16, 7)])  # of 16 pixels its own map would be 3 x 3
@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_layer_has_a_map_of_at_least_4_by_4(name, size, side):
    model, shapes = zoo.build(name, 5).eval(), []
    layers.cam_layer(model, size).register_forward_hook(lambda m, i, o: shapes.append(o.shape[2:]))
    model(torch.randn(2, 3, size, size))
    assert shapes == [(side, side)]


def test_maps_of_a_trained_network_say_something(make):
    _, learn = make("--epochs", 4)
    learn.fit(4, 0.05)
    images, labels = learn.dls.test.one_batch()
    maps = gradcam.maps(learn.model, learn.model.cam_layer, images, labels)
    assert np.mean([m.max() > m.min() for m in maps]) >= 0.9


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_as_it_was(make, mode):
    _, learn = make()
    learn.fit(1, 0.05)
    learn.model.train(mode)
    for p in list(learn.model.parameters())[:3]:
        p.grad = torch.ones_like(p)
        p.requires_grad_(False)
    before, frozen = state_of(learn), [p.requires_grad for p in learn.model.parameters()]
    with torch.no_grad():
        images = learn.dls.test.one_batch()[0]  # a fastai TensorImage
        gradcam.maps(learn.model, learn.model.cam_layer, images, [0] * len(images))
    assert state_of(learn) == before and [p.requires_grad for p in learn.model.parameters()] == frozen


def test_an_in_place_relu_behind_the_layer_does_not_change_the_map():
    def net(inplace):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )

    images = torch.randn(4, 3, 16, 16)
    one, two = (gradcam.maps(m, m[1], images, [0, 1, 2, 0]) for m in (net(False), net(True)))
    assert np.abs(one - two).max() < 1e-6 and one.max() > 0


def test_a_function_that_works_in_place_behind_the_layer_does_not_change_the_map():
    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc, self.inplace = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), inplace

        def forward(self, x):
            return self.fc(nn.functional.relu(self.conv(x), self.inplace).mean((2, 3)))

    images = torch.randn(4, 3, 16, 16)
    one, two = (gradcam.maps(net, net.conv, images, [0, 1, 2, 0]) for net in (Net(False), Net(True)))
    assert np.abs(one - two).max() < 1e-6 and one.max() > 0


def test_wrong_arguments_raise():
    model = network()
    with pytest.raises(ValueError, match="4 images, but 1 targets"):
        gradcam.maps(model, model.cam_layer, torch.randn(4, 3, 32, 32), [1])
    with pytest.raises(ValueError, match="not a part"):
        gradcam.maps(model, nn.ReLU(), torch.randn(1, 3, 32, 32), [1])
    assert gradcam.maps(model, model.cam_layer, torch.randn(0, 3, 32, 32), []).shape == (0, 32, 32)
