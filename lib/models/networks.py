"""Networks of our own, which need torch alone."""

import torch
from torch import nn


class ConvPoolNorm(nn.Sequential):
    """3 x 3 convolution, 2 x 2 max pooling where asked for, BatchNorm, SiLU.

    Pooling before the norm leaves it a quarter of the work (Jordan, arXiv 2404.00498).
    """

    def __init__(self, c_in, c_out, pool=False):
        pooling = [nn.MaxPool2d(2)] if pool else []
        super().__init__(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), *pooling, nn.BatchNorm2d(c_out), nn.SiLU())


class SqueezeExcite(nn.Module):
    """Scales each channel by a function of all channels' means (Hu et al., arXiv 1709.01507)."""

    def __init__(self, width, reduction=4):
        super().__init__()
        hidden = max(width // reduction, 1)
        self.scale = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, x):
        return x * self.scale(x.mean((2, 3)))[:, :, None, None]


class Residual(nn.Module):
    """x + f(x), where f is `depth` convolutions, then a SqueezeExcite if asked for (He et al., arXiv 1512.03385)."""

    def __init__(self, width, depth, squeeze):
        super().__init__()
        layers = [ConvPoolNorm(width, width) for _ in range(depth)]
        self.body = nn.Sequential(*layers, *([SqueezeExcite(width)] if squeeze else []))

    def forward(self, x):
        return x + self.body(x)


class SmallResNet(nn.Module):
    """A residual network for small images: a stem, then stages that each halve the side and add a residual block.

    Maps (n, 3, h, w) to logits (n, n_classes); h and w are at least 9.
    """

    def __init__(
        self,
        n_classes,  # length of the output
        stem,  # channels of the first convolution; to whiten, even and at most 24: a 2 x 2 patch has 12 numbers
        widths,  # channels of the stages, at 1/2, 1/4, 1/8 of the side
        depths=(1, 1, 1),  # convolutions in the residual block of each stage
        squeeze=True,  # whether the blocks end in a SqueezeExcite
    ):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 2), nn.SiLU())
        self.stages = nn.Sequential()
        for c_in, c_out, depth in zip([stem, *widths[:-1]], widths, depths, strict=True):
            self.stages.append(nn.Sequential(ConvPoolNorm(c_in, c_out, pool=True), Residual(c_out, depth, squeeze)))
        self.head = nn.Linear(widths[-1], n_classes)

    @torch.no_grad()
    def whiten(self, images, eps=5e-4):
        """Sets the first convolution from normalised `images` (n, 3, h, w). Its weight becomes a buffer: it is fixed.

        The first half of its filters are eigenvectors of the second moments of the images' patches, largest eigenvalue
        first, each divided by the square root of eigenvalue + eps. So on these patches each of their outputs has a mean
        square of 1, and the product of any two has a mean of 0. The second half are the negatives of the first (Page,
        How to train your ResNet; Jordan, arXiv 2404.00498).
        """
        conv = self.stem[0]
        moment = 0
        for part in images.as_subclass(torch.Tensor).cpu().split(256):  # the patches of all fill too much memory
            patches = nn.functional.unfold(part.double(), conv.kernel_size).movedim(1, 2).flatten(0, 1)
            moment = moment + patches.T @ patches / len(patches) * (len(part) / len(images))
        values, vectors = torch.linalg.eigh(moment)
        vectors *= values > 1e-5 * values[-1]  # directions that no image has, such as colour in grey ones, are ignored
        filters = (vectors / (values + eps).sqrt()).T.flip(0)[: conv.out_channels // 2]
        weight = torch.cat([filters, -filters]).reshape(conv.weight.shape).to(conv.weight)
        del conv.weight
        conv.register_buffer("weight", weight)
        conv.bias.zero_()

    def forward(self, x):
        x = self.stages(self.stem(x))
        # as in Page's ResNet-9: the loss starts near ln(n_classes), and the head learns at the pace of the rest
        return self.head(x.amax((2, 3))) * 0.125

    @property
    def early(self):
        """Parameters that learn in the first epochs alone: the bias of a whitening stem, which is soon settled."""
        return [] if isinstance(self.stem[0].weight, nn.Parameter) else [self.stem[0].bias]

    @property
    def cam_layer(self):
        """The layer GradCAM reads: the last whose map is a quarter of the image's side, 7 x 7 for 32 x 32."""
        return self.stages[1]
