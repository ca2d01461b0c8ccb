"""Networks: ours and torchvision's, fresh, pretrained, or rebuilt from a run."""

from lib.models.zoo import build, cam_layer, card, check, check_batches, rebuild, small_side, smallest_side, split

__all__ = ["build", "cam_layer", "card", "check", "check_batches", "rebuild", "small_side", "smallest_side", "split"]
