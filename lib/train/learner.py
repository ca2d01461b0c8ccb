"""SGDLearner: a fastai Learner with torch's optimizers, a true record, and looks that disturb nothing."""

import io
import sys
import threading
from contextlib import suppress
from functools import partial, partialmethod
from itertools import chain
from pathlib import Path

import torch
from fastai.callback.core import Callback, _inner_loop
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.imports import noop
from fastai.learner import CancelBackwardException, CancelEpochException, CancelStepException, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import skm_to_fastai
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, get_model, norm_bias_params, to_float
from fastcore.foundation import L
from fastcore.xtras import join_path_file
from sklearn.metrics import f1_score

from lib import runs
from lib.data.augment import shuffled
from lib.models import split
from lib.train import ranks
from lib.train.averaging import EMA
from lib.train.compiled import Compile, check_compiler
from lib.train.freezing import Hold
from lib.train.lecture import GradNoise, balanced_order
from lib.train.looks import Looks
from lib.train.loss import TrainingLoss, class_weights
from lib.train.optimizers import OPTIMIZERS, GroupedOptimizer, maker, undecayed
from lib.train.plateau import Plateau, StopEarly, plateau_options
from lib.train.randomness import seed_from
from lib.train.recorder import EpochRecorder
from lib.train.sharing import ShareCores

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EARLY_EPOCHS = 3  # in which a network's `early` parameters learn (Jordan, arXiv 2404.00498)
# fastai's callbacks that could have no effect here -> what to do instead
REFUSED = dict.fromkeys(("MixedPrecision", "ModelToHalf", "NonNativeMixedPrecision"), "pass precision='bf16' or 'fp16'")
REFUSED |= dict.fromkeys(("DistributedTrainer", "ParallelTrainer"), "run train_fastai.py with torchrun (docs/ranks.md)")


class Unscale(Callback):
    """Divides the gradients of fp16 by the loss's scale.

    It comes after callbacks that may cancel the step, and before those that read gradients. Order and name are those of
    fastai's MixedPrecision: by that name fastai's `load_learner` finds it on a CPU, and calls `to_fp32`.
    """

    order, name, done = MixedPrecision.order, "mixed_precision", False

    def before_step(self):
        self.learn.scaler.unscale_(self.learn.torchs_optimizer)
        self.done = True

    def after_step(self):
        if self.done:  # else the step was cancelled before
            self.learn.scaler.update()
        self.done = False

    after_cancel_batch = after_fit = after_step  # if a callback cuts the step short


class SGDLearner(Looks):
    """A Learner that trains with plain SGD, v = mom * v + (g + wd * w), w = w - lr * v, or another of OPTIMIZERS.

    All that fastai's Learner takes and does is here too (docs/fastai.md). `learn.recorder.rows` holds a dict an epoch.
    Raises Diverged on a loss that is not finite.
    """

    def __init__(
        self,
        dls,  # DataLoaders: train, valid and, where `dls.test` stands, test
        model,  # maps images (n, 3, h, w) to logits (n, classes)
        loss_func=None,  # None: that of the data, or cross-entropy
        lr=0.1,  # learning rate, where `fit` gets none
        mom=0.9,  # momentum
        optimizer="sgd",  # one of OPTIMIZERS
        accumulate=1,  # batches whose mean loss makes one update
        wd=5e-4,  # L2 penalty of weights; norms and biases have none, unless wd_bn_bias
        precision="float32",  # float32, bf16 or fp16: the format of matrix products in forward passes
        opt_func=None,  # fastai's, in the place of `optimizer` and `mom`: a function that makes an optimizer
        splitter=split,  # fastai's: model -> lists of parameters, one for each group of layers
        cbs=None,  # further callbacks
        **kwargs,  # as fastai's Learner
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}; or pass opt_func")
        self.mom = mom if opt_func is None else None
        self.accumulate, self.parallel, self.scaler = accumulate, None, None
        self.adding = None  # (epoch, number) of the group of batches whose gradients are being added up
        self.first_epoch = self.first_batch = 0  # where the fit begins; Checkpoint sets them when a run is resumed
        self.epochs_trained = 0  # over all fits: order and augmentation of the next epoch are a function of it
        self.dls = dls  # `device`, in the next line, reads it
        model = model.to(self.device, memory_format=torch.channels_last)
        loss_func = loss_func or getattr(dls.train_ds, "loss_func", None) or CrossEntropyLossFlat()
        if opt_func is None:
            opt_func = maker(optimizer, mom)
        elif isinstance(opt_func, OptimWrapper):
            raise ValueError("opt_func is an optimizer that exists already; pass partial(OptimWrapper, opt=…)")
        elif isinstance(opt_func, partial) and opt_func.func is OptimWrapper:
            opt_func = partial(GroupedOptimizer, *opt_func.args, **opt_func.keywords)
        options = dict(opt_func=opt_func, lr=lr, wd=wd, splitter=splitter, cbs=cbs)
        super().__init__(dls, model, loss_func, **options, **kwargs)
        self.lock = threading.RLock()  # fastai's Lock would hang if a callback evaluates within an evaluation
        self.set_precision(precision)

    compiled = None  # the compiled model, for training steps; the callback Compile sets it

    @property
    def device(self):
        """The device of the loaders. torch's loaders have none: then it is the one that fastai trains on."""
        return torch.device(getattr(self.dls, "device", default_device()) or "cpu")

    def set_precision(self, precision, **scaler):
        """Computes forward passes in float32, bf16 or fp16 from now on. Raises ValueError for fp16 off CUDA."""
        if precision not in DTYPES or (precision == "fp16" and self.device.type != "cuda"):
            raise ValueError(f"precision must be float32 or bf16, or fp16 on a CUDA device, not {precision!r}")
        self.dtype = DTYPES[precision]
        self.scaler = torch.amp.GradScaler("cuda", **scaler) if precision == "fp16" else None
        self.remove_cb(Unscale)
        return self.add_cb(Unscale) if self.scaler else self

    to_fp16 = partialmethod(set_precision, "fp16")
    to_bf16 = partialmethod(set_precision, "bf16")
    to_fp32 = partialmethod(set_precision, "float32")

    def add_cb(self, cb):
        """As fastai's. Raises ValueError for a callback that could have no effect here."""
        cb = cb() if isinstance(cb, type) else cb
        for kind in type(cb).__mro__:
            if kind.__name__ in REFUSED:
                raise ValueError(f"{type(cb).__name__} has no effect on this Learner; {REFUSED[kind.__name__]}")
        if type(cb) is Recorder:
            self.remove_cb(EpochRecorder)
            cb = EpochRecorder(cb.add_time, cb.train_metrics, cb.valid_metrics, cb.smooth_loss.beta)
        return super().add_cb(cb)

    def _call_one(self, event_name):
        """As fastai's, but faster: an event of the batch loop goes only to callbacks that have a method for it."""
        for cb in self.cbs.sorted("order"):
            own = hasattr(type(cb), event_name) or event_name in vars(cb) or type(cb).__call__ is not Callback.__call__
            if own or event_name not in _inner_loop:
                cb(event_name)

    def _bn_bias_state(self, with_bias):
        """As fastai's; weight decay spares the tokens and position embeddings of transformers too."""
        return L(undecayed(self.model)).map(self.opt.state) if with_bias else super()._bn_bias_state(False)

    def create_opt(self):
        """As fastai's, with `wd_bn_bias` for torch's optimizers too."""
        super().create_opt()
        if isinstance(self.opt, GroupedOptimizer):
            self.opt.split_by_decay()

    def one_batch(self, i, b):
        """As fastai's. What a batch draws (dropout, mixup) is a function of (seed, epoch, batch, rank), not a state."""
        seed = getattr(self.dls.train, "seed", None)
        if self.training and seed is not None:
            number = seed_from(seed, self.epochs_trained, i, ranks.rank())
            # torch's own seeds every kind of device, which takes long where there is only a CPU
            (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(number)
        super().one_batch(i, b)

    def _do_one_batch(self):
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            wrapped = self.compiled if self.parallel is None else self.parallel
            self.pred = (wrapped if self.training and wrapped is not None else self.model)(*self.xb)
        if self.dtype is not torch.float32:
            self.pred = to_float(self.pred)
        self("after_pred")
        if len(self.yb):
            self.loss_grad = self.loss_func(self.pred, *self.yb)
            self.loss = self.loss_grad.detach().clone()
        self("after_loss")
        if self.training and len(self.yb):
            self._do_grad_opt()

    def updates_after(self, i):
        """Whether the optimizer steps after batch `i` of the epoch."""
        return (i + 1) % self.accumulate == 0 or i + 1 == self.n_iter

    def _do_grad_opt(self):
        """As fastai's; with `accumulate` a step is made of the mean loss of so many batches, or of those left."""
        if self.accumulate > 1:
            first, group = self.iter - self.iter % self.accumulate, (self.epochs_trained, self.iter // self.accumulate)
            if group != self.adding:
                self.opt.zero_grad()  # drops the gradients of a group that a callback cut short
            self.adding, self.loss_grad = group, self.loss_grad / min(self.accumulate, self.n_iter - first)
        self._with_events(self._backward, "backward", CancelBackwardException)
        if self.updates_after(self.iter):
            self._with_events(self._step, "step", CancelStepException)
            self.opt.zero_grad()

    def _backward(self):
        (self.scaler.scale(self.loss_grad) if self.scaler else self.loss_grad).backward()

    def _step(self):
        if self.scaler:
            self.scaler.step(self.torchs_optimizer)
        else:
            self.opt.step()

    @property
    def torchs_optimizer(self):
        """What a gradient scaler steps."""
        return self.opt.opt if isinstance(self.opt, OptimWrapper) else self.opt

    def all_batches(self):
        """As fastai's; begins after the batches that a resumed epoch has had."""
        first, self.first_batch = self.first_batch, 0
        self.n_iter = len(self.dl)
        if first:
            self.dl.skip = first
            self.pct_train += first / (self.n_iter * self.n_epoch)
        for i, batch in enumerate(self.dl, first):
            self.one_batch(i, batch)

    def _do_epoch_train(self):
        self.dls.train.epoch = self.epochs_trained
        try:
            super()._do_epoch_train()
        except CancelEpochException:
            self.epochs_trained += 1
            raise
        self.epochs_trained += 1

    def _do_epoch(self):
        super()._do_epoch()
        if (test := getattr(self.dls, "test", None)) is not None and hasattr(self, "recorder"):
            evaluation = self.evaluate(test)
            self.recorder.row |= {"test_loss": evaluation.values[0], "test_acc": evaluation.accuracy}

    def _do_fit(self):
        if self.first_epoch and (bar := getattr(getattr(self, "progress", None), "mbar", None)):
            bar.update(0)  # fastprogress fails if the first number that it gets is not 0
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, "epoch", CancelEpochException)

    def fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        """As fastai's; however it ends, callbacks undo what they set. Raises Diverged on a loss that is not finite.

        Momentum starts at `mom`, whatever an earlier schedule left. Epochs before `start_epoch` are skipped.
        """
        if reset_opt or not self.opt:
            self.create_opt()
        if self.mom is not None and isinstance(self.opt, GroupedOptimizer):
            self.opt.set_hypers(mom=self.mom)
        self.opt.zero_grad()  # drops the gradients of an earlier fit that was cut short
        self.first_epoch, self.first_batch = start_epoch, 0
        self.epochs_trained = max(self.epochs_trained, start_epoch)  # an earlier process trained those before
        seeded = getattr(self.dls.train, "seed", None) is not None  # by one_batch: two learners must not begin alike
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else [], enabled=seeded):
            super().fit(n_epoch, lr, wd, cbs)

    def fit_flat_cos(self, n_epoch, *args, start_epoch=0, **kwargs):
        """As fastai's, which ignores `start_epoch`: here it raises ValueError."""
        if start_epoch:
            raise ValueError("fit_flat_cos cannot start at a later epoch; use fit with a ParamScheduler")
        return super().fit_flat_cos(n_epoch, *args, **kwargs)

    def _with_events(self, f, event_type, ex, final=noop):
        """As fastai's; after an error callbacks clean up as well, but SaveModelCallback does not load its best."""
        if event_type != "fit":
            return super()._with_events(f, event_type, ex, final)
        self.fitting, savers = True, L(cb for cb in self.cbs if isinstance(cb, SaveModelCallback))
        for cb in savers.filter(lambda cb: cb.reset_on_fit or cb.best is None):
            cb.last_saved_path = None
        try:
            super()._with_events(f, event_type, ex, final)
        except BaseException:
            for cb in self.cbs.sorted("order").filter(lambda cb: cb not in savers):
                for event in ("after_cancel_fit", "after_fit"):
                    with suppress(Exception):
                        cb(event)
            self._end_cleanup()
            raise
        finally:
            self.fitting = False

    def save(self, file, with_opt=True, **kwargs):
        """As fastai's; the file is whole or absent."""
        state = get_model(self.model).state_dict()
        state = {"model": state, "opt": self.opt.state_dict()} if with_opt and self.opt else state
        if not isinstance(file, (str, Path)):  # an open file
            torch.save(state, file, **kwargs)
            return file
        path, content = join_path_file(file, self.path / self.model_dir, ".pth"), io.BytesIO()
        if ranks.leads():
            torch.save(state, content, **kwargs)
            runs.write(path, content.getvalue())
        return path

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.RLock()


def build(config, dls, model, precision="float32", cbs=None):
    """The SGDLearner that `config` asks for. It shows no bar and no line for each epoch."""
    weight = class_weights(dls.train.labels, len(dls.vocab)) if config.class_weights else None
    alone = torch.device(dls.device).type == "cpu" and ranks.world() == 1 and not dls.train.fake_l.num_workers
    cbs = [*(cbs or []), ShareCores(adapt=config.threads == "auto" and not config.compile, looks=alone)]
    if config.freeze_epochs:  # as fastai's freeze: the head and the norms learn
        body = {*chain(*split(model)[:-1])} - {*norm_bias_params(model, with_bias=False)}
        cbs.append(Hold(body, range(config.freeze_epochs)))
    if early := getattr(model, "early", []):
        cbs.append(Hold(early, range(EARLY_EPOCHS, sys.maxsize), drop=config.compile))
    if config.grad_noise:
        plateau = Plateau(**plateau_options(config)) if config.perturb_on_plateau else None
        cbs.append(GradNoise(config.grad_noise, config.seed, config.monitor, plateau))
    if config.ema:
        cbs.append(EMA(config.ema))
    if config.mixup or config.cutmix:
        cbs.append(MixUp(config.mixup) if config.mixup else CutMix(config.cutmix))
        cbs[-1].stack_y = False  # fastai's sets it in before_train, and reads it even if the fit ended before that
    if config.stop_after:
        cbs.append(StopEarly(config.monitor, patience=config.stop_after))
    if config.compile:
        check_compiler(torch.device(dls.device), precision)
        cbs.append(Compile())
    dls.train.order = balanced_order if config.balanced_batches else shuffled
    options = dict(optimizer=config.optimizer, mom=config.momentum, wd=config.weight_decay)
    options["accumulate"] = config.accumulate
    if "macro_f1" in (config.monitor, config.keep):
        options["metrics"] = [skm_to_fastai(f1_score, name="macro_f1", average="macro", zero_division=0)]
    loss = TrainingLoss(label_smoothing=config.label_smoothing, weight=weight)
    learn = SGDLearner(dls, model, loss, precision=precision, cbs=cbs, path=dls.path, **options)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn
