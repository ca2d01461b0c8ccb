"""The settings of a run: one frozen dataclass, read from defaults, a YAML file and the command line. Needs no torch."""

import argparse
import dataclasses
import itertools
import math
import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from lib.cli import MOST_TEXT, BadInput, Parser, brief, guess, one_line, read_json

SUGGESTIONS = ("valley", "steep", "minimum", "slide")


SCHEDULES = (
    "plateau", "one_cycle", "constant", "triangular", "triangular2", "warm_restarts", "flat_cos", "grow_batch"
)  # fmt: skip


MOMENTUM = ("sgd", "nesterov", "adam")  # optimizers that have one


AXES = ("schedule", "optimizer", "momentum", "lr", "batch_size", "model")  # several values of these are a comparison


OPTIMIZERS = ("sgd", "nesterov", "rmsprop", "adagrad", "adam")


MODELS = ("small", "medium", "large")
AUXILIARY = ("googlenet", "inception_v3")  # torchvision's with further heads for training, which are left out here


BAD_IMAGES = ("fail", "skip")


AUTO = ("auto",)


MONITORS = ("valid_loss", "valid_acc", "train_loss", "train_acc")


# What may change when a run is resumed: nothing that changes its result by more than the rounding of another machine.
MACHINE = "resume cache device workers threads progress dry_run lr_find_only checkpoint_seconds open log".split()


FREE = (*MACHINE, "epochs", "data", "target", "gallery")


RESOLVED = ("threads", "precision", "size", "batch_size")  # of a resumed run: what `auto` became


PATHS = ("data", "out", "cache", "resume", "pretrained")


MOST_VARIANTS = 1000  # in one comparison


ENDLESS = ("plateau", "grow_batch", "constant")  # schedules that do not depend on how many epochs there will be


# A source of images carries its own defaults for the settings whose default below is None.
COMMON = dict(
    epochs=50, model="medium", flip=True, label_smoothing=0, pct_start=0.25, cycle_length=0.2,
    ema=0.0, threshold=1e-4
)  # fmt: skip


SOURCES = {
    # threshold: the loss of an average creeps on where it hardly falls any more
    "cifar10": {"label_smoothing": 0.1, "ema": 0.999, "threshold": 0.04},
    "digits": {"epochs": 20, "model": "small", "flip": False},
}


# So does a schedule.
BY_SCHEDULE = {"flat_cos": {"pct_start": 0.75}, "warm_restarts": {"cycle_length": 1 / 7}}


def option(default, help, *flags, choices=None, low=None, high=None, alone=None):
    """A field of `Config` and its command-line option in one; its annotation is the type of a value.

    `low` and `high` are inclusive bounds; where `choices` stands beside a number, either is taken; `alone` is the value
    of a flag without one.
    """
    return field(
        default=default, metadata=dict(help=help, flags=flags, choices=choices, low=low, high=high, alone=alone)
    )


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Names are those of the command line; `args.yaml` holds exactly these."""

    data: str = option("cifar10", "cifar10, digits, a folder of images, or an archive (.tgz .tar.gz .tar .zip) of one")
    schedule: str = option("plateau", "what drives the learning rate", choices=SCHEDULES)
    bad_images: str = option(
        "fail", "images that cannot be read: fail names the first; skip lists them in skipped.csv", choices=BAD_IMAGES
    )
    seeds: tuple = option((0,), "one run for each: weights, order and augmentation", low=0, high=2**32 - 1)
    split_seed: int = option(0, "seed of the split, where the data does not come split", low=0, high=2**32 - 1)
    epochs: int = option(None, "passes over the training images (50; digits 20)", low=1)
    batch_size: int = option(
        "auto", "images a step; auto: 128, fewer where that is under 20 steps", "-b", choices=AUTO, low=1, high=10**6
    )
    model: str = option(
        None, f"{', '.join(MODELS)}, or a torchvision classifier such as resnet18 (medium; digits small)"
    )
    pretrained: str = option(
        "", "start from weights: torchvision's own, or FILE (.pth state dict, .safetensors)", alone="torchvision"
    )
    freeze_epochs: int = option(
        None, "epochs in which a pretrained body stays and its new head learns (1 with --pretrained)", low=0
    )
    small_epochs: int = option(0, "first epochs, on images of 3/4 of the side: progressive resizing", low=0)
    size: int = option(
        "auto", "image side in pixels; auto: 32 for cifar10 and digits, else 128", choices=AUTO, low=16, high=1024
    )
    valid_pct: float = option(
        0.1, "share of the training images held out to choose with; 0: test chooses", low=0, high=0.9
    )
    lr: float = option("find", "learning rate: a number, or find (range test)", choices=("find",), low=1e-12)
    lr_suggest: str = option("steep", "which suggestion of the range test is used", choices=SUGGESTIONS)
    lr_iters: int = option(100, "batches of the range test", low=10, high=2000)
    lr_scale: str = option("exponential", "how the rates of the range test rise", choices=("exponential", "linear"))
    lr_high: float = option(None, "last rate of the range test (exponential 10, linear 0.2)", low=1e-4)
    lr_find_on: str = option("train", "whose loss the range test looks at", choices=("train", "valid"))
    optimizer: str = option("sgd", "sgd (with momentum), nesterov, rmsprop, adagrad, adam", choices=OPTIMIZERS)
    momentum: float = option(0.9, "momentum of sgd and nesterov, first beta of adam", low=0, high=0.9999)
    weight_decay: float = option(5e-4, "L2 penalty added to the gradient; not on BatchNorm and biases", low=0)
    label_smoothing: float = option(None, "label smoothing of the training loss (0; cifar10 0.1)", low=0, high=0.99)
    class_weights: bool = option(False, "training loss weighted by class: images / (classes x images of the class)")
    monitor: str = option("valid_loss", "what plateau watches", choices=MONITORS)
    patience_epochs: int = option(None, "bad epochs that plateau forgives (a tenth of the epochs, 1 or more)", low=0)
    factor: float = option(0.3, "what plateau multiplies the learning rate by", low=1e-6, high=0.999999)
    min_lr: float = option(0.0, "learning rate that plateau does not go below", low=0)
    threshold: float = option(None, "change that counts as an improvement (1e-4; cifar10 0.04)", low=0)
    threshold_mode: str = option("rel", "whether the threshold is relative or absolute", choices=("rel", "abs"))
    cooldown_epochs: int = option(0, "epochs after a reduction in which plateau does not count", low=0)
    warmup_epochs: float = option(0.0, "epochs over which the rate first rises from a quarter of the schedule's", low=0)
    pct_start: float = option(
        None, "share of the epochs before one_cycle's top (0.25), or before flat_cos falls (0.75)", low=0.01, high=0.99
    )
    div: float = option(25.0, "one_cycle starts at lr / div", low=1)
    div_final: float = option(1e5, "one_cycle and flat_cos end at lr / div_final", low=1)
    max_momentum: float = option(0.95, "one_cycle's momentum at both ends", low=0, high=0.9999)
    min_momentum: float = option(0.85, "one_cycle's momentum at the top of the rate", low=0, high=0.9999)
    cycle_length: float = option(
        None, "first cycle of triangular (0.2) and warm_restarts (1/7), as a share of the epochs", low=1e-3, high=1
    )
    cycle_mult: float = option(2.0, "each cycle of warm_restarts is so many times the one before", low=1)
    cycle_div: float = option(4.0, "triangular rates begin at lr / cycle_div", low=1)
    max_batch_size: int = option(
        1024, "batch size that grow_batch does not go above; there the rate shrinks", low=1, high=10**6
    )
    accumulate: int = option(1, "batches whose mean loss makes one update", low=1, high=10_000)
    balanced_batches: bool = option(False, "each batch in the classes' proportions, as closely as can be")
    grad_noise: float = option(0.0, "eta of Gaussian gradient noise, variance eta / (1 + step)^0.55; 0: none", low=0)
    perturb_on_plateau: bool = option(False, "gradient noise only in the epoch behind each plateau of --monitor")
    ema: float = option(
        None, "an average of the weights is evaluated and kept; its decay a step; 0: none (0; cifar10 0.999)",
        low=0, high=0.99999
    )  # fmt: skip
    cutout: int = option(8, "cutout's side, in pixels of a 32-pixel side; 0: none", low=0, high=64)
    crop_padding: int = option(4, "padding of the random crop, in pixels of a 32-pixel side; 0: none", low=0, high=32)
    flip: bool = option(None, "flip horizontally in every other epoch (on; digits off)")
    precision: str = option(
        "auto", "number format of training; auto: bf16 if the chip has it", choices=("auto", "float32", "bf16", "fp16")
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = option("auto", "loader processes; auto: 0 on a CPU", "-j", choices=AUTO, low=0, high=256)
    threads: int = option("auto", "CPU threads of torch; auto: one a core", choices=AUTO, low=1, high=1024)
    out: str = option("runs", "folder of the run folders")
    name: str = option("", "name of the run folder; default <data>-<schedule>-s<seed>")
    checkpoint_seconds: int = option(
        600, "seconds between checkpoints within an epoch, at whose end there is one anyway; 0: none", low=0
    )
    resume: str = option("", "run folder to go on with; flags may add epochs or change the machine, nothing else")
    cache: str = option(
        "", "folder for downloaded and unpacked data (default fastai's) and, if given, for decoded images"
    )
    target: float = option(0.88, "test accuracy whose first epoch and second the summary names", low=0, high=1)
    gallery: int = option(25, "mistakes explained in gradcam.png", low=0, high=100)
    lr_find_only: bool = option(False, "stop after the range test")
    dry_run: bool = option(False, "show settings, data and network; train and write nothing")
    progress: bool = option(True, "progress bar, on a terminal")
    log: str = option("none", "a log beside the run's own files, in its folder", choices=("none", "tensorboard"))
    open: bool = option(False, "open report.html in the browser; it follows the training")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if f.name in ("data", "schedule"):
                check(f, getattr(self, f.name))  # others' defaults depend on these
        own = {**COMMON, **SOURCES.get(self.data, {}), **BY_SCHEDULE.get(self.schedule, {})}
        own["freeze_epochs"] = int(bool(self.pretrained))
        own["lr_high"] = 0.2 if self.lr_scale == "linear" else 10.0
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            object.__setattr__(self, f.name, check(f, own.get(f.name) if value is None else value))
            if f.name == "epochs":
                own["patience_epochs"] = max(self.epochs // 10, 1)
        if self.perturb_on_plateau and not self.grad_noise:
            raise BadInput("--perturb-on-plateau: needs --grad-noise, such as 0.01")
        if not self.data:
            raise BadInput(f"--data: is empty; pass {', '.join(SOURCES)}, a folder of images, or an archive of one")
        if self.small_epochs >= self.epochs:
            raise BadInput(f"--small-epochs: must be fewer than the {self.epochs} epochs, not {self.small_epochs}")
        if self.freeze_epochs and not self.pretrained:
            raise BadInput("--freeze-epochs: needs --pretrained; fresh weights are not worth keeping")
        if self.pretrained == "torchvision" and self.model in MODELS:
            raise BadInput(f"--pretrained: torchvision has none for {self.model!r}; pass --model resnet18, or FILE")
        if self.name and (os.path.basename(self.name) != self.name or self.name.startswith(".")):
            raise BadInput(f"--name: must be the name of a folder, not a path or hidden, not {self.name!r}")

    @property
    def seed(self):
        """The seed of a single run."""
        return self.seeds[0]

    def to_dict(self):
        """The settings as plain values, for YAML and JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def flag_of(name):
    """The command-line spelling of the setting `name`."""
    return "--" + name.replace("_", "-")


def check(f, value):
    """`value` as the type of field `f`. Raises BadInput naming the setting where it is of another type or range."""
    if f.name == "seeds":
        many = value if isinstance(value, (list, tuple)) else [value]
        numbers = tuple(check_one(f, v) for v in many)
        if not 0 < len(numbers) == len(set(numbers)):
            raise BadInput(f"{flag_of(f.name)}: must be one or several different whole numbers, not {brief(value)}")
        return numbers
    return check_one(f, value)


def check_one(f, value):
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    m, kind = f.metadata, int if f.name == "seeds" else f.type
    choices, low, high = m["choices"], m["low"], m["high"]
    numeric = kind in (int, float)
    what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    if low is not None:
        what += f" of at least {low}" if high is None else f" from {low} to {high}"
    if choices:
        what = " or ".join(filter(None, [what if numeric else "", ", ".join(choices)]))
    bad = BadInput(f"{flag_of(f.name)}: must be {what}, not {brief(value)}" + guess(value, choices))
    if choices and isinstance(value, str) and value in choices:
        return value
    if numeric:
        try:
            number = kind(value)
            if isinstance(value, bool) or number != float(value) or not math.isfinite(number):
                raise bad
        except (TypeError, ValueError, OverflowError):
            raise bad from None
        if (low is not None and number < low) or (high is not None and number > high):
            raise bad
        return number
    if choices or not isinstance(value, kind) or (kind is str and not is_text(value)):
        raise bad
    if f.name in PATHS and value.startswith("~") and os.path.expanduser(value).startswith("~"):
        raise BadInput(f"{flag_of(f.name)}: {value} is the home of nobody; write the folder's path")
    return value


def is_text(value):
    """Whether `value` is one line of plain text: spaces and joiners of any script, no control or direction codes."""
    return all(c.isprintable() or c in "\u200c\u200d" or unicodedata.category(c) == "Zs" for c in value)


def parser():
    """The command line of `train_fastai.py`."""
    p = Parser(
        prog="train_fastai.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train an image classifier: range test, SGD under a schedule, curves, explained mistakes.",
    )
    for f in dataclasses.fields(Config):
        m, default = f.metadata, f.default
        shown = "" if default in (None, "") else f" ({' '.join(map(str, default)) if f.name == 'seeds' else default})"
        if f.type is bool:
            action = argparse.BooleanOptionalAction if default is not False else "store_true"
            p.add_argument(flag_of(f.name), *m["flags"], action=action, help=m["help"])
        else:
            metavar = "|".join(m["choices"]) if m["choices"] and f.type is str else None
            nargs = "+" if f.name in ("seeds", *AXES) else "?" if m["alone"] else None
            text = (m["help"] + shown).replace("%", "%%")
            p.add_argument(flag_of(f.name), *m["flags"], help=text, metavar=metavar, nargs=nargs, const=m["alone"])
    p.add_argument(
        "-c", "--config", metavar="FILE", help="settings from a YAML file, as args.yaml is; flags win over it"
    )
    p.add_argument(
        "--smoke", action="store_true", help="the whole line in seconds: digits, 2 epochs; flags win over it"
    )
    return p


def read_file(path):
    """The settings in a YAML file. Raises BadInput where it cannot be read or has an unknown key."""
    import yaml

    try:
        with open(path, encoding="utf-8") as f:
            text = f.read(MOST_TEXT + 1)
        if len(text) > MOST_TEXT:
            raise ValueError(f"more than {MOST_TEXT:,} characters")
        found = yaml.safe_load(text) or {}
    except Exception as e:  # PyYAML raises its own, and what its constructors meet: IndexError, RecursionError, …
        raise BadInput(f"--config {path}: cannot be read ({one_line(e)}); repair it, or pass another") from None
    if not isinstance(found, dict):
        raise BadInput(f"--config {path}: must hold 'setting: value' lines")
    names = [f.name for f in dataclasses.fields(Config)]
    for key, value in found.items():
        if key not in names:
            raise BadInput(f"--config {path}: unknown setting {brief(key)}" + guess(key, names))
        if any(isinstance(v, (list, dict, set)) for v in (value if isinstance(value, list) else [value])):
            raise BadInput(f"--config {path}: {key} must be one value, or a list of values")
    return found


def data_name(config):
    """The name of the data, as names of folders have it."""
    name = os.path.basename(os.path.realpath(os.path.expanduser(config.data))).split(".")[0]
    return "".join(c if c.isprintable() else "_" for c in name)[:50] or "data"


def resumed(flags):
    """The `Config` of the run folder that `flags` resume. Raises BadInput for a flag that would change its result."""
    resume = next(f for f in dataclasses.fields(Config) if f.name == "resume")
    run = Path(check(resume, flags["resume"])).expanduser()
    try:
        env = read_json(run / "env.json")
        found = {name: env[name] for name in RESOLVED if name in env or name != "batch_size"}
        found |= {"dry_run": False, "lr_find_only": False, "open": False}
        if not (math.isfinite(env.get("lr", 1.0)) and isinstance(env.get("resumed", []), list)):
            raise ValueError("lr or resumed is not what a run writes")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as e:
        raise BadInput(f"--resume {run}: is no run folder, or its env.json is damaged ({one_line(e)})") from None
    kept = Config(**{**read_file(run / "args.yaml"), **found})
    config = dataclasses.replace(kept, **flags)
    for name, value in config.to_dict().items():
        if name not in FREE and value != kept.to_dict()[name]:
            raise BadInput(
                f"{flag_of(name)}: {value} would change the result of {run}, which has {kept.to_dict()[name]}; "
                "leave it out, or start a new run"
            )
    if config.lr_find_only:
        raise BadInput(f"--lr-find-only: {run} has had its range test; leave it out, or start a new run")
    if config.epochs < kept.epochs:
        raise BadInput(f"--epochs: {run} has {kept.epochs}; a resumed run may have more, not fewer")
    if config.epochs > kept.epochs and config.schedule not in ENDLESS:
        raise BadInput(f"--epochs: {config.schedule} is a function of the epochs in all, {kept.epochs}; leave it out")
    return config


def read(argv):
    """The settings that a command line gives, by name: flags win over the file, the file over defaults."""
    flags = vars(parser().parse_args(argv))
    smoke = {"data": "digits", "epochs": 2} if flags.pop("smoke", False) else {}
    path = flags.pop("config", None)
    found = {**(read_file(path) if path else {}), **smoke, **flags}
    for name in AXES:
        values = found.get(name)
        if isinstance(values, (list, tuple)) and len(values) < 2:
            found[name] = values[0] if values else "nothing"
    return found


def parse(argv=None):
    """The `Config` that a command line asks for.

    Raises BadInput (one line) for anything wrong that needs neither torch nor the data to be seen.
    """
    found = read(argv)
    return resumed(found) if found.get("resume") else Config(**found)


def variants(argv=None):
    """One `Config`, of one seed, for each run that a command line asks for: several are a comparison.

    Those of a comparison are named by what varies, seed by seed, in a folder that `--name` or their names name.
    """
    found = read(argv)
    if found.get("resume"):
        return [resumed(found)]
    axes = {name: found[name] for name in AXES if isinstance(found.get(name), (list, tuple))}
    if math.prod(map(len, axes.values())) > MOST_VARIANTS:
        raise BadInput(f"{', '.join(map(flag_of, axes))}: more than {MOST_VARIANTS:,} variants; name fewer values")
    runs = []
    for values in itertools.product(*axes.values()):
        config = Config(**{**found, **dict(zip(axes, values))})
        words = [str(getattr(config, name)) for name in axes] or [config.schedule]
        runs += [("-".join(words), dataclasses.replace(config, seeds=(seed,))) for seed in config.seeds]
    if len(runs) == 1:
        return [runs[0][1]]
    labels = [f"{name}-s{config.seed}" for name, config in runs]
    if len(set(labels)) < len(labels):
        raise BadInput(f"{', '.join(flag_of(name) for name in axes)}: a value is there twice")
    first = runs[0][1]
    folder = first.name or f"{data_name(first)}-{'_vs_'.join(dict(runs))}"[:120]
    return [dataclasses.replace(c, out=os.path.join(c.out, folder), name=label) for label, (_, c) in zip(labels, runs)]
