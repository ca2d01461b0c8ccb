"""Networks by name: ours and torchvision's, fresh or pretrained, saved and rebuilt."""

import copy
import re
import sys
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
    """Raises BadInput where `name` is neither in `MODELS` nor a classifier of torchvision, or `pretrained` no file."""
    if pretrained not in ("", "torchvision") and not Path(pretrained).expanduser().is_file():
        raise BadInput(f"--pretrained {pretrained}: not found; pass a file of weights, or nothing for torchvision's")
    if name in MODELS:
        return
    import torchvision.models as zoo

    known = zoo.list_models(module=zoo)
    if name not in known:
        raise BadInput(
            f"--model: {name!r} is not among {', '.join(MODELS)}, nor a classifier of torchvision"
            + guess(name, [*MODELS, *known])
        )


def build(name, n_classes, pretrained="", images=None):
    """The network `name`, of `MODELS` or a torchvision classifier, with fresh weights, or a fresh head on others.

    The first convolution of ours whitens `images`, normalised training images (n, 3, h, w), where there are any.
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
    """The layer that gives the logits, in our networks and in torchvision's: the last with weights of its own."""
    return [m for m in model.modules() if list(m.parameters(recurse=False))][-1]


def load_body(model, name, pretrained):
    """Loads all but the head of `model` from torchvision's weights of `name`, or from the file `pretrained`.

    Raises BadInput where they cannot be had, or are of another network. No code of a file is run.
    """
    if pretrained == "torchvision":
        from torchvision.models import get_model_weights

        weights = get_model_weights(name).DEFAULT
        try:
            options = dict(map_location="cpu", progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
            state = weights.get_state_dict(**options)
        except Exception as e:  # urllib, ssl, http, the disk and the check of the hash each raise their own
            raise BadInput(
                f"--pretrained: download of {weights.url} failed ({one_line(e)}); without a network pass "
                "--pretrained FILE, fetched elsewhere"
            ) from None
    else:
        file = Path(pretrained).expanduser()
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(file)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as e:  # safetensors, pickle, zipfile and torch each raise their own
            raise BadInput(f"--pretrained {file}: cannot be read as weights ({one_line(e)})") from None
    last = head(model)
    aside = (next(n for n, m in model.named_modules() if m is last) + ".", "aux", "AuxLogits")
    shapes = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(aside)}
    wanted = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        key = re.sub(r"(denselayer\d+\.\w+)\.(?=[12]\.)", r"\1", str(key))  # torchvision's files say norm.1 for norm1
        if not key.startswith(aside):
            wanted[key] = value
    odd = [k for k in {**shapes, **wanted} if shapes.get(k) != getattr(wanted.get(k), "shape", None)]
    odd = [k for k in odd if not k.endswith("num_batches_tracked")]  # files of old do not have it
    if odd:
        raise BadInput(f"--pretrained {pretrained}: is not of {name} ({odd[0]!r} is missing, or does not fit)")
    model.load_state_dict(wanted, strict=False)


def cam_layer(model, size):
    """The layer of `model` that GradCAM reads for images of `size` pixels: its output is a map of at least 4 x 4.

    It is `model.cam_layer`, or, without one that fits, the last to finish whose output (n, channels, h, w) is such a
    map. Raises BadInput where the network does not take such images, or has no such layer.
    """
    own, fitting = getattr(model, "cam_layer", None), []

    def look(module, inputs, output):
        if torch.is_tensor(output) and output.dim() == 4 and output.shape[2] == output.shape[3] >= 4:
            if inputs[0].dim() != 4 or inputs[0].shape[2] >= output.shape[2]:  # an enlarged map says no more
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
    return own if own in fitting else fitting[-1]


def small_side(size):
    """The side of the images of --small-epochs, in pixels, where it is `size` behind them."""
    return size * 3 // 4


def smallest_side(model, config, size):
    """The side of the smallest images of a run. Raises BadInput where `model` does not take them, or no GradCAM it."""
    cam_layer(model, size)
    if not config.small_epochs:
        return size
    try:
        cam_layer(model, small_side(size))
    except BadInput as e:
        raise BadInput(f"{e}, or --small-epochs 0") from None
    return small_side(size)


def check_batches(model, config, sizes, n, size, ranks=1):
    """Raises BadInput where a batch, or a rank's slice of it, would be one image that `model` cannot be trained on.

    BatchNorm needs two values a channel; a network that ends in maps of 1 x 1 has one in a batch of one image.
    """
    lone = lambda batch: 0 < n % batch < 2 * ranks or batch < 2 * ranks
    if not any(map(lone, sizes)):
        return
    twin = copy.deepcopy(model).train()
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            twin(torch.zeros(1, 3, size, size))
    except ValueError:
        batch = next(
            (b for b in range(config.batch_size + 1, 2 * max(config.batch_size, n) + 2) if not lone(b)), "more"
        )
        more = f" (grow_batch comes to {', '.join(map(str, sizes))})" if len(sizes) > 1 else ""
        raise BadInput(
            f"--batch-size {config.batch_size}: of {n} training images a batch of one is left{more}, on which the "
            f"BatchNorm of {config.model} cannot be trained at {size} pixels; pass another, such as {batch}"
        ) from None


def card(name, dls, resize_rule, flip):
    """What rebuilds the trained network and feeds it: the content of weights/model.json."""
    ours = name in MODELS
    return {
        "architecture": MODELS[name][0].__name__ if ours else f"torchvision.{name}",
        "args": {"n_classes": len(dls.vocab), **(MODELS[name][1] if ours else {})},
        "classes": list(dls.vocab),
        "size": dls.store.size,
        "mean": dls.mean.tolist(),
        "std": dls.std.tolist(),
        "resize": resize_rule,
        "flip": flip,
    }


def rebuild(card):
    """The network that the content of weights/model.json describes, its weights still to be loaded.

    Raises BadInput for anything but a network of this module or a classifier of torchvision, of a possible size.
    """
    try:
        name, args = card["architecture"], card["args"]
        numbers = [n for k, v in args.items() if k != "squeeze" for n in (v if isinstance(v, list) else [v])]
        fitting = type(args.get("squeeze", True)) is bool and len(numbers) <= 16 and sum(args.get("depths", ())) <= 64
        if not fitting or not all(type(n) is int and 0 < n <= MOST for n in numbers):
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
