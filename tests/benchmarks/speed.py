"""Images a second of stock fastai, of this project, and of the same network on one batch that never leaves memory.

uv run python -m tests.benchmarks.speed [--data FOLDER] [--model medium] [--images 2560] [--rounds 5] [--out FILE]

`--model` is one that train_fastai.py takes, or resnet9, the small ResNet-9 that is common for CIFAR-10.

The three run in turn, round after round, stock fastai in a process of its own, as a fastai user has it; medians and
ratios of the rounds are printed and written to results/speed.json. What is timed is training from the first batch of
an epoch to its end, as a run has it: loader, augmentation, record, progress, plateau, checkpoint. Evaluation, range
test and start-up are reported apart.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import albumentations as A
import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import GrandparentSplitter, Normalize, get_image_files, parent_label
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fasttransform import Transform
from torch import nn

from lib import config, machine
from lib.data import loader
from lib.models import zoo
from lib.train import averaging, checkpoint, learner, lr_range, progress, schedules
from tests.benchmarks import common
from tests.benchmarks.common import generate, save, subset

ROOT = Path(__file__).parents[2]
FIRST_STEP = """
import os, sys, time, resource
import train_fastai
def step(*args):
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
    os._exit(0)
def train(*args):
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    register_optimizer_step_pre_hook(step)
    return original(*args)
original, train_fastai.train = train_fastai.train, train
sys.exit(train_fastai.main(sys.argv[1:]))
"""


class Timed(Callback):
    """Seconds of an epoch's training batches, from before the loader starts to after the last step."""

    order = -100

    def before_train(self):
        self.start = clock(self.dls.device)

    def after_train(self):
        self.seconds = clock(self.dls.device) - self.start


def clock(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class ResNet9(nn.Sequential):
    """Page's ResNet-9 (How to train your ResNet) in the order it is mostly written: convolution, norm, ReLU, pooling.

    Maps (n, 3, 32, 32) to logits (n, n_classes); of width 24 it has 0.93 M parameters and 54 M multiply-adds.
    """

    def __init__(self, n_classes, width=24):
        conv = lambda a, b: [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        down = lambda a, b: [*conv(a, b), nn.MaxPool2d(2)]
        residual = lambda a: Residual(*conv(a, a), *conv(a, a))
        w = width
        layers = [*conv(3, w), *down(w, 2 * w), residual(2 * w), *down(2 * w, 4 * w), *down(4 * w, 8 * w)]
        super().__init__(*layers, residual(8 * w), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * w, n_classes))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def network(name, n_classes, images):
    """The network that `--model` asks for, with fresh weights, as it trains behind the first epochs."""
    model = ResNet9(n_classes) if name == "resnet9" else zoo.build(name, n_classes, images=images)
    for p in getattr(model, "early", []):
        p.requires_grad_(False)
    return model


class Stock:
    """What a fastai user writes: per-item PIL, albumentations' own transforms, float32, fastai's defaults."""

    def __init__(self, root, settings, device):
        augment = A.Compose(
            [
                A.PadIfNeeded(40, 40),
                A.RandomCrop(32, 32),
                A.HorizontalFlip(p=0.5),
                A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(8, 8), hole_width_range=(8, 8), p=1.0),
            ]
        )

        class Augment(Transform):
            split_idx = 0

            def encodes(self, image: PILImage):
                return PILImage.create(augment(image=np.array(image))["image"])

        block = DataBlock(
            blocks=(ImageBlock, CategoryBlock),
            get_items=get_image_files,
            get_y=parent_label,
            splitter=GrandparentSplitter("train", "test"),
            item_tfms=Augment(),
            batch_tfms=Normalize.from_stats([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]),
        )
        self.dls = block.dataloaders(root, bs=settings.batch_size, device=device)
        model = network(settings.model, len(self.dls.vocab), self.dls.one_batch()[0])
        self.learn = Learner(self.dls, model, opt_func=SGD, metrics=accuracy, cbs=Timed())
        self.images = len(self.dls.train_ds) // settings.batch_size * settings.batch_size  # fastai drops the last

    def round(self):
        with self.learn.no_bar(), self.learn.no_logging():
            self.learn.fit(1, 0.01)
        return self.images / self.learn.timed.seconds

    @classmethod
    def serve(cls, connection, *args):
        """In a child process: a round for whatever comes."""
        os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # of the parent's `keep_memory`
        multiprocessing.set_start_method("fork", force=True)  # of its loader's workers, as in a script on Linux
        stock = cls(*args)
        while True:
            connection.recv()
            connection.send(stock.round())

    @classmethod
    @contextmanager
    def elsewhere(cls, *args):
        """`round` of a Stock that lives in a fresh process, without what this one was tuned with (`keep_memory`)."""
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("spawn").Process(target=cls.serve, args=(there, *args))
        child.start()
        there.close()  # so that a child that dies is noticed

        def round():
            here.send(True)
            return here.recv()

        try:
            yield round
        finally:
            child.terminate()


class Ours:
    """A run as `train_fastai.py` makes it."""

    def __init__(self, settings, device, precision, folder):
        self.dls = loader.get_dls(settings, device)
        model = network(settings.model, len(self.dls.vocab), self.dls.train.plain()[0])
        self.learn = learner.build(settings, self.dls, model, precision, cbs=[Timed()])
        self.learn.add_cbs(
            [averaging.KeepBest(), progress.EpochLines(), checkpoint.Checkpoint(folder / "last.pt")],
        )
        self.settings, self.images = settings, len(self.dls.train.dataset)

    def round(self):
        schedules.fit(self.learn, self.settings, 0.01)
        return self.images / self.learn.timed.seconds

    def loader(self):
        """Images a second of the training loader alone, in one process."""
        dl, n, start = self.dls.train.new(num_workers=0), 0, time.perf_counter()
        for x, _ in dl:
            n += len(x)
        return n / (time.perf_counter() - start)

    def evaluation(self):
        start = clock(self.dls.device)
        self.learn.evaluate(self.dls.test)
        return len(self.dls.test.dataset) / (clock(self.dls.device) - start)

    def range_test(self):
        start = clock(self.dls.device)
        lr_range.run(self.learn, np.geomspace(1e-5, 1e-2, len(self.dls.train)), stop_div=False)
        return self.images / (clock(self.dls.device) - start)


class Ceiling:
    """The same network, precision, memory format and optimizer on one batch that stays where it is."""

    def __init__(self, ours, steps):
        self.learn, self.steps = ours.learn, steps
        self.model = network(ours.settings.model, len(ours.dls.vocab), ours.dls.train.plain()[0])
        self.model.to(ours.dls.device, memory_format=torch.channels_last)
        self.opt = torch.optim.SGD(self.model.parameters(), 0.01, 0.9, weight_decay=5e-4)
        self.x, self.y = (t.as_subclass(torch.Tensor) for t in ours.dls.one_batch())
        self.x = self.x.contiguous(memory_format=torch.channels_last)

    def round(self):
        self.model.train()
        start = clock(self.x.device)
        for _ in range(self.steps):
            with torch.autocast(self.x.device.type, self.learn.dtype, enabled=self.learn.dtype is not torch.float32):
                out = self.model(self.x)
            nn.functional.cross_entropy(out.float(), self.y).backward()
            self.opt.step()
            self.opt.zero_grad()
        return self.steps * len(self.y) / (clock(self.x.device) - start)

    def evaluation(self):
        self.model.eval()
        start = clock(self.x.device)
        with torch.no_grad(), torch.autocast(self.x.device.type, self.learn.dtype):
            for _ in range(self.steps):
                self.model(self.x)
        return self.steps * len(self.y) / (clock(self.x.device) - start)


def command_seconds(argv, times=3):
    """Median seconds of a command, and the last line it printed; Python keeps its bytecode, as it does unasked."""
    found, env = [], {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    for _ in range(times):
        start = time.perf_counter()
        told = subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, capture_output=True, text=True, env=env)
        found.append(time.perf_counter() - start)
    return statistics.median(found), told.stdout.strip().splitlines()[-1]


def start_up(args, root, folder):
    """Seconds of `--help` and to the first step, that of the range test; and the memory at that step."""
    help_seconds, _ = command_seconds(["train_fastai.py", "--help"])
    start = ["-c", FIRST_STEP, "--data", args.data or str(root), "--size", "32"]
    start += ["--model", args.model, "--precision", args.precision, "--out", str(folder / "runs"), "--cache"]
    command_seconds([*start, str(folder / "bytecode")], 1)  # is not counted: the first start ever compiles Python
    cold, _ = command_seconds([*start, str(folder / "all")], 1)
    warm, peak = command_seconds([*start, str(folder / "all")])
    return {
        "seconds": {"help": help_seconds, "first step, cold cache": cold, "first step, warm cache": warm},
        "peak_rss_bytes_at_first_step": int(peak) * 1024,
    }


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", help="a folder with train/ and test/ in class folders; default: generated images")
    p.add_argument("--model", default="medium")
    p.add_argument("--images", type=int, default=2560, help="training images a round")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--precision", default="auto")
    p.add_argument("--out", default="results/speed.json")
    args = p.parse_args()
    machine.keep_memory()  # of the whole process: the ceiling has it too
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        root = folder / "images"
        if args.data:
            subset(Path(args.data), root, args.images, args.images // 4)
        else:
            generate(root, args.images, 32, test=args.images // 4)
        argv = ["--data", root, "--size", 32, "--valid-pct", 0, "--cache", folder, "--model", args.model]
        argv += ["-b", args.batch_size, "--precision", args.precision, "--epochs", 1, "--no-progress"]
        argv += ["--ema", config.SOURCES["cifar10"]["ema"]]
        settings = config.parse(list(map(str, argv)))
        device = machine.pick_device(settings)
        precision = machine.pick_precision(settings, device)
        torch.manual_seed(0)
        ours = Ours(settings, device, precision, folder)
        with Stock.elsewhere(root, settings, device) as stock:
            ways = {
                "stock": stock,
                "ours": ours.round,
                "ceiling": (ceiling := Ceiling(ours, max(args.images // args.batch_size, 1))).round,
                "loader": ours.loader,
                "evaluation": ours.evaluation,
                "evaluation ceiling": ceiling.evaluation,
                "range test": ours.range_test,
            }
            rounds = {name: [] for name in ways}
            for i in range(args.rounds + 1):  # the first, which warms up, is not counted
                for name, way in ways.items():
                    speed = way()
                    if i:
                        rounds[name].append(speed)
        startup = {} if args.model == "resnet9" else start_up(args, root, folder)

    ratio = lambda a, b: statistics.median(x / y for x, y in zip(rounds[a], rounds[b]))
    save(
        args.out,
        {
            "command": " ".join(["python -m tests.benchmarks.speed", *sys.argv[1:]]).replace(
                os.path.expanduser("~"), "~"
            ),
            "ratio_to_ceiling": ratio("ours", "ceiling"),
            "ratio_to_stock": ratio("ours", "stock"),
            "evaluation_ratio_to_ceiling": ratio("evaluation", "evaluation ceiling"),
            "range_test_ratio_to_ceiling": ratio("range test", "ceiling"),
            "images_per_second": {name: statistics.median(found) for name, found in rounds.items()},
            "rounds": rounds,
            **startup,
            "model": args.model,
            "batch_size": args.batch_size,
            "precision": precision,
            "device": str(device),
            "machine": common.machine(),
        },
    )
    for name, found in rounds.items():
        print(f"{name:20s} {statistics.median(found):9.0f} images/s")
    print(f"ours / ceiling {ratio('ours', 'ceiling'):.3f}, ours / stock {ratio('ours', 'stock'):.2f}")
    for what, seconds in startup.get("seconds", {}).items():
        print(f"{what:24s} {seconds:5.2f} s")


if __name__ == "__main__":
    main()
