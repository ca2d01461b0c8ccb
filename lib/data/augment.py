"""Augmentation: albumentations transforms whose randomness is a function of (seed, epoch, image)."""

import copy
import io
import json
import os
import random
import warnings
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

import albumentations as A
import cv2
import numpy as np
import yaml
from albumentations.core.serialization import SERIALIZABLE_REGISTRY, shorten_class_name
from fastai.vision.core import PILImage
from fasttransform import Transform

from lib.cli import BadInput, refused
from lib.data.decode import centre

MAX_CHARACTERS, MAX_TRANSFORMS = 100_000, 100  # of a file that --augment names


class Cutout(A.ImageOnlyTransform):
    """Masks one square around a uniformly drawn pixel, clipped at the border (DeVries & Taylor, arXiv 1708.04552).

    Unlike `A.CoarseDropout`, whose holes never clip, the centre of the square may be any pixel of the image.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        size: int
        fill: float | tuple[float, ...]

    def __init__(
        self,
        size,  # side of the square, in pixels of the image
        fill=0,  # value of the masked pixels: one number, or one a channel; the paper's is the mean of the images
        p=1.0,  # probability of masking
    ):
        if size < 1:
            raise ValueError(f"Cutout: size must be at least 1 pixel, not {size}")
        super().__init__(p=p)
        self.size, self.fill, self.colour = size, fill, np.asarray(fill)

    def apply(self, img, y, x, **params):
        out = img.copy()
        out[max(y, 0) : max(y + self.size, 0), max(x, 0) : max(x + self.size, 0)] = self.colour.astype(img.dtype)
        return out

    def get_params_dependent_on_data(self, params, data):
        h, w = params["shape"][:2]
        half = self.size // 2
        return {"y": self.py_random.randrange(h) - half, "x": self.py_random.randrange(w) - half}


class CropFromPadding(A.ImageOnlyTransform):
    """A random crop of size x size from the image padded by reflection: `A.Pad` and `A.RandomCrop` in one, faster."""

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        size: int
        padding: int

    def __init__(
        self,
        size,  # side of the crop, in pixels
        padding,  # pixels added on every side; no more than the image has
        p=1.0,  # probability; below 1 images of another size pass through
    ):
        super().__init__(p=p)
        self.size, self.padding = size, padding

    def apply(self, img, y, x, **params):
        if self.padding:
            img = cv2.copyMakeBorder(img, *[self.padding] * 4, cv2.BORDER_REFLECT_101)
        return img[y : y + self.size, x : x + self.size]

    def get_params_dependent_on_data(self, params, data):
        h, w = params["shape"][:2]
        spare = 2 * self.padding - self.size
        return {"y": self.py_random.randrange(h + spare + 1), "x": self.py_random.randrange(w + spare + 1)}


class AlternatingFlip(A.ImageOnlyTransform):
    """Flips an image left to right in every other epoch: in even or odd ones, by a coin tossed once for each image.

    So the network sees each image's two sides equally often, and two epochs in a row show twice as many views. Jordan
    (arXiv 2404.00498) found it better than a random flip wherever flipping helps.
    """

    turned = False  # set by AlbumentationsTransform, which knows epoch and image

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        pass

    def __init__(self, p=1.0):
        super().__init__(p=p)

    def apply(self, img, **params):
        return cv2.flip(img, 1) if self.turned else img


# Transforms that draw from py_random alone and change images alone. They are called directly, because A.Compose takes
# longer than they do.
LEAN = (CropFromPadding, AlternatingFlip, Cutout)


class AlbumentationsTransform(Transform):
    """An albumentations pipeline as a fastai item transform for training images.

    `apply` is a function of (seed, epoch, index): both generators that albumentations draws from are set from these
    three before each image, so that epochs differ, and workers, ranks and resumed runs agree. The numpy one is
    counter-based (Philox: Salmon et al., SC 2011), so setting it costs a few microseconds. A loader that knows epoch
    and index sets `position` before each image. Without it Python's `random` draws both.
    """

    split_idx, order = 0, 2  # training images only; after fastai's Resize

    def __init__(
        self,
        transforms,  # albumentations transforms, in order
        seed=0,  # whole number of at least 0
        size=None,  # side of the images that come out, cropped at the centre, in pixels; None: as the pipeline has it
    ):
        super().__init__()
        self.compose, self.seed, self.size = A.Compose(copy.deepcopy(list(transforms)), strict=True), seed, size
        self.position = None  # (epoch, index) of the next image
        self.lean = all(type(t) in LEAN for t in self.compose.transforms)
        self.flips = [t for t in leaves(self.compose) if isinstance(t, AlternatingFlip)]
        self.mirrors = any(isinstance(t, (AlternatingFlip, A.HorizontalFlip, A.D4)) for t in leaves(self.compose))

    def apply(self, image, epoch, index):
        """`image`, (h, w, 3) uint8, as epoch `epoch` sees the image numbered `index`.

        Raises BadInput where the pipeline gives no such image of at least `size` pixels.
        """
        if not hasattr(self, "_philox"):  # made where it is used: a worker process makes its own
            cv2.setNumThreads(0)
            self._philox, self._py_random = np.random.Philox(key=self.seed), random.Random()
            self._state = self._philox.state
            self.compose.set_random_state(np.random.Generator(self._philox), self._py_random)
        chance = self._py_random
        for flip in self.flips:
            chance.seed((1 << 128) | (self.seed << 96) | index)  # no epoch has these draws
            flip.turned = (chance.random() < 0.5) == bool(epoch % 2)
        chance.seed((self.seed << 96) | (epoch << 64) | index)
        if self.lean:
            chance.random()  # as Compose does, for its own probability
            for t in self.compose.transforms:
                if t.p >= 1 or chance.random() < t.p:
                    image = t.apply(image, **t.get_params_dependent_on_data({"shape": image.shape}, None))
        else:
            self._state["state"]["counter"][:] = (0, index, epoch, 0)
            self._philox.state = self._state
            image = self.compose(image=image)["image"]
        fits = self.size is None or self.lean and image.shape[:2] == (self.size, self.size)
        return image if fits else self.cropped(image)

    def cropped(self, image):
        shape, kind = getattr(image, "shape", ()), getattr(image, "dtype", type(image))
        if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or min(shape[:2]) < self.size:
            needed = f"uint8 (h, w, 3) of at least {self.size} pixels"
            raise BadInput(f"--augment: its pipeline gives an image {kind} {tuple(shape)}, not {needed}; change it")
        return centre(image, self.size)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_philox", "_py_random", "_state")}

    def encodes(self, x: PILImage):
        epoch, index = self.position or (random.getrandbits(32), random.getrandbits(32))
        self.position = None
        return type(x).create(self.apply(np.asarray(x), epoch, index))


def leaves(compose):
    """The transforms of a pipeline and of those in it."""
    for t in compose.transforms:
        yield from leaves(t) if isinstance(t, A.BaseCompose) else [t]


def shuffled(seed, epoch, labels):
    """The order of an epoch, (n,) int64, by (seed, epoch). The counter's last 1 (augmentation: 0) keeps draws apart."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, 1])).permutation(len(labels))


def pipeline(config, size, fill):
    """The transforms of `--augment` for images of `size` pixels; `fill` is their mean colour, 0..255.

    Raises BadInput where it names a file that cannot be used.
    """
    scaled = lambda pixels: round(pixels * size / 32)
    flip = [AlternatingFlip()] if config.flip else []
    cutout = [Cutout(max(scaled(config.cutout), 1), tuple(fill))] if config.cutout else []
    if config.augment == "standard":
        return [CropFromPadding(size, scaled(config.crop_padding)), *flip, *cutout]
    if config.augment == "photo":
        crop, mild = A.RandomResizedCrop((size, size), scale=(0.35, 1.0)), (0.8, 1.2)
        return [crop, *flip, A.ColorJitter(mild, mild, mild, hue=(-0.02, 0.02), p=0.8), *cutout]
    return [] if config.augment == "none" else from_file(Path(config.augment).expanduser(), size)


def saved(transform):
    """The pipeline of an AlbumentationsTransform as YAML, which `--augment` reads."""
    text = io.StringIO()
    A.save(transform.compose, text, "yaml")
    return text.getvalue()


def from_file(path, size):
    """The transforms in a file that `A.save` wrote, YAML or JSON, tried on an image of `size` pixels.

    No code but albumentations' and this module's is run. Raises BadInput naming the file, and the transform at fault.
    """
    remedy = "pass standard, photo, none, or a file that A.save wrote"
    try:
        with warnings.catch_warnings(action="ignore"), refused("cannot be used", remedy):  # what is wrong raises
            with open(path, encoding="utf-8") as file:
                text = file.read(MAX_CHARACTERS + 1)
            if len(text) > MAX_CHARACTERS or text.count("__class_fullname__") > MAX_TRANSFORMS:
                raise ValueError(f"more than {MAX_CHARACTERS:,} characters or {MAX_TRANSFORMS} transforms")
            top = build(parse(text)["transform"])
            transforms = top.transforms if type(top) is A.Compose and top.p >= 1 else [top]
            trial = AlbumentationsTransform(transforms, size=size)
            saved(trial)  # raises for those that read further files
            for i in range(8):
                trial.apply(np.full((size, size, 3), 128, np.uint8), 0, i)
            return transforms
    except BadInput as error:
        raise BadInput(f"--augment {path}: {error.text.removeprefix('--augment: ')}") from None


def parse(text):
    try:
        return json.loads(text)
    except ValueError:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has aliases, which A.save does not write") from None
        return yaml.safe_load(text)


def build(node):
    """The transform that a node of the file describes. Those inside are built first: an error names the innermost."""
    name = shorten_class_name(str(node["__class_fullname__"]))
    cls = SERIALIZABLE_REGISTRY.get(name, object)
    ours = cls in LEAN or cls.__module__.startswith("albumentations.")
    if not (ours and issubclass(cls, (A.BasicTransform, A.BaseCompose))):
        raise BadInput(f"{name} is no transform of albumentations that a file can hold; remove it")
    for child in node.get("transforms", ()):
        build(child)
    with refused(f"{name}: wrong arguments", "correct them"):  # pydantic's, and what constructors raise
        strict = {"strict": True} if issubclass(cls, A.BasicTransform) and "InitSchema" in vars(cls) else {}
        transform = A.from_dict({"transform": {**node, **strict}})
        if lost := node.keys() - transform.to_dict_private().keys():
            raise ValueError(f"A.save does not keep {', '.join(lost)}")
        return transform
