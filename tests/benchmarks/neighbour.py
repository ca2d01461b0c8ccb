"""Training speed of a run alone, of a run beside a busy program, and of two runs at once.

uv run python -m tests.benchmarks.neighbour [--models medium small] [--rounds 5] [--seconds 8] [--out FILE]

Each way to set the threads has its own process. It trains when it is its turn, and waits otherwise. In each round,
every way trains alone, and then beside a program that uses one core. Two runs with `--threads auto` also train at once.
Medians of the rounds, and of ratios within a round, are printed and written to results/neighbour.json. The first three
seconds of a turn are not counted: `--threads auto` needs two seconds to notice a busy program.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastai.callback.core import Callback, CancelFitException

from lib import config, machine
from lib.data import loader
from lib.models import zoo
from lib.train import learner
from tests.benchmarks import common

WAYS = {"auto": ["--threads", "auto"], "2 threads": ["--threads", "2"], "1 thread": ["--threads", "1"]}
UNCOUNTED = 3.0  # seconds at the start of a turn
IMAGES = 1280


class Turn(Callback):
    """Ends a fit after `seconds`. `speed` is in images per second, and includes the loader and the record."""

    order = 100

    def before_fit(self):
        self.images, self.begin = 0, time.perf_counter() + UNCOUNTED
        self.counting = False

    def after_batch(self):
        now = time.perf_counter()
        if not self.counting:
            self.counting, self.begin = now >= self.begin, max(now, self.begin)
            return
        self.images += len(self.yb[0]) if self.training else 0
        if now - self.begin > self.seconds:
            self.speed = self.images / (now - self.begin)
            raise CancelFitException


def child(argv):
    """Reads a number of seconds from each line of standard input, trains for that time, and prints the speed."""
    settings = config.parse(argv)
    _, precision, _ = machine.prepare(settings)
    dls = loader.get_dls(settings)
    model = zoo.build(settings.model, len(dls.vocab), images=dls.train.plain()[0])
    turn = Turn()
    learn = learner.build(settings, dls, model, precision, cbs=[turn])
    learn._do_epoch = learn._do_epoch_train  # nothing is evaluated
    print("ready", flush=True)
    for line in sys.stdin:
        turn.seconds = float(line)
        learn.fit(10**6, 1e-3)
        print(turn.speed, precision, flush=True)


class Run:
    """A child process that trains in turns."""

    def __init__(self, options):
        argv = [sys.executable, "-m", "tests.benchmarks.neighbour", "--child", *options]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(argv, **pipes)
        while (line := self.process.stdout.readline()) and line.strip() != "ready":
            pass

    def begin(self, seconds):
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def end(self):
        while not (line := self.process.stdout.readline())[:1].isdigit():  # a line about busy programs may come first
            if not line:
                raise RuntimeError("a run has ended")
        self.precision = line.split()[1]
        return float(line.split()[0])

    def turn(self, seconds):
        self.begin(seconds)
        return self.end()


def measure(runs, second, rounds, seconds):
    """{place: {way: images per second of each round}}"""
    found = {place: {way: [] for way in runs} for place in ("alone", "beside a busy program")}
    found["two at once, each"] = {"auto": []}
    for i in range(rounds + 1):  # the first round warms up
        one = {place: {} for place in found}
        for way, run in runs.items():
            one["alone"][way] = run.turn(seconds)
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            for way, run in runs.items():
                one["beside a busy program"][way] = run.turn(seconds)
        finally:
            busy.kill()
            busy.wait()
        second.begin(seconds)
        one["two at once, each"]["auto"] = statistics.mean([runs["auto"].turn(seconds), second.end()])
        for place, ways in one.items() if i else ():
            for way, speed in ways.items():
                found[place][way].append(speed)
    return found


def ratio(speeds, found):
    """The median ratio of a speed to that of two threads alone in the same round."""
    return statistics.median(a / b for a, b in zip(speeds, found["alone"]["2 threads"]))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", default=["medium", "small"])
    p.add_argument("--precision", default="auto")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=8, help="counted seconds of a turn")
    p.add_argument("--out", default="results/neighbour.json")
    args = p.parse_args()
    result = {"command": " ".join(["python -m tests.benchmarks.neighbour", *sys.argv[1:]]), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        root = common.generate(Path(folder) / "images", IMAGES, 32, test=10)
        for model in args.models:
            options = [
                "--data",
                root,
                "--size",
                "32",
                "--model",
                model,
                "--valid-pct",
                "0",
                "--precision",
                args.precision,
            ]
            options += ["--cache", folder]
            runs = {way: Run([*map(str, options), *more]) for way, more in WAYS.items()}
            second = Run(list(map(str, options)))
            found = measure(runs, second, args.rounds, args.seconds)
            ratios = {place: {way: ratio(v, found) for way, v in ways.items()} for place, ways in found.items()}
            medians = {place: {w: statistics.median(v) for w, v in ways.items()} for place, ways in found.items()}
            result["models"][model] = {
                "precision": second.precision, "images_per_second": medians,
                "ratio to 2 threads alone": ratios, "rounds": found,
            }  # fmt: skip
            print(f"{model}, {second.precision}: images/s, and its ratio to 2 threads alone")
            for place, ways in medians.items():
                for way, speed in ways.items():
                    print(f"  {place:22s} {way:20s} {speed:6.0f}  {ratios[place][way]:.2f}")
            for run in [*runs.values(), second]:
                run.process.kill()
    common.save(args.out, result | {"machine": common.machine()})


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(sys.argv[sys.argv.index("--child") + 1 :])
    else:
        main()
