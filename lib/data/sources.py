"""Sources of images: each returns the root folder of its images."""

import hashlib
import sys
from pathlib import Path

import numpy as np
from fastai.data.external import URLs, fastai_cfg
from PIL import Image

from lib.cli import BadInput, one_line
from lib.data.archive import unpack
from lib.data.folders import enter
from lib.runs import whole_folder, write

ARCHIVES = (".tgz", ".tar.gz", ".tar", ".zip")


def cache_dir(config):
    """Where downloaded and unpacked data lies: --cache, or fastai's data folder (under FASTAI_HOME)."""
    return Path(config.cache).expanduser() if config.cache else fastai_cfg().path("data")


def cifar10(config):
    """fastai's CIFAR-10 (`URLs.CIFAR`), downloaded once and checked by fastai's own size and hash."""
    import fastai.data
    from fastdownload.core import check, checks_module, download_url

    folder = cache_dir(config) / "cifar10"
    if not folder.is_dir():
        where = Path(config.cache).expanduser() if config.cache else fastai_cfg().path("archive")
        archive, checks = where / "cifar10.tgz", checks_module(fastai.data)
        if not (archive.exists() and check(checks, URLs.CIFAR, archive)):
            archive.parent.mkdir(parents=True, exist_ok=True)
            print(f"downloading {URLs.CIFAR} to {archive}", flush=True)
            try:
                download_url(URLs.CIFAR, archive, timeout=30, show_progress=sys.stdout.isatty())
            except Exception as e:  # urllib, ssl, socket and http each raise their own
                raise BadInput(
                    f"--data cifar10: download from {URLs.CIFAR} failed ({one_line(e)}); without a network pass "
                    "--data digits, or --data with a folder or an archive of images"
                ) from None
            if not check(checks, URLs.CIFAR, archive):
                raise BadInput(f"{archive}: not the file that fastai knows (size, md5); remove it and try again")
        check_record(archive)
        unpack(archive, folder)
    return folder


def sha256(path):
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_record(archive):
    """Records the SHA-256 of a download beside it. Raises BadInput where it is not what was recorded at first."""
    record, line = archive.with_name(f"{archive.name}.sha256"), f"{sha256(archive)}  {archive.name}\n"
    if not record.exists():
        write(record, line)
    elif record.read_text(errors="replace") != line:
        raise BadInput(
            f"{archive}: is not what was first downloaded (its sha256 is not that in {record.name}); remove it and try "
            "again, or remove both if you trust the new one"
        )


def digits(config):
    """scikit-learn's 1,797 handwritten digits (8 x 8, 16 grey levels), written as PNG files: no network."""
    folder = cache_dir(config) / "digits"
    if not folder.is_dir():
        from sklearn.datasets import load_digits

        found = load_digits()
        with whole_folder(folder) as part:
            for i, (image, label) in enumerate(zip(found.images, found.target)):
                (part / str(label)).mkdir(exist_ok=True)
                Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(part / str(label) / f"{i:04}.png")
    return folder


SOURCES = {"cifar10": cifar10, "digits": digits}


def root_folder(config):
    """The folder of images that `--data` names. Raises BadInput where there is none."""
    if config.data in SOURCES:
        return enter(SOURCES[config.data](config))
    path = Path(config.data).expanduser()
    if path.is_dir():
        return enter(path)
    if path.is_file() and path.name.lower().endswith(ARCHIVES):
        folder = cache_dir(config) / f"{path.name.split('.')[0]}-{sha256(path)[:16]}"
        if not folder.is_dir():
            unpack(path, folder)
        return enter(folder)
    if path.exists():
        raise BadInput(f"--data {path}: is neither a folder nor an archive ({' '.join(ARCHIVES)})")
    raise BadInput(f"--data {path}: not found; pass {', '.join(SOURCES)}, a folder of images, or an archive of one")
