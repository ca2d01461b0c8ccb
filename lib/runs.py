"""The run folder. Every file in it is whole or absent: written beside itself, synced, renamed."""

import csv
import io
import json
import math
import os
import tempfile
import warnings
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import yaml

from lib.cli import BadInput, one_line, read_json
from lib.config import RESOLVED, data_name, read_file
from lib.machine import environment

ROOM, ROOM_A_WEIGHT = 20_000_000, 48  # bytes: tables and figures; 3 checkpoints of up to 4 floats a weight


def write(path, content, keep=None):
    """Writes `content` (text or bytes) to `path`, whole or not at all; the file there is kept as `keep`."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as f:  # a link that lies in wait there is not followed
            f.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as e:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot be written ({e.strerror}); make room, or pass another folder") from None


def write_json(path, value):
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_csv(path, rows, columns=None):
    """Writes a list of dicts that share their keys; `columns` where there may be none."""
    columns = columns or list(rows[0])
    write_table(path, columns, [[row[c] for c in columns] for row in rows])


def write_table(path, header, rows):
    """Writes a header and lists of values as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write(path, text.getvalue())


def write_figure(path, figure):
    """Writes a matplotlib figure as PNG."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # what the font lacks is drawn as a box
        figure.savefig(png, format="png", dpi=130)
    write(path, png.getvalue())


@contextmanager
def whole_folder(path, pick=lambda part: part):
    """`with whole_folder(path) as part:` fill `part`; `pick(part)` becomes `path` if all goes well, or nothing does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        part = Path(temporary) / "root"
        part.mkdir()
        yield part
        if not path.exists():
            try:
                pick(part).rename(path)
            except OSError:
                if not path.is_dir():  # else another process was quicker
                    raise


class Run:
    """One run folder: `run.path`, and `run.env`, the content of env.json."""

    def __init__(self, path, config, env, **as_asked):
        self.path, self.env = path, env
        path.mkdir(exist_ok=True)
        write(path / "args.yaml", yaml.safe_dump({**config.to_dict(), "resume": "", **as_asked}, sort_keys=False))
        self.note()

    def __truediv__(self, name):
        return self.path / name

    def note(self, **facts):
        """Adds facts to env.json."""
        self.env.update(facts)
        write_json(self / "env.json", self.env)

    def save_rows(self, rows):
        """Writes results.csv, a row an epoch."""
        write_csv(self / "results.csv", rows)

    def save_model_card(self, card):
        """Writes weights/model.json, which rebuilds the network."""
        (self / "weights").mkdir(exist_ok=True)
        write_json(self / "weights/model.json", card)

    def save_weights(self, content):
        """Writes weights/best.safetensors."""
        write(self / "weights/best.safetensors", content)


def check_log(kind):
    """Raises BadInput where the package that `--log` names is not installed."""
    if kind == "tensorboard" and not find_spec(kind):
        raise BadInput("--log tensorboard: is not installed; uv run --with tensorboard train_fastai.py …")


def logger(kind, folder):
    """A function that logs the last of the rows it is given, an epoch's, to `folder`; for "none" it does nothing."""
    if kind == "none":
        return lambda rows: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def log(rows):
        for name, value in rows[-1].items():
            writer.add_scalar(name, value, rows[-1]["epoch"])
        writer.flush()

    return log


def start(config, **facts):
    """A new run folder under `config.out` (-2, -3 … behind a name that is taken), made with args.yaml and env.json."""
    optimizer = "" if config.optimizer == "sgd" else f"-{config.optimizer}"
    name = config.name or f"{data_name(config)}-{config.schedule}{optimizer}-s{config.seed}"
    out, env = Path(config.out).expanduser(), {**environment(), **facts}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as temporary:
            make_room(temporary, config.out, ROOM + ROOM_A_WEIGHT * facts.get("params", 0))
            run = Run(Path(temporary) / name, config, env)
            for i in range(1, 10_000):
                path = out / (name if i == 1 else f"{name}-{i}")
                try:
                    if not os.path.lexists(path):
                        run.path.rename(path)
                        break
                except OSError:
                    if not path.exists():  # else another process was quicker
                        raise
    except OSError as e:
        raise BadInput(f"--out {config.out}: cannot be written ({e.strerror}); pass another folder") from None
    run.path = path
    return run


def check_out(config):
    """Raises BadInput where no run folder can be made under `--out`; seen before the images are read."""
    path = Path(config.out).expanduser().absolute()
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise BadInput(f"--out {config.out}: {there} {what}; pass another folder")


def make_room(path, out, size):
    """Raises BadInput where `size` bytes cannot be had in the folder `path`: disk full, quota, limit of the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            with tempfile.TemporaryFile(dir=path) as f:
                os.posix_fallocate(f.fileno(), 0, size)
        except OSError as e:
            raise BadInput(
                f"--out {out}: has no room for the {size / 1e6:,.0f} MB that a run may take ({e.strerror}); "
                "make room, or pass another folder"
            ) from None


def reopen(config, **facts):
    """The run folder `config.resume`, to go on in it. Raises BadInput where its data was other data."""
    path = Path(config.resume).expanduser()
    try:
        env = read_json(path / "env.json")
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}/env.json: cannot be read ({one_line(e)}); start a new run") from None
    if "lr" not in env and (path / "weights/last.pt").exists():
        raise BadInput(f"{path}/env.json: has lost the lr of its run; start a new run")
    if env.get("data_fingerprint") != facts["data_fingerprint"]:
        raise BadInput(f"--data {config.data}: its images are not those that {path} was trained on; pass those")
    kept = read_file(path / "args.yaml")
    asked = {name: kept[name] for name in RESOLVED if name in kept}
    now = {**environment(), **{name: facts[name] for name in ("device", "precision", "threads", "workers")}}
    (path / "summary.json").unlink(missing_ok=True)  # it says that a run is finished
    same = {name: fact for name, fact in facts.items() if name not in (*now, "device_name")}
    return Run(path, config, {**facts, **now, **env, **same, "resumed": [*env.get("resumed", []), now]}, **asked)


def read_card(path):
    """The content of a weights/model.json. Raises BadInput where it is damaged."""
    try:
        card = read_json(path)
        classes, size, numbers = card["classes"], card["size"], [*card["mean"], *card["std"]]
        if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
            raise ValueError("classes are not names")
        if len(classes) != card["args"]["n_classes"]:
            raise ValueError("as many classes as the network has outputs are needed")
        if type(size) is not int or not 0 < size <= 1024 or len(numbers) != 6 or not all(map(math.isfinite, numbers)):
            raise ValueError("size, mean or std are not what a run writes")
        return card
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as e:
        raise BadInput(f"{path}: is damaged ({one_line(e)})") from None
