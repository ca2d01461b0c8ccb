"""What the benchmarks share: generated images, and the machine in words."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import torch

from lib.machine import environment

VERSIONS = ("python", "torch", "torchvision", "fastai", "albumentations", "commit")
KEPT = (*VERSIONS, "cpu", "cpu_model", "cpu_count", "cpu_capability")


def machine():
    env = environment()
    return {**{k: env[k] for k in KEPT}, "gpus": env["gpus"], "threads": torch.get_num_threads()}


def generate(root, n, side, classes=10, test=0):
    """Writes `n` training and `test` test images, JPEG of quality 75 with smooth random colours, in class folders."""
    rng = np.random.default_rng(0)
    for where, count in (("train", n), ("test", test)):
        for k in range(classes if count else 0):
            (root / where / f"class {k}").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            coarse[i % classes % 6] //= 4
            image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
            path = root / where / f"class {i % classes}" / f"{i:06}.jpg"
            path.write_bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 75])[1])
    return root


def subset(source, root, n, test):
    """A folder of the first images of every class of `source`, which has train/ and test/."""
    for where, count in (("train", n), ("test", test)):
        folders = sorted(p for p in (source / where).iterdir() if p.is_dir())
        for folder in folders:
            (root / where / folder.name).mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.iterdir())[: count // len(folders)]:
                shutil.copyfile(path, root / where / folder.name / path.name)
    return root


def save(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
    print(f"-> {path}")
