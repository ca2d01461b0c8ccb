"""Augmentation: albumentations transforms whose randomness is a function of (seed, epoch, image)."""

import os
import random

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

import albumentations as A
import cv2
import numpy as np
from fastai.vision.core import PILImage
from fasttransform import Transform


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
    """Flips left to right in every other epoch; a coin, tossed once an image, says whether in the even or the odd ones.

    So the network sees each image's two sides equally often, and two epochs in a row show twice as many views. Jordan
    (arXiv 2404.00498) found it better than a random flip wherever flipping helps.
    """

    turned = False  # set by AlbumentationsTransform, which knows epoch and image

    def __init__(self, p=1.0):
        super().__init__(p=p)

    def apply(self, img, **params):
        return cv2.flip(img, 1) if self.turned else img


# Transforms that draw from py_random alone and change images alone: they need nothing that A.Compose does around them,
# which takes more time than they do.
LEAN = (CropFromPadding, AlternatingFlip, Cutout)


class AlbumentationsTransform(Transform):
    """An albumentations pipeline as a fastai item transform for training images.

    What it does to an image is a function of (seed, epoch, index): both generators that albumentations draws from are
    set from these three before each image, so that epochs differ, and workers, ranks and resumed runs agree. The numpy
    one is counter-based (Philox: Salmon et al., SC 2011), so setting it costs a few microseconds.
    """

    split_idx = 0  # training images only

    def __init__(
        self,
        transforms,  # albumentations transforms, in order
        seed=0,  # whole number of at least 0
    ):
        super().__init__()
        cv2.setNumThreads(0)
        self.compose, self.seed = A.Compose(transforms, strict=True), seed
        self.lean = all(type(t) in LEAN for t in self.compose.transforms)
        self.flips = [t for t in self.compose.transforms if isinstance(t, AlternatingFlip)]

    def apply(self, image, epoch, index):
        """`image`, (h, w, 3) uint8, as epoch `epoch` sees the image numbered `index`."""
        if not hasattr(self, "_philox"):  # made where it is used: a worker process makes its own
            self._philox, self._py_random = np.random.Philox(key=self.seed), random.Random()
            self._state = self._philox.state
            self.compose.set_random_state(np.random.Generator(self._philox), self._py_random)
        chance = self._py_random
        for flip in self.flips:
            chance.seed((1 << 128) | (self.seed << 96) | index)  # no epoch has these draws
            flip.turned = (chance.random() < 0.5) == bool(epoch % 2)
        chance.seed((self.seed << 96) | (epoch << 64) | index)
        if not self.lean:
            self._state["state"]["counter"][:] = (0, index, epoch, 0)
            self._philox.state = self._state
            return self.compose(image=image)["image"]
        chance.random()  # as Compose does, for its own probability
        for t in self.compose.transforms:
            if t.p >= 1 or chance.random() < t.p:
                image = t.apply(image, **t.get_params_dependent_on_data({"shape": image.shape}, None))
        return image

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_philox", "_py_random", "_state")}

    def encodes(self, x: PILImage):
        """The per-item path of a plain fastai loader, which knows neither epoch nor index: epoch 0, image 0."""
        return type(x).create(self.apply(np.asarray(x), 0, 0))


def order(seed, epoch, n):
    """The order of `n` images in an epoch, (n,) int64: a function of (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, 1])).permutation(n)


def train_transforms(config, size, fill):
    """The training augmentation of `config` for images of `size` pixels; `fill` is their mean colour, 0..255."""
    scaled = lambda pixels: round(pixels * size / 32)
    transforms = [CropFromPadding(size, scaled(config.crop_padding))]
    if config.flip:
        transforms.append(AlternatingFlip())
    if config.cutout:
        transforms.append(Cutout(max(scaled(config.cutout), 1), tuple(fill)))
    return transforms


def balanced_order(seed, epoch, labels):
    """An order in which any run of images has the classes in the data's proportions, as closely as can be: (n,) int64.

    Image of rank r (in `order`) among the n_c of its class c comes at (r + u_c) / n_c, u_c uniform per epoch and class.
    """
    labels = np.asarray(labels)
    at, shuffled = np.empty(len(labels)), order(seed, epoch, len(labels))
    starts = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, 2]))
    for c in range(labels.max() + 1):
        own = shuffled[labels[shuffled] == c]
        at[own] = (np.arange(len(own)) + starts.random()) / max(len(own), 1)
    return np.argsort(at, kind="stable")
