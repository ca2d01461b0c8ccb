"""Networks by name: ours, torchvision's and timm's, fresh or pretrained, saved and rebuilt."""

import copy
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from lib.cli import BadInput, brief, guess, refused
from lib.config import AUXILIARY
from lib.models.layers import heads
from lib.models.networks import SmallResNet

TIMM = "timm/"
MOST = 65536  # largest number in the arguments of a network in model.json
OFFLINE = "without a network pass --pretrained FILE, fetched elsewhere"

# name -> constructor(n_classes, **args), args
MODELS = {
    "small": (SmallResNet, dict(stem=12, widths=(16, 32, 64))),
    "light": (SmallResNet, dict(stem=24, widths=(32, 96, 256), squeeze=False)),
    "medium": (SmallResNet, dict(stem=24, widths=(64, 128, 256), depths=(1, 2, 1), squeeze=False)),
    "large": (SmallResNet, dict(stem=24, widths=(64, 256, 256), depths=(2, 2, 1), squeeze=False)),
}


def check(name, pretrained=""):
    """Raises BadInput if no library here has a network `name`, or if the file `pretrained` does not exist."""
    if pretrained not in ("", "torchvision") and not Path(pretrained).expanduser().is_file():
        network = "resnet18" if Path(pretrained).suffix else pretrained
        remedy = f"pass a file of weights, or --model {network} --pretrained for those of a network"
        raise BadInput(f"--pretrained {pretrained}: not found; {remedy}")
    if name in (*MODELS, "auto"):  # auto: --minutes chooses
        return
    if name.startswith(TIMM):
        if not find_spec("timm"):
            raise BadInput(f"--model {name}: timm is not installed; uv run --extra timm train_fastai.py …")
        import timm

        names = [n for tags in (False, True) for n in timm.list_models(include_tags=tags, name_matches_cfg=True)]
        known, these = [TIMM + n for n in names], "timm.list_models()"
    else:
        import torchvision.models as torchvisions

        known = [*MODELS, *torchvisions.list_models(module=torchvisions)]
        these = f"{', '.join(MODELS)}, nor a classifier of torchvision, nor timm/…"
    if name not in known:
        raise BadInput(f"--model: {name!r} is not among {these}{guess(name, known)}")


def build(name, n_classes, pretrained="", images=None, size=None):
    """The network `name`, ours, torchvision's or timm/'s, with fresh weights, or with pretrained ones and a fresh head.

    `images` are normalised training images (n, 3, h, w): the first convolution of ours whitens them. `size`, by default
    theirs, is the side for networks that are made for one alone. Raises BadInput for an unknown name, or weights that
    do not fit.
    """
    check(name, pretrained)
    size = size if images is None else images.shape[-1]
    if name.startswith(TIMM):
        return timms(name, n_classes, pretrained, size)
    if name in MODELS:
        constructor, args = MODELS[name]
        model = constructor(n_classes, **args)
        if images is not None:
            model.whiten(images)
    else:
        from torchvision.models import get_model

        extra = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
        if size and name.startswith(("vit_", "maxvit_")):
            extra = {"image_size": size} if name.startswith("vit_") else {"input_size": (size, size)}
        with unfit(name, size):
            model = get_model(name, weights=None, num_classes=n_classes, **extra)
    if pretrained:
        load_body(model, name, pretrained)
    return model


def unfit(name, size):
    return refused(f"--model {name}: does not take images of {size} pixels", "try another --size")


def timms(name, n_classes, pretrained, size):
    """A network of timm. Weights come by timm's own loader, which adapts positions and runs no code in a file.

    They are loaded with their own head: without it timm does not check that they fit.
    """
    import timm

    name = name.removeprefix(TIMM)
    found = timm.models.get_pretrained_cfg(name)
    options = {"img_size": size} if size and found.fixed_input_size else {}
    if not pretrained:
        with unfit(TIMM + name, size):
            return timm.create_model(name, num_classes=n_classes, **options)
    what, remedy, overlay = f"--pretrained: the weights of {TIMM}{name} cannot be had", OFFLINE, {}
    if pretrained != "torchvision":
        what, remedy = f"--pretrained {pretrained}: is not of {TIMM}{name}", ""
    with refused(what, remedy):  # hubs, disks, pickle, and networks that do not take the size each raise their own
        classes = found.num_classes
        if pretrained != "torchvision":
            state = timm.models.load_state_dict(Path(pretrained).expanduser())
            classes = len(state.get(f"{found.classifier}.weight", range(classes)))
            overlay = {"state_dict": state, "num_classes": classes, "custom_load": False}
        model = timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay, **options)
        model.reset_classifier(n_classes)
        return model


def split(model):
    """fastai's layer groups of a network: the parameters of its body and of its head, or of its head alone."""
    last = [p for layer in heads(model) for p in layer.parameters()]
    body = [p for p in model.parameters() if not any(p is q for q in last)]
    return [body, last] if body else [last]


def read_weights(name, pretrained):
    """The state dict of torchvision's weights of `name`, or of the file `pretrained`. No code in a file is run."""
    if pretrained == "torchvision":
        from torchvision.models import get_model_weights

        weights = get_model_weights(name).DEFAULT
        options = dict(map_location="cpu", progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
        with refused(f"--pretrained: download of {weights.url} failed", OFFLINE):  # urllib, ssl, the disk …
            return weights.get_state_dict(**options)
    file = Path(pretrained).expanduser()
    with refused(f"--pretrained {file}: cannot be read as weights"):  # safetensors, pickle and torch raise their own
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)


def load_body(model, name, pretrained):
    """Loads all but the head of `model`. Raises BadInput where the weights cannot be had, or are another network's."""
    last = heads(model)
    fresh = (*(f"{n}." for n, m in model.named_modules() if any(m is layer for layer in last)), "aux", "AuxLogits")
    without_head = lambda state: {k: v for k, v in state.items() if not k.startswith(fresh)}
    state = read_weights(name, pretrained)
    state = state if isinstance(state, dict) else {}
    if name.startswith("vit_") and "encoder.pos_embedding" in state:  # of other images than these
        from torchvision.models.vision_transformer import interpolate_embeddings

        state = interpolate_embeddings(model.image_size, model.patch_size, state)
    # torchvision's files of DenseNets say norm.1 for norm1
    state = {re.sub(r"(denselayer\d+\.\w+)\.(?=[12]\.)", r"\1", str(k)): v for k, v in state.items()}
    state, body = without_head(state), without_head(model.state_dict())
    for key in {**body, **state}:
        same = getattr(body.get(key), "shape", None) == getattr(state.get(key), "shape", None)
        if not same and not key.endswith("num_batches_tracked"):  # which old files do not have
            raise BadInput(f"--pretrained {pretrained}: is not of {name} ({key!r} is missing, or does not fit)")
    model.load_state_dict(state, strict=False)


def check_batches(model, config, sizes, n, size, ranks=1):
    """Raises BadInput where a batch, or a rank's part of one, is one image, and `model` cannot be trained on one.

    BatchNorm needs two values a channel; a network that ends in maps of 1 x 1 has one in a batch of one image. fastai's
    MixUp needs two images. `sizes` are the batch sizes that the run comes to, `n` counts the training images, of `size`
    pixels.
    """
    leaves_one = lambda batch: batch < 2 * ranks or 0 < n % batch < 2 * ranks  # a rank gets fewer than two images
    if not any(map(leaves_one, sizes)):
        return
    try:
        if config.mixup:
            raise ValueError  # as BatchNorm raises for one image: both become the line below
        with torch.random.fork_rng([]), torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(1, 3, size, size))
    except ValueError:
        larger = next((batch for batch in range(config.batch_size + 1, n + 1) if not leaves_one(batch)), None)
        other = "leave out --mixup" if config.mixup else "pass another --model"
        remedy = f"pass another, such as {larger}" if larger else f"add images, or {other}"
        grown = f" (grow_batch comes to {', '.join(map(str, sizes))})" if len(sizes) > 1 else ""
        remedy = "pass another, or another --max-batch-size" if grown else remedy
        fault = f"on which the BatchNorm of {config.model} cannot be trained at {size} pixels"
        fault = "which --mixup cannot mix" if config.mixup else fault
        one = "a batch of one" if ranks == 1 else "for one process a batch of one"
        left = f"of {n} training images {one} is left{grown}, {fault}"
        raise BadInput(f"--batch-size {config.batch_size}: {left}; {remedy}") from None


def card(name, dls):
    """The content of weights/model.json: what rebuilds the trained network, and how images become its input."""
    constructor, args = MODELS.get(name, (None, {}))
    theirs = name if name.startswith(TIMM) else f"torchvision.{name}"
    return {
        "architecture": constructor.__name__ if constructor else theirs,
        "args": {"n_classes": len(dls.vocab), **args},
        "classes": list(dls.vocab),
        "size": dls.store.size,
        "mean": dls.mean.tolist(),
        "std": dls.std.tolist(),
        "resize": dls.store.resize_rule,
        "flip": dls.augment.mirrors,
        "levels": dls.store.levels,
    }


def rebuild(card):
    """The network that the content of weights/model.json describes; its weights are still to be loaded.

    Raises BadInput for what is no network of lib/models, torchvision or timm, and for an impossible size.
    """
    with refused("model.json: describes no network of this project"):
        name, args = card["architecture"], card["args"]
        numbers = [n for k, v in args.items() if k != "squeeze" for n in (v if isinstance(v, list) else [v])]
        possible = type(args.get("squeeze", True)) is bool and len(numbers) <= 16 and sum(args.get("depths", ())) <= 64
        if not possible or not all(type(n) is int and 0 < n <= MOST for n in numbers):
            raise ValueError(f"args {brief(args)}")
        if name.startswith(("torchvision.", TIMM)):
            return build(name.removeprefix("torchvision."), args["n_classes"], size=card.get("size"))
        constructor = next(c for c, _ in MODELS.values() if c.__name__ == name)
        with torch.device("meta"):  # takes no memory
            if sum(p.numel() for p in constructor(**args).parameters()) > 10**9:
                raise ValueError("more than 10^9 parameters")
        return constructor(**args)
