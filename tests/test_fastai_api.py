"""What a fastai user does with any Learner works on ours. The list of it comes from fastai's own modules.

Each test says what it covers. The last ones compare that with what fastai has, so a new version shows what is new.
"""

import importlib
import inspect
import pkgutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fastai.callback
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.tracker import ReduceLROnPlateau as FastaisReduceLROnPlateau
from fastai.learner import AvgSmoothLoss
from fastai.vision.all import (
    ActivationStats,
    Adam,
    BnFreeze,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
    CategoryBlock,
    ChannelsLast,
    CollectDataCallback,
    CSVLogger,
    CutMix,
    DataBlock,
    DataLoaders,
    EarlyStoppingCallback,
    F1Score,
    FetchPredsCallback,
    GatherPredsCallback,
    GradientAccumulation,
    GradientClip,
    ImageBlock,
    ImageDataLoaders,
    Learner,
    LRFinder,
    MCDropoutCallback,
    MixedPrecision,
    MixUp,
    Normalize,
    OptimWrapper,
    ParamScheduler,
    PILImage,
    Recorder,
    Resize,
    SaveModelCallback,
    SchedCos,
    ShortEpochCallback,
    ShowGraphCallback,
    TerminateOnNaNCallback,
    TfmdDL,
    Transform,
    accuracy,
    error_rate,
    get_image_files,
    load_learner,
    minimum,
    parent_label,
    ranger,
    slide,
    steep,
    valley,
)  # fmt: skip
from matplotlib import pyplot
from sklearn.metrics import f1_score

from lib import models
from lib.cli import BadInput
from lib.data import AlbumentationsTransform, get_dls
from lib.train import SGDLearner
from lib.train.averaging import EMA
from lib.train.lecture import GrowBatchOnPlateau
from lib.train.recorder import Diverged
from tests.conftest import fingerprint, state_of

ELSEWHERE = {
    "azureml": "needs azureml",
    "captum": "needs captum",
    "comet": "needs comet_ml",
    "wandb": "needs wandb; --log wandb",
    "tensorboard": "needs tensorboard; --log tensorboard",
    "rnn": "is for text",
}  # fmt: skip  modules of fastai.callback that are not for this test -> why
BASES = (
    "Callback",
    "TrainEvalCallback",
    "TrackerCallback",
    "HookCallback",
    "MixHandler",
)  # of the others
COVERED = {"learner": set(), "recorder": set(), "dls": set(), "callback": set()}


def covers(**names):
    """Notes that a test exercises these members of fastai."""
    for kind, text in names.items():
        COVERED[kind] |= set(text.split())
    return lambda test: test


@pytest.fixture(autouse=True)
def figures():
    matplotlib.use("agg")
    yield
    pyplot.close("all")


@pytest.fixture
def dls(bands, parse):
    return get_dls(parse("--data", bands, "--size", 32, "-b", 16))


@pytest.fixture
def learner(dls, tmp_path):
    """learner(**options) -> a silent SGDLearner of the small network on the generated images."""

    def learner(dls=dls, **options):
        torch.manual_seed(0)
        learn = SGDLearner(dls, models.build("small", len(dls.vocab)), path=tmp_path, **options)
        learn.remove_cb(learn.progress)
        learn.logger = lambda log: None
        return learn

    return learner


def column(learn, name):
    return [values[learn.recorder.metric_names.index(name) - 1] for values in learn.recorder.values]


def weights(learn):
    return {name: w.clone() for name, w in learn.model.state_dict().items()}


def moved(learn, before):
    return {name for name, w in learn.model.state_dict().items() if not torch.equal(w, before[name])}


# --- metrics and the record ------------------------------------------------------------------------------------------


@covers(learner="fit validate metrics get_preds no_logging", recorder="after_batch after_validate before_validate")
def test_metrics_are_columns_and_equal_a_hand_computation(learner):
    learn = learner(metrics=[accuracy, error_rate, F1Score(average="macro")])
    learn.fit(2, 0.05)
    predictions, targets = learn.get_preds()
    predicted = predictions.argmax(1)
    right = (predicted == targets).double().mean().item()
    assert [column(learn, name)[-1] for name in ("accuracy", "error_rate")] == pytest.approx([right, 1 - right])
    f1 = f1_score(targets, predicted, average="macro")
    assert column(learn, "f1_score")[-1] == pytest.approx(f1)
    loss = -predictions.double().log()[range(len(targets)), targets].mean().item()
    assert column(learn, "valid_loss")[-1] == pytest.approx(loss, rel=1e-5)
    assert list(learn.validate()) == pytest.approx([loss, right, 1 - right, f1], rel=1e-5)
    assert learn.validate(2)[1] == pytest.approx(learn.recorder.rows[-1]["test_acc"])


@covers(recorder="before_fit before_epoch before_train after_train after_epoch plot_loss plot_sched")
def test_the_record_has_fastais_names_and_ours(learner):
    learn = learner(metrics=accuracy)
    learn.recorder.train_metrics = True
    learn.fit_one_cycle(2, 0.05)
    names, n = list(learn.recorder.metric_names), len(learn.dls.train)
    assert names[:5] == ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"]
    assert names[5:] == ["lr", "train_acc", "valid_acc", "test_loss", "test_acc", "time"]
    assert column(learn, "train_accuracy") == pytest.approx(column(learn, "train_acc"))
    assert [len(values) for values in learn.recorder.values] == [len(names) - 2] * 2
    assert len(learn.recorder.lrs) == len(learn.recorder.losses) == 2 * n and learn.recorder.iters == [n, 2 * n]
    assert len(learn.recorder.plot_loss().lines) == 2
    learn.recorder.plot_sched()
    assert [list(ax.lines[0].get_ydata()) for ax in pyplot.gcf().axes] == [learn.recorder.hps[h] for h in ("lr", "mom")]
    learn.fit(1, 0.02)
    assert set(learn.recorder.hps["lr"]) == {0.02}


def test_fastais_recorder_in_cbs_takes_the_place_of_ours(learner):
    learn = learner(metrics=accuracy, cbs=Recorder(train_metrics=True))
    learn.fit(1, 0.05)
    assert "train_accuracy" in learn.recorder.metric_names and learn.recorder.rows[0]["epoch"] == 1


@covers(callback="ShortEpochCallback", recorder="after_cancel_train after_cancel_validate")
def test_a_short_epoch_is_short_and_its_record_whole(learner):
    learn = learner(metrics=accuracy)
    learn.fit(1, 0.05, cbs=ShortEpochCallback(0.4))
    assert len(learn.recorder.losses) == 3 < len(learn.dls.train)
    assert column(learn, "train_loss")[0] > 0 and 0 <= column(learn, "accuracy")[0] <= 1


# --- callbacks that watch --------------------------------------------------------------------------------------------


@covers(callback="EarlyStoppingCallback")
def test_early_stopping_stops(learner):
    learn = learner()
    learn.fit(9, 1e-9, cbs=EarlyStoppingCallback(patience=2, min_delta=0.5))
    assert len(learn.recorder.values) == 3


@covers(callback="SaveModelCallback", learner="load save")
def test_the_best_model_is_saved_and_loaded(learner, tmp_path):
    learn, seen = learner(metrics=accuracy, cbs=EMA(0.5)), []

    class Watch(Callback):
        order = 99

        def after_epoch(self):
            seen.append(fingerprint(self.model.state_dict()))

    learn.fit(3, 0.05, cbs=[SaveModelCallback(monitor="accuracy", fname="best"), Watch()])
    saved = torch.load(tmp_path / "models/best.pth", weights_only=True)
    best = int(np.argmax(column(learn, "accuracy")))
    assert fingerprint(saved) == seen[best] == fingerprint(learn.model.state_dict())


@pytest.mark.parametrize("name", ["best", Path("best")])
def test_nothing_of_another_run_is_loaded(name, learner, tmp_path):
    """Trap 7: a fit that was never better than before loads an old file."""
    old = learner()
    old.save("best", with_opt=False)
    learn = learner(cbs=TerminateOnNaNCallback())
    nan = Callback(after_pred=lambda self: setattr(self.learn, "pred", self.learn.pred * torch.nan))
    with pytest.warns(UserWarning, match="nothing is loaded"):
        learn.fit(1, 0.1, cbs=[SaveModelCallback(fname=name), nan])
    assert learn.model.head.weight.isnan().all()
    with pytest.raises(Diverged):
        learner().fit(1, 0.1, cbs=[SaveModelCallback(fname="best"), nan])


def test_the_best_of_two_fits_is_loaded(learner):
    """reset_on_fit=False: the second fit is never better than the first, whose weights come back."""
    learn = learner(cbs=[best := SaveModelCallback(fname="best", reset_on_fit=False)])
    learn.fit(2, 0.05)
    kept, best.best = fingerprint(learn.model.state_dict()), -np.inf
    learn.fit(1, 0.05)
    assert fingerprint(learn.model.state_dict()) == kept


def test_the_best_weights_stay_where_a_fit_with_an_average_is_cancelled(learner, tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.epoch == 1 and self.iter == 3:
                raise CancelFitException

    learn = learner(cbs=EMA(0.9))
    learn.fit(3, 0.05, cbs=[SaveModelCallback(fname="best"), Stop()])
    saved = torch.load(tmp_path / "models/best.pth", weights_only=True)
    assert fingerprint(saved) == fingerprint(learn.model.state_dict())


def test_a_wrapped_model_is_saved_as_fastai_saves_it(dls, tmp_path):
    wrapped = SGDLearner(dls, torch.nn.DataParallel(models.build("small", 4)), path=tmp_path)
    state = torch.load(wrapped.save("x", with_opt=False), weights_only=True)
    assert list(state) == list(wrapped.model.module.state_dict())
    wrapped.load("x", with_opt=False)


@covers(callback="ReduceLROnPlateau")
def test_fastais_plateau_reduces(learner):
    learn = learner()
    learn.fit(3, 0.1, cbs=FastaisReduceLROnPlateau(patience=1, min_delta=10))
    n = len(learn.dls.train)
    assert learn.recorder.lrs[::n] == pytest.approx([0.1, 0.1, 0.01])
    with pytest.raises(ValueError, match="two owners"):
        learn.fit_one_cycle(1, 0.1, cbs=FastaisReduceLROnPlateau())


@covers(callback="TerminateOnNaNCallback")
def test_nan_ends_quietly_where_the_user_wants_it(learner):
    learn = learner()
    learn.fit(3, 1e30, cbs=TerminateOnNaNCallback())
    assert len(learn.recorder.losses) < len(learn.dls.train) and learn.recorder.values == []


@covers(callback="CSVLogger")
def test_the_csv_has_every_column(learner, tmp_path):
    learn = learner(metrics=accuracy)
    learn.fit(2, 0.05, cbs=CSVLogger())
    table = pd.read_csv(tmp_path / "history.csv")
    assert list(table.columns) == list(learn.recorder.metric_names)
    assert table["accuracy"].tolist() == pytest.approx(column(learn, "accuracy")) and len(table) == 2


@covers(callback="ProgressCallback ShowGraphCallback", learner="no_bar no_mbar")
def test_bars_and_graphs(dls, tmp_path, capsys):
    learn = SGDLearner(dls, models.build("small", 4), path=tmp_path)
    learn.fit(2, 0.05, cbs=ShowGraphCallback())
    assert "valid_loss" in capsys.readouterr().out
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.05)
    assert capsys.readouterr().out == ""


@covers(callback="ActivationStats CollectDataCallback FetchPredsCallback GatherPredsCallback")
def test_what_looks_into_a_fit_sees_it(learner):
    n = lambda dl: len(dl.dataset)
    learn, stats, data = learner(metrics=accuracy), ActivationStats(with_hist=True), CollectDataCallback()
    learn.fit(1, 0.05, cbs=[stats, data])
    fetch = FetchPredsCallback()
    learn.fit(1, 0.05, cbs=fetch)
    assert len(stats.stats) == len(learn.dls.train) and len(fetch.preds[0]) == n(learn.dls.valid)
    assert sum(len(batch[1][0]) for batch in data.data) == n(learn.dls.train) + n(learn.dls.valid)
    assert 0 <= column(learn, "accuracy")[0] <= 1
    gather = GatherPredsCallback()
    learn.validate(cbs=gather)
    assert len(gather.preds) == n(learn.dls.valid)
    losses = learn.get_preds(with_loss=True)[2]
    assert losses.mean().item() == pytest.approx(column(learn, "valid_loss")[-1], rel=1e-5)


@covers(
    learner="add_cb add_cbs added_cbs remove_cb remove_cbs removed_cbs ordered_cbs show_training_loop x y to_detach"
)
def test_a_callback_of_ones_own_sees_training_and_valid_batches(learner, capsys):
    class Count(Callback):
        train = valid = 0

        def after_batch(self):
            assert len(self.x) == len(self.y) and not self.learn.to_detach(self.learn.pred).requires_grad
            self.train, self.valid = (
                self.train + self.training * len(self.y),
                self.valid + (not self.training) * len(self.y),
            )

    learn = learner()
    sizes = len(learn.dls.train.dataset), len(learn.dls.valid.dataset)
    with learn.added_cbs(Count()):
        learn.fit(2, 0.05)
        assert (learn.count.train, learn.count.valid) == (2 * sizes[0], 2 * sizes[1])
        learn.validate()
        assert learn.count.valid == 3 * sizes[1]
        assert learn.count in learn.ordered_cbs("after_batch")
        learn.show_training_loop()
        assert "Count" in capsys.readouterr().out
        with learn.removed_cbs(learn.count):
            assert learn.ordered_cbs("after_batch") == [learn.recorder] or not hasattr(learn, "count")
    assert not hasattr(learn, "count")
    learn.add_cbs([Count, Count()]).remove_cbs(Count)
    assert Count not in map(type, learn.cbs)


# --- callbacks that change a step ------------------------------------------------------------------------------------


@covers(callback="MixUp CutMix")
@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_mixup_mixes_and_repeats(learner, mix):
    plain, one, two = learner(), learner(), learner()
    plain.fit(1, 0.05), one.fit(1, 0.05, cbs=mix()), two.fit(1, 0.05, cbs=mix())
    assert fingerprint(one.model.state_dict()) == fingerprint(two.model.state_dict())
    assert one.recorder.rows[0]["train_loss"] != plain.recorder.rows[0]["train_loss"]
    assert type(one.loss_func) is type(plain.loss_func)


@covers(callback="GradientClip GradientAccumulation BnFreeze")
def test_gradients_are_clipped_and_accumulated(learner):
    norms, steps = [], []

    class Watch(Callback):
        order = 99

        def before_step(self):
            norms.append(
                torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm().item()
            )

        def after_step(self):
            steps.append(self.iter)

    learn = learner()
    learn.fit(1, 0.05, cbs=[GradientClip(0.01), Watch()])
    assert max(norms) <= 0.0101
    steps.clear()
    learn.fit(1, 0.05, cbs=[GradientAccumulation(32), Watch()])
    assert steps == [1, 3]  # 16 images a batch; 24 are left over
    learn.freeze()
    learn.train_bn = False
    learn.create_opt(), learn.freeze()
    before = weights(learn)
    learn.fit(1, 0.05, cbs=BnFreeze())
    assert moved(learn, before) == {"head.weight", "head.bias"}


@covers(callback="ParamScheduler LRFinder", learner="fit_one_cycle fit_flat_cos fit_sgdr")
def test_fastais_schedules_drive_the_rate(learner):
    learn = learner()
    n = len(learn.dls.train)
    learn.fit(2, 0.1, cbs=ParamScheduler({"lr": SchedCos(0.1, 0.0)}))
    assert learn.recorder.lrs[0] == 0.1 and learn.recorder.lrs[n] == pytest.approx(0.05)
    learn.fit_one_cycle(2, 0.1)
    assert max(learn.recorder.lrs) == pytest.approx(0.1, rel=0.05) and learn.recorder.lrs[0] == pytest.approx(0.1 / 25)
    assert learn.recorder.hps["mom"][0] == pytest.approx(0.95) and min(learn.recorder.hps["mom"]) < 0.88
    learn.fit(1, 0.1)
    assert learn.opt.hypers[0]["mom"] == 0.9  # trap 14
    learn.fit_flat_cos(1, 0.1)
    assert learn.recorder.lrs[0] == pytest.approx(0.1) and learn.recorder.lrs[-1] < 0.08
    with pytest.raises(ValueError, match="start"):
        learn.fit_flat_cos(2, 0.1, start_epoch=1)
    learn.fit_sgdr(2, 1, 0.1)
    assert len(learn.recorder.values) == 3 and learn.recorder.lrs[n] == pytest.approx(0.1)
    learn.fit(1, cbs=LRFinder(1e-6, 1e-3, 10))
    assert learn.recorder.lrs == pytest.approx(np.geomspace(1e-6, 1e-3, 11)[: len(learn.recorder.lrs)])


@covers(learner="freeze unfreeze freeze_to fine_tune create_opt")
def test_freezing_freezes_the_body_and_slices_are_of_layers(learner):
    learn = learner()
    learn.freeze()
    norms = {n for n, m in learn.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    before = weights(learn)
    learn.fit(1, 0.05)
    changed = {name.rsplit(".", 1)[0] for name in moved(learn, before)}
    assert changed == {"head", *norms}
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-4, 1e-2))
    head = {id(p) for p in learn.model.head.parameters()}
    assert [{id(p) in head for p in group} for group in learn.opt.param_lists] == [{False}, {True}]
    body, last = (h["lr"] for h in learn.opt.hypers)
    assert last == pytest.approx(100 * body)
    assert {g["lr"] for g in learn.opt.opt.param_groups} == {body, last}
    learn.fine_tune(1)
    assert all(p.requires_grad for p in learn.model.parameters()) and len(learn.recorder.values) == 1


@pytest.mark.parametrize("name", ["sgd", "nesterov", "rmsprop", "adagrad", "adam"])
def test_one_cycle_with_every_optimizer(learner, name):
    learn = learner(optimizer=name)
    learn.fit_one_cycle(1, 0.005)
    has_momentum = name in ("sgd", "nesterov", "adam")
    assert (learn.opt.hypers[0]["mom"] > 0.9) == has_momentum
    assert all(g.get("momentum", 0) == 0 for g in learn.opt.opt.param_groups) or has_momentum


def test_optimizers_of_fastai_and_of_torch(learner):
    for opt_func in (Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)):
        learn = learner(opt_func=opt_func, lr=0.005, wd=0.3)
        before = weights(learn)
        learn.fit(1)
        assert len(moved(learn, before)) > 20 and learn.opt.hypers[0]["wd"] == 0.3
    assert sorted({g["weight_decay"] for g in learn.opt.opt.param_groups}) == [0, 0.3]
    with pytest.raises(ValueError, match="optimizer must be one of"):
        learner(optimizer="adamw")


def test_weight_decay_of_norms_and_biases_is_fastais_switch(learner):
    for wd_bn_bias, spared in ((False, True), (True, False)):
        learn = learner(wd_bn_bias=wd_bn_bias)
        learn.fit(1, 0.01, wd=0.1)
        groups = [g for g in learn.opt.opt.param_groups if g["params"]]
        assert any(g["weight_decay"] == 0 for g in groups) == spared


@covers(callback="MixedPrecision ModelToHalf NonNativeMixedPrecision ChannelsLast")
@covers(learner="to_bf16 to_fp16 to_fp32 to_non_native_fp16 to_non_native_fp32 to_channelslast to_contiguous")
def test_precision_and_layout(learner):
    learn, kinds = learner(), []
    learn.model.stem[0].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    learn.to_bf16().fit(1, 0.01)
    assert set(kinds) == {torch.bfloat16}
    learn.to_fp32().validate()
    assert kinds[-1] == torch.float32
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            learn.to_fp16()
    for refused in (lambda: learner(cbs=MixedPrecision()), learn.to_non_native_fp16, learn.to_channelslast):
        with pytest.raises(ValueError, match="has no effect on this Learner; pass precision"):
            refused()
    learn.to_non_native_fp32()
    learn.to_contiguous()
    assert learn.model.head.weight.is_contiguous() and learn.model.stages[0][0][0].weight.is_contiguous()
    learn.fit(1, 0.01, cbs=ChannelsLast())
    assert learn.model.stages[0][0][0].weight.is_contiguous(memory_format=torch.channels_last)


# --- fits that end early ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [CancelFitException, KeyboardInterrupt, ValueError])
def test_what_callbacks_set_is_undone_however_the_fit_ends(learner, error):
    class Stop(Callback):
        order = 100

        def after_batch(self):
            if self.training and self.epoch == 2:
                raise error("stop")

    learn = learner(cbs=EMA(0.9))
    grow = GrowBatchOnPlateau(64, patience=0, threshold=9.0, threshold_mode="abs", factor=0.5)
    with nullcontext() if error is CancelFitException else pytest.raises(error):
        learn.fit(4, 0.05, cbs=[grow, MixUp(), Stop()])
    assert len(learn.recorder.rows) == 2  # it ended in the third epoch
    assert learn.dls.train.bs == 16 and grow.changes and learn.ema.average is None
    assert type(learn.loss_func).__name__ == "CrossEntropyLossFlat" and not learn.fitting
    learn.fit(1, 0.05)
    assert len(learn.recorder.rows) == 1 and learn.recorder.rows[0]["batch_size"] == 16


@pytest.mark.parametrize("event", ["before_train", "after_batch", "before_validate", "before_epoch"])
def test_a_part_of_an_epoch_may_be_cancelled(learner, event):
    """Of the second epoch: the columns stay where they are, and what was not measured is None."""
    kind = {"before_validate": CancelValidException, "before_epoch": CancelEpochException}.get(
        event, CancelTrainException
    )

    class Cancel(Callback):
        def look(self):
            if self.epoch == 1 and (event != "after_batch" or self.training):
                raise kind

    setattr(Cancel, event, Cancel.look)
    learn = learner(metrics=[accuracy, F1Score(average="macro")])
    learn.fit(3, 0.05, cbs=Cancel())
    names = list(learn.recorder.metric_names[1:-1])
    first, second, third = (dict(zip(names, values, strict=True)) for values in learn.recorder.values)
    assert None not in (*first.values(), *third.values())
    missing = {name for name, value in second.items() if value is None}
    trained, validated = {"train_loss", "train_acc"}, {"valid_loss", "accuracy", "f1_score", "valid_acc"}
    expected = {"before_train": trained, "after_batch": trained, "before_validate": validated}
    assert missing == expected.get(event, set(names) - {"lr"})


def test_a_fit_begins_at_start_epoch(learner):
    """Trap 4: fastai raises IndexError beside a tracker."""
    learn = learner()
    learn.fit(3, 0.05, start_epoch=2, cbs=EarlyStoppingCallback())
    assert [row["epoch"] for row in learn.recorder.rows] == [3]


def test_a_fit_that_begins_later_sees_the_images_of_its_epochs(learner):
    """With fastai's own callback and `start_epoch`, the weights are those of a fit that was never cut."""
    whole, second = learner(), learner()
    whole.fit(3, 0.05, cbs=SaveModelCallback(every_epoch=True, with_opt=True))
    second.load("model_1")
    second.fit(3, 0.05, start_epoch=2)
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values()):
        assert torch.equal(a, b)


def test_no_callback_of_ours_hides_what_a_learner_has(learner):
    """fastai makes each callback an attribute of its learner."""
    found, todo = [], [Callback]
    while todo:
        todo += (kinds := todo.pop().__subclasses__())
        found += [kind for kind in kinds if kind.__module__.startswith("lib.")]
    learn = learner()
    names = {kind: object.__new__(kind).name for kind in found}
    assert len(found) >= 12 and not [kind for kind, name in names.items() if hasattr(type(learn), name)]


# --- looks -----------------------------------------------------------------------------------------------------------


@covers(
    learner="predict tta show_results summary loss_not_reduced validation_context all_batches one_batch", dls="test_dl"
)
def test_looks_say_what_they_say_and_change_nothing(learner):
    learn = learner(metrics=accuracy)
    learn.fit(2, 0.05)
    before, valid = state_of(learn), learn.dls.valid
    path = learn.dls.store.paths[valid.ids[0]]
    probabilities, targets = learn.get_preds()
    for item in (path, str(path), PILImage.create(path), np.array(PILImage.create(path))):
        name, index, p = learn.predict(item)
        assert name == learn.dls.vocab[index] and torch.allclose(p, probabilities[0], atol=1e-5)
    averaged, same = learn.tta(n=2)
    assert (
        averaged.shape == probabilities.shape and (same == targets).all() and not torch.equal(averaged, probabilities)
    )
    learn.show_results(max_n=4)
    assert "Total params" in str(learn.summary())
    with learn.loss_not_reduced():
        assert learn.loss_func(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)).shape == (3,)
    assert state_of(learn) == before
    assert "Total params" in str(learner().summary())  # before a fit


def test_a_look_of_ones_own_goes_through_fastais_contexts(learner):
    learn = learner()
    learn.fit(1, 0.05)
    before = state_of(learn)
    with learn, learn.no_mbar():
        learn._do_epoch_validate()
    assert state_of(learn) == before


def test_learners_made_in_a_loop_begin_apart(dls):
    torch.manual_seed(0)
    starts = []
    for _ in range(3):
        learn = SGDLearner(dls, models.build("small", 4), cbs=Callback())
        starts.append(fingerprint(learn.model.state_dict()))
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
    assert len({*starts}) == 3


def test_an_optimizer_that_a_user_sets_keeps_its_momentum(learner):
    learn = learner()
    for kind, mom in ((torch.optim.SGD, 0), (torch.optim.Adagrad, None)):
        learn.opt = OptimWrapper(opt=kind(learn.model.parameters(), 0.1))
        learn.fit(1)
        assert learn.opt.hypers[0].get("mom") == mom
    learn = learner(optimizer="adam")
    learn.create_opt()
    assert None not in learn.opt.hypers[0].values()  # TensorBoardCallback takes numbers alone


def test_dropout_may_be_sampled(dls, learner):
    learn = SGDLearner(dls, torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Flatten(), torch.nn.Linear(3072, 4)))
    learn.remove_cb(learn.progress)
    samples = [learn.get_preds(cbs=MCDropoutCallback())[0] for _ in range(2)]
    assert not torch.equal(*samples) and torch.equal(learn.get_preds()[0], learn.get_preds()[0])


covers(callback="MCDropoutCallback")


@covers(learner="lr_find", recorder="plot_lr_find")
def test_lr_find_has_fastais_face(learner):
    learn = learner()
    learn.fit(1, 0.05)
    before = state_of(learn)
    rates = learn.lr_find(suggest_funcs=(valley, steep, minimum, slide))
    assert rates._fields == ("valley", "steep", "minimum", "slide") and len(pyplot.gcf().axes[0].lines) == 5
    assert (
        learn.lr_find(show_plot=False)._fields == ("valley",)
        and learn.lr_find(suggest_funcs=None, show_plot=False) is None
    )
    lrs = learn.recorder.lrs
    assert lrs[0] == pytest.approx(1e-7) and len(lrs) == len(learn.recorder.losses) <= 100
    learn.recorder.plot_lr_find()
    assert pyplot.gcf().axes[0].get_xscale() == "log"
    assert state_of(learn) == before
    learn.lr_find([1e-5, 1e-4], [1, 10], show_plot=False)
    assert learn.recorder.lrs[0] == pytest.approx(1e-4)
    mixed = learner(cbs=MixUp())
    assert mixed.lr_find(show_plot=False) != learner().lr_find(show_plot=False)
    with pytest.raises(BadInput, match="diverged at once"):
        learner(cbs=TerminateOnNaNCallback()).lr_find(1e30, 1e35)
    with pytest.warns(UserWarning, match="never falls"):  # as after a fit and unfreeze: the curve is still to be read
        assert learn.lr_find(1e-12, 1e-11, show_plot=False).valley > 0
    batches = []

    class Asks(Callback):  # as fastai's own do
        def before_fit(self):
            self.run = not hasattr(self.learn, "lr_finder")

        def before_batch(self):
            batches.append(self.iter)

    learner(cbs=Asks()).lr_find(show_plot=False)
    assert batches == []


@covers(learner="export")
def test_an_exported_learner_predicts_the_same_and_carries_no_images(learner, tmp_path):
    learn = learner()
    learn.fit(1, 0.05)
    path = learn.dls.store.paths[0]
    learn.export("x.pkl")
    with pytest.warns(UserWarning, match="pickle"):
        again = load_learner(tmp_path / "x.pkl")
    assert torch.allclose(again.predict(path)[2], learn.predict(path)[2], atol=1e-6)
    assert (tmp_path / "x.pkl").stat().st_size < 1_500_000 and b"class 0/00.png" not in (
        tmp_path / "x.pkl"
    ).read_bytes()


def test_an_optimizer_state_that_does_not_fit_raises(learner):
    """Trap 5: fastai warns and trains on without momentum."""
    learn = learner()
    learn.fit(1, 0.05)
    path = learn.save("a")
    before = weights(learn)
    learn.fit(1, 0.05)
    learn.load("a")
    assert not moved(learn, before)
    saved = torch.load(path, weights_only=True)
    saved["opt"]["param_groups"] = saved["opt"]["param_groups"][:1]
    torch.save(saved, path)
    with pytest.raises(UserWarning, match="Could not load"):
        learn.load("a")


# --- loaders ---------------------------------------------------------------------------------------------------------


class Invert(Transform):
    def encodes(self, x: PILImage):
        return PILImage.create(255 - np.array(x))


@covers(dls="add_tfms train valid train_ds valid_ds device to cpu cuda new_empty from_dblock from_dsets")
def test_transforms_of_ones_own_take_effect(bands, parse):
    config = parse("--data", bands, "--size", 32, "-b", 16, "--augment", "none")
    plain, inverted = get_dls(config), get_dls(config)
    inverted.valid.after_item.add(Invert())
    inverted.add_tfms([Invert()], "after_item", "train")
    for a, b in ((plain.valid, inverted.valid), (plain.train, inverted.train)):
        x, y = a.decode(next(iter(a))), b.decode(next(iter(b)))
        assert (x[1] == y[1]).all() and (x[0].float() + y[0].float() - 255).abs().max() <= 2  # two roundings
    inverted.train.after_batch.add(Normalize.from_stats([0.0] * 3, [2.0] * 3, cuda=False))
    assert inverted.train.new(bs=8, shuffle=False).one_batch()[0].shape[0] == 8
    plain.show_batch(max_n=4)
    assert len(pyplot.gcf().axes) == 4 and plain.train.n_inp == 1
    assert len(plain.new_empty().train.dataset) == 0 and str(plain.to("cpu").device) == "cpu" == str(plain.cpu().device)


def test_albumentations_in_a_data_block_of_ones_own(bands):
    import albumentations as A

    block = DataBlock(
        (ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
        item_tfms=[Resize(32), AlbumentationsTransform([A.HorizontalFlip(p=0.5), A.Rotate(90, p=1.0)])],
    )  # fmt: skip
    dls = block.dataloaders(bands, bs=8, num_workers=0)
    first = dls.train.new(shuffle=False)
    a, b = first.one_batch()[0], first.one_batch()[0]
    assert (a != b).flatten(1).any(1).sum() >= 7
    valid = dls.valid
    assert torch.equal(valid.one_batch()[0], valid.one_batch()[0])
    block = block.new(item_tfms=[AlbumentationsTransform([A.CenterCrop(8, 8)]), Resize(32)])
    assert block.dataloaders(bands, bs=8, num_workers=0).one_batch()[0].shape[2:] == (8, 8)  # it comes after Resize


@covers(learner="no_logging")
def test_plain_fastai_loaders(bands, tmp_path):
    dls = ImageDataLoaders.from_folder(bands, valid_pct=0.2, item_tfms=Resize(32), bs=16, seed=1, num_workers=0)
    learn = SGDLearner(dls, models.build("small", 4), metrics=accuracy, path=tmp_path)
    learn.remove_cb(learn.progress)
    with learn.no_logging():
        assert learn.lr_find(show_plot=False).valley > 0
        learn.fit_one_cycle(2, 0.05)
    assert "test_acc" not in learn.recorder.metric_names
    assert learn.validate()[1] == pytest.approx(column(learn, "accuracy")[-1])
    learn.predict(get_image_files(bands)[0]), learn.tta(n=2), learn.show_results(), learn.summary()
    learn.export("y.pkl")
    load_learner(tmp_path / "y.pkl").predict(get_image_files(bands)[0])


# --- what fastai has, and what of it is covered ----------------------------------------------------------------------


def members(kind, *without):
    taken = set().union(*(dir(base) for base in (object, *without)))
    return {name for name in dir(kind) if not name.startswith("_") and name not in taken}


def test_every_public_member_of_learner_is_covered():
    assert members(Learner) - COVERED["learner"] == set() and COVERED["learner"] <= members(Learner)


def test_every_public_member_of_recorder_is_covered():
    assert members(Recorder, Callback) - COVERED["recorder"] == {"remove_on_fetch"}


def test_every_public_member_of_the_loaders_is_there():
    """Loaders are subclasses of fastai's. What ours override is exercised here and in test_data.py."""
    assert members(DataLoaders) - COVERED["dls"] == set()
    from lib.data.loader import StoreDL

    assert issubclass(StoreDL, TfmdDL) and members(TfmdDL) <= set(dir(StoreDL))


def test_every_callback_class_is_covered_or_listed_with_a_reason():
    classes = set()
    for module in pkgutil.iter_modules(fastai.callback.__path__):
        if module.name in ELSEWHERE or module.name == "all":
            continue
        namespace = vars(importlib.import_module(f"fastai.callback.{module.name}"))
        for name, thing in namespace.items():
            if inspect.isclass(thing) and issubclass(thing, Callback) and thing.__module__.endswith(f".{module.name}"):
                classes.add(name)
    assert classes - set(BASES) == COVERED["callback"]


# --- found by reading: each is a use that fastai takes ---------------------------------------------------------------


def test_a_batch_may_be_cancelled(learner):
    class Skip(Callback):
        def before_batch(self):
            if self.iter in (0, 5):
                raise CancelBatchException

    learn = learner(metrics=accuracy)
    learn.fit(1, 0.05, cbs=Skip())
    assert len(learn.recorder.losses) == len(learn.dls.train) - 2 and column(learn, "accuracy") == [None]


def test_gradients_of_a_group_that_was_cut_short_go_into_no_step(learner):
    """The first pass ends in the middle of a group of four batches."""
    steps = []

    class Watch(Callback):
        order = 99

        def __init__(self, cut):
            self.cut = cut

        def before_train(self):
            if self.cut:
                self.learn.opt.zero_grad()

        def after_batch(self):
            if self.training and self.epoch == 0 and self.iter == 1:
                raise CancelTrainException

        def before_step(self):
            steps.append(fingerprint([p.grad for p in self.model.parameters()]))

    for cut in (False, True):
        learner(accumulate=4).fit(2, 0.05, cbs=Watch(cut))
    assert len(steps) % 2 == 0 and steps[: len(steps) // 2] == steps[len(steps) // 2 :]


def test_the_log_and_the_metrics_are_there_after_an_epoch(learner):
    """Callbacks of wandb and TensorBoard read them in `after_epoch`."""
    logs = []

    class Reads(Callback):
        order = 60

        def after_epoch(self):
            logs.append((list(self.recorder.log), self.learn.metrics[0].value))

    learn = learner(metrics=accuracy, cbs=Reads())
    learn.fit(2, 0.05)
    for epoch, (log, value) in enumerate(logs):
        assert log[:-1] == [epoch, *learn.recorder.values[epoch]] and len(log) == len(learn.recorder.metric_names)
        assert float(value) == column(learn, "accuracy")[epoch]
    assert learn.metrics[0].value is not None


def test_no_code_in_a_file_of_weights_is_run(learner, tmp_path):
    class Armed:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    (tmp_path / "models").mkdir()
    torch.save(Armed(), tmp_path / "models/x.pth")
    for options in ({}, {"weights_only": False}):
        with pytest.raises(Exception, match="[Ww]eights"):
            learner().load("x", **options)
    assert not (tmp_path / "canary").exists()
    assert torch.load(tmp_path / "models/x.pth", weights_only=False) and (tmp_path / "canary").exists()  # it is armed


def test_what_is_refused_is_refused(learner):
    """docs/fastai.md lists these."""
    with pytest.raises(ValueError, match="at least 10 updates"):
        learner().lr_find(num_it=5)
    for name in ("DistributedTrainer", "ParallelTrainer"):  # fastai's need a package that is not here
        with pytest.raises(ValueError, match="torchrun"):
            learner().add_cb(type(name, (Callback,), {}))


def test_the_moving_average_of_the_loss_is_fastais(learner):
    losses = []
    note = Callback(after_batch=lambda self: losses.append(self.loss.item()) if self.training else None)
    learn, average = learner(), AvgSmoothLoss()
    learn.fit(1, 0.05, cbs=note)
    for loss in losses:
        average.accumulate(SimpleNamespace(loss=torch.tensor(loss), to_detach=lambda x: x))
        average.seen = [*getattr(average, "seen", []), float(average.value)]
    assert [float(loss) for loss in learn.recorder.losses] == pytest.approx(average.seen, rel=1e-5)


def test_an_optimizer_that_exists_already_is_refused(learner):
    opt = OptimWrapper(models.build("small", 4).parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="pass partial"):
        learner(opt_func=opt)


def test_options_of_torchs_optimizers_reach_them(learner):
    learn = learner(opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.7, nesterov=True))
    learn.fit(1, 0.01)
    assert {(g["momentum"], g["nesterov"]) for g in learn.opt.opt.param_groups} == {(0.7, True)}


def test_tta_before_a_fit_and_a_look_that_fails_leave_the_learner_whole(dls, tmp_path):
    learn = SGDLearner(dls, models.build("small", 4), path=tmp_path)
    learn.tta(n=2)
    callbacks = list(learn.cbs)
    with pytest.raises(ValueError, match="no"), learn.added_cbs(Callback(before_fit=lambda self: int("no"))):
        learn.validate()
    assert list(learn.cbs) == callbacks
    learn.fit(1, 0.05)


def test_loaders_of_torch(tmp_path, monkeypatch):
    points = torch.utils.data.TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 4)
    loaders = DataLoaders(*[torch.utils.data.DataLoader(points, batch_size=8) for _ in range(2)], path=tmp_path)
    learn = SGDLearner(loaders, models.build("small", 4), metrics=accuracy)
    learn.remove_cb(learn.progress)
    with learn.no_logging():
        learn.fit(2, 0.05)
    assert [row["batch_size"] for row in learn.recorder.rows] == [8, 8]
    monkeypatch.setattr("lib.train.learner.default_device", lambda: torch.device("meta"))
    assert learn.device == torch.device("meta")  # that of fastai, for loaders that have none


def test_part_of_a_set_is_a_pass_of_that_many(dls):
    some = dls.train.new(n=32)
    assert sum(len(y) for _, y in some) == 32 == len(some) * 16
