"""From a source of images to fastai DataLoaders: train, valid, test."""

import gzip
import hashlib
import os
import random
import shutil
import sys
import tarfile
import unicodedata
import zipfile
from functools import partial
from pathlib import Path, PurePosixPath

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

from lib import models, runs
from lib.augment import AlbumentationsTransform, balanced_order, order, train_transforms
from lib.config import BadInput, one_line, printable
from lib.runs import whole_folder, write
from lib.store import EXTENSIONS, Store, batch_size, centre, decode

MAX_MEMBERS, MAX_DEPTH = 2_000_000, 32  # of an archive, and of folders in one another
MAX_UNPACKED = 500_000_000_000  # bytes
MAX_RATIO, SMALL = 100, 1 << 20  # an archive becomes at most so many times its size, or SMALL bytes
MAX_HEADER = 1 << 22  # bytes of an archive that are read at once: tarfile reads long names whole
ARCHIVES = (".tgz", ".tar.gz", ".tar", ".zip")
VALID_NAMES = ("valid", "val", "validation")
PLAIN_PIXELS = 2**21  # that say enough of the colours of all
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


def enter(folder):
    """`folder`, or the single folder in it that holds all the class folders, as archives often have."""
    while True:
        inside = visible(folder)
        folders = [p for p in inside if p.is_dir() and not p.is_symlink()]
        if len(folders) != 1 or folders[0].name.lower() == "train":
            return folder
        if any(p.suffix.lower() in EXTENSIONS for p in inside) or not any(p.is_dir() for p in visible(folders[0])):
            return folder
        folder = folders[0]


def unpack(archive, folder):
    """Unpacks `archive` into the new `folder`.

    Raises BadInput, with nothing left behind, on a damaged archive or where `fault_of` finds one in a member.
    """
    with whole_folder(folder, enter) as part:
        most = min(max(MAX_RATIO * archive.stat().st_size, SMALL), MAX_UNPACKED, shutil.disk_usage(part).free)
        total, made = 0, set()
        try:
            for number, (name, size, fault, source) in enumerate(members(archive), 1):
                total += size + 512  # a name is not free either
                where = PurePosixPath(name.replace("\\", "/"))
                target = part / where
                fault = fault or fault_of(where, number, total, most)
                if fault or (source and target.exists()):
                    fault = fault or "is there twice"
                    raise BadInput(f"--data {archive}: member {name!r} {fault}; the whole archive is refused")
                above = target.parent if source else target
                if above not in made:
                    above.mkdir(parents=True, exist_ok=True)
                    made.add(above)
                if source:
                    with source() as found, open(target, "xb") as f:
                        copy(found, f, size)
        except BadInput:
            raise
        except Exception as e:  # tarfile, zipfile, zlib, lzma and the disk each raise their own
            raise BadInput(
                f"--data {archive}: cannot be unpacked ({one_line(e)}); is the file whole, and the disk not full?"
            ) from None


def members(archive):
    """Yields (name, bytes, fault or "", function that opens it or None for a folder) for each member of an archive."""
    special = "is no plain file or folder"
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            for m in z.infolist():
                plain = (m.external_attr >> 16) & 0o170000 in (0, 0o100000, 0o040000)
                fault = "is encrypted" if m.flag_bits & 1 else "" if plain else special
                yield m.filename, m.file_size, fault, None if m.is_dir() else partial(z.open, m)
        return
    with open(archive, "rb") as f:
        opener = BoundedGzip if f.read(2) == b"\x1f\x8b" else open
    with opener(archive, "rb") as f, tarfile.open(fileobj=f, mode="r:") as t:
        for m in t:
            fault = "" if m.isdir() or (m.isreg() and not m.issparse()) else special
            yield m.name, m.size, fault, None if m.isdir() else partial(t.extractfile, m)


class BoundedGzip(gzip.GzipFile):
    """A gzip file that gives no more than MAX_HEADER bytes at once, however many are asked for."""

    def read(self, size=-1):
        if not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a name or header of {size:,} bytes")
        return super().read(size)


def fault_of(where, number, total, most):
    """What is wrong with a member of an archive: its path, its number, the bytes so far; "" if nothing is."""
    if where.is_absolute() or ".." in where.parts or str(where)[1:2] == ":":
        return "points outside"
    if len(where.parts) > MAX_DEPTH:
        return f"lies more than {MAX_DEPTH} folders deep"
    if number > MAX_MEMBERS:
        return f"is one of more than {MAX_MEMBERS:,}"
    if total > most:
        return f"makes it {total:,} bytes; {most:,} are what its size ({MAX_RATIO} times), or the disk, allows"
    return ""


def copy(source, target, size):
    """Copies the `size` bytes that a file has; raises ValueError where it has more or fewer."""
    left = size
    while block := source.read(min(left + 1, 1 << 20)):
        left -= len(block)
        if left < 0:
            break
        target.write(block)
    if left:
        raise ValueError(f"a member is not of the {size:,} bytes that it declares")


# --- what is train, valid and test -----------------------------------------------------------------------------------


def visible(folder):
    return sorted((p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))), key=lambda p: p.name)


def images_in(folder, odd, others):
    """The images under `folder`. Links and devices are added to `odd`, files not named as images to `others`."""
    found, ahead = [], [folder]
    while ahead:
        with os.scandir(ahead.pop()) as entries:
            for entry in entries:
                known = entry.name.lower().endswith(EXTENSIONS)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    ahead.append(entry.path)
                elif known and entry.is_file(follow_symlinks=False):
                    found.append(Path(entry.path))
                elif known or entry.is_dir():
                    odd.append(entry.path)
                else:
                    others.append(entry.path)
    return sorted(found, key=Path.as_posix)


def scan(folder, without=frozenset()):
    """The images under `folder` but those in `without`: [(path, class name)], in an order that the names alone decide.

    Each folder in it is a class. Hidden names and links are passed over. Raises BadInput for an empty class.
    """
    found, odd, others, notes, spelled = [], [], [], [], {}
    for sub in visible(folder):
        if not sub.is_dir():
            others += [sub] if sub.name.lower().endswith(EXTENSIONS) else []
            continue
        if sub.is_symlink():
            odd.append(sub)
            continue
        files = [p for p in images_in(sub, odd, others) if p not in without]
        if not files:
            raise BadInput(
                f"{sub}: no images{' that can be read' if without else ''} ({' '.join(EXTENSIONS)}; links do not "
                "count); remove the folder, or put images of its class in it"
            )
        label = unicodedata.normalize("NFC", sub.name)  # file systems differ in how they write é
        if spelled.setdefault(label, sub.name) != sub.name:
            notes.append(f"{sub}: is the class {label!r} in other code points; the two folders are taken as one class")
        found += [(path, label) for path in files]
    if odd:
        notes.append(f"{folder}: links and devices are passed over, {len(odd):,} in all, such as {odd[0]}")
    if others:
        text = "not named as images, or in no class folder, are passed over"
        notes.append(f"{folder}: {len(others):,} files {text}, such as {others[0]}")
    for note in notes if not without else ():
        print(printable(note), flush=True)
    return found


def split_off(items, pct, seed):
    """Splits [(path, class)] into (rest, held): `pct` of every class, at least one image, a function of `seed`."""
    held, classes = set(), {}
    for i, (_, name) in enumerate(items):
        classes.setdefault(name, []).append(i)
    for k, (name, own) in enumerate(sorted(classes.items())):
        if len(own) < 2:
            raise BadInput(f"class {name!r} has too few images to hold some out; it needs at least 3 in all")
        n = min(max(round(len(own) * pct), 1), len(own) - 1)
        held.update(np.random.default_rng([seed, k]).permutation(own)[:n].tolist())
    return [x for i, x in enumerate(items) if i not in held], [x for i, x in enumerate(items) if i in held]


def named_folders(root, *names):
    return [p for p in visible(root) if p.is_dir() and p.name.lower() in names]


def find_images(root, valid_pct, split_seed, without=frozenset()):
    """Three lists of (path, class) under `root`: train, valid, test. With valid_pct 0 and no valid set, valid is test.

    `train/` beside `valid|val|validation` and `test` is taken as it is; a single set beside `train/` is test; plain
    class folders, or `train/` alone, give 20% of each class to test. What is held out is stratified, by `split_seed`.
    `without` are images to leave out.
    """
    root = Path(root)
    trains, valids, test = (named_folders(root, *names) for names in (["train"], VALID_NAMES, ["test"]))
    if not trains:
        valids, test = [], []
    for folders in (trains, valids, test):
        if len(folders) > 1:
            raise BadInput(f"{root}: has both {folders[0].name}/ and {folders[1].name}/; keep one")
        if folders and folders[0].is_symlink():
            raise BadInput(f"{folders[0]}: is a link, and links are not followed; put the folder itself there")
    train = scan(trains[0] if trains else root, without)
    if not train:
        raise BadInput(f"{root}: no images in class folders; expected <class>/<image>, or train/<class>/<image>")
    sets = [scan(s, without) for s in valids + test]
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
        self.rank, self.world = 0, 1  # of several processes, each of which makes its part
        self.skip = 0  # batches that the next pass leaves out at its beginning
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
        skip, self.skip = self.skip, 0
        self.idxs = self.get_idxs()[skip * self.bs :]
        if self.world > 1 and not self.shuffle:  # whole batches; of those of training, each rank makes its slice
            self.idxs = [i for at, i in enumerate(self.idxs) if at // self.bs % self.world == self.rank]
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

    def in_batch(self, i):
        """The number of images in batch `i`, over all ranks."""
        return min(self.bs, len(self.dataset) - i * self.bs)

    def own(self, i):
        """The number of images in training's batch `i` that are this rank's; for 0 it makes one that does not count."""
        n = self.in_batch(i)
        return n // self.world + (self.rank < n % self.world)

    def do_batch(self, idxs, plain=False):
        if self.world > 1 and self.shuffle:
            idxs = np.array_split(idxs, self.world)[self.rank].tolist() or idxs[:1]
        store, augment = self.store, None
        if self.dataset.split_idx == 0 and not plain:
            augment = next((t for t in self.after_item.fs if isinstance(t, AlbumentationsTransform)), None)
        images = np.empty((len(idxs), store.size, store.size, 3), np.uint8)
        for at, i in enumerate(idxs):
            known = self.ids[i]
            image = decode(self.dataset.items[i], store.size) if known is None else store[known]
            images[at] = augment.apply(image, self.epoch, known or 0) if augment else centre(image, store.size)
        x = TensorImage(torch.from_numpy(images).permute(0, 3, 1, 2))
        return (x,) if self.labels is None else (x, TensorCategory(torch.from_numpy(self.labels[idxs])))

    def plain(self, most=None):
        """(images, labels) of at most `most` images, not augmented, that lie evenly in the set and so in its classes.

        `most` is as many as have PLAIN_PIXELS, where it is not given.
        """
        n, most = len(self.dataset), most or max(PLAIN_PIXELS // self.store.size**2, 2)
        at = np.linspace(0, n - 1, min(n, most)).astype(int).tolist()
        batch = self.after_batch(tuple(t.to(self.device or "cpu") for t in self.do_batch(at, plain=True)))
        return tuple(t.as_subclass(torch.Tensor) for t in batch)


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


def images_a_step(config, n):
    """`--batch-size` for `n` training images; auto: the largest of 128, 64, 32 that makes 20 steps, else 16."""
    sizes = [b for b in (128, 64, 32) if -(-n // b) >= 20]
    return config.batch_size if config.batch_size != "auto" else max(sizes, default=16)


def image_size(config):
    """`--size` in pixels."""
    return config.size if config.size != "auto" else 32 if config.data in SOURCES else 128


def check_apart(config, root):
    """Raises BadInput where what a run writes would lie among class folders, and be a class of the next run."""
    root = root.resolve()
    for name in ("out", "cache"):
        written = Path(getattr(config, name) or root.parent).expanduser().resolve()
        if written.is_relative_to(root) and not named_folders(root, "train"):
            if not any(part.startswith(".") for part in written.relative_to(root).parts):
                raise BadInput(f"--{name} {written}: lies among the class folders of {root}; pass another folder")


def get_dls(config, device="cpu"):
    """`config.data` as DataLoaders `train`, `valid`, `test`, with `vocab` and `store`; images (n, 3, size, size).

    Raises BadInput (one line) for data that cannot be trained on.
    """
    size = image_size(config)
    try:
        root = root_folder(config)
        sets = find_images(root, config.valid_pct, config.split_seed)
        check_apart(config, root)
        paths = list(dict.fromkeys(path for images in sets for path, _ in images))  # valid may be test
        cache = cache_dir(config) if config.cache else None
        skip = config.bad_images == "skip"
        store = Store(paths, size, root, cache=cache, spare=lambda: cache_dir(config), skip=skip)
        if store.skipped:  # split anew, so that each class has its share in each set
            sets = find_images(root, config.valid_pct, config.split_seed, set(paths) - set(store.index))
    except OSError as e:
        raise BadInput(
            f"--data {config.data}: {one_line(e)}; make it readable, or pass another --data or --cache"
        ) from None
    label = dict(item for images in sets for item in images)
    splits = [[store.index[path] for path, _ in images] for images in sets]
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
    device, workers = torch.device(device), config.workers
    if workers == "auto":
        workers = 0 if device.type == "cpu" else min(8, max(1, os.cpu_count() // runs.on_this_machine()))
    how = dict(device=device, pin_memory=device.type == "cuda", num_workers=workers, drop_last=False)
    how |= dict(bs=images_a_step(config, len(splits[0])), val_bs=batch_size(size))
    how |= dict(store=store, seed=config.seed, balanced=config.balanced_batches)  # StoreDL's own
    dls = block.dataloaders(root, path=root, **how)
    dls.test, dls.store, dls.mean, dls.std = dls[2], store, mean, std
    return dls
