"""What README's table "Beside plain fastai" says of fastai, on fastai alone; our side has its own tests.

Where a newer fastai does better, the test that fails here names the row that is out of date.
"""

import fastai.callback.progress  # noqa: F401  it adds no_bar
import fastai.callback.schedule  # noqa: F401  it adds lr_find
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.interpret import Interpretation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn


@pytest.fixture
def plain(tmp_path):
    """plain(loss_func, *callbacks) -> a Learner of a linear classifier of 64 random points, nearly all of one class."""

    def learner(loss_func, *cbs):
        set_seed(0)
        x = torch.randn(64, 5)
        points = list(zip(x, (x[:, 0] > 1.5).long()))
        dls = DataLoaders(DataLoader(points, bs=8, shuffle=True), DataLoader(points, bs=8), path=tmp_path)
        return Learner(dls, nn.Linear(5, 2), loss_func, opt_func=SGD, lr=0.1, wd=0.0, cbs=cbs)

    return learner


def same_loss(value):
    """A loss that is `value()` whatever the network says: its gradient is 0."""
    return lambda logits, targets: 0 * logits.sum() + value()


class Rates(Callback):
    """The learning rate behind each epoch."""

    order = 100

    def before_fit(self):
        self.seen = []

    def after_epoch(self):
        self.seen.append(self.opt.hypers[0]["lr"])


def test_the_range_test_makes_the_training_behind_it_another(plain):
    def weights(look):
        learn = plain(CrossEntropyLossFlat())
        if look:
            learn.lr_find(num_it=10, show_plot=False)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        return learn.model.weight.detach()

    assert torch.equal(weights(False), weights(False))
    assert not torch.equal(weights(True), weights(False))


def test_patience_2_cuts_after_the_second_bad_epoch(plain):
    learn = plain(same_loss(lambda: 1.0), ReduceLROnPlateau(patience=2, factor=10), Rates())
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, 1.0)
    assert learn.rates.seen[:3] == [1.0, 1.0, pytest.approx(0.1)]  # the first epoch is the best, the others are bad


def test_train_loss_is_a_moving_average_that_is_never_reset(plain):
    learn = plain(same_loss(lambda: 1.0 - learn.epoch))
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
    train, valid = learn.recorder.values[1]
    assert valid == 0 and train > 0.4


def test_start_epoch_beside_a_plateau_raises_index_error(plain):
    learn = plain(CrossEntropyLossFlat(), ReduceLROnPlateau())
    with learn.no_bar(), learn.no_logging(), pytest.raises(IndexError):
        learn.fit(2, start_epoch=1)


def test_top_losses_have_right_predictions_among_them(plain):
    learn = plain(CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(3)
        indices = Interpretation.from_learner(learn).top_losses(25)[1]
        _, targets, decoded = learn.get_preds(with_decoded=True)
    assert (decoded[indices] == targets[indices]).any()
