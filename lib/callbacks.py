"""Callbacks: the record of a fit, plateau, the best weights, and what is printed while it runs."""

import math
import sys
import time

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from safetensors.torch import save as to_safetensors
from tqdm import tqdm

from lib.config import OneLine
from lib.schedules import Plateau

CHECK_EVERY = 50  # batches between looks at the losses: each look waits for the device


class Diverged(OneLine):
    """The training loss is not finite any more (exit status 3); names the epoch, batch and rate where it began."""


class EpochRecorder(Callback):
    """The record of a fit, and its guard against a loss that is not finite.

    `rows` has a dict an epoch: the columns of results.csv. `train_loss` is the mean over the epoch's images, each with
    the loss it had when it was trained on (fastai's is a moving average); `train_acc` is of the same augmented batches.
    Nothing waits for the device inside the batch loop but the look at the losses, every 50 batches and at the end.
    """

    name, order = "recorder", 50

    def __init__(self):
        self.reset()

    def reset(self):
        self.rows, self.start, self.pending = [], time.perf_counter(), []

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = list(state["rows"])
        self.start = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0)

    def before_train(self):
        hypers = self.opt.hypers[0]
        self.dl.epoch = self.learn.epochs_trained
        self.now = {
            "epoch": self.epoch + 1,
            "seconds": None,
            "lr": hypers["lr"],
            "momentum": hypers["mom"],
            "batch_size": getattr(self.dl, "bs", None) or self.dl.batch_size,
        }
        self.loss_sum, self.correct, self.n, self.n_batches = 0.0, 0, 0, len(self.dl)

    def after_batch(self):
        learn = self.learn
        if not learn.training:
            return
        correct = (learn.pred.detach().argmax(-1) == learn.yb[0]).sum()
        lr = learn.opt.opt.param_groups[0]["lr"]
        self.pending.append((learn.iter, lr, len(learn.yb[0]), learn.loss, correct))
        if len(self.pending) >= CHECK_EVERY:
            self.check()

    def check(self):
        """Adds up the batches since the last look. Raises Diverged naming the first whose loss is not finite."""
        if not self.pending:
            return
        batches, lrs, sizes, losses, correct = zip(*self.pending)
        losses = torch.stack(losses).float().cpu().double()
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            i = int(bad[0])
            raise Diverged(
                f"the loss is {losses[i].item()} at epoch {self.epoch + 1}, batch {batches[i] + 1}, lr {lrs[i]:.3g}; "
                f"try a smaller --lr, such as {lrs[i] / 10:.1g}"
            )
        self.loss_sum += (losses * torch.tensor(sizes)).sum().item()
        self.correct += int(torch.stack(correct).sum())
        self.n += sum(sizes)
        self.latest, self.pending = losses.mean().item(), []

    def after_train(self):
        self.check()
        if self.n:
            self.now |= {"train_loss": self.loss_sum / self.n, "train_acc": self.correct / self.n}
        self.learn.epochs_trained += 1

    def record_evaluation(self, name, loss, acc):
        self.now |= {f"{name}_loss": loss, f"{name}_acc": acc}

    def after_epoch(self):
        for name, value in self.now.items():
            if name.endswith("_loss") and not math.isfinite(value):  # what the epoch's last step did
                raise Diverged(
                    f"{name} is {value} after epoch {self.epoch + 1}, batch {self.n_batches}, lr {self.now['lr']:.3g}; "
                    f"try a smaller --lr, such as {self.now['lr'] / 10:.1g}"
                )
        self.now["seconds"] = time.perf_counter() - self.start
        self.rows.append(self.now)

    @property
    def metric_names(self):
        """As fastai's Recorder has it: the names of `values`, behind 'epoch'."""
        return ["epoch", *self.values_of(self.rows[-1] if self.rows else {}), "time"]

    @property
    def values(self):
        """As fastai's Recorder has it: a list of numbers an epoch."""
        return [list(self.values_of(row).values()) for row in self.rows]

    @staticmethod
    def values_of(row):
        return {k: v for k, v in row.items() if k.endswith(("_loss", "_acc"))}


class ReduceLROnPlateau(Callback):
    """Multiplies the learning rate by `factor` where `Plateau` sees one. Same rates as torch's scheduler of that name.

    torch.optim.lr_scheduler.ReduceLROnPlateau is the reference, bad-epoch count and all: with patience 2 the third bad
    epoch reduces. It is the only owner of the learning rate: raises ValueError beside fastai's schedulers.
    """

    order = 60

    def __init__(
        self,
        monitor="valid_loss",  # a metric of the record
        mode="min",  # min: lower is better; max
        factor=0.1,  # below 1
        patience=10,  # bad epochs forgiven
        threshold=1e-4,  # change that counts as better
        threshold_mode="rel",  # rel: share of the best; abs
        cooldown=0,  # epochs after a reduction that are not counted
        min_lr=0.0,  # the rate does not go below
        eps=1e-8,  # a smaller change is not made
    ):
        if factor >= 1:
            raise ValueError(f"factor must be below 1, not {factor}")
        self.monitor, self.factor, self.min_lr, self.eps = monitor, factor, min_lr, eps
        self.options = dict(
            mode=mode, threshold=threshold, threshold_mode=threshold_mode, patience=patience, cooldown=cooldown
        )
        self.plateau = Plateau(**self.options)

    def before_fit(self):
        self.run = not hasattr(self, "lr_finder") and not hasattr(self, "gather_preds")  # as fastai's trackers
        if not self.run:
            return
        owners = [cb for cb in self.learn.cbs if isinstance(cb, (ParamScheduler, ReduceLROnPlateau))]
        if len(owners) > 1:
            raise ValueError("two owners of the learning rate: " + " and ".join(type(cb).__name__ for cb in owners))
        self.plateau, self.reductions = Plateau(**self.options), []

    def after_epoch(self):
        recorder = self.learn.recorder
        found = dict(zip(recorder.metric_names[1:], recorder.values[-1]))
        if self.monitor not in found:
            raise ValueError(f"monitor {self.monitor!r} is not among {', '.join(found)}")
        if self.plateau.step(found[self.monitor]):
            self.reduce()

    def reduce(self):
        old = [h["lr"] for h in self.opt.hypers]
        new = [max(lr * self.factor, self.min_lr) for lr in old]
        new = [n if o - n > self.eps else o for o, n in zip(old, new)]
        self.opt.set_hypers(lr=new)
        if new != old:
            self.reductions.append((self.epoch + 1, new[0]))

    def state_dict(self):
        return {"plateau": self.plateau.state_dict(), "reductions": list(self.reductions)}

    def load_state_dict(self, state):
        self.plateau.load_state_dict(state["plateau"])
        self.reductions = [tuple(r) for r in state["reductions"]]


class KeepBest(Callback):
    """Keeps the weights of the epoch with the best valid accuracy (ties: lower valid loss), in memory and as a file."""

    order = 70

    def __init__(
        self,
        save=None,  # called with the safetensors bytes of each new best
    ):
        self.save, self.best, self.epoch_number, self.state = save, (-1.0, -math.inf), None, None

    def after_epoch(self):
        row = self.recorder.rows[-1]
        score = (row["valid_acc"], -row["valid_loss"])
        if score > self.best:
            self.best, self.epoch_number = score, row["epoch"]
            self.state = {k: v.detach().cpu().clone().contiguous() for k, v in self.model.state_dict().items()}
            if self.save:
                self.save(to_safetensors(self.state))

    def state_dict(self):
        return {"best": self.best, "epoch_number": self.epoch_number, "state": self.state}

    def load_state_dict(self, state):
        self.best, self.epoch_number, self.state = tuple(state["best"]), state["epoch_number"], state["state"]


class Progress(Callback):
    """A line an epoch; on a terminal a bar over its batches as well."""

    order = 65

    def __init__(
        self,
        bar=True,  # whether a bar may be drawn; it is where stderr is a terminal
        on_epoch=None,  # called with the rows so far after each epoch
    ):
        self.bar, self.on_epoch = bar, on_epoch

    def before_train(self):
        self.tqdm = tqdm(
            total=len(self.dls.train),
            desc=f"epoch {self.epoch + 1}/{self.n_epoch}",
            unit="batch",
            leave=False,
            disable=not (self.bar and sys.stderr.isatty()),
            mininterval=0.2,
        )

    def after_batch(self):
        if self.training:
            self.tqdm.update()
            if not self.recorder.pending:
                self.tqdm.set_postfix(loss=f"{self.recorder.latest:.3f}", lr=f"{self.opt.hypers[0]['lr']:.3g}")

    def after_train(self):
        self.close()

    def close(self):
        """Takes the bar off the screen."""
        if hasattr(self, "tqdm"):
            self.tqdm.close()

    def after_epoch(self):
        rows = self.recorder.rows
        print(epoch_line(rows[-1], self.n_epoch), flush=True)
        plateau = getattr(self.learn, "reduce_lr_on_plateau", None)
        if plateau and plateau.reductions and plateau.reductions[-1][0] == rows[-1]["epoch"]:
            print(
                f"plateau: {plateau.monitor} stands still; lr {rows[-1]['lr']:.3g} -> {plateau.reductions[-1][1]:.3g}",
                flush=True,
            )
        if self.on_epoch:
            self.on_epoch(rows)


def epoch_line(row, n_epoch):
    parts = [f"epoch {row['epoch']:>{len(str(n_epoch))}}/{n_epoch}  lr {row['lr']:.3g}"]
    for name in ("train", "valid", "test"):
        if f"{name}_acc" in row:
            parts.append(f"{name} loss {row[f'{name}_loss']:.4f} acc {row[f'{name}_acc']:.4f}")
    return "  ".join([*parts, f"{row['seconds']:.0f} s"])
