"""Networks. Needs torch alone, so that a trained one can be rebuilt anywhere."""

from torch import nn


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
    """x + f(x), f being `depth` convolutions of the same width (He et al., arXiv 1512.03385) and a SqueezeExcite."""

    def __init__(self, width, depth):
        super().__init__()
        self.body = nn.Sequential(*[ConvPoolNorm(width, width) for _ in range(depth)], SqueezeExcite(width))

    def forward(self, x):
        return x + self.body(x)


class SmallResNet(nn.Module):
    """A residual network for small images: a stem, then stages that each halve the side and add a residual block.

    Maps (n, 3, h, w) to logits (n, n_classes); h and w at least 8.
    """

    def __init__(
        self,
        n_classes,  # length of the output
        stem,  # channels of the first convolution, at full resolution
        widths,  # channels of the stages, at 1/2, 1/4, 1/8 of the side
        depth=1,  # convolutions in a residual block
    ):
        super().__init__()
        self.stem = ConvPoolNorm(3, stem)
        self.stages = nn.ModuleList(
            nn.Sequential(ConvPoolNorm(c_in, c_out, pool=True), Residual(c_out, depth))
            for c_in, c_out in zip([stem, *widths], widths)
        )
        self.head = nn.Linear(widths[-1], n_classes)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return (
            self.head(x.amax((2, 3))) * 0.125
        )  # as Page's ResNet-9: the loss starts near ln(n_classes), the head learns as the rest

    @property
    def cam_layer(self):
        """The layer GradCAM reads: the last whose map is a quarter of the image's side, 8 x 8 for 32 x 32."""
        return self.stages[1]


# name -> constructor(n_classes, **args), args; multiply-adds are those of a 32 x 32 image
MODELS = {
    "small": (SmallResNet, dict(stem=8, widths=(16, 32, 64))),
    "medium": (SmallResNet, dict(stem=16, widths=(48, 96, 256))),
    "large": (SmallResNet, dict(stem=24, widths=(64, 128, 256))),
}


def build(name, n_classes):
    """The network `name` with fresh weights. Its layer for GradCAM is `model.cam_layer`."""
    constructor, args = MODELS[name]
    return constructor(n_classes, **args)


def card(name, dls, resize_rule):
    """What rebuilds the trained network and feeds it: the content of weights/model.json."""
    return {
        "architecture": MODELS[name][0].__name__,
        "args": {"n_classes": len(dls.vocab), **MODELS[name][1]},
        "classes": list(dls.vocab),
        "size": dls.store.size,
        "mean": dls.mean.tolist(),
        "std": dls.std.tolist(),
        "resize": resize_rule,
    }


def rebuild(card):
    """The network that the content of weights/model.json describes, its weights still to be loaded."""
    constructors = {constructor.__name__: constructor for constructor, _ in MODELS.values()}
    return constructors[card["architecture"]](**card["args"])
