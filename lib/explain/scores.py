"""The numbers of a classifier on a set of images: of each class, over classes, and of its probabilities."""

import numpy as np
from sklearn import metrics

TOP_5 = 20  # classes from which top-5 accuracy says something
CLASS_COLUMNS = ("class", "precision", "recall", "f1", "images")
BIN_COLUMNS = ("from", "to", "images", "confidence", "accuracy")


def accuracy(targets, p):
    """The share of images whose most probable class, by `p` (n, classes), is their target."""
    return float((p.argmax(1) == targets).mean())


def of_classes(targets, p, classes):
    """Precision, recall, F1 and images of each class, as rows of classes.csv. What cannot be told is 0."""
    numbers = metrics.precision_recall_fscore_support(targets, p.argmax(1), labels=range(len(classes)), zero_division=0)
    return [dict(zip(CLASS_COLUMNS, row)) for row in zip(classes, *(column.tolist() for column in numbers))]


def reliability(targets, p, bins=15):
    """Mean confidence and accuracy of the images in each bin of confidence, as rows of calibration.csv.

    Confidence is the probability of the prediction. Empty bins are left out (Guo et al., arXiv 1706.04599).
    """
    confidence, right = p.max(1), p.argmax(1) == targets
    place = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1).astype(int)
    rows = []
    for i in np.unique(place):
        inside = place == i
        means = float(confidence[inside].mean()), float(right[inside].mean())
        rows.append(dict(zip(BIN_COLUMNS, (i / bins, (i + 1) / bins, int(inside.sum()), *means))))
    return rows


def calibration_error(rows):
    """Expected calibration error (eq. 3) of rows of `reliability`: mean |accuracy - confidence| over the images."""
    return sum(r["images"] * abs(r["accuracy"] - r["confidence"]) for r in rows) / sum(r["images"] for r in rows)


def overall(targets, p):
    """{macro_f1, balanced_acc, calibration_error, top5_acc}; the last is None below 20 classes."""
    predictions, classes = p.argmax(1), range(p.shape[1])
    there = dict(labels=np.unique(targets), average="macro")  # a class without images has no recall
    return {
        "macro_f1": float(metrics.f1_score(targets, predictions, average="macro", zero_division=0)),
        "balanced_acc": float(metrics.recall_score(targets, predictions, **there)),
        "calibration_error": calibration_error(reliability(targets, p)),
        "top5_acc": metrics.top_k_accuracy_score(targets, p, k=5, labels=classes) if len(classes) >= TOP_5 else None,
    }
