"""What every command shares: errors of one line, exit statuses, and JSON files read with care."""

import argparse
import difflib
import json
import os
import sys
import time
from pathlib import Path


def printable(text):
    """`text` as one line that a terminal shows as text: line breaks, escape codes and the like are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class OneLine(Exception):
    """An error whose text is the one line that the user reads. fastai may put text of its own before `args`."""

    def __init__(self, text):
        self.text = printable(text)
        super().__init__(self.text)

    def __str__(self):
        return self.text


class BadInput(OneLine):
    """An input or a setting that cannot be used (exit status 2)."""


def one_line(error):
    """The exception of a library as text for a `BadInput`."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


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
    """'until 13:40', where it is now so many seconds before; with the day where that is another."""
    end, now = time.localtime(time.time() + seconds), time.localtime()
    return "until " + time.strftime("%H:%M" if end[:3] == now[:3] else "%a %H:%M", end)


def command(function):
    """`main(argv)` of a module: exit status 0; 2 and one line on stderr where `function` raises BadInput; or 130."""

    def main(argv=None):
        try:
            function(argv)
        except BadInput as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # the reader of the output has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            return 130
        return 0

    return main


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; see --help")


def read_json(path):
    """The object in a JSON file that a run wrote. Raises ValueError, or OSError, where it holds anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=int)  # int refuses NaN and Infinity
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    return content
