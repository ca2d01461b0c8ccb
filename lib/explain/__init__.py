"""What a network learned, explained: mistakes, maps, figures."""

from lib.explain.evaluate import mistakes
from lib.explain.gradcam import maps

__all__ = ["maps", "mistakes"]
