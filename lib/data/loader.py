"""Loaders that make whole batches, and the DataLoaders of a run."""

import os
import random
from pathlib import Path

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import TfmdDL
from fastai.data.load import _loaders
from fastai.data.transforms import Normalize
from fastai.torch_core import TensorCategory, TensorImage
from fastai.vision.data import ImageBlock

from lib.cli import BadInput, one_line
from lib.config import AUXILIARY, MODELS
from lib.data.augment import AlbumentationsTransform, balanced_order, order, train_transforms
from lib.data.decode import batch_size, centre, decode
from lib.data.folders import find_images, named_folders
from lib.data.sources import SOURCES, cache_dir, root_folder
from lib.data.store import Store
from lib.machine import on_this_machine
from lib.runs import read_card

PLAIN_PIXELS = 2**21  # that say enough of the colours of all


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
    mean, std = pretrained_stats(config) if config.pretrained else store.stats(splits[0])
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
        workers = 0 if device.type == "cpu" else min(8, max(1, os.cpu_count() // on_this_machine()))
    how = dict(device=device, pin_memory=device.type == "cuda", num_workers=workers, drop_last=False)
    how |= dict(bs=images_a_step(config, len(splits[0])), val_bs=batch_size(size))
    how |= dict(store=store, seed=config.seed, balanced=config.balanced_batches)  # StoreDL's own
    dls = block.dataloaders(root, path=root, **how)
    dls.test, dls.store, dls.mean, dls.std = dls[2], store, mean, std
    return dls


def pretrained_stats(config):
    """Mean and standard deviation a channel, in 0..1, of what the weights `--pretrained` were trained on: (3,) arrays.

    Of a run's weights they stand beside them, in model.json; of others they are those of torchvision's own.
    """
    card = Path(config.pretrained).expanduser().with_name("model.json")
    if config.pretrained != "torchvision" and card.exists():
        found = read_card(card)
        return np.array(found["mean"]), np.array(found["std"])
    if config.model in MODELS:
        raise BadInput(f"--pretrained: {card}, which a run writes beside its weights, is not there")
    if config.model in AUXILIARY:  # their weights expect 2 x - 1
        return np.full(3, 0.5), np.full(3, 0.5)
    from torchvision.models import get_model_weights

    transforms = get_model_weights(config.model).DEFAULT.transforms()
    return np.array(transforms.mean), np.array(transforms.std)
