"""Networks of our own, which need torch alone."""

import torch
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
