"""The loss of training, which may smooth labels and weigh classes; in evaluation it is plain cross-entropy."""

import torch
from fastai.losses import CrossEntropyLossFlat
from torch.nn.functional import cross_entropy


def class_weights(labels, n_classes):
    """n / (C n_c) for n images, n_c of them of class c of C: (C,) float32. Their mean over the images is 1."""
    counts = torch.bincount(torch.as_tensor(labels), minlength=n_classes)
    return (counts.sum() / (n_classes * counts)).float()


class TrainingLoss(CrossEntropyLossFlat):
    """Cross-entropy. Where gradients are computed, labels are smoothed and each image is weighed by its class.

    torch would weigh the smoothed share of a label by the classes that share goes to. Here an image has one weight.
    """

    def __init__(
        self,
        label_smoothing=0.0,  # share of a label that is spread over all classes
        weight=None,  # (classes,) weight of an image of each class; None: all alike
    ):
        super().__init__(label_smoothing=label_smoothing)
        self.weight = weight

    def __call__(self, pred, target, **kwargs):
        reduction, smoothing = self.func.reduction, self.func.label_smoothing * torch.is_grad_enabled()
        if self.weight is None or not torch.is_grad_enabled():
            return cross_entropy(pred, target, reduction=reduction, label_smoothing=smoothing)
        self.weight = self.weight.to(pred.device)
        weights = self.weight[target]
        losses = weights * cross_entropy(pred, target, reduction="none", label_smoothing=smoothing)
        return losses if reduction == "none" else losses.sum() / (weights.sum() if reduction == "mean" else 1)
