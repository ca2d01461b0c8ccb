"""What a network learns in a fixed time: parameters, multiply-adds, images a second, valid accuracy over seeds.

uv run python -m tests.benchmarks.networks --data FOLDER [--seconds 300] [--seeds 0 1 2] [--only NAME …] [--out FILE]

The speed of every candidate is measured first, in turn, on one batch that stays in memory; each then trains for as many
batches as it does in the given seconds (a noisy hour is nobody's disadvantage) under one cycle, SGD, momentum 0.9,
and is judged on valid, never on test. Finished rows are kept in the file, and not run again.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from lib import config, machine
from lib.data import loader
from lib.models import networks, zoo
from lib.train import learner, optimizers
from tests.benchmarks import common
from tests.benchmarks.common import save

WIDE = dict(stem=24, widths=(64, 128, 256))
CANDIDATES = {
    **{name: args for name, (_, args) in zoo.MODELS.items()},
    "32,96,256": dict(stem=24, widths=(32, 96, 256)),
    "64,256,256": dict(stem=24, widths=(64, 256, 256)),
    "64,128,256": WIDE,
    "64,128,256 not whitening": {**WIDE, "whiten": False},
    "64,128,256 without squeeze-excite": {**WIDE, "squeeze": False},
    "64,128,256 x2": {**WIDE, "depths": (2, 2, 2)},
    "96,192,384": dict(stem=24, widths=(96, 192, 384)),
}


def network(args, dls):
    """A fresh network of `args` for the data."""
    args = dict(args)
    whiten = args.pop("whiten", True)
    model = networks.SmallResNet(len(dls.vocab), **args)
    if whiten:
        model.whiten(dls.train.plain()[0])
    return model.to(memory_format=torch.channels_last)


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


def speeds(models_, batch, autocast, rounds=7, steps=3):
    """{name: images a second}: medians of training steps on `batch`, the models in turn."""
    x, y = batch
    optimizers = {name: torch.optim.SGD(m.parameters(), 0.01, 0.9) for name, m in models_.items()}
    found = {name: [] for name in models_}
    for i in range(rounds + 1):
        for name, model in models_.items():
            start = time.perf_counter()
            for _ in range(steps):
                step(model, optimizers[name], x, y, autocast)
            if i:
                found[name].append(steps * len(y) / (time.perf_counter() - start))
    return {name: statistics.median(v) for name, v in found.items()}


def step(model, opt, x, y, autocast):
    with autocast():
        out = model(x)
    nn.functional.cross_entropy(out.float(), y).backward()
    opt.step()
    opt.zero_grad()


def train(args, seed, steps, dls, autocast, lr):
    """Valid accuracy of a network of `args` after `steps` batches of one cycle."""
    torch.manual_seed(seed)
    model = network(args, dls)
    spared = optimizers.undecayed(model)
    decayed = [p for p in model.parameters() if not any(p is q for q in spared)]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": spared, "weight_decay": 0}]
    opt = torch.optim.SGD(groups, lr, 0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, cycle_momentum=False, pct_start=0.25)
    dls.train.seed, dls.train.epoch, done, start = seed, 0, 0, time.perf_counter()
    while done < steps:
        for b in dls.train:
            x, y = (t.as_subclass(torch.Tensor) for t in b)
            step(model, opt, x, y, autocast)
            schedule.step()
            done += 1
            if done == steps:
                break
    seconds = time.perf_counter() - start
    right = n = 0
    model.eval()
    with torch.no_grad():
        for b in dls.valid:
            x, y = (t.as_subclass(torch.Tensor) for t in b)
            right, n = right + (model(x).argmax(1) == y).sum().item(), n + len(y)
    return right / n, seconds


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="as of train_fastai.py")
    p.add_argument("--seconds", type=float, default=300)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    p.add_argument("--lr", type=float, default=0.2)
    p.add_argument("--precision", default="auto")
    p.add_argument("--out", default="results/networks.json")
    args = p.parse_args()
    settings = config.parse(["--data", args.data, "--size", "32", "--precision", args.precision])
    precision = machine.pick_precision(settings, torch.device("cpu"))
    dtype = learner.DTYPES[precision]
    autocast = lambda: torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)
    dls = loader.get_dls(settings)
    batch = tuple(t.as_subclass(torch.Tensor) for t in dls.train.one_batch())
    made = {name: network(CANDIDATES[name], dls) for name in args.only}
    about = {
        name: {
            "args": CANDIDATES[name],
            "parameters": sum(q.numel() for q in m.parameters()),
            "multiply_adds": multiply_adds(m),
        }
        for name, m in made.items()
    }
    known = json.loads(Path(args.out).read_text())["rows"] if Path(args.out).exists() else {}
    speed = speeds(made, batch, autocast)
    rows = {
        **known,
        **{name: {**about[name], **known.get(name, {}), "images_per_second": speed[name]} for name in made},
    }
    for seed in args.seeds:
        for name in args.only:
            runs = rows[name].setdefault("runs", {})
            key = f"{args.seconds:g} s, seed {seed}"
            if key in runs:
                continue
            steps = math.ceil(args.seconds * speed[name] / dls.train.bs)
            acc, seconds = train(CANDIDATES[name], seed, steps, dls, autocast, args.lr)
            runs[key] = {"valid_acc": acc, "batches": steps, "seconds": seconds}
            print(f"{name:20s} {key:16s} {steps} batches, {seconds:.0f} s: valid {acc:.4f}", flush=True)
            command = f"python -m tests.benchmarks.networks --data … --seconds {args.seconds:g}"
            save(args.out, {"command": command, "precision": precision, "rows": rows, "machine": common.machine()})


if __name__ == "__main__":
    main()
