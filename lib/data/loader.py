"""Loaders that make whole batches where they can, and the DataLoaders of a run."""

import dataclasses
import random
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import TfmdDL
from fastai.data.load import _loaders
from fastai.data.transforms import Categorize, IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorCategory, TensorImage, to_device
from fastai.vision.augment import CropPad
from fastai.vision.core import PILImage
from fastcore.foundation import L
from fasttransform import Transform

from lib.cli import BadInput, refused
from lib.config import AUXILIARY, FEW_VALID, MODELS
from lib.data import decode
from lib.data.augment import AlbumentationsTransform, pipeline, shuffled
from lib.data.decode import centre, evaluation_batch
from lib.data.folders import Label, find_images, find_sets, told_sets, unlabelled
from lib.data.sources import SOURCES, cache_dir, root_folder
from lib.data.store import Store
from lib.machine import leave_signals, pick_device, processes_here, signals_held, useful_workers
from lib.runs import read_card

PLAIN_PIXELS = 2**21  # that `StoreDL.plain` gives: enough to whiten the first convolution
CARRIED = ("store", "seed", "epoch", "order", "item_tfms")  # what `StoreDL.new` takes over
PER_ITEM = {"create_item", "create_batch", "do_item", "do_batch", "retain"}  # methods that make items into a batch


class ReadImage(Transform):
    """Turns a path, bytes, PIL image, array or tensor into a PILImage whose shorter side is `size` pixels."""

    input_types = (object,)

    def __init__(self, size, levels=None):
        super().__init__()
        self.size, self.levels = size, levels

    def encodes(self, x: object) -> PILImage:
        if isinstance(x, torch.Tensor):
            x = np.asarray(x.permute(1, 2, 0).cpu() if isinstance(x, TensorImage) else x.cpu())
        return PILImage.create(decode.read(x, self.size, self.levels))


class NormalizeInPlace(Normalize):
    """fastai's Normalize, the same numbers in a fifth of the time, for batches that the loader has just made.

    For images of `size` pixels, mean and standard deviation have their shape and memory format as well, so that a
    batch is one run of memory.
    """

    parameters = L("mean", "std", "mean_image", "std_image")

    def __init__(self, mean, std, size):
        super().__init__(*(torch.tensor(v, dtype=torch.float32)[None, :, None, None] for v in (mean, std)))
        full = lambda v: v.expand(1, 3, size, size).contiguous(memory_format=torch.channels_last)
        self.mean_image, self.std_image = full(self.mean), full(self.std)

    def encodes(self, x: TensorImage):
        x = x.contiguous() if 0 in x.stride() else x  # a batch transform has expanded it
        if x.shape[1:] != self.mean_image.shape[1:]:
            return x.sub_(self.mean).div_(self.std)
        return x.sub_(self.mean_image).div_(self.std_image)


class StoreDL(TfmdDL):
    """A fastai loader that makes whole batches from a `Store`, without an object an item in between.

    It does so if all items are files in the store, and the item transforms are those it was made with. Otherwise it
    works item by item, as fastai does, with the same result. The order of a shuffled epoch is a function of (seed,
    epoch), the augmentation of (seed, epoch, image). `epoch` grows by one after each complete shuffled pass.
    """

    def __init__(
        self,
        dataset,
        store=None,  # Store with the pixels of the files in `dataset`; others are decoded as they come
        seed=0,
        epoch=0,
        order=shuffled,  # function of (seed, epoch, labels) that gives the order of a shuffled pass, (n,) int64
        item_tfms=(),  # AlbumentationsTransform, CropPad, ToTensor: those that a whole batch goes without
        **kwargs,  # as fastai's TfmdDL
    ):
        state = random.getstate()
        super().__init__(dataset, **kwargs)
        random.setstate(state)  # fastai's loader draws a seed that is not needed here
        self.store, self.seed, self.epoch, self.order, self.item_tfms = store, seed, epoch, order, item_tfms
        self.rank, self.world = 0, 1  # of several processes, each of which makes its part of every batch
        self.skip = 0  # batches that the next pass leaves out at its beginning
        index = store.index if store else {}
        self.ids = [index.get(p) if isinstance(p, Path) else None for p in getattr(dataset, "items", ())]
        transforms = [list(tl.tfms.fs) for tl in getattr(dataset, "tls", ())]
        self.labels = None  # class numbers, (n,) int64, where there are some
        if [type(t) for t in sum(transforms[1:], [])] == [Label, Categorize]:
            label, number = transforms[1][0], transforms[1][1].vocab.o2i
            self.labels = np.array([number.get(label.name_of(p), -1) for p in dataset.items], dtype=np.int64)

    def new(self, dataset=None, cls=None, **kwargs):
        """As fastai's. A loader of nothing, as `learn.export` has it, has no store."""
        carried = {name: getattr(self, name) for name in CARRIED if issubclass(cls or StoreDL, StoreDL)}
        if dataset is not None and not len(dataset):
            carried.pop("store", None)
        return super().new(dataset, cls, **{**carried, **kwargs})

    def shuffle_fn(self, idxs):
        idxs = np.asarray(idxs)
        return idxs[self.order(self.seed, self.epoch, idxs if self.labels is None else self.labels[idxs])].tolist()

    def __iter__(self):
        """As fastai's, but it draws nothing from global generators, and waits for no copy from pinned memory."""
        self.before_iter()
        skip, self.skip = self.skip, 0
        self.idxs = self.get_idxs()
        if skip:
            self.idxs = self.idxs[skip * self.bs :]
        with signals_held(), torch.random.fork_rng([]):  # worker processes are seeded from it
            torch.default_generator.manual_seed(self.seed * 2**32 + self.epoch)
            batches = iter(_loaders[self.fake_l.num_workers == 0](self.fake_l))
        for batch in batches:
            batch = tuple(batch) if type(batch) is list else batch  # as pinned memory has it
            batch = batch if self.device is None else to_device(batch, self.device, non_blocking=self.pin_memory)
            yield self.after_batch(batch)
        self.after_iter()
        self.epoch += self.shuffle

    def wif(self):
        """fastai calls this at the start of a worker process."""
        leave_signals()

    def sample(self):
        size, workers, worker = self.bs or 1, self.num_workers, self.offs
        return (i for position, i in enumerate(self.idxs) if position // size % workers == worker)

    def create_batches(self, samps):
        if self.prebatched or not self.indexed:
            yield from super().create_batches(samps)
            return
        for idxs in self.chunkify(samps):
            part = np.array_split(idxs, self.world)[self.rank].tolist() or idxs[:1]
            if (batch := self.batch_of(part)) is not None:
                yield batch

    def shares(self, i):
        """How many images of batch `i` are each rank's; a rank with none makes one that does not count."""
        n = min(self.bs, self.n - i * self.bs)
        return [n // self.world + (rank < n % self.world) for rank in range(self.world)]

    def make_batch(self, idxs):
        """The images `idxs` as a batch of this loader, before batch transforms."""
        self.before_iter()
        return self.batch_of(idxs)

    def batch_of(self, idxs):
        if self.is_fast(idxs):
            return self.whole_batch(idxs)
        items = [item for item in map(self.do_item, idxs) if item is not None]
        return self.do_batch(items) if items else None

    def is_fast(self, idxs):
        """Whether a whole batch of these is what fastai's way would make of them."""
        same = self.item_tfms and [*map(id, self.after_item.fs)] == [*map(id, self.item_tfms)]
        same = same and not self.before_batch.fs and [type(t) for t in self.dataset.tls[0].tfms.fs] == [ReadImage]
        return same and not PER_ITEM & vars(self).keys() and None not in [self.ids[i] for i in idxs]

    def whole_batch(self, idxs):
        augment, size = self.item_tfms[0], self.store.size
        augmented = self.after_item.split_idx == augment.split_idx
        images = np.empty((len(idxs), size, size, 3), np.uint8)
        again = len({*idxs}) < len(idxs)  # as show_batch(unique=True) asks for one image: each time augmented anew
        for row, number in enumerate(self.ids[i] for i in idxs):
            image = self.store[number]
            images[row] = augment.apply(image, self.epoch + row * again, number) if augmented else centre(image, size)
        x = TensorImage(torch.from_numpy(images).permute(0, 3, 1, 2))
        return (x,) if self.labels is None else (x, TensorCategory(torch.from_numpy(self.labels[idxs])))

    def do_item(self, i):
        number = self.ids[i] if self.ids and i is not None else None
        for t in self.after_item.fs:
            if isinstance(t, AlbumentationsTransform):
                t.position = self.epoch, (i or 0) if number is None else number
        return super().do_item(i)

    def create_item(self, i):
        """As fastai's; what is in the store is not decoded anew."""
        stored = self.ids and i is not None and [type(t) for t in self.dataset.tls[0].tfms.fs] == [ReadImage]
        if not stored or self.ids[i] is None:
            return super().create_item(i)
        return PILImage.create(self.store[self.ids[i]]), *(tl[i] for tl in self.dataset.tls[1:])

    def plain(self, most=None):
        """(images, labels) of at most `most` images, not augmented, that lie evenly in the set and so in its classes.

        `most` is as many as have PLAIN_PIXELS, where it is not given.
        """
        most = most or max(PLAIN_PIXELS // self.store.size**2, 2)
        idxs = np.linspace(0, self.n - 1, min(self.n, most)).astype(int).tolist()
        with self.dataset.set_split_idx(1):
            batch = self.after_batch(to_device(self.make_batch(idxs), self.device or "cpu"))
        return tuple(t.as_subclass(torch.Tensor) for t in batch)


def images_a_step(config, n):
    """`--batch-size` for `n` training images; auto: the largest of 128, 64, 32 that makes 20 steps, else 16."""
    sizes = [b for b in (128, 64, 32) if -(-n // b) >= 20]
    return config.batch_size if config.batch_size != "auto" else max(sizes, default=16)


def without_auto(config, dls):
    """`config` with what `--batch-size` and `--keep` become for the images of `dls`."""
    auto = "valid_loss" if len(dls.valid.ids) < FEW_VALID else "valid_acc"
    return dataclasses.replace(config, batch_size=dls.train.bs, keep=auto if config.keep == "auto" else config.keep)


def image_size(config):
    """`--size` in pixels; auto: with pretrained weights of timm what they were trained on."""
    if config.size == "auto" and config.pretrained and config.model.startswith("timm/"):
        from timm.models import get_pretrained_cfg

        return get_pretrained_cfg(config.model.removeprefix("timm/")).input_size[-1]
    return config.size if config.size != "auto" else 32 if config.data in SOURCES else 128


def check_apart(config, root):
    """Raises BadInput where what a run writes would lie among class folders, and be a class of the next run."""
    root = root.resolve()
    for name in ("out", "cache"):
        written = Path(getattr(config, name) or root.parent).expanduser().resolve()
        seen = written.is_relative_to(root) and not any(p.startswith(".") for p in written.relative_to(root).parts)
        for folder in find_sets(root).values() if seen else ():  # a hidden folder is no class
            if written.is_relative_to(folder):
                raise BadInput(f"--{name} {written}: lies among the class folders of {folder}; pass another folder")


def read_images(config, size):
    """(root folder, Store, the images of train, valid and test as lists of (path, class)) of `config.data`."""
    remedy = "make it readable, make room, or pass another --data or --cache"
    with refused(f"--data {config.data}: cannot be used", remedy, OSError):
        root = root_folder(config)
        split = config.valid_pct, config.split_seed, config.folds, config.fold
        sets = find_images(root, *split)
        check_apart(config, root)
        paths = list(dict.fromkeys(path for images in sets for path, _ in images))  # valid may be test
        folder, skip = None, config.bad_images == "skip"
        with nullcontext() if config.cache else suppress(OSError, BadInput):  # the default folder may be missing
            folder = cache_dir(config)
        cache = folder if config.cache or processes_here() > 1 else None  # ranks on one machine share the pixels
        store = Store(paths, size, root, cache=cache, skip=skip, temporary=folder)
        if store.skipped:  # split anew, so that each class has its share in each set
            sets = find_images(root, *split, set(paths) - set(store.index))
    return root, store, sets


def get_dls(config, device=None):
    """`config.data` as DataLoaders `train`, `valid`, `test`, with `vocab` and `store`; images (n, 3, size, size).

    `device` is by default the one that `config.device` means here. Raises BadInput (one line) for data, or a file of
    `--augment`, that cannot be trained on.
    """
    size = image_size(config)
    pipeline(config, size, (0.0, 0.0, 0.0))  # a file that cannot be used is named before the images are read
    root, store, sets = read_images(config, size)
    splits = [[store.index[path] for path, _ in images] for images in sets]
    mean, std = pretrained_stats(config) if config.pretrained else store.stats(splits[0])
    augment = AlbumentationsTransform(pipeline(config, size, (mean * 255).tolist()), config.seed, size)
    augment.order = CropPad.order  # it comes first
    item_tfms = (augment, CropPad(size), ToTensor())
    categorize = Categorize(vocab=sorted({name for images in sets for _, name in images}))
    block = DataBlock(
        blocks=(TransformBlock(batch_tfms=IntToFloatTensor), TransformBlock(categorize)),
        get_items=lambda _: store.paths,
        get_x=ReadImage(size, store.levels),
        get_y=Label(find_sets(root).values()),
        splitter=lambda _: splits,
        item_tfms=list(item_tfms),
        batch_tfms=NormalizeInPlace(mean, std, size),
        dl_type=StoreDL,
    )
    device, workers = torch.device(device or pick_device(config)), config.workers
    evaluation = {}
    if workers == "auto":
        most = config.max_batch_size if config.schedule == "grow_batch" else 0
        largest = min(max(images_a_step(config, len(splits[0])), most), len(splits[0]))  # images in a batch
        workers = useful_workers(device, 3 * size**2 * largest)
        evaluation["num_workers"] = 0  # copying pixels from the store is faster than starting processes
    options = dict(device=device, pin_memory=device.type == "cuda", num_workers=workers, drop_last=False)
    options |= dict(bs=images_a_step(config, len(splits[0])), val_bs=evaluation_batch(size))
    options |= dict(store=store, seed=config.seed, item_tfms=item_tfms)  # StoreDL's own
    options["dl_kwargs"] = [{}, evaluation, evaluation]
    dls = block.dataloaders(root, **options)  # no `path`: what a learner saves does not go into the folder of the data
    dls.test, dls.store, dls.mean, dls.std, dls.augment = dls[2], store, mean, std, augment
    dls.unlabelled, dls.sets = unlabelled(root), told_sets(root, config.valid_pct, config.folds, config.fold)
    return dls


def pretrained_stats(config):
    """Mean and standard deviation a channel, in 0..1, of what the weights `--pretrained` were trained on: (3,) arrays.

    For the weights of a run they are in the model.json beside them. For others they are those of the library's weights.
    """
    card_file = Path(config.pretrained).expanduser().with_name("model.json")
    if config.pretrained != "torchvision" and card_file.exists():
        card = read_card(card_file)
        return np.array(card["mean"]), np.array(card["std"])
    if config.model in MODELS:
        raise BadInput(f"--pretrained: {card_file}, which a run writes beside its weights, is not there")
    if config.model in AUXILIARY:  # their weights expect 2 x - 1
        return np.full(3, 0.5), np.full(3, 0.5)
    if config.model.startswith("timm/"):
        from timm.models import get_pretrained_cfg

        found = get_pretrained_cfg(config.model.removeprefix("timm/"))
        return np.array(found.mean), np.array(found.std)
    from torchvision.models import get_model_weights

    transforms = get_model_weights(config.model).DEFAULT.transforms()
    return np.array(transforms.mean), np.array(transforms.std)
