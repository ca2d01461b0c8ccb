"""Which operators take the time of a training step, and how fast other ways to compute the step are.

uv run python -m tests.benchmarks.step [--model medium] [--precision float32] [--rounds 5] [--out results/step.json]

To imitate a chip without AVX512, put ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 before the command.

Every way trains the same network on a batch that stays in memory. In each round the ways train in turn. The file has
the images per second of each way, and the share of a step that each operator takes. It also has the floating-point
operations per second of a step, and of a product of two large matrices.
"""

import argparse
import os
import statistics
import sys
import time

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lib import machine
from lib.models import zoo
from tests.benchmarks import common

SIDE, N = 2048, 4  # rows and columns of the matrices, and number of products in a round
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


class Way:
    """One way to compute the training steps of a network."""

    def __init__(self, name, dtype, batch=128, memory_format=torch.channels_last, compiled=False):
        torch.manual_seed(0)
        self.x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=memory_format)
        self.y = torch.randint(10, (batch,))
        self.model = zoo.build(name, 10, images=self.x).to(memory_format=memory_format).train()
        for p in getattr(self.model, "early", []):
            p.requires_grad_(False)
        self.opt = torch.optim.SGD(self.model.parameters(), 0.01, 0.9, weight_decay=5e-4)
        self.forward, self.dtype = torch.compile(self.model) if compiled else self.model, dtype
        self.step()

    def step(self):
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
            out = self.forward(self.x)
        nn.functional.cross_entropy(out.float(), self.y).backward()
        self.opt.step()
        self.opt.zero_grad()

    def round(self, images=1024):
        steps, start = images // len(self.x), time.perf_counter()
        for _ in range(steps):
            self.step()
        return steps * len(self.x) / (time.perf_counter() - start)


def operators(way, steps=3):
    """{operator: its share of a step}, the largest first, without shares below a hundredth."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            way.step()
    found = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    shares = {name: time / sum(found.values()) for name, time in found.items()}
    return dict(sorted(((k, v) for k, v in shares.items() if v >= 0.01), key=lambda pair: -pair[1]))


def product(dtype):
    """Floating-point operations per second of a product of two matrices."""
    a = torch.randn(SIDE, SIDE, dtype=dtype)
    start = time.perf_counter()
    for _ in range(N):
        a @ a
    return N * 2 * SIDE**3 / (time.perf_counter() - start)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="medium")
    p.add_argument("--precision", choices=PRECISIONS, default="float32")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", default="results/step.json")
    args = p.parse_args()
    machine.keep_memory()
    dtype = PRECISIONS[args.precision]
    start = time.perf_counter()
    compiled = Way(args.model, dtype, compiled=True) if args.precision == "float32" else None
    compiling = time.perf_counter() - start
    ways = {
        "as a run has it": (ours := Way(args.model, dtype)),
        "channels first": Way(args.model, dtype, memory_format=torch.contiguous_format),
        "batches of 512": Way(args.model, dtype, batch=512),
        **({"torch.compile": compiled} if compiled else {}),
    }
    rounds, products = {name: [] for name in ways}, []
    for i in range(args.rounds + 1):  # the first round warms up
        for name, way in ways.items():
            speed = way.round()
            rounds[name] += [speed] if i else []
        products += [product(dtype)] if i else []
    with FlopCounterMode(display=False) as counter:
        ours.step()
    operations = counter.get_total_flops() / len(ours.x)  # per image, forward and backward
    speeds = {name: statistics.median(found) for name, found in rounds.items()}
    shares = operators(ours)
    common.save(
        args.out,
        {
            "command": " ".join(["python -m tests.benchmarks.step", *sys.argv[1:]]),
            "instruction sets": {k: os.environ.get(k) for k in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")},
            "model": args.model, "precision": args.precision,
            "images_per_second": speeds, "rounds": rounds, "seconds to compile": compiled and compiling,
            "share of a step": shares,
            "operations an image": operations,
            "operations per second": {
                "a step": operations * speeds["as a run has it"], "a matrix product": statistics.median(products)
            },
            "machine": common.machine(),
        },
    )  # fmt: skip
    for name, speed in speeds.items():
        print(f"{name:20s} {speed:6.0f} images/s")
    for name, share in shares.items():
        print(f"{name:40s} {share:.3f}")
    print(f"a step: {operations * speeds['as a run has it'] / 1e9:.0f} GFLOP/s; ", end="")
    print(f"a matrix product: {statistics.median(products) / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
