"""The loss of training, which may smooth labels and weigh classes; in evaluation it is plain cross-entropy."""

import numpy as np
import torch
from fastai.losses import CrossEntropyLossFlat
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy


def class_weights(labels, n_classes):
    """n / (C n_c) for n images, n_c of them of class c of C: (C,) float32. Their mean over the images is 1."""
    return torch.tensor(compute_class_weight("balanced", classes=np.arange(n_classes), y=labels)).float()


class TrainingLoss(CrossEntropyLossFlat):
    """torch's cross-entropy. Its `label_smoothing` and class `weight` act only where gradients are computed."""

    def __call__(self, pred, target):
        if torch.is_grad_enabled():
            return self.func(pred, target)
        return cross_entropy(pred, target, reduction=self.reduction)
