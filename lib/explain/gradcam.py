"""GradCAM maps (Selvaraju et al., arXiv 1610.02391), and those of related methods, by the grad-cam package."""

import copy

import numpy as np
import torch

from lib.config import CAMS
from lib.models import as_map

CLASSES = "GradCAM GradCAMPlusPlus HiResCAM LayerCAM XGradCAM EigenCAM".split()  # of the grad-cam package
METHODS = dict(zip(CAMS, CLASSES, strict=True))


def maps(
    model,  # network: images -> logits (n, classes)
    layer,  # the module of `model` whose output is read; its map should be at least 4 x 4
    images,  # (n, channels, h, w) float tensor, normalised as for the network
    targets,  # n class numbers: what each map explains
    batch_size=None,  # images at a time; None: 64 of 64 x 64 pixels, fewer of larger ones
    method="gradcam",  # one of METHODS
):
    """Where the network saw the target class in each image: (n, h, w) float32 array in 0..1.

    `model` is left as it was: weights, mode, gradients, hooks. Raises ValueError where `targets` and `images` differ in
    number, or `layer` is not in `model`.
    """
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    if len(targets) != len(images):
        raise ValueError(f"{len(images)} images, but {len(targets)} targets")
    name = next((n for n, m in model.named_modules() if m is layer), None)
    if name is None:
        raise ValueError(f"the layer {type(layer).__name__} is not a part of the model")
    images, batches = torch.as_tensor(images).as_subclass(torch.Tensor).detach().float(), []
    batch_size = batch_size or max(1, min(64, 64 * 64**2 // images.shape[-1] ** 2))
    twin = copy.deepcopy(model).float().eval().requires_grad_(True)
    twin.zero_grad()
    cam = getattr(pytorch_grad_cam, METHODS[method])(twin, [twin.get_submodule(name)], reshape_transform=as_map)
    # what comes next gets a copy, so that an in-place ReLU leaves alone what the hooks of GradCAM have kept
    twin.get_submodule(name).register_forward_hook(lambda module, inputs, output: output.clone())
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        for first in range(0, len(images), batch_size):
            part = slice(first, first + batch_size)
            batches.append(cam(images[part], [ClassifierOutputTarget(int(target)) for target in targets[part]]))
            cam.outputs = None  # it holds the graph of the batch
    return np.concatenate([np.zeros((0, *images.shape[2:])), *batches]).clip(0, 1).astype(np.float32)
