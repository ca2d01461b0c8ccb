import csv
import json
import math

import albumentations as A
import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch.nn import functional as F

from lib import runs
from lib.explain import evaluate, plots
from lib.models import zoo
from lib.train import averaging
from tests.conftest import logits_of, state_of


def outcome_with(learn, wrong):
    """An outcome on test with `wrong` mistakes of different losses."""
    n, c = len(learn.dls.test.ids), len(learn.dls.vocab)
    targets, p = learn.dls.test.labels, np.full((n, c), 0.01)
    for i, t in enumerate(targets):
        sure = 0.5 + 0.4 * i / n
        p[i, (t + 1) % c if i < wrong else t] = sure
    p /= p.sum(1, keepdims=True)
    return targets, p, -np.log(p[np.arange(n), targets])


@pytest.mark.parametrize("wrong", [0, 3, 24])
@pytest.mark.parametrize("k", [None, 5])
def test_mistakes_are_all_wrong_and_worst_first(make, wrong, k):
    _, learn = make()
    found = outcome_with(learn, wrong)
    rows = evaluate.mistakes(learn, k, found)
    assert len(rows) == min(wrong, k or wrong)
    assert all(row["truth"] != row["prediction"] and row["p_truth"] < row["p_prediction"] for row in rows)
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)


def test_mistakes_describe_their_files(make):
    """Each row against the network itself, on the file that the row names."""
    _, learn = make()
    learn.fit(1, 0.02)
    before, (logits, targets) = state_of(learn), logits_of(learn, learn.dls.test)
    rows = evaluate.mistakes(learn)
    assert state_of(learn) == before
    vocab, store = list(learn.dls.vocab), learn.dls.store
    assert len(rows) == int((logits.argmax(1) != targets).sum()) > 0
    mean, std = (torch.tensor(v).view(3, 1, 1).float() for v in (learn.dls.mean, learn.dls.std))
    learn.model.eval()
    for row in rows[:10]:
        assert row["file"].startswith(row["truth"] + "/")
        x = torch.tensor(store[store.names.index(row["file"])]).permute(2, 0, 1) / 255
        with torch.no_grad():
            p = learn.model(((x - mean) / std)[None]).softmax(1)[0]
        assert vocab[p.argmax()] == row["prediction"]
        assert p.max().item() == pytest.approx(row["p_prediction"], rel=1e-4)
        assert p[vocab.index(row["truth"])].item() == pytest.approx(row["p_truth"], rel=1e-3)
        assert row["loss"] == pytest.approx(-np.log(row["p_truth"]), rel=1e-6)


@pytest.mark.parametrize("wrong", [0, 3, 24])
def test_the_report_handles_any_number_of_mistakes(make, tmp_path, monkeypatch, wrong):
    config, learn = make("--out", tmp_path, "--gallery", 10, "--lr", 0.05)
    best = averaging.KeepBest()
    learn.fit(1, 0.05, cbs=best)
    run = runs.start(config, images={"train": 88}, chosen_on="valid", lr=0.05, params=1)
    monkeypatch.setattr(evaluate, "outcome", lambda learn, dl, mirror=False: outcome_with(learn, wrong))
    learn.dls.loaders[1] = learn.dls.valid = learn.dls.test
    shown = []
    draw = plots.gradcam
    monkeypatch.setattr(plots, "gradcam", lambda *args: shown.append(len(args[0])) or draw(*args))
    evaluate.report(learn, config, run, learn.recorder.rows, best, 0.0, 0.0)
    rows = list(csv.DictReader(open(run / "mistakes.csv")))
    assert len(rows) == wrong and shown == ([min(10, wrong)] if wrong else [])
    assert (run / "gradcam.png").exists() == bool(wrong)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["mistakes"] == wrong and summary["test_acc"] == pytest.approx(1 - wrong / 24)


def test_the_summary_is_of_the_kept_weights(make):
    config, learn = make("--epochs", 3, "--target", 0.3)
    best = averaging.KeepBest()
    learn.fit(3, 0.05, cbs=best)
    learn.model.load_state_dict(best.state)
    with learn.in_float32():
        evaluation = learn.evaluate(learn.dls.valid)
    loss, acc = evaluation.values[0], evaluation.accuracy
    valid, test = (evaluate.outcome(learn, dl) for dl in (learn.dls.valid, learn.dls.test))
    env = dict(chosen_on="valid", lr=0.05, params=9, images=dict(train=88))
    s = evaluate.summarize(config, env, learn.recorder.rows, best.epoch_number, valid, test, learn.opt.opt, [0.5, 0.25])
    assert (s["valid_acc"], s["valid_loss"]) == (pytest.approx(acc), pytest.approx(loss, rel=1e-5))
    assert (s["tta_valid_acc"], s["tta_test_acc"]) == (0.5, 0.25)
    assert s["valid_acc"] == max(row["valid_acc"] for row in learn.recorder.rows)
    first = next(row for row in learn.recorder.rows if row["test_acc"] >= 0.3)
    assert (s["epochs_to_target"], s["seconds_to_target"]) == (first["epoch"], first["seconds"])
    weights = sum(p.numel() for p in learn.model.parameters() if p.requires_grad)
    assert s["optimizer_state_bytes"] == 4 * weights and s["peak_rss_bytes"] > 1e8
    assert valid[2].mean() == pytest.approx(F.nll_loss(torch.tensor(valid[1]).log(), torch.tensor(valid[0])).item())


def test_accuracy_with_mirror_images_is_of_the_mean_of_the_logits(make):
    _, learn = make()
    dl, side = learn.dls.test, learn.dls.store.size
    torch.manual_seed(1)  # with which the mean and the image alone differ in accuracy
    learn.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * side**2, len(learn.dls.vocab)))
    right = alone = n = 0
    for x, y in dl:
        with torch.no_grad():
            z, turned = learn.model(x), learn.model(x[..., torch.arange(side - 1, -1, -1)])
        right, alone, n = right + ((z + turned).argmax(1) == y).sum(), alone + (z.argmax(1) == y).sum(), n + len(y)
    seen = evaluate.tta_accuracy(learn, dl, evaluate.outcome(learn, dl))
    assert seen == pytest.approx(float(right) / n) != pytest.approx(float(alone) / n)


@pytest.mark.parametrize(
    "options, mirrors",
    [([], True), (["--no-flip"], False), (["--augment", "none"], False), (["--no-flip", None], True)],
)
def test_mirror_images_are_looked_at_where_training_had_them(make, tmp_path, options, mirrors):
    if None in options:
        A.save(A.Compose([A.OneOf([A.HorizontalFlip(), A.RandomGamma()])]), tmp_path / "own.yaml", "yaml")
        options = ["--no-flip", "--augment", tmp_path / "own.yaml"]
    config, learn = make("--out", tmp_path, "--gallery", 0, *options)
    assert zoo.card("small", learn.dls)["flip"] is mirrors
    best = averaging.KeepBest()
    learn.fit(1, 0.02, cbs=best)
    run = runs.start(config, images={"train": 88}, chosen_on="valid", lr=0.02, params=1)
    evaluate.report(learn, config, run, learn.recorder.rows, best, 0.0, 0.0)
    summary = json.loads((run / "summary.json").read_text())
    for name in ("valid", "test"):
        dl, found = getattr(learn.dls, name), summary[f"tta_{name}_acc"]
        assert found == (evaluate.tta_accuracy(learn, dl, evaluate.outcome(learn, dl)) if mirrors else None)


def rows_of(n, chosen=True):
    lrs = [0.1] * (n // 2) + [0.03] * (n - n // 2)
    return [
        dict(
            epoch=i + 1,
            lr=lr,
            train_acc=0.5,
            train_loss=1.0,
            valid_acc=0.5,
            valid_loss=1.0,
            test_acc=0.5,
            test_loss=1.0,
        )
        for i, lr in enumerate(lrs)
    ]


@pytest.mark.parametrize("cuts", [0, 1, 2, 3, 4, 8])
def test_labels_of_the_rate_do_not_touch(cuts):
    rows = [{**row, "lr": 0.0756 * 0.3 ** min(i, cuts)} for i, row in enumerate(rows_of(10))]
    figure = plots.results(rows, "a run")
    FigureCanvasAgg(figure).draw()
    axis = figure.axes[2].yaxis
    labels = [t for minor in (False, True) for t in axis.get_ticklabels(minor=minor) if t.get_text()]
    low, high = figure.axes[2].get_window_extent().intervaly
    boxes = sorted(
        b.intervaly.tolist() for b in (t.get_window_extent() for t in labels) if low < b.intervaly.mean() < high
    )
    assert len(boxes) >= 2
    assert all(below[1] <= above[0] for below, above in zip(boxes, boxes[1:]))


def test_figures_say_what_they_show():
    rates = np.array([[row["epoch"] - 0.5, row["lr"], 0.8 + 0.01 * row["epoch"]] for row in rows_of(10)])
    figure = plots.results(rows_of(10), "a run", 0.88, 3, rates=rates)
    top, middle, bottom, right = figure.axes
    assert top.get_xlim() == (0.5, 10.5) and 1 in top.get_xticks()
    plain = plots.results(rows_of(10), "a run").axes
    without_test = [{k: v for k, v in row.items() if "test" not in k} for row in rows_of(4)]
    assert plots.results(without_test, "a fastai fit", best_epoch=2)
    assert len(plain) == 3 and plain[2].lines[-1].get_xdata()[-1] == 10.5  # a momentum that stays has no axis
    figure.canvas.draw()
    for ax in (top, middle):  # no legend lies on its curves
        assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1
    labels = [t.get_text() for t in top.get_legend().get_texts()]
    assert labels == [
        "train (augmented batches)",
        "valid",
        "test",
        "target 0.88",
        "kept: epoch 3, best valid accuracy",
        "plateau: rate reduced, or batch grown",
    ]
    cuts = [line.get_xdata()[0] for line in bottom.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "--"]
    assert cuts == [5.5] and bottom.get_yscale() == "log" and "momentum" in right.get_ylabel()
    assert "test chose" in plots.results(rows_of(4), "a run", 0.88, 3, "test").axes[0].get_title()
    by_loss = plots.results(rows_of(4), "a run", 0.88, 3, chosen_by="loss").axes[0].get_legend()
    assert "kept: epoch 3, best valid loss" in [text.get_text() for text in by_loss.get_texts()]
    legend = plots.results(rows_of(4), "a run", averaged=True).axes[1].get_legend()
    labels = [t.get_text() for t in legend.get_texts()]
    assert labels == ["train (augmented batches)", "valid, averaged weights", "test, averaged weights"]
    found = dict(valley=0.01, steep=0.1, minimum=0.2, slide=0.3)
    losses = np.linspace(2, 1, 50)
    raw = losses.copy()
    raw[-20], raw[-1] = 0.2, math.inf
    ax = plots.lr_find(np.geomspace(1e-5, 10, 50), raw, losses, found, "steep").axes[0]
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert ax.get_ylim()[0] < 0.2  # no dip of the raw curve is cut off; what explodes is
    assert len(labels) == 6
    assert [label for label in labels if "used" in label] == ["steep: 0.1  (used)\n  where the loss falls fastest"]
    assert all("\n" in label for label in labels[2:]) and set(found) <= set(plots.MEANINGS)


@pytest.mark.parametrize("best", [0.6, 0.9])
def test_a_target_far_above_all_curves_does_not_squeeze_them(best):
    left, right, _ = plots.comparison({"a": [(1, 9, 0.5), (2, 18, best)]}, "two epochs", 0.88).axes
    assert [line.get_ydata()[0] == 0.88 for ax in (left, right) for line in ax.lines[1:]] == [True, True] * (best > 0.8)
    assert left.get_ylim()[1] < best + 0.1


def test_a_comparison_speaks_of_bands_where_there_are_some():
    one, two = [(1, 9, 0.5), (2, 18, 0.6)], [(1, 9, 0.5), (1, 8, 0.4), (2, 18, 0.6), (2, 17, 0.7)]
    for curves, bands in (({"a": one, "b": one}, 0), ({"a": one, "b": two}, 1)):
        figure = plots.comparison(curves, "both")
        assert [len(ax.collections) for ax in figure.axes[:2]] == [bands] * 2
        assert figure.get_suptitle() == "both" + ": mean over seeds, band of ± 1 standard deviation" * bands


def test_a_comparison_has_no_seconds_where_they_say_nothing():
    curves = {name: [(1, 9, 0.5), (2, 18, 0.6)] for name in "ab"}
    labels = [
        [ax.get_xlabel() for ax in plots.comparison(curves, "title", timed=timed).axes] for timed in (True, False)
    ]
    seconds = "seconds of training, evaluation included"
    assert seconds in labels[0] and labels[1] == [label for label in labels[0] if label != seconds]


def test_a_comparison_ends_at_1_and_has_a_dot_a_seed_and_small_multiples_for_many():
    curves = {f"v{i}": [(1, 9, 0.9), (1, 8, 1.0), (2, 18, 0.99), (2, 17, 1.0)] for i in range(7)}
    for names in (list(curves)[:2], list(curves)):
        some = {name: curves[name] for name in names}
        figure = plots.comparison(some, "title", finals={name: [0.99, 1.0] for name in names})
        *panels, dots = figure.axes
        assert len(panels) == (2 if len(names) == 2 else 8)
        assert panels[0].get_xticks()[0] == 1 and panels[0].get_xlim() == (0.5, 2.5)
        assert panels[0].get_ylim()[1] == 1 and max(panels[0].collections[0].get_paths()[0].vertices[:, 1]) <= 1
        assert [line.get_xdata().tolist() for line in dots.lines if len(line.get_xdata()) == 2] == [[0.99, 1.0]] * len(
            names
        )
        assert len(dots.containers) == len(names)
        figure.canvas.draw()


@pytest.mark.parametrize("n", [1, 3, 5, 7, 25])
def test_a_gallery_of_any_size_and_strange_names(n):
    row = dict(rank=1, file="a/$b$.png", prediction="$x^2$ <b>é\n" * 5, truth="猫", p_prediction=1.0, p_truth=1e-9)
    picture, seen = np.zeros((n, 32, 32, 3), np.uint8), np.random.default_rng(0).random((n, 32, 32))
    figure = plots.gradcam(picture, seen, np.zeros((n, 32, 32)), [row] * n, "title")
    assert isinstance(figure, matplotlib.figure.Figure)
    ax, scale = figure.axes
    assert len(ax.images) == 5 * n and "map of a class" in scale.get_xlabel()  # each image thrice, two maps
    words = [text.get_text() for text in ax.texts]
    assert words.count("predicted, 100.0%") == words.count("truth, 0.0%") == words.count("$b$.png") == n
    assert sum(text.get_weight() == "bold" for text in ax.texts) == 2 * n
    assert sum("empty map" in word for word in words) == n == len(ax.collections)  # a contour for each other map
    figure.canvas.draw()


@pytest.mark.parametrize("classes", [2, 10, 120])
def test_a_confusion_matrix_of_any_size(classes):
    counts = np.eye(classes, dtype=int) * 5
    figure = plots.confusion_matrix(counts, [f"class number {i}" for i in range(classes)], "title")
    assert len(figure.axes) == 3  # with a scale for what is right and one for what is wrong
    assert figure.axes[0].get_ylabel() == "truth" and len(figure.axes[0].texts) == (classes if classes <= 40 else 0)
    figure.canvas.draw()


def test_pyplot_is_left_alone():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plots.train_batch(np.zeros((3, 8, 8, 3), np.uint8), ["a", "b", "c"], "title")
    assert pyplot.get_fignums() == before
