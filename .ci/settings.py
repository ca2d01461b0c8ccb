"""Makes docs/settings.md from the settings of lib/config.py.

uv run .ci/settings.py             writes it
uv run .ci/settings.py --check     exits with 1 where it is not up to date
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs/settings.md"

START = """# Settings

<!-- made by: uv run .ci/settings.py   (from lib/config.py; do not edit) -->

`uv run train_fastai.py --help` prints the same list. Every setting has a default. Flags win over a file (`-c FILE`),
and the file wins over the defaults. Each run writes its settings to `args.yaml`: `-c runs/x/args.yaml` runs it again.

Three more flags are not settings:

- `-c FILE` reads settings from a YAML file.
- `--smoke` tries everything: digits, 2 epochs, a short range test, 4 mistakes. More than half of its time goes into
  the start of Python and torch. On a busy or a slow machine it can take a minute.
- `--help` lists the flags.

A file `args.yaml` has a value for every setting, so a flag beside it changes no other default. For example, with
`--ema 0` also pass `--threshold 1e-4`.

Some settings take one value or several. Several values make a [comparison](comparing.md).
"""

GROUPS = {  # heading: (settings, notes)
    "Data": (
        "data bad_images valid_pct split_seed folds fold size batch_size balanced_batches",
        """
        - With `--valid-pct 0` the test set chooses the weights, and the summary and the figures of the result say so.
          Data with its own `valid/` and `test/` keeps both.
        - `--folds 5` makes five runs. Each run tests on another fifth of the images
          ([comparing.md](comparing.md)). With `--fold 2` there is one run, which tests on the second fifth.
        - `--size` is the length of the shorter side. Images are then cropped to a square: in the centre for evaluation,
          at a random place for training (unless `--augment none`). For a pretrained network of timm, `--size auto` is
          the size that its weights were trained with.
        - Images are decoded once, into a file that is mapped into memory. Without `--cache` the file is removed at the
          end (not under torchrun). With `--cache DIR` it stays, and later runs use it again. Another
          size, split or fold makes another file, and so does a change of the images' names, sizes or times.
        """,
    ),
    "Network": (
        "model pretrained freeze_epochs",
        """
        - `--model` takes our networks (`small`, `light`, `medium`, `large`), the classifiers of torchvision
          (`resnet18`, `vit_b_16`, …) and those of timm (`timm/convnext_atto`, with `uv run --extra timm …`).
        - In the networks of torchvision and timm, GradCAM reads the last layer that has a map of at least 4 x 4. In a
          ViT or a Swin transformer that is a norm layer.
        - The first convolution of our networks is not trained. It whitens the 2 x 2 patches of the training images.
          Its bias learns in the first three epochs.
        """,
    ),
    "Training": (
        "epochs minutes seeds optimizer momentum weight_decay label_smoothing class_weights accumulate ema grad_noise "
        "perturb_on_plateau stop_after keep target",
        """
        - Weight decay is torch's L2 penalty. Norms and biases, and the tokens and positions of transformers, have none.
          Under `adam`, `rmsprop` and `adagrad` the penalty too is divided by the size of the gradients (Loshchilov &
          Hutter, arXiv 1711.05101).
        - `--ema` evaluates and keeps an exponential moving average of the weights. It does not change the steps of the
          training, except through what watches `--monitor`: plateau, for one, watches the loss of the average. The
          decay is for each step: if a step has more images (`grow_batch`, `--accumulate`), the average goes back over
          more epochs.
        - `--stop-after` counts epochs without a new best value, however little better. Under `plateau` and `grow_batch`
          it must be at least `--patience-epochs` + 2, so that a smaller rate can act. Under the other schedules it may
          end a run while the rate is still high.
        - The order of an epoch is a function of (seed, epoch). The augmentation of an image is a function of (seed,
          epoch, image). So any number of `--workers` sees the same data. Two equal runs on one machine, with the same
          number of threads, are equal to the bit (tested on a CPU).
        """,
    ),
    "Learning rate": (
        "lr lr_suggest lr_iters lr_scale lr_high lr_find_on",
        """
        - The range test trains a copy of the network while the rate rises, by default from 1e-5 to 10. It leaves no
          trace: a run with `--lr find` that finds x equals a run with `--lr x` to the bit. With `--accumulate`,
          `--lr-iters` counts updates.
        - The loss reacts late to the rates if the momentum is large. So by default the range test has 10 / (1 -
          momentum) batches, from 100 to 2,000: 1,000 with `--momentum 0.99`.
        - `--lr` is the largest rate of every schedule. With a number there is no range test, and the other settings of
          this table have no effect.
        """,
    ),
    "Schedule": (
        "schedule monitor patience_epochs factor min_lr threshold threshold_mode cooldown_epochs warmup_epochs "
        "pct_start div div_final max_momentum min_momentum cycle_length cycle_mult cycle_div max_batch_size",
        """
        - Plateau counts as torch's `ReduceLROnPlateau` does: with `--patience-epochs 5` the sixth bad epoch in a row
          lowers the rate.
        - `grow_batch` grows the batch on a plateau, where `plateau` would lower the rate. From
          `--max-batch-size`, or from all training images if these are fewer, it lowers the rate.
        - On CIFAR-10 the loss must fall by 4% to count as an improvement (`--threshold 0.04`). The loss of averaged
          weights keeps falling a little. So with a smaller threshold there would hardly ever be a plateau. If you use
          `--ema` on other data, pass `--threshold 0.04` too; the value was chosen on CIFAR-10.
        - `one_cycle` sets the momentum itself, between `--max-momentum` and `--min-momentum`. `--momentum` then counts
          in its range test alone. `rmsprop` and `adagrad` have no momentum.
        - A setting acts under the schedules that its meaning names. `--warmup-epochs` acts under all of them,
          `--pct-start` under `one_cycle` and `flat_cos`, `--cycle-length` under `triangular`, `triangular2` and
          `warm_restarts`. What acts under `plateau` acts under `grow_batch` too.
        - `--perturb-on-plateau` has its own detector of plateaus. `--monitor`, `--patience-epochs`, `--threshold`,
          `--threshold-mode` and `--cooldown-epochs` count for it too. `--monitor` also counts for `--stop-after`.
        - With `--ema`, `--monitor` names a value of the averaged weights. (`train_loss` and `train_acc` are those of
          the weights in training.)
        """,
    ),
    "Augmentation": (
        "augment cutout crop_padding flip mixup cutmix",
        """
        - `standard` crops at random from a padded image, flips it in every other epoch, and masks one square (cutout).
        - `photo` crops at random places and scales, flips, changes colours a little, and masks one square.
        - `none` changes nothing: it crops larger images in the centre, as for evaluation. You can also pass a pipeline
          of your own: a file that albumentations' `A.save` wrote.
        - `--cutout` and `--flip` act in `standard` and `photo`, `--crop-padding` in `standard` alone. With `none`, or
          with a pipeline of your own, none of them acts.
        - `augment.yaml` in the run folder holds the pipeline of the run.
        """,
    ),
    "Machine": (
        "device precision compile workers threads",
        """
        - `--threads auto` starts with a thread for each core that the process may use, but with no more than torch has
          by itself. Affinity and the quota of a container limit these cores. On a CPU, a run checks once a second how
          many of them other programs use. It gives up the cores that they keep busy, and takes them again when they are
          free. It says so once, in a line. If the number of threads changes, the run is not repeatable to the bit.
          `--threads N` never changes it. Only on Linux does a run see other programs, and not with loader processes or
          torchrun. With `--compile` it does not adapt.
        - fp16 needs a CUDA device; `--precision auto` never takes it.
        - `--compile` needs a compiler, and Python's headers (`Python.h`). On a CPU it needs `--precision float32`. It
          works in one process only, and not with `--minutes`.
        """,
    ),
    "Output": (
        "out name cache resume checkpoint_seconds cam gallery log open progress lr_find_only dry_run",
        """
        - `--log` needs the package that it names: `uv run --with wandb train_fastai.py --log wandb`. TensorBoard and
          wandb write into the run folder. MLflow writes where `MLFLOW_TRACKING_URI` says. If the log does not take
          an epoch, one line says so, and training goes on. A resumed run goes on with its run at wandb or MLflow.
        - `--cam eigencam` knows no class: its two maps are equal. `xgradcam` is made for layers whose outputs are not
          negative; those of our networks may be.
        - `--name`: the default also has the optimizer, if it is not `sgd`, and the fold, if there is one. Where the
          folder is there already, `-2` is added.
        - `--resume` goes on from the last checkpoint. There is one at the end of each epoch, and one every
          `--checkpoint-seconds` within an epoch. `--epochs` may grow under `plateau`, `grow_batch` and `constant`.
          [reliability.md](reliability.md) lists what is promised.
        """,
    ),
}
REST = "Other"  # the heading of settings that are in no group

END = """
## Exit status

| status | meaning |
| --- | --- |
| 0 | the run is done |
| 1 | another process of the run is gone, or an error that nobody has foreseen |
| 2 | bad input, a bad setting, a disk that cannot be written, too little memory; one line on stderr says which |
| 3 | the loss is not finite any more, after training has begun; the message names the epoch, the batch and the rate |
| 130 | interrupted; during training, a line names the command that goes on |
"""


def escaped(text):
    """`text` for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def number(value):
    """A number in a short form."""
    return "2^32 - 1" if value == 2**32 - 1 else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def values(field):
    """The values that a setting may have, in words."""
    from lib.config import AXES, PATHS, kind_and_words

    (kind, words), low, high = kind_and_words(field.type), field.metadata["low"], field.metadata["high"]
    if kind is bool:
        return "on, off"
    text = {int: "whole number", float: "number", str: "text", None: ""}[kind]
    text = "path or name" if field.name in PATHS else text
    if high is not None:
        text += f", {number(low)} to {number(high)}"
    elif low is not None:
        text += f", at least {number(low)}"
    text = "; ".join(filter(None, [text, ", ".join(f"`{word}`" for word in words)]))
    return f"one or several: {text}" if field.name in (*AXES, "seeds") else text


def default_and_meaning(field):
    """Both as text. If a default depends on other settings, it stands in brackets at the end of the help."""
    default, text = field.default, field.metadata["help"]
    if default is None:
        text, default = re.fullmatch(r"(.*) \((.*)\)", text).groups()
    elif isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, (int, float)):
        default = number(default)
    return " ".join(map(str, default)) if field.name == "seeds" else default, text


def row(field):
    """A line of the table: flag, values, default, meaning."""
    from lib.config import flag_of

    flags = [flag_of(field.name), *field.metadata["flags"]]
    if field.type is bool:
        flags.append("--no-" + flags[0][2:])
    default, text = map(escaped, default_and_meaning(field))
    return f"| {', '.join(f'`{flag}`' for flag in flags)} | {values(field)} | {default or 'none'} | {text} |"


def page():
    """The text of docs/settings.md."""
    sys.path.insert(0, str(ROOT))
    from lib.config import FIELDS

    named = {name for names, _ in GROUPS.values() for name in names.split()}
    groups = {**GROUPS, REST: (" ".join(name for name in FIELDS if name not in named), "")}
    text = START
    for heading, (names, notes) in groups.items():
        fields = [FIELDS[name] for name in names.split() if name in FIELDS]
        if fields:
            text += f"\n## {heading}\n\n| flag | values | default | meaning |\n| --- | --- | --- | --- |\n"
            text += "".join(row(field) + "\n" for field in fields)
        if notes:
            text += "\n" + "".join(line.removeprefix(8 * " ") + "\n" for line in notes.strip("\n ").split("\n"))
    return text + END


if __name__ == "__main__":
    made = page()
    if "--check" in sys.argv:
        same = TARGET.exists() and TARGET.read_text(encoding="utf-8") == made
        print(f"docs/settings.md {'holds' if same else 'differs from'} the settings of lib/config.py")
        sys.exit(0 if same else 1)
    TARGET.write_text(made, encoding="utf-8")
    print(f"docs/settings.md: {made.count('| `--')} settings")
