"""Time and memory against the number of images and against their side; each row is measured in a process of its own.

uv run python -m tests.benchmarks.growth [--out results/growth.json]

A row: generated JPEG images are written, read into the store, and fed through the training loader once (augmentation
and all, no network). Memory is that of the loader's process: `anonymous` is its own, `peak_rss` counts pages of the
mapped file as well, which the system takes back when it needs them.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.common import generate, machine, save

ROWS = [(2_000, side) for side in (32, 64, 128, 224)] + [(n, 32) for n in (10_000, 100_000, 200_000)]


def kilobytes(what):
    """A figure of this process's memory (Linux), in bytes."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found.group(1)) * 1024


def measure(root, side, cache):
    """One row, in this process."""
    from lib import config
    from lib.data import loader

    before = kilobytes("RssAnon")
    settings = ["--data", root, "--size", side, "--valid-pct", 0] + (["--cache", cache] if cache else [])
    start = time.perf_counter()
    dls = loader.get_dls(config.parse(list(map(str, settings))))
    read, start = time.perf_counter() - start, time.perf_counter()
    for _ in dls.train:
        pass
    n, store = len(dls.train.dataset), dls.store
    return {
        "images": len(store),
        "side": side,
        "store": "named file" if cache else "unnamed file",
        "pixels_bytes": int(store.shapes.astype("int64").prod(1).sum()) * 3,
        "read_seconds": read,
        "loader_images_per_second": n / (time.perf_counter() - start),
        "before_bytes": before,
        "anonymous_bytes": kilobytes("RssAnon"),
        "peak_rss_bytes": kilobytes("VmHWM"),
    }


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", default="results/growth.json")
    p.add_argument("--row", nargs=3, metavar=("ROOT", "SIDE", "CACHE"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.row:
        root, side, cache = args.row
        print(json.dumps(measure(root, int(side), cache)))
        return
    rows = []
    for n, side in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder) / "images", n * 9 // 10, side, test=n // 10)
            for cache in ("", str(Path(folder) / "cache")):
                argv = [sys.executable, "-m", "tests.benchmarks.growth", "--row", f"{folder}/images", str(side), cache]
                out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
                rows.append(json.loads(out.splitlines()[-1]))
                print(rows[-1], flush=True)
                save(
                    args.out,
                    {"command": "python -m tests.benchmarks.growth", "rows": rows, "machine": machine()},
                )


if __name__ == "__main__":
    main()
