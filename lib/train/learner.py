"""SGDLearner: fastai's Learner with torch's optimizers, a true record, and evaluation that disturbs nothing."""

import copy
import sys
from contextlib import contextmanager
from functools import partial

import torch
from fastai.callback.core import (
    CancelBackwardException,
    CancelEpochException,
    CancelStepException,
    CancelValidException,
    TrainEvalCallback,
    _inner_loop,
)
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L
from torch import nn

from lib import models
from lib.config import MOMENTUM
from lib.machine import cpu_name
from lib.train import lr_range, ranks
from lib.train.averaging import EMA, Hold, SmallImages
from lib.train.lecture import GradNoise, mixed
from lib.train.optimizers import OPTIMIZERS, body, decay_split
from lib.train.plateau import Plateau, plateau_options
from lib.train.recorder import EpochRecorder

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


EARLY_EPOCHS = 3  # in which a network's `early` parameters learn (Jordan, arXiv 2404.00498)


def class_weights(dls):
    """n / (C n_c) for n training images, n_c of them of class c of C: (C,) float32. Their mean over the images is 1."""
    counts = torch.bincount(torch.from_numpy(dls.train.labels), minlength=len(dls.vocab))
    return (counts.sum() / (len(counts) * counts)).float().to(dls.device)


class WeightedLoss(CrossEntropyLossFlat):
    """The mean loss of a batch, each image weighted by its class; labels may be smoothed.

    torch would weight the smoothed share of a label by the classes that it goes to: a rare one would be taught to all.
    """

    def __call__(self, pred, target, **kwargs):
        if self.func.reduction != "mean":
            return super().__call__(pred, target, **kwargs)
        options = dict(reduction="none", label_smoothing=self.func.label_smoothing)
        weight = self.func.weight[target]
        return (weight * nn.functional.cross_entropy(pred, target, **options)).sum() / weight.sum()


@contextmanager
def kept_modes(model):
    """Puts every module of `model` back into the mode, train or eval, that it had."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


class SGDLearner(Learner):
    """A Learner that trains with plain SGD, v = mom * v + (g + wd * w), w = w - lr * v, or another of OPTIMIZERS.

    `learn.recorder.rows` holds a dict an epoch, the columns of results.csv. Raises `Diverged` on a non-finite loss.
    """

    def __init__(
        self,
        dls,  # DataLoaders: train, valid and, where `dls.test` stands, test
        model,  # maps images (n, 3, h, w) to logits (n, classes)
        loss_func=None,  # None: cross-entropy
        lr=0.1,  # learning rate, where `fit` gets none
        mom=0.9,  # momentum
        optimizer="sgd",  # one of OPTIMIZERS
        accumulate=1,  # batches whose mean loss makes one update
        wd=5e-4,  # L2 penalty of weights; norms and biases have none
        precision="float32",  # float32, bf16 or fp16: the format of matrix products in training
        channels_last=True,  # memory format of images and weights
        cbs=None,  # further callbacks
        **kwargs,  # as fastai's Learner
    ):
        self.dtype, self.scaler, self.accumulate = DTYPES[precision], None, accumulate
        self.has_momentum = optimizer in MOMENTUM
        self.first_epoch = self.first_batch = 0  # of the fit; more where a callback has put back one that was cut short
        self.parallel = None  # the model as `ranks.DataParallel` trains it
        self.average = None  # the model as `callbacks.EMA` averages it
        self.side = None  # pixels that images are brought to on their way into the model, by `callbacks.SmallImages`
        self.epochs_trained = 0  # over all fits: what order and augmentation of the next epoch are a function of
        device = torch.device(dls.device or "cpu")
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        model = model.to(device, memory_format=self.layout)
        opt_func = partial(OptimWrapper, opt=partial(OPTIMIZERS[optimizer], mom=mom))
        own = dict(lr=lr, splitter=decay_split, wd=[wd, 0.0], moms=(mom, mom, mom), default_cbs=False)
        cbs = [TrainEvalCallback(), EpochRecorder(), *(cbs or [])]
        super().__init__(dls, model, loss_func or CrossEntropyLossFlat(), opt_func=opt_func, cbs=cbs, **own, **kwargs)
        if self.dtype is torch.float16 and device.type == "cuda":
            self.scaler = torch.amp.GradScaler("cuda")

    @property
    def evaluated(self):
        """The model that is evaluated and kept: the average where there is one, else the model itself."""
        return self.model if self.average is None else self.average

    @property
    def kind(self):
        """The kind of device that computes: cpu, cuda, …"""
        return torch.device(self.dls.device or "cpu").type

    def autocast(self):
        """The context in which training's forward passes run."""
        return torch.autocast(self.kind, self.dtype, enabled=self.dtype is not torch.float32)

    def _call_one(self, event_name):
        """As fastai's, but callbacks are not asked about events of a batch that they do not have: it takes longer."""
        for cb in self.cbs.sorted("order"):
            if event_name not in _inner_loop or hasattr(type(cb), event_name) or event_name in vars(cb):
                cb(event_name)

    def _split(self, b):
        super()._split(tuple(t.as_subclass(torch.Tensor) if isinstance(t, torch.Tensor) else t for t in b))
        self.xb = tuple(self.resized(x) for x in self.xb)

    def resized(self, x):
        """Images (n, 3, h, w) at `side` x `side` pixels, bilinear and antialiased as Pillow has it; or as they are."""
        if self.side is None:
            return x
        how = dict(mode="bilinear", antialias=True)
        return nn.functional.interpolate(x, (self.side, self.side), **how).contiguous(memory_format=self.layout)

    def _do_one_batch(self):
        if self.training:  # what networks draw (dropout) is a function of (seed, epoch, batch, rank), and no state
            seed = mixed(getattr(self.dls.train, "seed", 0), self.epochs_trained, self.iter, ranks.rank())
            # torch's own seeds every kind of device, which takes long where there is only a CPU
            (torch.default_generator if self.kind == "cpu" else torch).manual_seed(seed)
        with self.autocast():
            self.pred = (self.parallel or self.model)(*self.xb)
        if self.pred.dtype is not torch.float64:
            self.pred = self.pred.float()
        self("after_pred")
        if len(self.yb):
            self.loss_grad = self.loss_func(self.pred, *self.yb)
            self.loss = self.loss_grad.detach()
        self("after_loss")
        if self.training and len(self.yb):
            self._do_grad_opt()

    def _do_grad_opt(self):
        """As fastai's; with `accumulate` a step is made of the mean loss of so many batches, or of those left."""
        if self.accumulate == 1:
            return super()._do_grad_opt()
        first = self.iter - self.iter % self.accumulate
        group = min(self.accumulate, self.n_iter - first)
        self.loss_grad = self.loss_grad / group
        self._with_events(self._backward, "backward", CancelBackwardException)
        if self.iter == first + group - 1:
            self._with_events(self._step, "step", CancelStepException)
            self.opt.zero_grad()

    def _backward(self):
        (self.scaler.scale(self.loss_grad) if self.scaler else self.loss_grad).backward()

    def _step(self):
        if self.scaler:
            self.scaler.step(self.opt.opt)
            self.scaler.update()
        else:
            self.opt.step()

    def _do_fit(self):
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, "epoch", CancelEpochException)

    def all_batches(self):
        """As fastai's; begins behind the batches that a resumed epoch has had."""
        first, self.first_batch = self.first_batch, 0
        self.n_iter = len(self.dl)
        if first:
            self.dl.skip = first
        for batch in enumerate(self.dl, first):
            self.one_batch(*batch)

    def _do_epoch(self):
        self._do_epoch_train()
        self._with_events(self._evaluate, "validate", CancelValidException)

    def _evaluate(self):
        for name in ("valid", "test"):
            dl = getattr(self.dls, name, None)
            if dl is not None:
                self.recorder.record_evaluation(name, *self.loss_and_accuracy(dl))

    @torch.no_grad()
    def loss_and_accuracy(self, dl, float32=False):
        """Mean cross-entropy and accuracy over every image of `dl`, in eval mode; mode and everything else as before.

        In training's precision, or with `float32` in float32.
        """
        sums = torch.zeros(3, dtype=torch.float64)  # of losses, of correct predictions, of images
        for _, logits, targets in self.logits(dl, float32):
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            sums += torch.tensor([loss, (logits.argmax(1) == targets).sum().item(), len(targets)])
        loss, correct, n = (ranks.total(sums) if self.parallel else sums).tolist()
        return loss / n, correct / n

    @torch.no_grad()
    def logits(self, dl, float32=True, mirror=False):
        """Yields (images, logits in float32, targets or None) for each batch of `dl`, the model in eval mode.

        With `mirror` the images are turned left to right.
        """
        epoch = getattr(dl, "epoch", None)
        with kept_modes(model := self.evaluated):
            model.eval()
            for b in dl:
                x, *y = (t.as_subclass(torch.Tensor) for t in self._set_device(b))
                x = self.resized(x.flip(3) if mirror else x)
                with self.autocast() if not float32 else torch.autocast(x.device.type, enabled=False):
                    logits = model(x).float()
                yield x, logits, y[0] if y else None
        if epoch is not None:
            dl.epoch = epoch

    def validate(self, ds_idx=1, dl=None, cbs=None):
        """(loss, accuracy) on a loader, by default valid. Unlike fastai's it touches no record and no callback."""
        return self.loss_and_accuracy(dl if dl is not None else self.dls[ds_idx])

    def validation_context(self, cbs=None, inner=False):
        """As fastai's, without a `before_fit` for callbacks that are in the middle of one; state is restored after."""
        context = super().validation_context(cbs, inner=True)
        context.default = L(self.undisturbed()) + context.default
        return context

    @contextmanager
    def undisturbed(self):
        """Puts modes, callbacks and the state of the loop back as they were; inside, no callback but fastai's own."""
        names = ("training", "epoch", "iter", "n_iter", "dl", "xb", "yb", "pred", "loss")
        kept = {n: getattr(self, n) for n in names if hasattr(self, n)}
        others = [cb for cb in self.cbs if not isinstance(cb, TrainEvalCallback)]
        with kept_modes(self.model), self.removed_cbs(others):
            try:
                yield
            finally:
                for n, v in kept.items():
                    setattr(self, n, v)

    def fit(self, n_epoch, lr=None, wd=None, **kwargs):
        """Trains `n_epoch` epochs; `learn.recorder.rows` starts anew. Raises Diverged on a non-finite loss."""
        self.recorder.reset()
        self.first_epoch = self.first_batch = 0
        super().fit(n_epoch, lr, [wd, 0.0] if isinstance(wd, (int, float)) else wd, **kwargs)

    def freeze_to(self, n):
        """As fastai's for 0. Its groups are layers; ours tell what decays, and frozen would be weights but no bias."""
        if n:
            raise NotImplementedError("the parameter groups are no layers; use the Hold callback, or --freeze-epochs")

    def probe(self):
        """A learner on a copy of the model, with an optimizer and no callbacks, for looks that leave no trace."""
        twin = copy.copy(self)
        twin.cbs, twin.model, twin.opt = type(self.cbs)(), copy.deepcopy(self.model), None
        twin.accumulate, twin.parallel, twin.average = 1, None, None
        twin.scaler = torch.amp.GradScaler("cuda") if self.scaler else None
        twin.create_opt()
        twin.opt.set_hypers(wd=self.wd)
        twin.training = True
        return twin

    def lr_find(self, start_lr=1e-5, end_lr=10, num_it=100, stop_div=True, linear=False, on_valid=False, **fastais):
        """The LR range test: see `lr_range.find`. fastai's `suggest_funcs` and `show_plot` are taken and not needed."""
        return lr_range.find(self, start_lr, end_lr, num_it, stop_div, linear, on_valid)


def build(config, dls, model, precision="float32", cbs=None):
    """The SGDLearner that `config` asks for."""
    kind, weight = (WeightedLoss, class_weights(dls)) if config.class_weights else (CrossEntropyLossFlat, None)
    loss = kind(weight=weight, label_smoothing=config.label_smoothing)
    cbs = list(cbs or [])
    if config.small_epochs:
        cbs.append(SmallImages(config.small_epochs, models.small_side(dls.store.size)))
    if config.freeze_epochs:
        cbs.append(Hold(body(model), range(config.freeze_epochs)))
    if early := getattr(model, "early", []):
        cbs.append(Hold(early, range(EARLY_EPOCHS, sys.maxsize)))
    if config.grad_noise:
        plateau = Plateau(**plateau_options(config)) if config.perturb_on_plateau else None
        cbs.append(GradNoise(config.grad_noise, config.seed, config.monitor, plateau))
    if config.ema:
        cbs.append(EMA(config.ema))
    how = dict(mom=config.momentum, wd=config.weight_decay, optimizer=config.optimizer, accumulate=config.accumulate)
    return SGDLearner(dls, model, loss, precision=precision, cbs=cbs, path=dls.path, **how)


def facts(config, learn, precision, threads):
    """What `auto` became, and what the data is, for env.json and the first lines of a run."""
    dls = learn.dls
    sets = {"train": dls.train, "valid": dls.valid, "test": dls.test}
    return {
        "device": str(dls.device),
        "device_name": torch.cuda.get_device_name(dls.device) if dls.device.type == "cuda" else cpu_name(),
        "precision": precision,
        "threads": threads,
        "workers": dls.train.fake_l.num_workers,
        "size": dls.store.size,
        "batch_size": dls.train.bs,
        "images": {name: len(dl.dataset) for name, dl in sets.items()},
        "skipped": len(dls.store.skipped),
        "classes": list(dls.vocab),
        "chosen_on": "test" if dls.valid.ids == dls.test.ids else "valid",
        "data_fingerprint": dls.store.fingerprint(),
        "params": sum(p.numel() for p in learn.model.parameters()),
    }


def banner(config, facts, where):
    """The first lines of a run."""
    images = ", ".join(f"{n:,} {name}" for name, n in facts["images"].items())
    if facts["skipped"]:
        images += f" ({facts['skipped']:,} that cannot be read are skipped: skipped.csv)"
    last, side = config.small_epochs, facts["size"]
    at_first = f" ({models.small_side(side)} x {models.small_side(side)} until epoch {last})" if last else ""
    return (
        f"{facts['device']} ({facts['device_name']}), {facts['precision']}, {facts['threads']} threads, "
        f"{facts['workers']} workers\n"
        f"{config.data}: {images}; {len(facts['classes'])} classes, {side} x {side} pixels{at_first}\n"
        f"{config.model}: {facts['params']:,} parameters; {config.schedule}, {config.epochs} epochs, "
        f"batches of {config.batch_size}, seed {config.seed}\n-> {where}"
    )
