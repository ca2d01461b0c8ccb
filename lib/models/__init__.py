"""Networks: ours, torchvision's, and weights that are there already."""

from lib.models.networks import SmallResNet
from lib.models.zoo import (
    MODELS,
    build,
    cam_layer,
    card,
    check,
    check_batches,
    head,
    rebuild,
    small_side,
    smallest_side,
)

__all__ = [
    "MODELS",
    "SmallResNet",
    "build",
    "cam_layer",
    "card",
    "check",
    "check_batches",
    "head",
    "rebuild",
    "small_side",
    "smallest_side",
]
