"""Progressive resizing: small images in the first epochs, in training, range test and evaluation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lib.cli import BadInput
from lib.models import layers, networks
from lib.train import averaging


@pytest.fixture
def seen(monkeypatch):
    """A list that gets (whether in training, side) of each batch that a network of ours is fed."""
    sides, forward = [], networks.SmallResNet.forward

    def look(self, x):
        assert x.shape[2] == x.shape[3] and x.is_contiguous(memory_format=torch.channels_last)
        sides.append((self.training, x.shape[2]))
        return forward(self, x)

    monkeypatch.setattr(networks.SmallResNet, "forward", look)
    return sides


def test_the_first_epochs_have_small_images_wherever_the_network_looks(make, seen):
    _, learn = make("--epochs", 3, "--small-epochs", 2, "--ema", 0.5)
    n, held = len(learn.dls.train), len(learn.dls.valid) + len(learn.dls.test)
    learn.lr_find(end_lr=1, num_it=30, on_valid=True)
    assert set(seen) == {(True, 24), (False, 24)}
    seen.clear()
    learn.fit(3, 0.05)
    small, full = ([(True, side)] * n + [(False, side)] * held for side in (24, 32))
    assert seen == small * 2 + full
    seen.clear()
    learn.validate(), learn.get_preds(dl=learn.dls.test), learn.fit(1, 0.01), learn.lr_find(end_lr=1, num_it=30)
    assert {side for _, side in seen} == {32}  # epochs are counted over all fits


def test_a_fit_that_ends_on_small_images_is_evaluated_on_whole_ones(make, seen):
    _, learn = make("--small-epochs", 1)
    learn.fit(1, 0.05)
    seen.clear()
    learn.validate(2)
    assert set(seen) == {(False, 32)}


def test_without_them_images_are_untouched(make, seen):
    _, learn = make()
    assert not any(isinstance(cb, averaging.SmallImages) for cb in learn.cbs)
    learn.fit(1, 0.05)
    assert {side for _, side in seen} == {32}


def test_images_shrink_as_pillow_shrinks_them(make):
    _, learn = make("--small-epochs", 1)
    x = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    learn.xb, learn.small_images.active = (torch.from_numpy(x),), True
    learn.small_images.before_batch()
    out = learn.xb[0].numpy()
    bilinear = Image.Resampling.BILINEAR
    for i, c in np.ndindex(4, 3):
        assert np.allclose(out[i, c], Image.fromarray(x[i, c]).resize((24, 24), bilinear), atol=1e-4)


def test_weights_of_whole_images_are_kept_before_any_of_small_ones():
    keep, rows = averaging.KeepBest(small_epochs=3), []
    keep.learn = SimpleNamespace(model=torch.nn.Linear(1, 1), recorder=SimpleNamespace(rows=rows))
    kept = []
    for epoch, acc in enumerate([0.5, 0.9, 0.8, 0.6, 0.7, 0.65], 1):
        rows.append(dict(epoch=epoch, valid_acc=acc, valid_loss=1.0))
        keep.after_epoch()
        kept.append(keep.epoch_number)
    assert kept == [1, 2, 2, 4, 5, 5]


class OneSide(torch.nn.Sequential):
    """Takes images of 32 pixels alone, as transformers do."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 30 * 30, 2))


def test_a_network_that_takes_one_size_alone_is_refused_before_training():
    fit = lambda small: layers.smallest_side(OneSide(), SimpleNamespace(small_epochs=small), 32)
    assert fit(0) == 32
    with pytest.raises(BadInput, match="does not take images of 24 pixels.*or --small-epochs 0"):
        fit(2)
