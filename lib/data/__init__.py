"""From a source of images to fastai DataLoaders: train, valid, test."""

from lib.data.augment import AlbumentationsTransform, Cutout
from lib.data.doubts import say as say_doubts
from lib.data.loader import get_dls, without_auto

__all__ = ["AlbumentationsTransform", "Cutout", "get_dls", "say_doubts", "without_auto"]
