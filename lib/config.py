"""The settings of a run: one frozen dataclass, read from defaults, a YAML file and the command line. Needs no torch."""

import argparse
import dataclasses
import itertools
import math
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lib.cli import BadInput, Parser, brief, guess, is_text, read_json, read_yaml, refused

Auto = Literal["auto"]
AUGMENTS = ("standard", "photo", "none")
MODELS = ("small", "light", "medium", "large")
AUXILIARY = ("googlenet", "inception_v3")  # torchvision's with further heads for training, which are left out here
OPTIMIZERS = ("sgd", "nesterov", "rmsprop", "adagrad", "adam")
MOMENTUM = ("sgd", "nesterov", "adam")  # optimizers that have one
MONITORS = ("valid_loss", "valid_acc", "macro_f1", "train_loss", "train_acc")
KEEP = ("valid_acc", "valid_loss", "macro_f1")
FEW_VALID = 100  # valid images below which --keep auto goes by their loss
CAMS = ("gradcam", "gradcam++", "hirescam", "layercam", "xgradcam", "eigencam")
SUGGESTIONS = ("sixth", "valley", "steep", "minimum", "slide")  # ours, and fastai's
SCHEDULES = ("plateau", "one_cycle", "constant", "triangular", "triangular2", "warm_restarts", "flat_cos", "grow_batch")
ENDLESS = ("plateau", "grow_batch", "constant")  # schedules that do not depend on how many epochs there will be

AXES = ("schedule", "optimizer", "momentum", "lr", "batch_size", "model")  # several values of these are a comparison
PATHS = ("data", "augment", "out", "cache", "resume", "pretrained")
# MACHINE: settings that change a result by rounding at most. RESUME_MAY_CHANGE: those that a resumed run may change.
MACHINE = """resume cache compile device workers threads progress dry_run lr_find_only checkpoint_seconds open
    log""".split()
RESUME_MAY_CHANGE = (*MACHINE, "epochs", "data", "target", "gallery", "cam")
# Settings that the range test does not see: it trains at rates of its own, before the schedule begins.
NOT_IN_RANGE_TEST = """schedule epochs keep stop_after monitor patience_epochs factor min_lr threshold threshold_mode
    cooldown_epochs warmup_epochs pct_start div div_final max_momentum min_momentum cycle_length cycle_mult cycle_div
    max_batch_size ema target gallery cam name out""".split()
RESOLVED = ("threads", "precision", "size", "batch_size", "keep")  # a resumed run keeps what `auto` became

# The defaults of the settings that say None below. SOURCES and IMPLIED change them, by the values of other settings.
COMMON = dict(schedule="plateau", epochs=50, model="medium", flip=True, label_smoothing=0, pct_start=0.25,
              cycle_length=0.2, ema=0.0, threshold=1e-4, target=0.0)  # fmt: skip
SOURCES = {  # threshold: with ema the loss keeps falling a little, and only a fall by 4% counts as better
    "cifar10": {"label_smoothing": 0.1, "ema": 0.999, "threshold": 0.04, "target": 0.88},
    "digits": {"epochs": 20, "model": "small", "flip": False},
}
IMPLIED = {  # setting: function of its value that gives new defaults for settings further down in Config
    "data": lambda source: SOURCES.get(source, {}),
    "minutes": lambda some: {"schedule": "one_cycle", "epochs": "auto", "model": "auto"} if some else {},
    "schedule": {"flat_cos": {"pct_start": 0.75}, "warm_restarts": {"cycle_length": 1 / 7}}.get,
    "pretrained": lambda weights: {"freeze_epochs": 1 if weights else 0},
    "momentum": lambda mu: {"lr_iters": min(max(round(10 / (1 - mu)), 100), 2000)},  # ten times its memory
    "lr_scale": {"exponential": {"lr_high": 10.0}, "linear": {"lr_high": 2.0}}.get,
    "monitor": lambda what: {} if what == "valid_loss" else {"threshold": COMMON["threshold"]},
    "ema": lambda decay: {} if decay else {"threshold": COMMON["threshold"]},
}


def option(default, help, *flags, low=None, high=None, alone=None):
    """A field of `Config` and its flag, from `low` to `high`. Default None: see COMMON. A bare flag means `alone`."""
    return dataclasses.field(default=default, metadata=dict(help=help, flags=flags, low=low, high=high, alone=alone))


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Names are those of the command line; `args.yaml` holds exactly these."""

    data: str = option("cifar10", "cifar10, digits, a folder of images, or an archive of one (.zip, .tar.gz …)")
    minutes: float = option(0.0, "minutes for the whole run; network and epochs are chosen to fit; 0: no limit", low=0)
    schedule: Literal[*SCHEDULES] = option(None, "what drives the learning rate (plateau; one_cycle with --minutes)")
    bad_images: Literal["fail", "skip"] = option("fail", "unreadable images: fail names the first, skip lists them all")
    seeds: tuple[int, ...] = option((0,), "one run for each: weights, order, augmentation", low=0, high=2**32 - 1)
    split_seed: int = option(0, "seed of the split, where the data is not split already", low=0, high=2**32 - 1)
    epochs: int | Auto = option(None, "passes over the images; auto: what fits into --minutes (50; digits 20)", low=1)
    batch_size: int | Auto = option("auto", "images in a batch; auto: 128, or fewer", "-b", low=1, high=10**6)
    model: str = option(None, f"{', '.join(MODELS)}, torchvision's such as resnet18, timm/NAME (medium; digits small)")
    pretrained: str = option("", "start from weights: the library's, or FILE (.pth, .safetensors)", alone="torchvision")
    freeze_epochs: int = option(None, "epochs in which only head and norm layers learn (1 with --pretrained)", low=0)
    size: int | Auto = option("auto", "image side in pixels; auto: 128 (cifar10, digits 32)", low=16, high=1024)
    valid_pct: float = option(0.1, "share of train held out to choose the weights; 0: test chooses", low=0, high=0.9)
    folds: int = option(0, "split the images into so many parts; one run tests on each; 0: no folds", low=0, high=100)
    fold: int = option(0, "run only this fold: its images are the test set; 0: run all folds", low=0, high=100)
    optimizer: Literal[*OPTIMIZERS] = option("sgd", "what updates the weights; sgd has momentum")
    momentum: float = option(0.9, "momentum of sgd and nesterov, first beta of adam", low=0, high=0.9999)
    lr: float | Literal["find"] = option("find", "learning rate: a number, or find (range test)", low=1e-12)
    lr_suggest: Literal[*SUGGESTIONS] = option("sixth", "which suggestion of the range test is used")
    lr_iters: int = option(None, "batches of the range test (100; more above momentum 0.9)", low=10, high=2000)
    lr_scale: Literal["exponential", "linear"] = option("exponential", "how the rates of the range test rise")
    lr_high: float = option(None, "last rate of the range test (exponential 10, linear 2)", low=1e-4)
    lr_find_on: Literal["train", "valid"] = option("train", "set whose loss the range test looks at")
    weight_decay: float = option(5e-4, "L2 penalty added to the gradient; not on norms and biases", low=0)
    label_smoothing: float = option(None, "label smoothing of the training loss (0; cifar10 0.1)", low=0, high=0.99)
    class_weights: bool = option(False, "weigh the training loss by class: images / (classes x images of the class)")
    ema: float = option(None, "decay per step of the averaged weights; 0: none (0; cifar10 0.999)", low=0, high=0.99999)
    monitor: Literal[*MONITORS] = option("valid_loss", "what plateau watches")
    keep: Literal["auto", *KEEP] = option("auto", "epoch to keep; auto: valid_acc, or valid_loss if valid is small")
    patience_epochs: int | Auto = option("auto", "bad epochs that plateau forgives; auto: a tenth of all", low=0)
    stop_after: int = option(0, "stop after so many epochs without a better --monitor; 0: never", low=0)
    factor: float = option(0.3, "what plateau multiplies the learning rate by", low=1e-6, high=0.999999)
    min_lr: float = option(0.0, "lowest learning rate of plateau", low=0)
    threshold_mode: Literal["rel", "abs"] = option("rel", "whether plateau's threshold is relative or absolute")
    threshold: float = option(None, "least change that plateau counts (1e-4; cifar10 0.04 with valid_loss, ema)", low=0)
    cooldown_epochs: int = option(0, "epochs after a reduction in which plateau does not count", low=0)
    warmup_epochs: float = option(0.0, "epochs in which the rate rises from a quarter to all of it; 0: none", low=0)
    pct_start: float = option(None, "share of epochs before the rate falls (0.25; flat_cos 0.75)", low=0.01, high=0.99)
    div: float = option(25.0, "one_cycle starts at lr / div", low=1)
    div_final: float = option(1e5, "one_cycle and flat_cos end at lr / div_final", low=1)
    max_momentum: float = option(0.95, "one_cycle's momentum at both ends", low=0, high=0.9999)
    min_momentum: float = option(0.85, "one_cycle's momentum at the top of the rate", low=0, high=0.9999)
    cycle_length: float = option(None, "first cycle, as a share of epochs (0.2; warm_restarts 1/7)", low=1e-3, high=1)
    cycle_mult: float = option(2.0, "how many times longer each cycle of warm_restarts is than the one before", low=1)
    cycle_div: float = option(4.0, "triangular and triangular2 begin at lr / cycle_div", low=1)
    max_batch_size: int = option(1024, "largest batch of grow_batch, if there are so many images", low=1, high=10**6)
    accumulate: int = option(1, "batches whose mean loss makes one update", low=1, high=10_000)
    balanced_batches: bool = option(False, "each batch has the class proportions of the data, as far as possible")
    grad_noise: float = option(0.0, "eta of Gaussian gradient noise, variance eta / (1 + step)^0.55; 0: none", low=0)
    perturb_on_plateau: bool = option(False, "gradient noise only in the epoch after each plateau of --monitor")
    augment: str = option("standard", "standard (crop, flip, cutout), photo, none, or FILE of albumentations' A.save")
    cutout: int = option(8, "cutout's side if --size is 32; grows with it; 0: none", low=0, high=64)
    crop_padding: int = option(4, "padding of the crop if --size is 32; grows with it; 0: none", low=0, high=32)
    flip: bool = option(None, "flip horizontally in every other epoch (on; digits off)")
    mixup: float = option(0.0, "alpha of mixup, such as 0.4; 0: none", low=0, high=100)
    cutmix: float = option(0.0, "alpha of cutmix, such as 1; 0: none", low=0, high=100)
    precision: Literal["auto", "float32", "bf16", "fp16"] = option("auto", "number format; auto: bf16 if the chip can")
    compile: bool = option(False, "training steps through torch.compile; for a GPU, not measured there yet")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int | Auto = option("auto", "loader processes; auto: 0 on a CPU", "-j", low=0, high=256)
    threads: int | Auto = option("auto", "CPU threads of torch; auto: one for each core that is free", low=1, high=1024)
    out: str = option("runs", "folder of the run folders")
    name: str = option("", "name of the run folder; default <data>-<schedule>-s<seed>")
    checkpoint_seconds: int = option(600, "seconds between checkpoints within an epoch; 0: only at its end", low=0)
    resume: str = option("", "run folder to go on with; no flag may change what is trained, but --epochs may grow")
    cache: str = option("", "folder for downloads and decoded images; none: fastai's, for downloads alone")
    target: float = option(None, "report the first epoch with this test accuracy (0; cifar10 0.88)", low=0, high=1)
    cam: Literal[*CAMS] = option("gradcam", "method of grad-cam that explains mistakes")
    gallery: int = option(25, "mistakes explained in gradcam.png", low=0, high=100)
    lr_find_only: bool = option(False, "stop after the range test")
    dry_run: bool = option(False, "show settings, data and network; train nothing, make no run folder")
    progress: bool = option(True, "progress bar, on a terminal")
    log: Literal["none", "tensorboard", "wandb", "mlflow"] = option("none", "where else each epoch is logged")
    open: bool = option(False, "open report.html in the browser; it follows the training")

    def __post_init__(self):
        defaults = dict(COMMON)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = check(field, defaults.get(field.name) if value is None else value)
            object.__setattr__(self, field.name, value)
            if field.name in IMPLIED:
                defaults |= IMPLIED[field.name](value) or {}
        if self.patience_epochs == "auto" and self.epochs != "auto":
            object.__setattr__(self, "patience_epochs", max(self.epochs // 10, 1))
        clash = "--compile" * self.compile if self.epochs == "auto" else f"--epochs {self.epochs} (or --epochs auto)"
        not_a_folder = os.path.basename(self.name) != self.name or self.name.startswith(".")
        for wrong, text in (
            (self.perturb_on_plateau and not self.grad_noise, "perturb-on-plateau: needs --grad-noise, such as 0.01"),
            (not self.data, f"data: is empty; pass {', '.join(SOURCES)}, a folder of images, or an archive of one"),
            (self.epochs == "auto" and not self.minutes, "epochs: auto needs --minutes"),
            (self.lr_find_only and self.lr != "find", "lr-find-only: needs --lr find"),
            (self.model == "auto" and not self.minutes, "model: auto needs --minutes"),
            (self.minutes and clash, f"minutes: chooses the epochs by the speed of plain steps; leave out {clash}"),
            (self.model == "auto" and self.pretrained, "pretrained: needs --model where --minutes chooses"),
            (self.optimizer == "nesterov" and not self.momentum, "momentum: nesterov needs more than 0, or is sgd"),
            (self.threshold_mode == "rel" and self.monitor.endswith("loss") and self.threshold >= 1,
             f"threshold: no loss falls by a share of {self.threshold:g}; 4% is 0.04, or pass --threshold-mode abs"),
            (self.mixup and self.cutmix, "mixup, --cutmix: pass one of them, not both"),
            (self.folds == 1 or self.fold > self.folds, "folds: must be 2 or more, and --fold one of them"),
            (self.freeze_epochs and not self.pretrained, "freeze-epochs: needs --pretrained; nothing else is frozen"),
            (self.pretrained == "torchvision" and self.model in MODELS,
             f"pretrained: {self.model!r} has none; pass --model resnet18 or timm/NAME, or FILE"),
            (not_a_folder, f"name: must be the name of a folder, not a path or hidden, not {self.name!r}"),
        ):  # fmt: skip
            if wrong:
                raise BadInput(f"--{text}")

    @property
    def seed(self):
        """The seed of a single run."""
        return self.seeds[0]

    def to_dict(self):
        """The settings as plain values, for YAML and JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def flag_of(name):
    """The command-line spelling of the setting `name`."""
    return "--" + name.replace("_", "-")


def kind_and_words(annotation):
    """(class or None, words) of an annotation: int | Literal["auto"] gives (int, ["auto"])."""
    parts = [inner for part in get_args(annotation) for inner in get_args(part) or [part]] or [annotation]
    return next((part for part in parts if isinstance(part, type)), None), [p for p in parts if isinstance(p, str)]


def check(field, value):
    """`value` as the annotation of `field` has it. Raises BadInput that names the setting and what it may be."""
    if field.name != "seeds":
        return check_one(field, value)
    seeds = tuple(check_one(field, seed) for seed in (value if isinstance(value, (list, tuple)) else [value]))
    if not 0 < len(seeds) == len(set(seeds)):
        raise BadInput(f"--seeds: must be one or several different whole numbers, not {brief(value)}")
    return seeds


def check_one(field, value):
    (kind, words), low, high = kind_and_words(field.type), field.metadata["low"], field.metadata["high"]
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and value in words:
        return value
    with suppress(TypeError, ValueError, OverflowError):
        if kind in (int, float) and not isinstance(value, bool):
            number = kind(value)
            most = math.inf if high is None else high
            if number in (value, float(value)) and low <= number <= most and number < math.inf:  # 2.5 is no int
                return number
        elif kind in (str, bool) and isinstance(value, kind) and (kind is bool or is_text(value)):
            if field.name in PATHS and os.path.expanduser(value).startswith("~"):
                raise BadInput(f"{flag_of(field.name)}: {value} is the home of nobody; write the folder's path")
            return value
    allowed = {int: "a whole number", float: "a number", bool: "true or false", str: "text", None: ""}[kind]
    if low is not None:
        allowed += f" of at least {low}" if high is None else f" from {low} to {high}"
    allowed = " or ".join(filter(None, [allowed, ", ".join(words)]))
    raise BadInput(f"{flag_of(field.name)}: must be {allowed}, not {brief(value)}{guess(value, words)}")


def parser():
    """The command line of `train_fastai.py`."""
    p = Parser(prog="train_fastai.py", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    p.description = "Train an image classifier: range test, SGD under a schedule, curves, explained mistakes."
    for name, field in FIELDS.items():
        kind, words = kind_and_words(field.type)
        flags, text, default = [flag_of(name), *field.metadata["flags"]], field.metadata["help"], field.default
        if kind is bool:
            p.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
            continue
        if default not in (None, ""):
            text += f" ({' '.join(map(str, default)) if name == 'seeds' else default})"
        alone, metavar = field.metadata["alone"], None if kind else "|".join(words)
        nargs = "+" if name in ("seeds", *AXES) else "?" if alone else None
        p.add_argument(*flags, help=text.replace("%", "%%"), metavar=metavar, nargs=nargs, const=alone)
    p.add_argument("-c", "--config", metavar="FILE", help="settings from a YAML file such as args.yaml; flags win")
    p.add_argument("--smoke", action="store_true", help="try everything on digits, in about half a minute; flags win")
    return p


def read_file(path):
    """The settings in a YAML file. Raises BadInput where it cannot be read or has an unknown key."""
    with refused(f"{path}: cannot be read", "repair it, or pass another"):  # PyYAML raises its own, and others
        settings = read_yaml(path)
    for name in settings:
        if name not in FIELDS:
            raise BadInput(f"{path}: unknown setting {brief(name)}" + guess(name, FIELDS))
    return settings


def read_args(path):
    """As `read_file`; a file that `augment` names gives way to the copy that the run keeps beside its args.yaml."""
    settings, copy = read_file(path), Path(path).with_name("augment.yaml")
    if Path(path).name == "args.yaml" and settings.get("augment", "standard") not in AUGMENTS and copy.exists():
        settings["augment"] = str(copy)
    return settings


def read(argv):
    """The settings that a command line gives, by name: flags win over the file, the file over defaults."""
    flags = vars(parser().parse_args(argv))
    smoke = {"data": "digits", "epochs": 2, "lr_iters": 40, "gallery": 4} if flags.pop("smoke", False) else {}
    path = flags.pop("config", None)
    settings = {**(read_args(path) if path else {}), **smoke, **flags}
    lists = {name: settings[name] for name in AXES if isinstance(settings.get(name), list)}
    return settings | {name: values[0] for name, values in lists.items() if len(values) == 1}


def resumed(flags):
    """The `Config` of the run folder that `flags` resume. Raises BadInput for a flag that a resumed run cannot take."""
    run = Path(check(FIELDS["resume"], flags["resume"])).expanduser()
    folder = next((p for p in (run, *run.parents) if (p / "args.yaml").exists()), run)
    if folder != run:
        raise BadInput(f"--resume {run}: lies in a run folder; pass --resume {folder}, which goes on from last.pt")
    with refused(f"--resume {run}: is no run folder, or damaged"):
        env = read_json(run / "env.json")
        ended = int(read_json(run / "summary.json")["epochs"]) if (run / "summary.json").exists() else math.inf
        if not (math.isfinite(env.get("lr", 1.0)) and isinstance(env.get("resumed", []), list)):
            raise ValueError("lr or resumed is not what a run writes")
    for name in ("minutes", "lr_find_only"):
        if name in flags and check(FIELDS[name], flags[name]):
            raise BadInput(f"{flag_of(name)}: is for a new run; leave it out, and {run} goes on")
    became = {name: env[name] for name in RESOLVED if name in env}
    before = Config(**read_args(run / "args.yaml") | became | {"dry_run": False, "lr_find_only": False, "open": False})
    config = dataclasses.replace(before, **flags)
    for name in FIELDS:
        value, kept = getattr(config, name), getattr(before, name)
        moved = name == "pretrained" and not {"", "torchvision"} & {value, kept}  # a file that may lie elsewhere now
        if name not in RESUME_MAY_CHANGE and value != kept and not moved:
            raise BadInput(f"{flag_of(name)}: {run} has {kept}, not {value}; leave it out, or start a new run")
    if config.epochs < before.epochs or (config.epochs > before.epochs and config.schedule not in ENDLESS):
        raise BadInput(f"--epochs: {run} has {before.epochs}; only {', '.join(ENDLESS)} may have more, and none fewer")
    if ended < before.epochs < config.epochs:
        raise BadInput(f"--epochs: {run} stopped after epoch {ended} by --stop-after; start a new run for more")
    return config


def parse(argv=None):
    """The `Config` that a command line asks for. Raises BadInput for what is wrong without a look at torch or data."""
    settings = read(argv)
    return resumed(settings) if settings.get("resume") else Config(**settings)


def data_name(config):
    """The name of the data, as names of folders have it."""
    name = os.path.basename(os.path.realpath(os.path.expanduser(config.data))).split(".")[0]
    return "".join(c if c.isprintable() else "_" for c in name)[:50] or "data"


def variants(argv=None):
    """One `Config`, of one seed, for each run that a command line asks for: several are a comparison in one folder."""
    settings = read(argv)
    if settings.get("resume"):
        return [resumed(settings)]
    axes = {name: settings[name] for name in AXES if isinstance(settings.get(name), list) and settings[name]}
    configs, names = [], []
    for values in itertools.product(*axes.values()):
        config = Config(**{**settings, **dict(zip(axes, values))})
        least = 0 if config.patience_epochs == "auto" else config.patience_epochs + 2
        if config.schedule in ("plateau", "grow_batch") and 0 < config.stop_after < least:
            text = f"ends training before a smaller rate can act; pass {least} or more, or --schedule constant"
            raise BadInput(f"--stop-after {config.stop_after}: {text}")
        names.append("-".join(str(getattr(config, name)) for name in axes or ["schedule"]).replace("/", "-"))
        folds = [config.fold] if config.fold else range(1, config.folds + 1) or [0]
        for seed, fold in itertools.product(config.seeds, folds):
            name = f"{names[-1]}-s{seed}" + f"-f{fold}" * (fold > 0)
            configs.append(dataclasses.replace(config, seeds=(seed,), fold=fold, name=name))
    if len(configs) == 1:
        return [config]
    if config.minutes:
        raise BadInput("--minutes: is for one run; compare with the --model and --epochs that it chooses")
    if len(set(names)) < len(names):
        raise BadInput(f"{', '.join(map(flag_of, axes))}: a value is there twice")
    folder = f"{data_name(config)}-{'_vs_'.join(names)}" + f"-{config.folds}-folds" * (config.folds > 0)
    if len(folder) > 120:  # two lists that begin alike must not share a folder
        folder = f"{folder[:111]}-{zlib.crc32(folder.encode()):08x}"
    return [dataclasses.replace(c, out=os.path.join(c.out, config.name or folder)) for c in configs]
