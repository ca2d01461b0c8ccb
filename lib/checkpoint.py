"""weights/last.pt: all that a run needs to go on. Whole or absent; the one before it is kept, and used if need be."""

import hashlib
import io
import os
import sys
import warnings

import torch
from fastai.callback.core import Callback

from lib.config import BadInput, one_line
from lib.runs import write

FORMAT = 1  # of the checkpoint; another one is refused


class Checkpoint(Callback):
    """Saves after each epoch what the next one starts from, and starts a fit from what was saved.

    Order, augmentation and weights are functions of (seed, epoch, image), so no generator's state is in it.
    """

    order = 80  # behind all callbacks whose states it keeps: those with a state_dict of their own

    def __init__(
        self,
        path,  # file of the checkpoint
        state=None,  # what `load` gave: the fit goes on from there
    ):
        self.path, self.state = path, state

    def keepers(self):
        return [cb for cb in self.learn.cbs if hasattr(type(cb), "state_dict")]

    def before_fit(self):
        if self.state is None:
            return
        learn, state = self.learn, self.state
        try:
            learn.model.load_state_dict(state["model"])
            learn.opt.opt.load_state_dict(state["optimizer"])
            if learn.scaler:
                learn.scaler.load_state_dict(state["scaler"])
            for cb in self.keepers():
                cb.load_state_dict(state["callbacks"][cb.name])
            learn.epochs_trained = int(state["epochs_trained"])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as e:
            raise BadInput(f"{self.path}: is of another run than its args.yaml says ({one_line(e)})") from None
        learn.first_epoch = len(learn.recorder.rows)

    def after_epoch(self):
        learn = self.learn
        state = {
            "model": learn.model.state_dict(),
            "optimizer": learn.opt.opt.state_dict(),
            "scaler": learn.scaler.state_dict() if learn.scaler else None,
            "callbacks": {cb.name: cb.state_dict() for cb in self.keepers()},
            "epochs_trained": learn.epochs_trained,
        }
        save(self.path, state)


def save(path, state):
    """Writes `state` (dicts and lists of tensors and plain values) to `path`; the file there becomes `.before`."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, "checksum": checksum(state), **state}, content)
    write(path, content.getvalue(), keep=before(path))


def load(path):
    """The state in the checkpoint `path`, on the CPU; the one before it (with a warning) where it is damaged; or None.

    Raises BadInput where there are checkpoints and none is whole.
    """
    faults = []
    for file in (path, before(path)):
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


def read(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on files that it then refuses
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise ValueError(f"not a checkpoint of format {FORMAT}")
    if state.pop("checksum", None) != checksum(state):
        raise ValueError("its checksum differs from its content")
    return state


def before(path):
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(path.name + ".before")


def checksum(state):
    """SHA-256 of everything in `state`: names, types, shapes, bytes."""
    h = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                h.update(f"{key!r}:".encode())
                add(inner)
        elif isinstance(value, (list, tuple)):
            h.update(f"[{len(value)}]".encode())
            for inner in value:
                add(inner)
        elif torch.is_tensor(value):
            value = value.detach().cpu().contiguous()
            h.update(f"{value.dtype}{tuple(value.shape)}".encode())
            h.update(value.reshape(-1).view(torch.uint8).numpy())
        else:
            h.update(repr(value).encode())

    add(state)
    return h.hexdigest()
