"""What every command shares: errors of one line, exit statuses, and files read with care."""

import argparse
import difflib
import json
import os
import sys
from pathlib import Path

MOST_TEXT = 10**6  # characters of a file of settings


def printable(text):
    """`text` as one line that is only text to a terminal: line breaks, escape codes and the like are spelled out."""
    spelled = lambda c: c.encode("unicode_escape").decode()
    return "".join(c if c.isprintable() else spelled(c) for c in str(text))


class OneLine(Exception):
    """An error whose text is the one line that the user reads, whatever fastai's callbacks put before it on its way."""

    def __init__(self, text):
        self.text = printable(text)
        super().__init__(self.text)

    def __str__(self):
        return self.text


class BadInput(OneLine):
    """An input or a setting that cannot be used (exit status 2)."""


def one_line(e):
    """An exception of a library as text for a `BadInput`."""
    return printable(" ".join(f"{type(e).__name__}: {e}".split()))


def brief(value):
    """`repr(value)`, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else text[:99] + "…"


def guess(word, words):
    """' (did you mean …?)', or nothing."""
    near = difflib.get_close_matches(brief(word).strip("'"), words, 1) if words else ()
    return f" (did you mean {near[0]}?)" if near else ""


def command(function):
    """`main(argv)` of a module: exit status 0; 2 and one line on stderr where `function` raises BadInput; or 130."""

    def main(argv=None):
        try:
            function(argv)
        except BadInput as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # whoever reads the output has enough
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

    def refuse(word):
        raise ValueError(f"{word} is no number")

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found
