"""What networks learn from how many images, and how fast they are: the table that `--minutes` chooses from.

uv run python -m tests.benchmarks.networks [--only NAME …] [--epochs 2 4 8 16] [--seeds 0] [--out FILE]

First the speed of every candidate is measured, in turn, on one batch that stays in memory. Then train_fastai.py trains
each for each number of epochs under one cycle. What counts is the accuracy on valid, never that on test. Finished runs
are kept in the file, and not run again. `--add` takes over the numbers of finished runs, also of plateau.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

import train_fastai
from lib import compare, machine
from lib.config import parse
from lib.models import networks, zoo
from lib.train import learner
from lib.train.budget import TABLE
from tests.benchmarks import common


class Separable(networks.SmallResNet):
    """Its 3 x 3 convolutions see one channel each, and a 1 x 1 convolution mixes them (Howard, arXiv 1704.04861)."""

    def __init__(self, n_classes, **args):
        super().__init__(n_classes, **args)
        for parent in list(self.stages.modules()):
            for name, conv in list(parent.named_children()):
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    c_in, c_out = conv.in_channels, conv.out_channels
                    each = nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
                    setattr(parent, name, nn.Sequential(each, nn.Conv2d(c_in, c_out, 1, bias=False)))


class Strided(networks.SmallResNet):
    """Its first stage has a convolution of stride 2 instead of one with pooling behind it."""

    def __init__(self, n_classes, **args):
        super().__init__(n_classes, **args)
        first = self.stages[0][0]
        first[0] = nn.Conv2d(first[0].in_channels, first[0].out_channels, 3, stride=2, padding=1, bias=False)
        del first[1]


def ours(*widths, stem=24, depths=(1, 1, 1), kind=networks.SmallResNet):
    return kind, dict(stem=stem, widths=widths, depths=depths, squeeze=False)


CANDIDATES = {
    **zoo.MODELS,
    "24,64,128": ours(24, 64, 128),
    "32,128,256": ours(32, 128, 256),
    "64,128,256": ours(64, 128, 256),
    "64,128,256 strided": ours(64, 128, 256, kind=Strided),
    "64,128,256 separable": ours(64, 128, 256, kind=Separable),
    "96,192,384 separable": ours(96, 192, 384, kind=Separable),
}


def multiply_adds(model, size=32):
    """Multiplications of convolutions and linear layers for one image of `size` pixels."""
    total = 0

    def count(m, inputs, output):
        nonlocal total
        total += m.weight.numel() * (output.shape[2] * output.shape[3] if output.dim() == 4 else 1)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    model.train()
    return total


def speeds(models, precision, device="cpu", bs=128, rounds=5, steps=2):
    """{name: images a second}: medians of training steps on one batch, the models in turn. The stem is fixed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(bs, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    y = torch.randint(10, (bs,), generator=generator).to(device)
    dtype, found, optimizers = learner.DTYPES[precision], defaultdict(list), {}
    for name, model in models.items():
        model.to(device, memory_format=torch.channels_last).stem[0].weight.requires_grad_(False)
        optimizers[name] = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, 0.9)
    for i in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(steps):
                with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32):
                    out = model(x)
                nn.functional.cross_entropy(out.float(), y).backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
            if i:  # the first round warms up
                found[name].append(steps * bs / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def train(name, epochs, seed, options):
    """The folder of a finished run of train_fastai.py."""
    argv = ["--model", name, "--epochs", epochs, "--seeds", seed, "--schedule", "one_cycle", "--gallery", 0]
    argv += ["--no-progress", "--threads", options.threads, "--out", Path(options.runs).resolve()]
    argv += ["--name", f"{name.replace(',', '-').replace(' ', '-')}-{epochs}-s{seed}"]
    argv += [word for key in ("data", "cache") if (value := getattr(options, key)) for word in (f"--{key}", value)]
    argv += ["--size", 32, "--precision", options.precision]
    zoo.MODELS[name] = CANDIDATES[name]
    if train_fastai.main(list(map(str, argv))):
        raise SystemExit(f"{name}: the run of {epochs} epochs failed")
    return max(Path(options.runs).glob(argv[argv.index("--name") + 1] + "*"), key=lambda folder: folder.stat().st_mtime)


def add(rows, folder, name=None):
    """Adds the accuracy of a finished run to the row of its network."""
    run = compare.load(folder)
    if not run or run["args"]["schedule"] not in ("one_cycle", "plateau"):
        raise SystemExit(f"{folder}: is no finished run of one_cycle or plateau")
    args, env = run["args"], run["env"]
    row = rows.setdefault(name or args["model"], {})
    facts = dict(valid_acc=run["summary"]["valid_acc"], images=len(run["rows"]) * env["images"]["train"])
    facts |= {key: args[key] for key in ("schedule", "optimizer", "weight_decay", "cutout", "crop_padding")}
    facts |= {key: env[key] for key in ("commit", "precision")}
    row.setdefault("runs", {})[f"{len(run['rows'])} epochs, seed {args['seeds'][0]}"] = facts


def learned(runs):
    """[(images seen, mean valid accuracy, number of runs)] of a row's runs, by images."""
    by_images = defaultdict(list)
    for run in runs.values():
        by_images[run["images"]].append(run["valid_acc"])
    return [(images, statistics.mean(found), len(found)) for images, found in sorted(by_images.items())]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", default=list(zoo.MODELS), choices=CANDIDATES, help="networks to train")
    p.add_argument("--epochs", type=int, nargs="+", default=[2, 4, 8, 16])
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--threads", default="auto")
    p.add_argument("--precision", default="auto")
    p.add_argument("--add", nargs="*", default=[], help="folders of finished runs on CIFAR-10")
    p.add_argument("--no-speeds", action="store_true", help="leave the measured speeds as they are")
    p.add_argument("--data", help="images other than CIFAR-10")
    p.add_argument("--cache", help="train_fastai.py's --cache")
    p.add_argument("--runs", default=tempfile.gettempdir() + "/networks", help="folder of the runs")
    p.add_argument("--out", default=TABLE, type=Path)
    options = p.parse_args()
    if options.data and options.out == TABLE:
        p.error("--data: --minutes reads CIFAR-10's numbers in results/networks.json; pass another --out")
    rows = {}
    with suppress(FileNotFoundError):
        rows = json.loads(options.out.read_text())["rows"]
    for folder in options.add:
        add(rows, folder)
    if not options.no_speeds:
        measure(rows, machine.prepare(parse(["--precision", options.precision, "--threads", options.threads]))[1])
    save(options, rows)
    for epochs in options.epochs:
        for seed in options.seeds:
            for name in options.only:
                if f"{epochs} epochs, seed {seed}" not in rows.setdefault(name, {}).get("runs", {}):
                    add(rows, train(name, epochs, seed, options), name)
                    save(options, rows)


def measure(rows, precision):
    """Adds size and speed of each candidate to its row."""
    torch.manual_seed(0)
    models = {name: constructor(10, **args) for name, (constructor, args) in CANDIDATES.items()}
    for name, speed in speeds(models, precision).items():
        row = rows.setdefault(name, {})
        row["args"], row["parameters"] = CANDIDATES[name][1], sum(p.numel() for p in models[name].parameters())
        row["multiply_adds"] = multiply_adds(models[name])
        row.setdefault("images_per_second", {})[f"{precision}, {torch.backends.cpu.get_cpu_capability()}"] = speed


def save(options, rows):
    for row in rows.values():
        row["learned"] = learned(row.get("runs", {}))
    common.save(
        options.out, {"command": "python -m tests.benchmarks.networks", "rows": rows, "machine": common.machine()}
    )


if __name__ == "__main__":
    main()
