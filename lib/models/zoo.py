"""Networks by name: ours and torchvision's, fresh or pretrained, saved and rebuilt."""

import copy
import re
import sys
from itertools import count
from pathlib import Path

import torch

from lib.cli import BadInput, brief, guess, one_line
from lib.config import AUXILIARY
from lib.models.networks import SmallResNet

MOST = 65536  # of each number in a model.json

# name -> constructor(n_classes, **args), args
MODELS = {
    "small": (SmallResNet, dict(stem=12, widths=(16, 32, 64))),
    "medium": (SmallResNet, dict(stem=24, widths=(64, 128, 256), depths=(1, 2, 1), squeeze=False)),
    "large": (SmallResNet, dict(stem=24, widths=(64, 256, 256), depths=(2, 2, 1), squeeze=False)),
}


def check(name, pretrained=""):
    """Raises BadInput where `name` is neither in MODELS nor a classifier of torchvision, or `pretrained` is no file."""
    if pretrained not in ("", "torchvision") and not Path(pretrained).expanduser().is_file():
        raise BadInput(f"--pretrained {pretrained}: not found; pass a file of weights, or nothing for torchvision's")
    if name in MODELS:
        return
    import torchvision.models as torchvisions

    known = [*MODELS, *torchvisions.list_models(module=torchvisions)]
    if name not in known:
        ours, nearest = ", ".join(MODELS), guess(name, known)
        raise BadInput(f"--model: {name!r} is not among {ours}, nor a classifier of torchvision{nearest}")


def build(name, n_classes, pretrained="", images=None):
    """The network `name`, ours or torchvision's, with fresh weights, or with pretrained ones and a fresh head.

    The first convolution of ours whitens `images`, normalised training images (n, 3, h, w), where they are given.
    Raises BadInput for an unknown name, or weights that do not fit.
    """
    check(name, pretrained)
    if name in MODELS:
        constructor, args = MODELS[name]
        model = constructor(n_classes, **args)
        if images is not None:
            model.whiten(images)
    else:
        from torchvision.models import get_model

        extra = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
        model = get_model(name, weights=None, num_classes=n_classes, **extra)
    if pretrained:
        load_body(model, name, pretrained)
    return model


def head(model):
    """The layer that gives the logits: the last module with parameters of its own."""
    return [m for m in model.modules() if list(m.parameters(recurse=False))][-1]


def split(model):
    """fastai's layer groups of a network: the parameters of its body and of its head, or of its head alone."""
    last = list(head(model).parameters())
    body = [p for p in model.parameters() if not any(p is q for q in last)]
    return [body, last] if body else [last]


def read_weights(name, pretrained):
    """The state dict of torchvision's weights of `name`, or of the file `pretrained`. No code in a file is run."""
    if pretrained == "torchvision":
        from torchvision.models import get_model_weights

        weights = get_model_weights(name).DEFAULT
        options = dict(map_location="cpu", progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
        try:
            return weights.get_state_dict(**options)
        except Exception as e:  # urllib, ssl, http, the disk and the check of the hash each raise their own
            remedy = "without a network pass --pretrained FILE, fetched elsewhere"
            raise BadInput(f"--pretrained: download of {weights.url} failed ({one_line(e)}); {remedy}") from None
    file = Path(pretrained).expanduser()
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # safetensors, pickle, zipfile and torch each raise their own
        raise BadInput(f"--pretrained {file}: cannot be read as weights ({one_line(e)})") from None


def load_body(model, name, pretrained):
    """Loads all but the head of `model`. Raises BadInput where the weights cannot be had, or are another network's."""
    last = head(model)
    fresh = (next(n for n, m in model.named_modules() if m is last) + ".", "aux", "AuxLogits")
    without_head = lambda state: {k: v for k, v in state.items() if not k.startswith(fresh)}
    state = read_weights(name, pretrained)
    state = state if isinstance(state, dict) else {}
    # torchvision's files of DenseNets say norm.1 for norm1
    state = {re.sub(r"(denselayer\d+\.\w+)\.(?=[12]\.)", r"\1", str(k)): v for k, v in state.items()}
    state, body = without_head(state), without_head(model.state_dict())
    for key in {**body, **state}:
        same = getattr(body.get(key), "shape", None) == getattr(state.get(key), "shape", None)
        if not same and not key.endswith("num_batches_tracked"):  # which old files do not have
            raise BadInput(f"--pretrained {pretrained}: is not of {name} ({key!r} is missing, or does not fit)")
    model.load_state_dict(state, strict=False)


def cam_layer(model, size):
    """The layer of `model` that GradCAM reads for images of `size` pixels: its output is a map of at least 4 x 4.

    It is `model.cam_layer`, or, where that does not fit, the last to finish whose output (n, channels, h, w) is such a
    map. Raises BadInput where the network does not take such images, or has no such layer.
    """
    fitting = []

    def look(module, inputs, output):
        if torch.is_tensor(output) and output.dim() == 4 and output.shape[2] == output.shape[3] >= 4:
            maps = [x for x in inputs if torch.is_tensor(x) and x.dim() == 4]  # densely connected layers take lists
            if all(x.shape[2] >= output.shape[2] for x in maps):  # an enlarged map says no more
                fitting.append(module)

    training, handles = model.training, [m.register_forward_hook(look) for m in model.modules() if m is not model]
    example = next(model.parameters())
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size, device=example.device, dtype=example.dtype))
    except (RuntimeError, ValueError, AssertionError) as e:
        raise BadInput(f"--model: does not take images of {size} pixels ({one_line(e)}); try another --size") from None
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not fitting:
        raise BadInput(f"--model: has no layer with a map of 4 x 4 for images of {size} pixels; try a larger --size")
    preferred = getattr(model, "cam_layer", None)
    return preferred if preferred in fitting else fitting[-1]


def small_side(size):
    """The side of the images of --small-epochs, in pixels, where it is `size` in the epochs after them."""
    return size * 3 // 4


def smallest_side(model, config, size):
    """The side of a run's smallest images. Raises BadInput where `model` does not take them, or no GradCAM is had."""
    cam_layer(model, size)
    if config.small_epochs:
        size = small_side(size)
        try:
            cam_layer(model, size)
        except BadInput as e:
            raise BadInput(f"{e}, or --small-epochs 0") from None
    return size


def check_batches(model, config, sizes, n, size, ranks=1):
    """Raises BadInput where a batch, or a rank's part of one, is one image, and `model` cannot be trained on one.

    BatchNorm needs two values a channel; a network that ends in maps of 1 x 1 has one in a batch of one image. `sizes`
    are the batch sizes that the run comes to, `n` counts the training images, whose side is `size` pixels or more.
    """
    leaves_one = lambda batch: 0 < n % batch < 2 * ranks or batch < 2 * ranks
    if not any(map(leaves_one, sizes)):
        return
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(1, 3, size, size))
    except ValueError:
        larger = next(batch for batch in count(config.batch_size + 1) if not leaves_one(batch))
        grown = f" (grow_batch comes to {', '.join(map(str, sizes))})" if len(sizes) > 1 else ""
        raise BadInput(
            f"--batch-size {config.batch_size}: of {n} training images a batch of one is left{grown}, on which the "
            f"BatchNorm of {config.model} cannot be trained at {size} pixels; pass another, such as {larger}"
        ) from None


def card(name, dls, resize_rule, flip):
    """The content of weights/model.json: what rebuilds the trained network, and how images become its input."""
    constructor, args = MODELS.get(name, (None, {}))
    return {
        "architecture": constructor.__name__ if constructor else f"torchvision.{name}",
        "args": {"n_classes": len(dls.vocab), **args},
        "classes": list(dls.vocab),
        "size": dls.store.size,
        "mean": dls.mean.tolist(),
        "std": dls.std.tolist(),
        "resize": resize_rule,
        "flip": flip,
    }


def rebuild(card):
    """The network that the content of weights/model.json describes; its weights are still to be loaded.

    Raises BadInput for anything but a network of this room or a classifier of torchvision, of a possible size.
    """
    try:
        name, args = card["architecture"], card["args"]
        numbers = [n for k, v in args.items() if k != "squeeze" for n in (v if isinstance(v, list) else [v])]
        possible = type(args.get("squeeze", True)) is bool and len(numbers) <= 16 and sum(args.get("depths", ())) <= 64
        if not possible or not all(type(n) is int and 0 < n <= MOST for n in numbers):
            raise ValueError(f"args {brief(args)}")
        if name.startswith("torchvision."):
            return build(name.removeprefix("torchvision."), args["n_classes"])
        constructor = next(c for c, _ in MODELS.values() if c.__name__ == name)
        with torch.device("meta"):  # takes no memory
            if sum(p.numel() for p in constructor(**args).parameters()) > 10**9:
                raise ValueError("more than 10^9 parameters")
        return constructor(**args)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, IndexError) as e:
        raise BadInput(f"model.json: describes no network of this project ({one_line(e)})") from None
