"""The runs behind docs/lecture.md: every schedule, optimizer and switch, small network, a fifth of CIFAR-10, 3 seeds.

uv run python -m tests.benchmarks.evidence --data FOLDER [--groups schedules …] [--epochs 10] [--jobs 2]

FOLDER is CIFAR-10 as class folders in train/ and test/. Its first 1,000 training and 200 test images of each class are
copied into a folder of their own. A variant is a comparison of seeds by train_fastai.py, one thread each, `--jobs` of
them at a time; finished runs are not run again. The tables and figures go to results/lecture/.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib import compare
from lib.config import OPTIMIZERS, SCHEDULES
from tests.benchmarks.common import subset

ROOT = Path(__file__).parent.parent.parent
COMMON = """--size 32 --model small --patience-epochs 1 --lr-iters 70 --gallery 0 --target 0.6 --threads 1
    --no-progress""".split()
VARIANTS = {
    "plateau": [],
    **{name: ["--optimizer", name] for name in OPTIMIZERS if name != "sgd"},
    **{f"momentum {m}": ["--momentum", m] for m in ("0.75", "0.99")},
    **{name: ["--schedule", name] for name in SCHEDULES if name != "plateau"},
    "grad noise": ["--grad-noise", "0.01"],
    "noise on plateaus": ["--grad-noise", "0.01", "--perturb-on-plateau"],
    "balanced": ["--balanced-batches"],
    "accumulate": ["--accumulate", "4"],
    "warmup": ["--warmup-epochs", "2"],
    "ema": ["--ema", "0.99"],
}
# the first of each is what the others are compared with: SGD with momentum 0.9 under plateau
FIGURES = {
    "schedules": SCHEDULES,
    "optimizers": ["plateau", *(name for name in OPTIMIZERS if name != "sgd")],
    "momentum": ["plateau", "momentum 0.75", "momentum 0.99"],
    "switches": ["plateau", "grad noise", "noise on plateaus", "balanced", "accumulate", "warmup", "ema"],
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, type=Path)
    p.add_argument("--groups", nargs="+", default=list(FIGURES), choices=FIGURES, help="tables to make")
    p.add_argument("--epochs", default=10, type=int)
    p.add_argument("--jobs", default=2, type=int)
    p.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    p.add_argument("--runs", default=ROOT / "runs/lecture", type=Path)
    p.add_argument("--out", default=ROOT / "results/lecture", type=Path)
    args = p.parse_args()
    data = subset(args.data.expanduser(), args.runs / "data/cifar10-fifth", 10_000, 2_000)

    def run(name):
        given = ["--data", data, "--out", args.runs, "--name", name, "--epochs", args.epochs, "--seeds", *args.seeds]
        command = [sys.executable, "train_fastai.py", *map(str, given), *COMMON, *VARIANTS[name]]
        with open(args.runs / f"{name}.log", "a") as log:
            status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
        print(f"{name}: exit status {status}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, [name for name in VARIANTS if any(name in FIGURES[group] for group in args.groups)]))
    for figure in args.groups:
        names = FIGURES[figure]
        folders = [folder for name in names for folder in sorted((args.runs / name).glob("*-s*"))]
        finished = [folder for folder in folders if (folder / "summary.json").exists()]
        if len(finished) < len(names) * len(args.seeds):
            print(f"{figure}: {len(finished)} of {len(names) * len(args.seeds)} runs are finished; run this again")
            continue
        (args.out / figure).mkdir(parents=True, exist_ok=True)
        compare.report(folders, args.out / figure)


if __name__ == "__main__":
    main()
