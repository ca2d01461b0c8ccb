"""Networks: ours, torchvision's and timm's, fresh, pretrained, or rebuilt from a run."""

from lib.models.layers import as_map, cam_layer
from lib.models.zoo import build, card, check, check_batches, rebuild, split

__all__ = ["as_map", "build", "cam_layer", "card", "check", "check_batches", "rebuild", "split"]
