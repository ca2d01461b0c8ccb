"""What a learner learned: the range test's choice, test metrics, confusion, and its mistakes, explained."""

import base64
import dataclasses
import io
from collections import Counter

import numpy as np
import torch
from PIL import Image

from lib import models
from lib.data.decode import centre
from lib.explain import gradcam, plots
from lib.machine import peak_rss_bytes
from lib.runs import write_csv, write_figure, write_json, write_table
from lib.train import schedules

MISTAKE_COLUMNS = ("rank", "file", "truth", "prediction", "loss", "p_prediction", "p_truth")


def outcome(learn, dl, mirror=False):
    """The model on every image of `dl`, in float32: (targets (n,), probabilities (n, classes), losses (n,)).

    With `mirror` on the images turned left to right.
    """
    logits, targets = zip(*[(z.cpu(), y.cpu()) for _, z, y in learn.logits(dl, mirror=mirror)])
    log_p = torch.cat(logits).double().log_softmax(1)
    targets = torch.cat(targets)
    return targets.numpy(), log_p.exp().numpy(), -log_p.gather(1, targets[:, None])[:, 0].numpy()


def tta_accuracy(learn, dl, found):
    """Accuracy on `dl` of the mean of the logits of each image (`found`: their outcome) and of its mirror image.

    Test-time augmentation as Jordan has it, arXiv 2404.00498; fastai's `learn.tta` takes training's augmentations.
    """
    targets, p, _ = outcome(learn, dl, mirror=True)
    return float(((p * found[1]).argmax(1) == targets).mean())  # a product of probabilities is largest where logits are


def mistakes(learn, k=None, found=None):
    """The misclassified test images, worst first, as rows of mistakes.csv: at most `k`, or all.

    Ranked by loss with fastai's ClassificationInterpretation, which lists correct predictions too: those are left out.
    `found` is an `outcome` on test, where there is one already.
    """
    from fastai.interpret import ClassificationInterpretation

    dl = learn.dls.test
    targets, p, losses = found or outcome(learn, dl)
    predictions, names, vocab, rows = p.argmax(1), learn.dls.store.names, learn.dls.vocab, []
    for i in ClassificationInterpretation(learn, dl, torch.from_numpy(losses)).top_losses()[1].tolist():
        truth, taken = targets[i], predictions[i]
        if taken != truth and (k is None or len(rows) < k):
            numbers = map(float, (losses[i], p[i, taken], p[i, truth]))
            row = len(rows) + 1, names[dl.ids[i]], vocab[truth], vocab[taken], *numbers
            rows.append(dict(zip(MISTAKE_COLUMNS, row)))
    return rows


def explain(learn, rows):
    """Rows of mistakes.csv as (images (n, h, w, 3) uint8, maps for the prediction, maps for the truth (n, h, w))."""
    dl, store, vocab = learn.dls.test, learn.dls.store, list(learn.dls.vocab)
    number = {store.names[known]: i for i, known in enumerate(dl.ids)}
    at = [number[row["file"]] for row in rows]
    x = dl.after_batch(learn._set_device(dl.do_batch(at)))[0]
    layer = models.cam_layer(learn.model, store.size)
    maps = lambda what: gradcam.maps(learn.model, layer, x, [vocab.index(row[what]) for row in rows])
    return np.stack([centre(store[dl.ids[i]], store.size) for i in at]), maps("prediction"), maps("truth")


def pictured(rows, gallery, most=100):
    """Rows of mistakes.csv that report.html has pictures of: the worst `gallery`, then the worst of each confusion,
    its second worst and so on: `most` in all, by rank."""
    seen, others = Counter(), []
    for row in rows:
        pair = row["truth"], row["prediction"]
        seen[pair] += 1
        if row["rank"] > gallery:
            others.append((seen[pair], row["rank"], row))
    others = [row for *_, row in sorted(others, key=lambda other: other[:2])]
    return sorted(rows[:gallery] + others[: max(most - gallery, 0) if gallery else 0], key=lambda row: row["rank"])


def save_gallery(run, rows, images, why, where):
    """Writes gallery.json: {file: picture as a data URI, and both maps, 32 x 32 bytes in base64}, for report.html."""
    text = lambda content: base64.b64encode(content).decode()
    grey = lambda cam: np.asarray(Image.fromarray(cam).resize((32, 32), Image.Resampling.BOX)).clip(0, 1)

    def uri(image):
        image, file = Image.fromarray(image), io.BytesIO()
        image.thumbnail((160, 160))
        kind = "png" if max(image.size) <= 64 else "jpeg"  # which would blur what is shown pixel by pixel
        image.save(file, kind, quality=85)
        return f"data:image/{kind};base64,{text(file.getvalue())}"

    found = {}
    for row, image, *cams in zip(rows, images, why, where):
        maps = [text((255 * grey(cam)).round().astype(np.uint8).tobytes()) for cam in cams]
        found[row["file"]] = dict(zip(("image", "why", "where"), [uri(image), *maps]))
    write_json(run / "gallery.json", found)


def save_train_batch(learn, config, run, most=32):
    """Writes train_batch.png: the first images of training as augmentation feeds them to the network."""
    dl = learn.dls.train
    at = dl.get_idxs()[:most]
    x, y = dl.do_batch(at)
    labels = [learn.dls.vocab[int(i)] for i in y]
    title = "What the network is fed: the first training images, augmented"
    if config.small_epochs:
        title += f"\n(until epoch {config.small_epochs} at {learn.side} x {learn.side} pixels)"
    write_figure(run / "train_batch.png", plots.train_batch(x.permute(0, 2, 3, 1).numpy(), labels, title))


def range_test(learn, config, run):
    """Runs the range test, writes lr_find.csv and lr_find.png, and returns the rate that `--lr-suggest` names."""
    linear, on_valid = config.lr_scale == "linear", config.lr_find_on == "valid"
    found = learn.lr_find(1e-5, config.lr_high, config.lr_iters, linear=linear, on_valid=on_valid)
    lr, curves = found.suggestions[config.lr_suggest], (found.lrs, found.losses, found.smooth_losses)
    write_table(run / "lr_find.csv", ("lr", "loss", "smooth_loss"), zip(*(curve.tolist() for curve in curves)))
    title, what = f"Learning rate range test: {run.path.name}", "valid loss" if on_valid else "training loss"
    figure = plots.lr_find(*curves, found.suggestions, config.lr_suggest, title, linear, what)
    write_figure(run / "lr_find.png", figure)
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in found.suggestions.items())
    more = f", in {found.epochs} passes over the training images" if found.epochs > 1 else ""
    print(f"range test: {len(found.lrs)} batches{more}: {rates}; {config.lr_suggest} is used: lr {lr:.3g}", flush=True)
    run.note(lr_suggestions=found.suggestions)
    return lr


def optimizer_state_bytes(opt):
    """Bytes of the tensors that a torch optimizer keeps beside the weights."""
    return sum(t.nbytes for state in opt.state.values() for t in state.values() if torch.is_tensor(t))


def summarize(config, env, rows, best_epoch, valid, test, opt, tta):
    """The content of summary.json; `valid` and `test` are outcomes of the kept weights, `tta` their `tta_accuracy`."""
    reached = next((row for row in rows if row["test_acc"] >= config.target), None)
    acc = lambda found: float((found[1].argmax(1) == found[0]).mean())
    return {
        "test_acc": acc(test),
        "valid_acc": acc(valid),
        "tta_test_acc": tta[1],
        "tta_valid_acc": tta[0],
        "test_loss": float(test[2].mean()),
        "valid_loss": float(valid[2].mean()),
        "chosen_on": env["chosen_on"],
        "best_epoch": best_epoch,
        "last_test_acc": rows[-1]["test_acc"],
        "mistakes": int((test[1].argmax(1) != test[0]).sum()),
        "lr": env["lr"],
        "epochs": rows[-1]["epoch"],
        "target": config.target,
        "epochs_to_target": reached and reached["epoch"],
        "seconds_to_target": reached and reached["seconds"],
        "train_seconds": rows[-1]["seconds"],
        "images_per_second": len(rows) * env["images"]["train"] / rows[-1]["seconds"],
        "params": env["params"],
        "optimizer_state_bytes": optimizer_state_bytes(opt),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def report(learn, config, run, rows, best):
    """Summary, confusion, mistakes and figures of the kept weights (`best`: a KeepBest), evaluated once in float32."""
    learn.model.load_state_dict(best.state)
    dls = learn.dls.valid, learn.dls.test
    valid, test = found = [outcome(learn, dl) for dl in dls]
    tta = [tta_accuracy(learn, *of) for of in zip(dls, found)] if config.flip else [None, None]
    classes, run_name = list(learn.dls.vocab), run.path.name
    summary = summarize(config, run.env, rows, best.epoch_number, valid, test, learn.opt.opt, tta)
    chosen_on = run.env["chosen_on"]
    title = f"{run_name}: {summary['test_acc']:.2%} of the test images right"
    values = [row[config.monitor] for row in rows]
    steps = len(learn.dls.train)
    trace = schedules.trace(dataclasses.replace(config, lr=run.env["lr"]), steps, values)[: steps * len(rows)]
    plateaus = config.schedule in ("plateau", "grow_batch")
    small = (config.small_epochs, models.small_side(learn.dls.store.size)) if config.small_epochs else None
    shown = (config.target, best.epoch_number, chosen_on, trace, plateaus, config.label_smoothing, config.ema > 0)
    write_figure(run / "results.png", plots.results(rows, title, *shown, small))
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (test[0], test[1].argmax(1)), 1)
    table = [[name, *row] for name, row in zip(classes, counts.tolist())]
    write_table(run / "confusion_matrix.csv", ["truth", *classes], table)
    noted = "" if chosen_on == "valid" else ", which also chose the weights"
    figure = plots.confusion_matrix(counts, classes, f"{title}\n{test[0].size:,} test images{noted}")
    write_figure(run / "confusion_matrix.png", figure)

    wrong = mistakes(learn, None, test)
    write_csv(run / "mistakes.csv", wrong, MISTAKE_COLUMNS)
    top, shown = wrong[: config.gallery], pictured(wrong, config.gallery)
    images, *maps = explain(learn, shown) if shown else ([], [], [])
    save_gallery(run, shown, images, *maps)
    if top:
        which = "All" if len(top) == len(wrong) else "The worst"
        heading = f"{run_name}: {which} {len(top)} of {len(wrong)} mistakes on {test[0].size:,} test images{noted}"
        pictures = (found[: len(top)] for found in (images, *maps))
        write_figure(run / "gradcam.png", plots.gradcam(*pictures, top, heading))
    write_json(run / "summary.json", summary)  # last: it says that all is there
    print(closing(summary, len(top), run.path), flush=True)


def closing(s, shown, path):
    """The result in three lines and where to look."""
    chosen = "" if s["chosen_on"] == "valid" else " (test chose the weights: no held-out set)"
    epochs, seconds = s["epochs_to_target"], s["seconds_to_target"]
    when = f"reached after {epochs} epochs, {seconds:.0f} s" if epochs else "not reached"
    tta = "" if s["tta_test_acc"] is None else f"; with each image's mirror image (tta) {s['tta_test_acc']:.4f}"
    mistakes = f"{shown} of {s['mistakes']} mistakes explained" if s["mistakes"] else "no mistakes, so none to explain"
    return (
        f"test accuracy {s['test_acc']:.4f} with the weights of epoch {s['best_epoch']}, the best by {s['chosen_on']} "
        f"accuracy ({s['valid_acc']:.4f}){chosen}{tta}\n"
        f"target {s['target']:g} of test accuracy {when}; {s['epochs']} epochs in {s['train_seconds']:.0f} s, "
        f"{s['images_per_second']:.0f} images/s\n"
        f"{mistakes}; open {path / 'report.html'}"
    )
