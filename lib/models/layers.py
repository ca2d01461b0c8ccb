"""The layer that GradCAM reads, and how its output becomes a map."""

import copy
import math

import torch
from torch import nn

from lib.cli import BadInput, refused

LEAST = 4  # smallest side of a map that still shows a place


def as_map(x):
    """A layer's output as maps (n, channels, h, w), h = w, whatever its layout; None where it is no map.

    Channels may come last, as in a Swin transformer. Of tokens (n, t, channels), as in a ViT, the map is the largest
    square at the end: class tokens and registers come before the patches.
    """
    if x.dim() == 4 and x.shape[2] == x.shape[3]:
        return x
    if x.dim() == 4 and x.shape[1] == x.shape[2]:
        return x.movedim(3, 1)
    if x.dim() == 3:
        side = math.isqrt(x.shape[1])
        return x[:, x.shape[1] - side**2 :].unflatten(1, (side, side)).movedim(3, 1)
    return None


def heads(model):
    """The layers that give the logits: what timm says, or the last module with parameters of its own."""
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        return list(found) if isinstance(found, (list, tuple)) else [found]
    return [m for m in model.modules() if list(m.parameters(recurse=False))][-1:]


def cam_layer(model, size):
    """The layer of `model` that GradCAM reads for images of `size` pixels: its output is a map of at least 4 x 4.

    It is `model.cam_layer` if that fits. Otherwise it is the last layer to finish whose output is such a map and
    changes what the head sees. In a ViT that is the first norm of the last block: after it only the class token counts.
    Raises BadInput if the network does not take such images, or has no such layer.
    """
    twin, found, features = copy.deepcopy(model).eval(), [], []  # found: (layer of `model`, its output)
    ours = dict(zip(twin.modules(), model.modules()))

    def look(module, inputs, output):
        is_attention = isinstance(module, (nn.Dropout, nn.Softmax))  # attention weights are square, but are no map
        image = as_map(output) if torch.is_tensor(output) and not is_attention else None
        if image is None or image.shape[2] < LEAST or not (output is image or "Norm" in type(module).__name__):
            return
        maps = [x for x in inputs if torch.is_tensor(x) and x.dim() == 4]  # densely connected layers take lists
        if all(x.shape[2] >= image.shape[2] for x in maps):  # an enlarged map says no more
            found.append((ours[module], output))

    for module in list(twin.modules())[1:]:
        module.register_forward_hook(look)
    for head in heads(twin):  # its input counts, not the logits: a fresh head may be zero
        head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    example = next(twin.parameters())
    x = torch.linspace(-2, 2, 3 * size**2, device=example.device, dtype=example.dtype).view(1, 3, size, size)
    with torch.enable_grad(), refused(f"--model: does not take images of {size} pixels", "try another --size"):
        logits = twin(x.requires_grad_().clone())
        seen = sum(x.square().sum() for x in features or [logits])
        outputs = [output for _, output in found]
        slopes = torch.autograd.grad(seen, outputs, allow_unused=True) if outputs else ()
    matters = [m for (m, _), slope in zip(found, slopes) if slope is not None and (as_map(slope) != 0).any()]
    if not matters:
        raise BadInput(f"--model: has no layer with a map of 4 x 4 for images of {size} pixels; try a larger --size")
    preferred = getattr(model, "cam_layer", None)
    return preferred if preferred in matters else matters[-1]
