"""What is printed while a fit or a range test runs: lines and, on a terminal, a bar over its batches."""

import time

from fastai.callback.core import Callback
from tqdm import tqdm

from lib.cli import duration, until
from lib.train.plateau import ReduceLROnPlateau, StopEarly


def bar_of(shown, **options):
    """tqdm's bar over batches. It appears only on a terminal, and only if `shown`."""
    return tqdm(unit="batch", leave=False, mininterval=0.2, disable=None if shown else True, **options)


class EpochLines(Callback):
    """A line an epoch; on a terminal a bar over its batches as well."""

    order, train_only = 65, True

    def __init__(
        self,
        bar=True,  # whether a bar may be drawn; it is drawn where stderr is a terminal
        on_epoch=None,  # called with the rows so far after each epoch
    ):
        self.bar, self.on_epoch, self.tqdm = bar, on_epoch, None

    def before_train(self):
        desc = f"epoch {self.epoch + 1}/{self.n_epoch}"
        self.tqdm = bar_of(self.bar, total=len(self.dls.train), initial=self.learn.first_batch, desc=desc)

    def after_batch(self):
        if self.training:
            self.tqdm.update()
            record = self.learn.recorder
            if not record.pending:
                done = (self.epoch + (self.iter + 1) / self.n_iter) / self.n_epoch
                left = tqdm.format_interval((time.perf_counter() - record.start) * (1 - done) / done)  # of all epochs
                latest = {name: f"{value:.3f}" for name, value in record.latest.items()}
                self.tqdm.set_postfix(**latest, lr=f"{record.lrs[-1]:.3g}", left=left)

    def after_fit(self):
        if self.tqdm is not None:
            self.tqdm.close()

    after_train = after_fit

    def after_epoch(self):
        rows = self.learn.recorder.rows
        stop = next((cb for cb in self.learn.cbs if isinstance(cb, StopEarly)), None)
        stops = stop and stop.wait >= stop.patience and len(rows) < self.n_epoch
        print(epoch_line(rows[-1], self.n_epoch) + ("" if stops else time_left(rows, self.n_epoch)), flush=True)
        for owner in (cb for cb in self.learn.cbs if isinstance(cb, ReduceLROnPlateau)):
            for change in owner.changes:
                print(f"plateau: {owner.monitor} stands still; {change}", flush=True)
        if stops:
            print(f"stopped: {stop.monitor} is no better since epoch {len(rows) - stop.wait}", flush=True)
        if self.on_epoch:
            self.on_epoch(rows)


class RangeTestLines:
    """A bar over the updates of a range test. Where there is none: a line, at most one each `pause` seconds."""

    def __init__(
        self,
        most,  # updates of the whole test
        bar=True,  # whether a bar may be drawn; it is drawn where stderr is a terminal
        pause=30,
    ):
        self.tqdm = bar_of(bar, total=most, desc="range test")
        self.pause, self.said = pause, time.perf_counter()

    def after_update(self, done, loss):
        """To be called after each update with how many there were, and its loss."""
        self.tqdm.update()
        self.tqdm.set_postfix(loss=f"{loss:.3f}")
        if self.tqdm.disable and time.perf_counter() - self.said >= self.pause:
            self.said = time.perf_counter()
            print(f"range test: {done} of {self.tqdm.total} batches, loss {loss:.4f}", flush=True)


def time_left(rows, n_epoch):
    """', 41 min left (until 13:40)', at the pace of the epochs so far; nothing where little is left."""
    left = rows[-1]["seconds"] / len(rows) * (n_epoch - len(rows))
    return f", {duration(left)} left ({until(left)})" if left >= 60 else ""


def epoch_line(row, n_epoch):
    """'epoch  3/50  lr 0.1  train loss 1.2345 acc 0.5678  valid …  12 s'"""
    parts = [f"epoch {row['epoch']:>{len(str(n_epoch))}}/{n_epoch}  lr {row['lr']:.3g}"]
    for name in ("train", "valid", "test"):
        if f"{name}_acc" in row:
            parts.append(f"{name} loss {row[f'{name}_loss']:.4f} acc {row[f'{name}_acc']:.4f}")
    return "  ".join([*parts, f"{row['seconds']:.0f} s"])
