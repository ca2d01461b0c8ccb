"""Sources of images: each returns the root folder of its images."""

import hashlib
import sys
from pathlib import Path

import numpy as np
from fastai.data.external import URLs, fastai_cfg
from PIL import Image

from lib.cli import BadInput, refused
from lib.data.archive import unpack
from lib.data.folders import enter
from lib.runs import whole_folder

ARCHIVES = (".tgz", ".tar.gz", ".tar", ".zip", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tbz")


def cache_dir(config):
    """Where downloaded and unpacked data lies: --cache, or fastai's data folder (under FASTAI_HOME)."""
    with refused("--cache: this user has no home folder for downloads", "pass a folder, or set HOME", RuntimeError):
        return Path(config.cache).expanduser() if config.cache else fastai_cfg().path("data")


def cifar10(config):
    """fastai's CIFAR-10 (`URLs.CIFAR`), downloaded once and checked by fastai's own size and hash."""
    import fastai.data
    from fastdownload.core import check, checks_module, download_url

    folder = cache_dir(config) / "cifar10"
    if folder.is_dir():
        return folder
    archive = (Path(config.cache).expanduser() if config.cache else fastai_cfg().path("archive")) / "cifar10.tgz"
    whole = lambda: check(checks_module(fastai.data), URLs.CIFAR, archive)
    if not (archive.exists() and whole()):
        archive.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {URLs.CIFAR} to {archive}", flush=True)
        remedy = "without a network pass --data digits, or --data with a folder or an archive of images"
        with refused(f"--data cifar10: download from {URLs.CIFAR} failed", remedy):
            download_url(URLs.CIFAR, archive, timeout=30, show_progress=sys.stdout.isatty())
        if not whole():
            raise BadInput(f"{archive}: not the file that fastai knows (size, md5); remove it and try again")
    unpack(archive, folder)
    return folder


def digits(config):
    """scikit-learn's 1,797 handwritten digits (8 x 8, 17 grey levels), written as PNG files: no network."""
    folder = cache_dir(config) / "digits"
    if not folder.is_dir():
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        with whole_folder(folder) as part:
            for i, (image, label) in enumerate(zip(images.reshape(-1, 8, 8), labels)):
                (part / str(label)).mkdir(exist_ok=True)
                Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(part / str(label) / f"{i:04}.png")
    return folder


SOURCES = {"cifar10": cifar10, "digits": digits}


def root_folder(config):
    """The folder of images that `--data` names. Raises BadInput where there is none."""
    path = Path(config.data).expanduser()
    if "://" in config.data:
        raise BadInput(f"--data {config.data}: is a web address; fetch it (curl -LO …) and pass the file or folder")
    if config.data in SOURCES:
        here, path = path, SOURCES[config.data](config)
        if here.is_dir() and not here.samefile(path):
            print(f"{here} is a known data set; for the folder {here}/ here, pass ./{here}", flush=True)
    elif path.is_file() and path.name.lower().endswith(ARCHIVES):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        archive, path = path, cache_dir(config) / f"{path.name.split('.')[0]}-{digest[:16]}"
        if not path.is_dir():
            unpack(archive, path)
    if path.is_dir():
        return enter(path)
    if path.exists():
        raise BadInput(f"--data {path}: is neither a folder nor an archive ({' '.join(ARCHIVES)})")
    if config.resume:
        raise BadInput(f"--data {path}: not found; if it has moved, pass --resume {config.resume} --data WHERE-IT-IS")
    raise BadInput(f"--data {path}: not found; pass {', '.join(SOURCES)}, a folder of images, or an archive of one")
