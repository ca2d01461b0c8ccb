"""What a learner learned: the range test's choice, test metrics, confusion, and its mistakes, explained."""

import base64
import math
import time

import numpy as np
import pandas as pd
import torch
from fastai.learner import before_batch_cb
from fastai.torch_core import to_device
from fastcore.basics import noop
from PIL import Image
from sklearn import metrics

from lib import models
from lib.cli import read_json
from lib.explain import gradcam, plots, scores
from lib.explain.scores import accuracy
from lib.machine import peak_rss_bytes
from lib.runs import data_uri, write, write_csv, write_figure, write_json, write_table
from lib.train import lr_range
from lib.train.progress import RangeTestLines

MISTAKE_COLUMNS = ("rank", "file", "truth", "prediction", "loss", "p_prediction", "p_truth")
CHOSEN_BY = {"valid_acc": "accuracy", "valid_loss": "loss", "macro_f1": "macro-F1"}
NOISY = 3  # a range test is trusted if its fall is at least so many times its noise
MAP_SIDE = 32  # of the maps in gallery.json


def outcome(learn, dl, mirror=False):
    """The model on every image of `dl`, in float32: (targets (n,), probabilities (n, classes), losses (n,)).

    With `mirror` it looks at the images turned left to right.
    """
    turn = before_batch_cb(lambda cb, xb, yb: (tuple(x.flip(3) for x in xb), yb))
    with learn.in_float32():
        logits, targets = learn.get_preds(dl=dl, act=noop, cbs=[turn] if mirror else None)
    log_p, targets = logits.double().log_softmax(1), targets.as_subclass(torch.Tensor)
    return targets.numpy(), log_p.exp().numpy(), -log_p.gather(1, targets[:, None])[:, 0].numpy()


def tta_accuracy(learn, dl, plain):
    """Accuracy on `dl` if logits are averaged over each image and its mirror image. `plain` is the outcome on `dl`.

    Test-time augmentation as in Jordan, arXiv 2404.00498; fastai's `learn.tta` takes the augmentations of training.
    """
    targets, p, _ = outcome(learn, dl, mirror=True)
    return accuracy(targets, p * plain[1])  # a product of probabilities is largest where the mean of logits is


def mistakes(learn, k=None, on_test=None):
    """The misclassified test images, worst first, as rows of mistakes.csv: at most `k`, or all.

    `on_test` is the outcome on test, where there is one already.
    """
    targets, p, losses = on_test or outcome(learn, learn.dls.test)
    predictions, names, vocab = p.argmax(1), learn.dls.store.names, learn.dls.vocab
    worst_first = [i for i in np.argsort(-losses, kind="stable") if predictions[i] != targets[i]]
    rows = []
    for rank, i in enumerate(worst_first[:k], 1):
        truth, prediction = targets[i], predictions[i]
        numbers = map(float, (losses[i], p[i, prediction], p[i, truth]))
        row = (rank, names[learn.dls.test.ids[i]], vocab[truth], vocab[prediction], *numbers)
        rows.append(dict(zip(MISTAKE_COLUMNS, row)))
    return rows


def explain(learn, rows, method="gradcam"):
    """Rows of mistakes.csv as (images (n, h, w, 3) uint8, maps for the prediction, maps for the truth (n, h, w))."""
    dl, store, vocab = learn.dls.test, learn.dls.store, list(learn.dls.vocab)
    place = {store.names[number]: i for i, number in enumerate(dl.ids)}
    batch = dl.make_batch([place[row["file"]] for row in rows])
    images = batch[0].permute(0, 2, 3, 1).numpy()
    x = dl.after_batch(to_device(batch, learn.device))[0]
    layer = models.cam_layer(learn.model, store.size)
    targets = [[vocab.index(row[column]) for row in rows] for column in ("prediction", "truth")]
    return images, *(gradcam.maps(learn.model, layer, x, each, method=method) for each in targets)


def pictured(rows, gallery, most=100):
    """The rows of mistakes.csv, by rank, that report.html has pictures of.

    They are the worst `gallery`, then the worst of each confusion, its second worst and so on: `most` in all.
    """
    if not (gallery and rows):
        return []
    turns = pd.DataFrame(rows).groupby(["truth", "prediction"]).cumcount()
    turns[:gallery] = -1
    return [rows[i] for i in sorted(turns.sort_values(kind="stable").index[:most])]


def save_gallery(run, rows, images, why, where):
    """Writes gallery.json for report.html: {file: picture as a data URI, and both maps, a byte a point, in base64}."""

    def picture(image):
        image = Image.fromarray(image)
        image.thumbnail((160, 160))
        return data_uri(image, "png" if max(image.size) <= 64 else "jpeg")  # JPEG blurs what is shown pixel by pixel

    def small(cam):
        shares = np.asarray(Image.fromarray(cam).resize((MAP_SIDE, MAP_SIDE), Image.Resampling.BOX)).clip(0, 1)
        return base64.b64encode((255 * shares).round().astype(np.uint8).tobytes()).decode()

    each = zip(rows, images, why, where)
    found = {row["file"]: dict(image=picture(image), why=small(a), where=small(b)) for row, image, a, b in each}
    write_json(run / "gallery.json", found)


def save_train_batch(learn, run, most=32):
    """Writes train_batch.png: the first images of training as augmentation feeds them to the network."""
    dl = learn.dls.train
    x, y = dl.make_batch(dl.get_idxs()[:most])
    title = "What the network is fed: the first training images, augmented"
    labels = [learn.dls.vocab[int(i)] for i in y]
    write_figure(run / "train_batch.png", plots.train_batch(x.permute(0, 2, 3, 1).numpy(), labels, title))


def range_test(learn, config, run):
    """Runs the range test and writes lr_find.csv and lr_find.png.

    Returns the rate that `--lr-suggest` names, and the seconds of an update: None on valid, which adds evaluations.
    """
    linear, on_valid = config.lr_scale == "linear", config.lr_find_on == "valid"
    print(f"range test: up to {config.lr_iters} batches, at growing rates …", flush=True)
    lines = RangeTestLines(config.lr_iters, config.progress)
    options = dict(linear=linear, on_valid=on_valid, on_update=lines.after_update)
    with lines.tqdm:
        test = lr_range.find(learn, 1e-5, config.lr_high, config.lr_iters, **options)
    suggestions, curves = test.suggestions, (test.lrs, test.losses, test.smooth_losses)
    write_table(run / "lr_find.csv", ("lr", "loss", "smooth_loss"), zip(*(curve.tolist() for curve in curves)))
    title, loss = f"Learning rate range test: {run.path.name}", "valid loss" if on_valid else "training loss"
    figure = plots.lr_find(*curves, suggestions, config.lr_suggest, title, linear, loss)
    write_figure(run / "lr_find.png", figure)
    lr, rates = suggestions[config.lr_suggest], ", ".join(f"{name} {rate:.3g}" for name, rate in suggestions.items())
    passes = f", in {test.epochs} passes over the training images" if test.epochs > 1 else ""
    print(f"range test: {len(test.lrs)} batches{passes}: {rates}; {config.lr_suggest} is used: lr {lr:.3g}", flush=True)
    if test.fall < NOISY * test.noise:
        little = f"its fall, {test.fall:.2g}, is little against its noise, {test.noise:.2g}: the rate is a rough guess"
        print(f"range test: {little}; more --lr-iters or --lr with a number make it surer", flush=True)
    if len(test.lrs) == test.num_it and test.smooth_losses.argmin() >= 0.9 * test.num_it:
        print("range test: the loss still falls at the highest rates; a larger --lr-high makes it surer", flush=True)
    run.note(lr_suggestions=suggestions)
    return lr, None if on_valid else test.step_seconds


def same_test(run, tested):
    """Copies the range test of the run folder `tested`, which has the same weights and settings.

    Returns (rate, None), as `range_test`; None if `tested` had other images.
    """
    env = read_json(tested / "env.json")
    if env["data_fingerprint"] != run.env["data_fingerprint"]:
        return None
    for name in ("lr_find.csv", "lr_find.png"):
        write(run / name, (tested / name).read_bytes())
    run.note(lr_suggestions=env["lr_suggestions"])
    print(f"range test: that of {tested.name}: lr {env['lr']:.3g}", flush=True)
    return env["lr"], None


def optimizer_state_bytes(opt):
    """Bytes of the tensors that a torch optimizer keeps beside the weights."""
    return sum(t.nbytes for state in opt.state.values() for t in state.values() if torch.is_tensor(t))


def summarize(config, env, rows, best_epoch, valid, test, opt, tta):
    """The content of summary.json; `valid` and `test` are outcomes of the kept weights, `tta` their `tta_accuracy`."""
    reached = next((row for row in rows if row["test_acc"] >= config.target), None) if config.target else None
    return {
        "test_acc": accuracy(*test[:2]), "valid_acc": accuracy(*valid[:2]),
        "tta_test_acc": tta[1], "tta_valid_acc": tta[0],
        "test_loss": float(test[2].mean()), "valid_loss": float(valid[2].mean()), **scores.overall(*test[:2]),
        "chosen_on": env["chosen_on"], "chosen_by": CHOSEN_BY[config.keep], "best_epoch": best_epoch,
        "last_test_acc": rows[-1]["test_acc"],
        "mistakes": int((test[1].argmax(1) != test[0]).sum()), "lr": env["lr"], "epochs": rows[-1]["epoch"],
        "target": config.target,
        "epochs_to_target": reached and reached["epoch"], "seconds_to_target": reached and reached["seconds"],
        "train_seconds": rows[-1]["seconds"],
        "images_per_second": len(rows) * env["images"]["train"] / rows[-1]["seconds"],
        "params": env["params"],
        "optimizer_state_bytes": optimizer_state_bytes(opt), "peak_rss_bytes": peak_rss_bytes(),
    }  # fmt: skip


def save_results(learn, config, run, rows, best_epoch, title):
    """Writes results.png."""
    steps = [math.ceil(len(learn.dls.train.dataset) / row["batch_size"]) for row in rows]
    places = [row["epoch"] - 0.5 + np.arange(n) / n for row, n in zip(rows, steps)]  # the epoch's mark is in the middle
    rates = np.column_stack([np.concatenate(places), *learn.recorder.hps.values()])
    plateaus, averaged = config.schedule in ("plateau", "grow_batch"), config.ema > 0
    options = dict(plateaus=plateaus, label_smoothing=config.label_smoothing, averaged=averaged)
    shown = (config.target, best_epoch, run.env["chosen_on"], CHOSEN_BY[config.keep], rates)
    write_figure(run / "results.png", plots.results(rows, title, *shown, **options))


def save_confusion(run, test, classes, title):
    """Writes confusion_matrix.csv and confusion_matrix.png of an outcome on test."""
    counts = metrics.confusion_matrix(test[0], test[1].argmax(1), labels=range(len(classes)))
    table = [[name, *row] for name, row in zip(classes, counts.tolist())]
    write_table(run / "confusion_matrix.csv", ["truth", *classes], table)
    write_figure(run / "confusion_matrix.png", plots.confusion_matrix(counts, classes, title))


def save_mistakes(learn, config, run, test, images_of_test):
    """Writes mistakes.csv, gallery.json and gradcam.png of an outcome on test."""
    wrong = mistakes(learn, None, test)
    write_csv(run / "mistakes.csv", wrong, MISTAKE_COLUMNS)
    n, shown = min(config.gallery, len(wrong)), pictured(wrong, config.gallery)
    pictures = explain(learn, shown, config.cam) if shown else ([], [], [])
    save_gallery(run, shown, *pictures)
    if n:
        which = "All" if n == len(wrong) else "The worst"
        title = f"{run.path.name}: {which} {n} of {len(wrong)} mistakes on {images_of_test}"
        write_figure(run / "gradcam.png", plots.gradcam(*(each[:n] for each in pictures), wrong[:n], title))


def report(learn, config, run, rows, best, start, began):
    """Summary, confusion, mistakes and figures of the kept weights (`best`: a KeepBest), evaluated once in float32.

    `start` and `began` are when the run and its training began, as `time.perf_counter` has it.
    """
    trained, load = time.perf_counter(), learn.share_cores.other_load  # now: the evaluations below set it anew
    learn.model.load_state_dict(best.state)
    valid, test, tta = outcome(learn, learn.dls.valid), outcome(learn, learn.dls.test), [None, None]
    if learn.dls.augment.mirrors:
        tta = [tta_accuracy(learn, learn.dls.valid, valid), tta_accuracy(learn, learn.dls.test, test)]
    summary = summarize(config, run.env, rows, best.epoch_number, valid, test, learn.opt.opt, tta)
    title = f"{run.path.name}: {summary['test_acc']:.2%} of the test images right"
    also = "" if run.env["chosen_on"] == "valid" else ", which also chose the weights"
    images_of_test = f"{len(test[0]):,} test images{also}"
    save_results(learn, config, run, rows, best.epoch_number, title)
    write_csv(run / "classes.csv", scores.of_classes(*test[:2], list(learn.dls.vocab)))
    write_csv(run / "calibration.csv", scores.reliability(*test[:2]))
    save_confusion(run, test, list(learn.dls.vocab), f"{title}\n{images_of_test}")
    save_mistakes(learn, config, run, test, images_of_test)
    end = time.perf_counter()
    seconds = {"start_seconds": began - start, "end_seconds": end - trained, "total_seconds": end - start}
    summary |= {"other_load": load, **seconds}
    write_json(run / "summary.json", summary)  # last: it says that all is there
