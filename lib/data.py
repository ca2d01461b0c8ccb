"""From a source of images to fastai DataLoaders: train, valid, test."""

import hashlib
import os
import random
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import TfmdDL
from fastai.data.external import URLs, fastai_cfg
from fastai.data.load import _loaders
from fastai.data.transforms import Normalize
from fastai.torch_core import TensorCategory, TensorImage
from fastai.vision.data import ImageBlock
from PIL import Image

from lib import models
from lib.augment import AlbumentationsTransform, balanced_order, order, train_transforms
from lib.config import BadInput, one_line
from lib.runs import whole_folder
from lib.store import EXTENSIONS, Store, batch_size, centre, decode

ARCHIVES = (".tgz", ".tar.gz", ".tar", ".zip")
VALID_NAMES = ("valid", "val", "validation")
TEST_PCT = 0.2  # of the images, where the data brings no test set


# --- sources: each returns the root folder of its images -------------------------------------------------------------


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
        unpack(archive, folder)
    return folder


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
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
        folder = cache_dir(config) / f"{path.name.split('.')[0]}-{digest.hexdigest()[:16]}"
        if not folder.is_dir():
            unpack(path, folder)
        return enter(folder)
    if path.exists():
        raise BadInput(f"--data {path}: is neither a folder nor an archive ({' '.join(ARCHIVES)})")
    raise BadInput(f"--data {path}: not found; pass {', '.join(SOURCES)}, a folder of images, or an archive of one")


def enter(folder):
    """`folder`, or the single folder in it that holds all the class folders, as archives often have."""
    inside = visible(folder)
    folders = [p for p in inside if p.is_dir()]
    images = any(p.suffix.lower() in EXTENSIONS for p in inside)
    if len(folders) == 1 and not images and folders[0].name.lower() != "train":
        if any(p.is_dir() for p in visible(folders[0])):
            return enter(folders[0])
    return folder


def unpack(archive, folder):
    """Unpacks `archive` into the new `folder`.

    Raises BadInput, with nothing left behind, on a damaged archive or a member that is not a plain file or folder.
    """
    with whole_folder(folder, enter) as part:
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as z:
                    links = [
                        m.filename
                        for m in z.infolist()
                        if (m.external_attr >> 16) & 0o170000 not in (0, 0o100000, 0o040000)
                    ]
                    refuse(archive, z.namelist(), links)
                    z.extractall(part)
            else:
                with tarfile.open(archive) as t:
                    members = t.getmembers()
                    refuse(
                        archive, [m.name for m in members], [m.name for m in members if not (m.isfile() or m.isdir())]
                    )
                    t.extractall(part, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        except BadInput:
            raise
        except Exception as e:  # tarfile, zipfile, zlib, lzma and the disk each raise their own
            raise BadInput(
                f"--data {archive}: cannot be unpacked ({one_line(e)}); is the file whole, and the disk not full?"
            ) from None


def refuse(archive, names, specials):
    for name in specials:
        raise BadInput(f"--data {archive}: member {name!r} is no plain file or folder; the whole archive is refused")
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
            raise BadInput(f"--data {archive}: member {name!r} points outside; the whole archive is refused")


# --- what is train, valid and test -----------------------------------------------------------------------------------


def visible(folder):
    return sorted((p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))), key=lambda p: p.name)


def scan(folder):
    """The images under `folder`, class by class: [(path, class name)], in an order that the names alone decide.

    Each folder in it is a class. Hidden names and links to folders are passed over. Raises BadInput for an empty class.
    """
    found = []
    for sub in visible(folder):
        if not sub.is_dir() or sub.is_symlink():
            continue
        files = []
        for at, folders, names in os.walk(sub):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files += [Path(at, n) for n in names if n.lower().endswith(EXTENSIONS) and not n.startswith(".")]
        if not files:
            raise BadInput(
                f"{sub}: no images ({' '.join(EXTENSIONS)}); remove the folder, or put images of its class in it"
            )
        label = unicodedata.normalize("NFC", sub.name)  # file systems differ in how they write é
        found += [(path, label) for path in sorted(files, key=lambda p: p.relative_to(folder).as_posix())]
    return found


def split_off(items, pct, seed):
    """Splits [(path, class)] into (rest, held): `pct` of every class, at least one image, a function of `seed`."""
    held = set()
    for k, name in enumerate(sorted({c for _, c in items})):
        own = [i for i, (_, c) in enumerate(items) if c == name]
        if len(own) < 2:
            raise BadInput(f"class {name!r} has too few images to hold some out; it needs at least 3 in all")
        n = min(max(round(len(own) * pct), 1), len(own) - 1)
        held.update(np.random.default_rng([seed, k]).permutation(own)[:n].tolist())
    return [x for i, x in enumerate(items) if i not in held], [x for i, x in enumerate(items) if i in held]


def find_images(root, valid_pct, split_seed):
    """Three lists of (path, class) under `root`: train, valid, test. With valid_pct 0 and no valid set, valid is test.

    `train/` beside `valid|val|validation` and `test` is taken as it is; a single set beside `train/` is test; plain
    class folders, or `train/` alone, give 20% of each class to test. What is held out is stratified, by `split_seed`.
    """
    root = Path(root)
    folders = {p.name.lower(): p for p in visible(root) if p.is_dir()}
    valids = [folders[n] for n in VALID_NAMES if n in folders]
    if len(valids) > 1:
        raise BadInput(f"{root}: has both {valids[0].name}/ and {valids[1].name}/; keep one")
    test = [folders["test"]] if "test" in folders else []
    split = "train" in folders
    train = scan(folders.get("train", root))
    if not train:
        raise BadInput(f"{root}: no images in class folders; expected <class>/<image>, or train/<class>/<image>")
    sets = [scan(s) for s in (valids + test if split else [])]
    classes = sorted({c for _, c in train})
    for folder, found in zip(valids + test, sets):
        if not found:
            raise BadInput(f"{folder}: no images in class folders; fill it or remove it")
        for path, name in found:
            if name not in classes:
                raise BadInput(f"{path.parent}: class {name!r} is not among those of train ({', '.join(classes[:5])}…)")
    if len(classes) < 2:
        raise BadInput(f"{root}: only one class ({classes[0]!r}); a classifier needs at least two class folders")
    if len(sets) == 2:
        return train, sets[0], sets[1]
    if sets:
        held = sets[0]
    else:
        train, held = split_off(train, TEST_PCT, split_seed)
    if valid_pct == 0:
        return train, held, held
    train, valid = split_off(train, valid_pct, split_seed + 1)
    return train, valid, held


# --- loaders ---------------------------------------------------------------------------------------------------------


class StoreDL(TfmdDL):
    """A fastai loader that makes whole batches from a `Store`, without an object an item in between.

    The order of a shuffled epoch is a function of (seed, epoch), the augmentation of (seed, epoch, image). `epoch`
    moves on after each complete pass. Files that are not in the store (`dls.test_dl`) are decoded as they come.
    """

    def __init__(self, dataset, store=None, seed=0, epoch=0, balanced=False, **kwargs):
        state = random.getstate()
        super().__init__(dataset, **kwargs)
        random.setstate(state)  # fastai's loader draws a seed that is not needed here
        self.store, self.seed, self.epoch, self.balanced = store, seed, epoch, balanced
        self.fake_l.generator = torch.Generator()  # else each pass would draw from torch's global state
        paths = list(dataset.items)
        self.ids = [store.index.get(p) for p in paths]
        self.labels = None
        if len(dataset.tls) > 1:
            get_y, (categorize, *_) = dataset.tls[1].tfms.fs[0], dataset.tls[1].tfms.fs[1:]
            self.labels = np.array([categorize.vocab.o2i[get_y(p)] for p in paths], dtype=np.int64)

    def new(self, dataset=None, cls=None, **kwargs):
        own = {name: getattr(self, name) for name in ("store", "seed", "epoch", "balanced")}
        return super().new(dataset, cls, **{**own, **kwargs})

    def shuffle_fn(self, idxs):
        if self.balanced:
            return balanced_order(self.seed, self.epoch, self.labels).tolist()
        return order(self.seed, self.epoch, len(idxs)).tolist()

    def __iter__(self):
        """As fastai's, but no copy to a GPU is waited for, where batches lie in pinned memory."""
        self.before_iter()
        self.idxs = self.get_idxs()
        device, kinds = self.device or "cpu", (TensorImage, TensorCategory)
        for batch in _loaders[self.fake_l.num_workers == 0](self.fake_l):
            batch = [kind(t.to(device, non_blocking=self.pin_memory)) for kind, t in zip(kinds, batch)]
            yield self.after_batch(tuple(batch))
        self.after_iter()

    def sample(self):
        return (i for at, i in enumerate(self.idxs) if at // self.bs % self.num_workers == self.offs)

    def after_iter(self):
        if self.shuffle:
            self.epoch += 1

    def do_item(self, i):
        return i or 0

    def do_batch(self, idxs):
        store, augment = self.store, None
        if self.dataset.split_idx == 0:
            augment = next((t for t in self.after_item.fs if isinstance(t, AlbumentationsTransform)), None)
        images = np.empty((len(idxs), store.size, store.size, 3), np.uint8)
        for at, i in enumerate(idxs):
            known = self.ids[i]
            image = decode(self.dataset.items[i], store.size) if known is None else store[known]
            images[at] = augment.apply(image, self.epoch, known or 0) if augment else centre(image, store.size)
        x = TensorImage(torch.from_numpy(images).permute(0, 3, 1, 2))
        return (x,) if self.labels is None else (x, TensorCategory(torch.from_numpy(self.labels[idxs])))


class NormalizeInPlace(Normalize):
    """fastai's Normalize, the same numbers in a fifth of the time, for batches that the loader has just made.

    Mean and standard deviation have the shape and memory format of an image, so that a batch is one run of memory.
    """

    @classmethod
    def of(cls, mean, std, size):
        full = lambda v: torch.tensor(v, dtype=torch.float32)[None, :, None, None].expand(1, 3, size, size)
        return cls(*(full(v).contiguous(memory_format=torch.channels_last) for v in (mean, std)))

    def encodes(self, x: TensorImage):
        return x.sub_(self.mean).div_(self.std)


def image_size(config):
    """`--size` in pixels."""
    return config.size if config.size != "auto" else 32 if config.data in SOURCES else 128


def get_dls(config, device="cpu"):
    """`config.data` as DataLoaders `train`, `valid`, `test`, with `vocab` and `store`; images (n, 3, size, size).

    Raises BadInput (one line) for data that cannot be trained on.
    """
    size = image_size(config)
    try:
        root = root_folder(config)
        train, valid, test = find_images(root, config.valid_pct, config.split_seed)
        items = train + (valid if valid is not test else []) + test
        cache = cache_dir(config) if config.cache else None
        store = Store([p for p, _ in items], size, root, cache=cache, spare=lambda: cache_dir(config))
    except OSError as e:
        raise BadInput(
            f"--data {config.data}: {one_line(e)}; make it readable, or pass another --data or --cache"
        ) from None
    label, n = dict(items), len(train)
    splits = [list(range(n)), list(range(n, n + len(valid))), list(range(len(items) - len(test), len(items)))]
    mean, std = models.pretrained_stats(config) if config.pretrained else store.stats(splits[0])
    augment = AlbumentationsTransform(train_transforms(config, size, (mean * 255).tolist()), config.seed)
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=sorted(set(label.values())))),
        get_items=lambda _: store.paths,
        get_y=label.get,
        splitter=lambda _: splits,
        item_tfms=augment,
        batch_tfms=NormalizeInPlace.of(mean, std, size),
        dl_type=StoreDL,
    )
    workers = (
        config.workers
        if config.workers != "auto"
        else 0
        if torch.device(device).type == "cpu"
        else min(8, os.cpu_count())
    )
    dls = block.dataloaders(
        root,
        path=root,
        bs=config.batch_size,
        val_bs=batch_size(size),
        drop_last=False,
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
        device=torch.device(device),
        store=store,
        seed=config.seed,
        balanced=config.balanced_batches,
    )
    dls.test, dls.store, dls.mean, dls.std = dls[2], store, mean, std
    return dls
