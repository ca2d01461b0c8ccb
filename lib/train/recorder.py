"""The record of a fit, and what is printed while it runs."""

import math
import time

import torch
from fastai.callback.core import Callback
from tqdm import tqdm

from lib.cli import OneLine
from lib.train import ranks
from lib.train.plateau import ReduceLROnPlateau

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

    def partial(self):
        """The record of the epoch that is under way, as plain values."""
        self.check()
        seconds = time.perf_counter() - self.start
        return {"now": self.now, "sums": [self.loss_sum, self.correct, self.n], "seconds": seconds}

    def go_on(self, partial):
        """Takes up the record of an epoch where `partial` left it; call it behind `before_train`."""
        self.now, (self.loss_sum, self.correct, self.n) = dict(partial["now"]), partial["sums"]
        self.start = time.perf_counter() - partial["seconds"]

    def before_train(self):
        hypers = self.opt.hypers[0]
        self.dl.epoch = self.learn.epochs_trained
        self.now = {
            "epoch": self.epoch + 1,
            "seconds": None,
            "lr": hypers["lr"],
            "momentum": hypers.get("mom", 0.0),
            "batch_size": getattr(self.dl, "bs", None) or self.dl.batch_size,
        }
        self.loss_sum, self.correct, self.n, self.n_batches = 0.0, 0, 0, len(self.dl)

    def before_batch(self):
        learn = self.learn
        if learn.training:  # the schedule has set what this step is made with; behind it a warm-up takes its part back
            vars(self)["rate"] = learn.opt.opt.param_groups[0]["lr"]
            if learn.iter == 0:
                self.now |= {"lr": self.rate, "momentum": learn.opt.hypers[0].get("mom", 0.0)}

    def after_batch(self):
        learn = self.learn
        if not learn.training:
            return
        n = learn.dl.own(learn.iter) if learn.parallel else len(learn.yb[0])
        correct = (learn.pred.detach().argmax(-1) == learn.yb[0]).sum()
        self.pending.append((learn.iter, self.rate, n, learn.loss, correct))
        if len(self.pending) >= CHECK_EVERY:
            self.check()

    def check(self):
        """Adds up the batches since the last look. Raises Diverged naming the first whose loss is not finite."""
        if not self.pending:
            return
        batches, lrs, sizes, losses, correct = zip(*self.pending)
        sizes, losses = torch.tensor(sizes, dtype=torch.float64), torch.stack(losses).cpu().double()
        sums = torch.stack([losses * sizes, torch.stack(correct).cpu() * (sizes > 0), sizes])
        if self.learn.parallel:
            ranks.total(sums)
        losses = sums[0] / sums[2]
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            i = int(bad[0])
            raise Diverged(
                f"the loss is {losses[i].item()} at epoch {self.epoch + 1}, batch {batches[i] + 1}, lr {lrs[i]:.3g}; "
                f"try a smaller --lr, such as {lrs[i] / 10:.1g}"
            )
        self.loss_sum += sums[0].sum().item()
        self.correct += int(sums[1].sum())
        self.n += int(sums[2].sum())
        self.latest, self.pending = {"loss": losses.mean().item(), "acc": (sums[1].sum() / sums[2].sum()).item()}, []

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
        desc = f"epoch {self.epoch + 1}/{self.n_epoch}"
        options = dict(unit="batch", leave=False, mininterval=0.2, disable=None if self.bar else True)
        self.tqdm = tqdm(total=len(self.dls.train), initial=self.learn.first_batch, desc=desc, **options)

    def after_batch(self):
        if self.training:
            self.tqdm.update()
            record = self.recorder
            if not record.pending:
                done = (self.epoch + (self.iter + 1) / self.n_iter) / self.n_epoch
                left = tqdm.format_interval((time.perf_counter() - record.start) * (1 - done) / done)  # of all epochs
                latest = {name: f"{value:.3f}" for name, value in record.latest.items()}
                self.tqdm.set_postfix(**latest, lr=f"{record.rate:.3g}", left=left)

    def after_train(self):
        self.close()

    def close(self):
        """Takes the bar off the screen."""
        if hasattr(self, "tqdm"):
            self.tqdm.close()

    def after_epoch(self):
        rows = self.recorder.rows
        print(epoch_line(rows[-1], self.n_epoch), flush=True)
        owner = next((cb for cb in self.learn.cbs if isinstance(cb, ReduceLROnPlateau)), None)
        for name, changes in (("lr", owner.reductions), ("batch_size", getattr(owner, "growths", []))) if owner else ():
            if changes and changes[-1][0] == rows[-1]["epoch"]:
                old = owner.old_lr if name == "lr" else rows[-1][name]
                change = f"{name.replace('_', ' ')} {old:.4g} -> {changes[-1][1]:.4g}"
                print(f"plateau: {owner.monitor} stands still; {change}", flush=True)
        if self.on_epoch:
            self.on_epoch(rows)


def epoch_line(row, n_epoch):
    parts = [f"epoch {row['epoch']:>{len(str(n_epoch))}}/{n_epoch}  lr {row['lr']:.3g}"]
    for name in ("train", "valid", "test"):
        if f"{name}_acc" in row:
            parts.append(f"{name} loss {row[f'{name}_loss']:.4f} acc {row[f'{name}_acc']:.4f}")
    return "  ".join([*parts, f"{row['seconds']:.0f} s"])
