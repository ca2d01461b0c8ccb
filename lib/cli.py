"""What every command shares: errors of one line, exit statuses, output, and files of settings read with care."""

import argparse
import difflib
import json
import os
import sys
import time
import unicodedata
from contextlib import contextmanager, suppress
from pathlib import Path

MOST_TEXT = 10**6  # characters of a YAML file
program = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()  # a notebook has no file
if program.parent == Path(__file__).resolve().parent or program.name == "train_fastai.py":
    os.environ["MPLBACKEND"] = "agg"  # a command draws only into files; a notebook keeps its backend


def printable(text):
    """`text` as one line that a terminal shows as text: line breaks, escape codes and the like are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def is_text(value):
    """Whether `value` is one line of plain text: spaces and joiners of any script, no control or direction codes."""
    return all(c.isprintable() or c in "\u200c\u200d" or unicodedata.category(c) == "Zs" for c in value)


class OneLine(Exception):
    """An error of one line, `text`, for the user. `args` does not do: fastai may put text of its own before it."""

    def __init__(self, text):
        self.text = printable(text)
        super().__init__(self.text)

    def __str__(self):
        return self.text


class BadInput(OneLine):
    """An input or a setting that cannot be used (exit status 2)."""


def one_line(error):
    """The exception of a library as text for a `BadInput`."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return printable(" ".join(text.split()))


@contextmanager
def refused(what, remedy="", errors=Exception):
    """`errors` of a library that are raised inside become the BadInput "what (error); remedy"."""
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except errors as e:
        raise BadInput(f"{what} ({one_line(e)[:500]})" + (f"; {remedy}" if remedy else "")) from None


def brief(value):
    """`repr(value)`, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else text[:99] + "…"


def guess(word, words):
    """' (did you mean …?)' with the nearest of `words`, or nothing."""
    near = difflib.get_close_matches(brief(word).strip("'"), words, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def duration(seconds):
    """Seconds as people say it."""
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 600 else f"{round(minutes / 60)} h"


def until(seconds):
    """'until 13:40': the time in so many seconds; with the day of the week or the date if it is not today."""
    end, now = time.localtime(time.time() + seconds), time.localtime()
    day = "" if end[:3] == now[:3] else "%a " if seconds < 6 * 86400 else "%d %b "
    return "until " + time.strftime(f"{day}%H:%M", end)


def counted(n, word):
    """'1 epoch', '2 epochs'"""
    return f"{n} {word}{'s' * (n != 1)}"


class Lasting:
    """A text stream that goes on, silently, where its reader is gone or its disk is full."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        try:
            return function(*args)
        except OSError:
            with suppress(OSError):  # what is left in its buffer goes nowhere, without an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def prepare_output():
    """Makes stdout UTF-8 if it is no terminal; a letter that a terminal lacks is spelled out. Opens closed streams."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, or a program without a window
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        terminal = sys.stdout.isatty()
        how = dict(errors="backslashreplace") if terminal else dict(encoding="utf-8", errors="surrogateescape")
        sys.stdout.reconfigure(**how)


def command(function):
    """`function(argv)` as a `main` that returns an exit status: the function's or 0, 2 for BadInput, 130 for Ctrl-C."""

    def main(argv=None):
        prepare_output()
        try:
            return function(argv) or 0
        except BadInput as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # the reader of the output has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            return 130
        return 0

    return main


OTHER_NAMES = {  # what timm, ultralytics, torchvision and Keras call these settings
    "--batch-size": "bs batch", "--size": "imgsz img-size input-size image-size", "--lr": "lr0 learning-rate",
    "--patience-epochs": "patience", "--weight-decay": "wd", "--model": "arch backbone network", "--optimizer": "opt",
    "--schedule": "sched scheduler lr-scheduler", "--epochs": "epoch num-epochs", "--seeds": "seed random-seed",
    "--workers": "num-workers", "--label-smoothing": "smoothing", "--data": "data-dir data-path dataset source",
    "--out": "output output-dir project save-dir", "--precision": "amp half fp16", "--pretrained": "weights",
    "--valid-pct": "val-split valid-split validation-split", "--ema": "model-ema ema-decay", "--device": "gpu gpus",
    "--accumulate": "grad-accum-steps", "--warmup-epochs": "warmup", "--flip": "hflip fliplr",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    def parse_args(self, *args):
        known, unknown = self.parse_known_intermixed_args(*args)  # options may stand between the others
        if unknown:
            flags = [word.split("=")[0] for word in unknown if word.startswith("-")] or unknown
            word = flags[0].strip("-").replace("_", "-")
            here = self._option_string_actions
            ours = next((flag for flag, others in OTHER_NAMES.items() if word in others.split()), None)
            meant = f" (did you mean {ours}?)" * (ours in here) if ours else guess(flags[0], here)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return known

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def read_yaml(path):
    """The 'setting: value' lines of a YAML file. Raises what PyYAML raises, and ValueError for anything else."""
    import yaml

    with open(path, encoding="utf-8") as f:
        text = f.read(MOST_TEXT + 1)
    if len(text) > MOST_TEXT:
        raise ValueError(f"more than {MOST_TEXT:,} characters")
    settings = yaml.safe_load(text) or {}
    if not isinstance(settings, dict):
        raise ValueError("it holds no 'setting: value' lines")
    for name, value in settings.items():
        if any(isinstance(v, (list, dict, set, tuple)) for v in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{brief(name)} must be one value, or a list of values")
    return settings


def read_json(path):
    """The object in a JSON file that a run wrote. Raises ValueError, OSError or RecursionError for anything else."""
    content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=int)  # int refuses NaN and Infinity
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return content
