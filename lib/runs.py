"""The run folder. Every file in it is whole or absent: written beside itself, synced, renamed."""

import base64
import csv
import errno
import io
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import yaml

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from lib.cli import BadInput, counted, one_line, printable, read_json, refused
from lib.config import FEW_VALID, RESOLVED, data_name, read_file
from lib.machine import device_name, environment

ROOM, ROOM_A_WEIGHT = 20_000_000, 48  # bytes: of tables and figures; of a weight, 3 checkpoints x 4 floats x 4
OF_MACHINE = ("device", "precision", "threads", "workers")  # facts that may change when a run is resumed


def write(path, content, keep=None):
    """Writes `content` (text or bytes) to `path`, whole or not at all. A file already there is renamed to `keep`.

    Makes the folder where there is none. Raises BadInput where it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with part.open("xb") as f:  # "x": a link that somebody put there is not followed
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
            except OSError as e:
                if e.errno != errno.EINVAL:  # a shared folder that does not sync folders
                    raise
            finally:
                os.close(folder)
    except OSError as e:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot be written ({e.strerror}); make room, or pass another folder") from None


def write_json(path, value):
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_table(path, header, rows):
    """Writes a header and lists of values as CSV."""
    write(path, as_csv([header, *rows]))


def as_csv(rows):
    """Lists of values as CSV."""
    text, has_cr = io.StringIO(), any("\r" in str(value) for row in rows for value in row)
    quoting = csv.QUOTE_ALL if has_cr else csv.QUOTE_MINIMAL  # Python 3.11 leaves a lone \r without quotes
    csv.writer(text, lineterminator="\n", quoting=quoting).writerows(rows)
    return text.getvalue()


def write_csv(path, rows, columns=None):
    """Writes a list of dicts with the same keys as CSV. Without `columns` there must be at least one."""
    columns = columns or list(rows[0])
    write_table(path, columns, [[row[column] for column in columns] for row in rows])


def write_figure(path, figure):
    """Writes a matplotlib figure as PNG."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # what the font lacks is drawn as a box
        figure.savefig(png, format="png", dpi=130)
    write(path, png.getvalue())


def data_uri(image, kind="png"):
    """A PIL image as text that a page shows without a file; `kind` is png or jpeg."""
    file = io.BytesIO()
    image.save(file, kind, quality=85)  # PNG ignores the quality
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@contextmanager
def whole_folder(path, pick=lambda part: part):
    """`with whole_folder(path) as part:` fill `part`; `pick(part)` becomes `path` if all goes well, or nothing does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        part = Path(temporary) / "root"
        part.mkdir()
        yield part
        try:
            pick(part).rename(path)
        except OSError:
            if not path.is_dir():  # otherwise another process was quicker
                raise


def locked(folder):
    """The lock file of a run folder, locked until it is closed. Raises BadInput where another process has it.

    A lock of POSIX is this process's alone: loader processes do not inherit it, and it ends with the process. Windows
    has none, and would not rename a folder with an open file.
    """
    file = None
    try:
        file = open(folder / ".lock", "w") if fcntl else None
        if file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN) and file:
            raise BadInput(f"{folder}: another process trains in it; wait for its end, or stop it") from None
    return file  # None on Windows, or if the folder takes no file, as the next `write` says; some disks lock nothing


def in_use(folder):
    """Whether another process trains in a run folder."""
    try:
        lock = locked(folder) if (folder / ".lock").exists() else None
    except BadInput:
        return True
    if lock:
        lock.close()
    return False


class Run:
    """One run folder: `run.path`, and `run.env`, the content of env.json. One process at a time has it."""

    def __init__(self, path, config, env, lock=None, **as_asked):
        path.mkdir(exist_ok=True)
        self.path, self.env, self.lock = path, env, lock or locked(path)
        write(path / "args.yaml", yaml.safe_dump({**config.to_dict(), "resume": "", **as_asked}, sort_keys=False))
        self.note()

    def __truediv__(self, name):
        return self.path / name

    def close(self):
        """Lets another process go on with the run."""
        if self.lock:
            self.lock.close()

    def note(self, **facts):
        """Adds facts to env.json."""
        self.env.update(facts)
        write_json(self / "env.json", self.env)


NOWHERE = SimpleNamespace(path=Path(), close=lambda: None)  # the run, on a rank that writes nothing


def check_log(kind):
    """Raises BadInput where the package that `--log` names is not installed."""
    if kind != "none" and not find_spec(kind):
        raise BadInput(f"--log {kind}: is not installed; uv run --with {kind} train_fastai.py …")


def writer(kind, folder):
    """A function that takes an epoch's row to a log of the run `folder`, through the package `kind`.

    A resumed run goes on with its run at wandb or MLflow, whose id is in the folder.
    """
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter  # imports torch

        board = SummaryWriter(folder / kind)
        return lambda row: [*(board.add_scalar(k, v, row["epoch"]) for k, v in row.items()), board.flush()]
    package, settings = import_module(kind), read_file(folder / "args.yaml")
    mark = folder / f"{kind}-id.txt"
    known = mark.read_text() if mark.exists() else None
    if kind == "wandb":
        which = dict(id=known, resume="allow", reinit="finish_previous")  # the previous one of a comparison
        run = package.init(project="train_fastai", name=folder.name, dir=folder, config=settings, **which)
        write(mark, run.id)
        return lambda row: run.log(row, step=row["epoch"])
    package.end_run()
    write(mark, package.start_run(run_id=known, run_name=folder.name).info.run_id)
    if not known:
        package.log_params(settings)
    return lambda row: package.log_metrics(row, step=row["epoch"])


def logger(kind, folder):
    """A function of the rows of all epochs so far: it logs the last one. For "none" it does nothing.

    Raises BadInput if the log cannot be begun. If an epoch cannot be logged, a line warns, and training goes on.
    """
    if kind == "none":
        return lambda rows: None
    with refused(f"--log {kind}: cannot be written", "mend that, or go on with --resume and --log none"):
        log = writer(kind, folder)

    def attempt(rows):
        try:
            log(rows[-1])
        except Exception as e:
            fault = one_line(e)[:300]
            print(f"warning: --log {kind}: epoch {rows[-1]['epoch']} was not logged ({fault})", file=sys.stderr)

    return attempt


def check_out(config, size=1):
    """Raises BadInput where `--out`, or a run to resume, cannot hold `size` bytes (rights, a full disk)."""
    name = "resume" if config.resume else "out"  # a run that has moved goes on where it is
    path = Path(getattr(config, name)).expanduser().absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))  # nothing is made yet
    try:
        with tempfile.TemporaryFile(dir=nearest) as f:
            f.write(b"x")
        if shutil.disk_usage(nearest).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:  # its text would name a file that nobody knows
        needs = f"has no room for the {math.ceil(size / 1e6):,} MB that a run may take"
        text = f"cannot be written to, or {needs} ({e.strerror}); pass another"
        raise BadInput(f"--{name} {getattr(config, name)}: {text}") from None


def start(config, **facts):
    """A new run folder under `config.out` (-2, -3 … behind a name that is taken), made with args.yaml and env.json."""
    optimizer = "" if config.optimizer == "sgd" else f"-{config.optimizer}"
    fold = f"-f{config.fold}" if config.fold else ""
    name = config.name or f"{data_name(config)}-{config.schedule}{optimizer}-s{config.seed}{fold}"
    out = Path(config.out).expanduser()
    with refused(f"--out {config.out}: cannot be written", "pass another folder", OSError):
        out.mkdir(parents=True, exist_ok=True)
        check_out(config, ROOM + ROOM_A_WEIGHT * facts.get("params", 0))
        with tempfile.TemporaryDirectory(prefix=f".{name[:40]}-", dir=out) as temporary:
            run = Run(Path(temporary) / name, config, {**environment(), **facts})
            for free in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))):
                try:
                    if not os.path.lexists(out / free):
                        run.path = run.path.rename(out / free)
                        return run
                except OSError:
                    if not os.path.lexists(out / free):  # otherwise another process was quicker
                        raise


def reopen(config, **facts):
    """The run folder `config.resume`, to go on in it. Raises BadInput where its data was other data."""
    path = Path(config.resume).expanduser()
    env, asked = read_json(path / "env.json"), read_file(path / "args.yaml")
    if "lr" not in env and (path / "weights/last.pt").exists():
        raise BadInput(f"{path}/env.json: has lost the lr of its run; start a new run")
    if env.get("data_fingerprint") != facts["data_fingerprint"]:
        raise BadInput(f"--data {config.data}: its images are not those that {path} was trained on; pass those")
    now = {**environment(), **{name: facts[name] for name in OF_MACHINE}}
    of_data = {name: fact for name, fact in facts.items() if name not in (*OF_MACHINE, "device_name")}
    env = {**facts, **now, **env, **of_data, "ended": "", "resumed": [*env.get("resumed", []), now]}
    lock = locked(path)
    with refused(f"{path}: cannot be written to", "make it writable", OSError):
        (path / "summary.json").unlink(missing_ok=True)  # it says that a run is finished
    return Run(path, config, env, lock, **{name: asked[name] for name in (*RESOLVED, "augment") if name in asked})


def read_card(path):
    """The content of a weights/model.json. Raises BadInput where it is damaged."""
    with refused(f"{path}: is damaged"):
        card = read_json(path)
        classes, size, numbers = card["classes"], card["size"], [*card["mean"], *card["std"]]
        named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        if not named or len(classes) != card["args"]["n_classes"]:
            raise ValueError("classes are not as many names as the network has outputs")
        if type(size) is not int or not 0 < size <= 1024 or len(numbers) != 6 or not all(map(math.isfinite, numbers)):
            raise ValueError("size, mean or std are not what a run writes")
        low, high = card.get("levels") or (0, 1)
        if not -math.inf < low < high < math.inf:
            raise ValueError("levels are not what a run writes")
        return card


def facts(config, dls, model, precision, threads):
    """What `auto` became, and what the data is, for env.json and the first lines of a run."""
    return {
        "device": str(dls.device),
        "device_name": device_name(dls.device),
        "precision": precision,
        "threads": threads,
        "workers": dls.train.fake_l.num_workers,
        "size": dls.store.size,
        "batch_size": dls.train.bs,
        "images": {name: len(getattr(dls, name).dataset) for name in ("train", "valid", "test")},
        "skipped": len(dls.store.skipped),
        "classes": list(dls.vocab),
        "sets": dls.sets,
        "keep": config.keep,
        "chosen_on": "test" if dls.valid.ids == dls.test.ids else "valid",
        "data_fingerprint": dls.store.fingerprint,
        "params": sum(p.numel() for p in model.parameters()),
        **({"levels": dls.store.levels} if dls.store.levels else {}),
    }


def banner(config, facts, where):
    """The first lines of a run."""
    images = ", ".join(f"{n:,} {name}" for name, n in facts["images"].items())
    if facts["skipped"]:
        images += f" ({facts['skipped']:,} that cannot be read are skipped: skipped.csv)"
    if "levels" in facts:
        images += "; of more than 8 bits, {:g} is black and {:g} white".format(*facts["levels"])
    side, classes = facts["size"], facts["classes"]
    few, n = "", facts["images"]["valid"]
    if n < FEW_VALID:
        few = f"\n{n} valid images are few to choose with: one of them is {1 / n:.3f} of accuracy, and the standard "
        few += f"error of an accuracy of 0.5 is {0.5 / math.sqrt(n):.3f}; the weights are kept by {facts['keep']}"
    names = printable(", ".join(name[:30] for name in classes[:5]) + (", …" if classes[5:] else ""))
    return (
        f"{facts['device']} ({facts['device_name']}), {facts['precision']}, {counted(facts['threads'], 'thread')}, "
        f"{counted(facts['workers'], 'worker')}\n"
        f"{config.data}: {images}; {len(classes)} classes ({names}), {side} x {side} pixels\n"
        f"sets: {printable(facts['sets'])}{few}\n"
        f"{config.model}: {facts['params']:,} parameters; {config.schedule}, {counted(config.epochs, 'epoch')}, "
        f"batches of {config.batch_size}, seed {config.seed}\n-> {where}"
    )


def show(asked, config, facts):
    """Prints the settings as `asked` and the first lines of a run that is not made."""
    print(*(f"{name}: {value}" for name, value in asked.to_dict().items()), sep="\n")
    print(banner(config, facts, "no run folder is made: dry run"))
