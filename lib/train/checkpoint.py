"""weights/last.pt: all that a run needs to go on. Whole or absent; the one before it is kept, and used if need be."""

import io
import os
import signal
import sys
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.callback.core import Callback

from lib import machine
from lib.cli import BadInput, one_line, refused
from lib.runs import write
from lib.train import ranks

FORMAT = 6  # of the checkpoint; another one is refused
GRACE = 5  # seconds in which a second signal is ignored: torchrun and uv send their processes the same one again


class Interrupted(KeyboardInterrupt):
    """A first Ctrl-C or SIGTERM, after the checkpoint was saved (exit status 130)."""


class Checkpoint(Callback):
    """Saves what the next epoch, or the next batch, starts from, and starts a fit from what was saved.

    Order, augmentation and dropout are functions of (seed, epoch, batch, image), so no generator's state is in it.
    Inside `signals`, a Ctrl-C or SIGTERM lets the batch or evaluation under way end, and saves; then Interrupted is
    raised. A second one stops at once. Within GRACE seconds it is ignored if it may be the first one, sent again.
    """

    order, train_only = 80, True  # after all callbacks whose states it keeps: those with a state_dict of their own

    def __init__(
        self,
        path,  # file of the checkpoint
        state=None,  # what `load` gave: the fit goes on from there
        every_seconds=0,  # within an epoch; 0: at its end alone
    ):
        self.path, self.state, self.every_seconds = path, state, every_seconds
        self.signalled = 0.0

    def keepers(self):
        return [cb for cb in self.learn.cbs if hasattr(type(cb), "state_dict")]

    def before_fit(self):
        self.saved_at = time.monotonic()
        state, self.state = self.state, None
        if state is None:
            return
        learn = self.learn
        with refused(f"{self.path}: is of another run than its args.yaml says"):
            learn.model.load_state_dict(state["model"])
            learn.opt.load_state_dict(state["optimizer"])
            if learn.scaler:
                learn.scaler.load_state_dict(state["scaler"])
            for cb in self.keepers():
                cb.load_state_dict(state["callbacks"][cb.name])
            learn.epochs_trained, learn.first_batch = int(state["epochs_trained"]), int(state["batches"])
            if type(state["batches"]) is not int or bool(state["batches"]) != (learn.recorder.under_way is not None):
                raise ValueError("batches and the record of them do not go together")
            learn.first_epoch = len(learn.recorder.rows)

    def after_batch(self):
        learn = self.learn
        if not learn.training or not learn.updates_after(learn.iter):
            return
        due = self.every_seconds and time.monotonic() - self.saved_at > self.every_seconds
        signalled, due = ranks.any_of(self.signalled, due)
        if signalled or due:
            self.save(learn.iter + 1)
        if signalled:
            raise Interrupted

    def after_epoch(self):
        self.save()
        if ranks.any_of(self.signalled)[0]:
            raise Interrupted

    def save(self, batches=0):
        """Saves the state between epochs or, with `batches`, behind so many batches of an epoch."""
        learn = self.learn
        learn.recorder.check()
        self.saved_at = time.monotonic()
        if not ranks.leads():
            return
        state = {
            "model": learn.model.state_dict(),
            "optimizer": learn.opt.state_dict(),
            "scaler": learn.scaler.state_dict() if learn.scaler else None,
            "callbacks": {cb.name: cb.state_dict() for cb in self.keepers()},
            "epochs_trained": learn.epochs_trained,
            "batches": batches,
        }
        save(self.path, state)

    @contextmanager
    def signals(self):
        """Inside, Ctrl-C and SIGTERM do what the class says; after it they have their former meaning again."""

        def stop(number, frame):
            if os.getpid() != process:  # a loader process that has just begun
                return
            now, grace = time.monotonic(), GRACE if machine.launched() or number == signal.SIGTERM else 0
            if self.signalled:
                if now - self.signalled > grace:
                    raise KeyboardInterrupt
                return
            self.signalled = now
            if ranks.leads():
                print(
                    "finishing the batch or evaluation, and saving; once more stops at once",
                    file=sys.stderr,
                    flush=True,
                )

        self.signalled, process = 0.0, os.getpid()
        handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        former = [(s, signal.signal(s, stop)) for s in handled]  # Python allows it in the main thread only
        try:
            yield
        finally:
            for s, handler in former:
                signal.signal(s, handler)


def save(path, state):
    """Writes `state` (dicts and lists of tensors and plain values) to `path`; the file there becomes `.before`."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    write(path, content.getvalue(), keep=f"{path}.before")


def load(path):
    """The state in the checkpoint `path`, on the CPU; None if there is no checkpoint.

    If it is damaged: that of the checkpoint before it, with a warning. Raises BadInput if neither is whole.
    """
    faults = []
    for file in (path, Path(f"{path}.before")):
        if file.exists():
            try:
                state = read(file)
            except Exception as e:  # zipfile, pickle and torch each raise their own on damaged bytes
                faults.append(f"{file}: cannot be read ({one_line(e)})")
                continue
            if faults:
                print(f"warning: {faults[0]}; going on from the one before it", file=sys.stderr)
                os.replace(file, path)  # else the next save would put the damaged one in its place
            return state
    if faults:
        raise BadInput(f"{'; '.join(faults)}; remove the run folder and train anew")
    return None


def of_run(folder):
    """The state that the run folder `folder` goes on from; None for a run that is new, or has no checkpoint yet."""
    return load(Path(folder).expanduser() / "weights/last.pt") if folder else None


def read(file):
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():  # torch.save writes a zip, and torch.load does not look at its checksums
            raise ValueError(f"the checksum of {damaged} differs")
    with warnings.catch_warnings(action="ignore"):  # torch's, on files that it then refuses
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise ValueError(f"not a checkpoint of format {FORMAT}")
    return state
