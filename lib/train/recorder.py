"""The record of a fit: fastai's Recorder with true means, the test set, and a guard against divergence."""

import math
import time

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.learner import AvgLoss, AvgSmoothLoss, Recorder
from fastai.learner import _maybe_item as value_of
from fastai.torch_core import find_bs
from fastcore.foundation import L
from fastprogress.fastprogress import format_time

from lib.cli import OneLine
from lib.train import ranks
from lib.train.plateau import check_sole_owner

CHECK_EVERY, CHECK_SECONDS = 50, 2  # batches or seconds from one look at the losses to the next: a look is a wait


class Diverged(OneLine):
    """The training loss is not finite any more (exit status 3). Names the epoch, batch and rate where it began."""


def diverged(name, value, place, batch, lr):
    where = f"{name} is {value} {place}, batch {batch}, lr {lr:.3g}"
    return Diverged(f"{where}; try a smaller learning rate, such as --lr {lr / 10:.1g}")


def n_correct(pred, targets):
    """How many of the predictions are right, a tensor that stays on its device; nan where targets are no classes."""
    tensors = isinstance(pred, torch.Tensor) and len(targets) > 0 and isinstance(targets[0], torch.Tensor)
    if not tensors or pred.ndim != 2 or targets[0].ndim != 1 or targets[0].is_floating_point():
        return torch.tensor(math.nan)
    return (pred.detach().argmax(1) == targets[0]).sum()


class SmoothLoss(AvgSmoothLoss):
    """fastai's moving average of the loss. It stays on the device, so no step waits for it."""

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().mean().float()
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class MeanLoss(AvgLoss):
    """fastai's mean of the loss. It stays on the device, so no batch waits for it."""

    def accumulate(self, learn):
        n = find_bs(learn.yb)
        self.total, self.count = self.total + learn.loss.detach().mean() * n, self.count + n


class Evaluation(Callback):
    """Loss, accuracy and metrics of one pass over a set."""

    order = 50

    def __init__(self, metrics):
        self.scores = [MeanLoss(), *metrics]
        self.before_validate()

    def before_validate(self):
        self.correct, self.n = 0, 0
        for score in self.scores:
            score.reset()

    def after_batch(self):
        if not self.training and len(self.yb):
            self.correct, self.n = self.correct + n_correct(self.pred, self.yb), self.n + find_bs(self.yb)
            for score in self.scores:
                score.accumulate(self.learn)

    @property
    def values(self):
        """[loss, metrics …]"""
        return L(self.scores).map(value_of)

    @property
    def accuracy(self):
        """The share of correct predictions; None before the first batch."""
        return float(self.correct) / self.n if self.n else None


class EpochRecorder(Recorder):
    """fastai's Recorder, with `train_loss` as the mean over the epoch's images (fastai's is a moving average).

    `rows` has a dict an epoch: the columns of results.csv, then the user's metrics. In `metric_names`
    and `values`, columns that fastai lacks come after the metrics. `hps` has learning rate and momentum of each step.
    (fastai's ParamScheduler puts its own record in its place.) Inside the batch loop, only the look at the losses
    waits for the device: every 50 batches or 2 seconds.
    """

    name = "recorder"

    def __init__(self, add_time=True, train_metrics=False, valid_metrics=True, beta=0.98):
        super().__init__(add_time, train_metrics, valid_metrics, beta)
        self.smooth_loss, self.rows, self.hps = SmoothLoss(beta), [], {"lr": [], "mom": []}
        self.lrs, self.iters, self.losses, self.values = [], [], [], []
        self.pending, self.metric_names = [], L()  # pending: batches that are not yet read from the device

    def before_fit(self):
        check_sole_owner(self.learn)
        super().before_fit()
        self.evaluation = Evaluation(self.metrics if self.valid_metrics else [])
        self.evaluation.learn = self.learn
        self.train_scores = self.metrics if self.train_metrics else L()  # the metrics that are taken in training too
        self.columns = ["lr", "train_acc", "valid_acc"]
        if getattr(self.dls, "test", None) is not None:
            self.columns += ["test_loss", "test_acc"]
        names = [name for name in self.metric_names if name != "time"]
        self.metric_names = L(*names, *self.columns, *(["time"] if self.add_time else []))
        self.rows, self.hps, self.start = [], {"lr": [], "mom": []}, time.perf_counter()
        self.under_way, self.pending, self.looked = None, [], time.perf_counter()
        self.begin_row()

    def begin_row(self):
        """Starts an empty row. What a callback cancels may be missing in it."""
        hypers = self.opt.hypers[-1]
        self.row = {"epoch": None, "seconds": None, "lr": hypers["lr"], "momentum": hypers.get("mom", 0.0)}
        self.in_epoch, self.trained, self.evaluated = False, [None] * (1 + len(self.train_scores)), []
        self.sums = [0.0, 0, 0]  # of losses, of correct predictions, of images
        self.settle()
        self.pending = []
        self.latest = {}  # loss and accuracy of the batches that were read last
        self.computed = False  # whether the batch under way has a loss

    def before_epoch(self):
        super().before_epoch()
        self.evaluation.before_validate()

    def before_train(self):
        super().before_train()
        self.in_epoch = True
        size = getattr(self.dl, "bs", None) or getattr(self.dl, "batch_size", None)
        self.row |= {"epoch": self.epoch + 1, "batch_size": size}
        if self.under_way:
            self.row, self.sums, self.under_way = dict(self.under_way["row"]), self.under_way["sums"], None

    def before_validate(self):
        self.evaluation.before_validate()

    def after_loss(self):
        self.computed = True

    def after_batch(self):
        learn = self.learn
        if not self.computed:  # a callback has cancelled the batch
            return
        self.computed = False
        if not learn.training:
            self.evaluation.after_batch()
        elif len(learn.yb):
            hypers = learn.opt.hypers[-1]
            lr, momentum = hypers["lr"], hypers.get("mom", 0.0)
            if learn.iter == 0:
                self.row |= {"lr": lr, "momentum": momentum}
            n = learn.dl.shares(learn.iter)[ranks.rank()] if learn.parallel else find_bs(learn.yb)
            loss = learn.loss.detach().mean()
            self.pending.append((learn.iter, lr, n, loss, n_correct(learn.pred, learn.yb)))
            self.smooth_loss.accumulate(learn)
            learn.smooth_loss = self.smooth_loss.value
            self.losses.append(learn.smooth_loss)
            self.lrs.append(lr)
            self.hps["lr"].append(lr), self.hps["mom"].append(momentum)
            for metric in self.train_scores:
                metric.accumulate(learn)
            late = time.perf_counter() > self.looked + CHECK_SECONDS and not learn.parallel  # ranks go by count
            if len(self.pending) >= CHECK_EVERY or late:
                self.check()

    def check(self):
        """Adds up the batches since the last look. Raises Diverged naming the first whose loss is not finite."""
        if not self.pending:
            return
        batches, lrs, sizes, losses, correct = zip(*self.pending)  # size 0: this rank had no image that counts
        self.settle()
        self.looked = time.perf_counter()
        sizes, losses = torch.tensor(sizes, dtype=torch.float64), torch.stack(losses).cpu().double()
        sums = torch.stack([losses * sizes, torch.stack(correct).cpu().double() * (sizes > 0), sizes])
        if self.learn.parallel:
            dist.all_reduce(sums)  # the same to the bit on each rank
        losses = sums[0] / sums[2]
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            i = int(bad[0])
            raise diverged("the loss", losses[i].item(), f"at epoch {self.epoch + 1}", batches[i] + 1, lrs[i])
        self.sums = [a + b for a, b in zip(self.sums, sums.sum(1).tolist())]
        self.latest, self.pending = {"loss": losses.mean().item(), "acc": (sums[1].sum() / sums[2].sum()).item()}, []

    def after_train(self):
        self.check()
        loss, correct, n = self.sums
        if n:
            self.row |= {"train_loss": loss / n, "train_acc": correct / n}
        self.trained = [self.row.get("train_loss"), *map(value_of, self.train_scores)]

    def after_validate(self):
        values = list(self.evaluation.values)
        self.evaluated = values if self.valid_metrics else []
        self.row |= {"valid_loss": values[0], "valid_acc": self.evaluation.accuracy}

    def after_epoch(self):
        self.row["epoch"] = self.epoch + 1
        for name, value in self.row.items():
            if name.endswith("_loss") and value is not None and not math.isfinite(value):  # the last step did it
                where = f"after epoch {self.row['epoch']}"
                raise diverged(name, value, where, len(self.learn.dls.train), self.row["lr"])
        self.row["seconds"] = time.perf_counter() - self.start
        values = [*self.trained, *self.evaluated]  # None, below, for what a callback cancelled
        n_fastais = len(self.metric_names) - len(["epoch", *self.columns]) - self.add_time
        values += [None] * (n_fastais - len(values))
        self.row |= {n: v for n, v in zip(self.metric_names[1:], values) if n not in self.row}
        self.rows.append(self.row)
        self.learn.final_record = L(*values, *(self.row.get(name) for name in self.columns))
        self.values.append(self.learn.final_record)
        self.iters.append(self.smooth_loss.count)
        time_taken = [format_time(time.time() - self.start_epoch)] if self.add_time else []
        self.log = L(self.epoch, *self.learn.final_record, *time_taken)
        self.logger(self.log)
        self.begin_row()

    def settle(self):
        """Reads the moving averages of the pending batches from the device."""
        if self.pending:
            recent = slice(-len(self.pending), None)
            self.losses[recent] = torch.stack(self.losses[recent]).cpu()

    after_fit = settle  # an epoch that was cut short leaves pending batches

    def state_dict(self):
        """The record so far, that of the epoch under way included, as plain values and a tensor."""
        under_way = None
        if self.in_epoch:
            under_way = {"row": {**self.row, "seconds": time.perf_counter() - self.start}, "sums": list(self.sums)}
        hps = torch.tensor([*self.hps.values()], dtype=torch.float64)
        return {"rows": self.rows, "under_way": under_way, "hps": hps}

    def load_state_dict(self, state):
        self.rows, self.under_way = list(state["rows"]), state["under_way"]
        self.values = [L(row.get(name) for name in self.metric_names[1:] if name != "time") for row in self.rows]
        last = self.under_way["row"] if self.under_way else self.rows[-1]
        self.hps = dict(zip(("lr", "mom"), state["hps"].tolist(), strict=True))
        self.start = time.perf_counter() - last["seconds"]
