"""Networks. Ours need torch alone, so that a trained one can be rebuilt anywhere."""

import copy
import math
import os
import re
import sys
from pathlib import Path

import torch
from torch import nn

from lib.config import BadInput, brief, guess, one_line, read_json


class ConvPoolNorm(nn.Sequential):
    """3 x 3 convolution, 2 x 2 max pooling where asked for, BatchNorm, SiLU.

    Pooling before the norm leaves it a quarter of the work (Jordan, arXiv 2404.00498).
    """

    def __init__(self, c_in, c_out, pool=False):
        layers = [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.SiLU()]
        super().__init__(*layers[:1], *([nn.MaxPool2d(2)] if pool else []), *layers[1:])


class SqueezeExcite(nn.Module):
    """Scales each channel by a function of all channels' means (Hu et al., arXiv 1709.01507)."""

    def __init__(self, width, reduction=4):
        super().__init__()
        hidden = max(width // reduction, 1)
        self.scale = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, x):
        return x * self.scale(x.mean((2, 3)))[:, :, None, None]


class Residual(nn.Module):
    """x + f(x), f being `depth` convolutions of the same width (He et al., arXiv 1512.03385), then a SqueezeExcite."""

    def __init__(self, width, depth, squeeze):
        super().__init__()
        layers = [ConvPoolNorm(width, width) for _ in range(depth)]
        self.body = nn.Sequential(*layers, *([SqueezeExcite(width)] if squeeze else []))

    def forward(self, x):
        return x + self.body(x)


class SmallResNet(nn.Module):
    """A residual network for small images: a stem, then stages that each halve the side and add a residual block.

    Maps (n, 3, h, w) to logits (n, n_classes); h and w at least 9.
    """

    def __init__(
        self,
        n_classes,  # length of the output
        stem,  # channels of the first convolution, at full resolution; even, at most 24 where it is to whiten
        widths,  # channels of the stages, at 1/2, 1/4, 1/8 of the side
        depths=(1, 1, 1),  # convolutions in the residual block of each
        squeeze=True,  # whether the blocks end in a SqueezeExcite
    ):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 2), nn.SiLU())
        each = zip([stem, *widths[:-1]], widths, depths, strict=True)
        block = lambda a, b, depth: nn.Sequential(ConvPoolNorm(a, b, pool=True), Residual(b, depth, squeeze))
        self.stages = nn.Sequential(*(block(*args) for args in each))
        self.head = nn.Linear(widths[-1], n_classes)

    @torch.no_grad()
    def whiten(self, images, eps=5e-4):
        """Sets the first convolution from `images` (n, 3, h, w), normalised, and holds its weights there.

        Its outputs are then uncorrelated and of variance 1 on their 2 x 2 patches: eigenvectors of the patches'
        covariance, the largest first, over the roots of their eigenvalues (+ eps); then the negatives of the same
        (Page, How to train your ResNet; Jordan, arXiv 2404.00498).
        """
        conv, k = self.stem[0], self.stem[0].kernel_size[0]
        patches = images.as_subclass(torch.Tensor).cpu().double().unfold(2, k, 1).unfold(3, k, 1)
        patches = patches.movedim(1, 3).flatten(3).flatten(0, 2)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        vectors *= values > 1e-5 * values[-1]  # what no image has, such as colour in grey ones, is not looked at
        filters = (
            (vectors / (values + eps).sqrt()).T.flip(0)[: len(conv.weight) // 2].reshape(-1, *conv.weight[0].shape)
        )
        conv.weight.copy_(torch.cat([filters, -filters]))
        conv.bias.zero_()
        conv.weight.requires_grad_(False)

    def forward(self, x):
        x = self.stages(self.stem(x))
        # as Page's ResNet-9: the loss starts near ln(n_classes), the head learns as the rest
        return self.head(x.amax((2, 3))) * 0.125

    @property
    def early(self):
        """What learns in the first epochs alone: the bias of a whitening, whose gradient takes a tenth of a step."""
        conv = self.stem[0]
        return [] if conv.weight.requires_grad else [conv.bias]

    @property
    def cam_layer(self):
        """The layer GradCAM reads: the last whose map is a quarter of the image's side, 7 x 7 for 32 x 32."""
        return self.stages[1]


MOST = 65536  # of each number in a model.json
# name -> constructor(n_classes, **args), args
MODELS = {
    "small": (SmallResNet, dict(stem=12, widths=(16, 32, 64))),
    "medium": (SmallResNet, dict(stem=24, widths=(64, 128, 256), depths=(1, 2, 1), squeeze=False)),
    "large": (SmallResNet, dict(stem=24, widths=(64, 256, 256), depths=(2, 2, 1), squeeze=False)),
}


AUXILIARY = ("googlenet", "inception_v3")  # torchvision's with further heads for training, which are left out here


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


def pretrained_stats(config):
    """Mean and standard deviation a channel, in 0..1, of what the weights `--pretrained` were trained on: (3,) arrays.

    Of a run's weights they stand beside them, in model.json; of others they are those of torchvision's own.
    """
    import numpy as np

    card = Path(config.pretrained).expanduser().with_name("model.json")
    if config.pretrained != "torchvision" and card.exists():
        found = read_card(card)
        return np.array(found["mean"]), np.array(found["std"])
    if config.model in MODELS:
        raise BadInput(f"--pretrained: {card}, which a run writes beside its weights, is not there")
    if config.model in AUXILIARY:  # their weights expect 2 x - 1
        return np.full(3, 0.5), np.full(3, 0.5)
    from torchvision.models import get_model_weights

    transforms = get_model_weights(config.model).DEFAULT.transforms()
    return np.array(transforms.mean), np.array(transforms.std)


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


def check_batches(model, config, n, size, ranks=1):
    """Raises BadInput where a batch, or a rank's slice of it, would be one image that `model` cannot be trained on.

    BatchNorm needs two values a channel; a network that ends in maps of 1 x 1 has one in a batch of one image.
    """
    from lib.schedules import batch_sizes

    lone = lambda batch: 0 < n % batch < 2 * ranks or batch < 2 * ranks
    sizes = batch_sizes(config)
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


def read_card(path):
    """The content of a weights/model.json. Raises BadInput where it is damaged."""
    try:
        card = read_json(path)
        classes, size, numbers = card["classes"], card["size"], [*card["mean"], *card["std"]]
        if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
            raise ValueError("classes are not names")
        if len(classes) != card["args"]["n_classes"]:
            raise ValueError("as many classes as the network has outputs are needed")
        if type(size) is not int or not 0 < size <= 1024 or len(numbers) != 6 or not all(map(math.isfinite, numbers)):
            raise ValueError("size, mean or std are not what a run writes")
        return card
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as e:
        raise BadInput(f"{path}: is damaged ({one_line(e)})") from None


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


def pick_device(config):
    """`--device` as a torch.device. Raises BadInput where there is no such device."""
    from lib.runs import launched

    if config.device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if launched():  # each rank its own GPU, where there are enough
            local = int(os.environ["LOCAL_RANK"])
            return torch.device("cuda", local) if local < torch.cuda.device_count() else torch.device("cpu")
        return torch.device(kind)
    try:
        device = torch.device(config.device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device: {config.device!r} is not to be had on this machine; pass auto or cpu") from None
