import csv
import json

import numpy as np
import pytest
from sklearn import metrics

from lib.explain import scores
from lib.train.averaging import KeepBest
from lib.train.schedules import fit
from train_fastai import main


def answers(n, classes, seed=0):
    """(targets, probabilities) of a classifier that is often right; the last class is in neither."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes - 1, n)
    logits = rng.normal(0, 1, (n, classes)) + 2 * np.eye(classes)[targets]
    logits[:, -1] = -9
    return targets, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_the_scores_of_classes_are_scikit_learns():
    targets, p = answers(300, 6)
    names = [f"class {i}" for i in range(5)] + ["accuracy"]  # a name that the report of scikit-learn uses itself
    report = metrics.classification_report(targets, p.argmax(1), labels=range(6), output_dict=True, zero_division=0)
    for i, row in enumerate(scores.of_classes(targets, p, names)):
        theirs = report[str(i)]
        assert [*row.values()] == [names[i], *(theirs[k] for k in ("precision", "recall", "f1-score", "support"))]


def test_the_scores_over_classes_are_scikit_learns():
    targets, p = answers(400, 24)
    found, rows = scores.overall(targets, p), scores.of_classes(targets, p, range(24))
    f1 = [rows[c]["f1"] for c in np.union1d(targets, p.argmax(1))]
    assert len(f1) == 23 and found["macro_f1"] == pytest.approx(np.mean(f1))
    assert np.isclose(found["balanced_acc"], metrics.balanced_accuracy_score(targets, p.argmax(1)), rtol=1e-12)
    assert np.isclose(found["top5_acc"], metrics.top_k_accuracy_score(targets, p, k=5, labels=range(24)), rtol=1e-12)
    assert scores.overall(*answers(50, 6))["top5_acc"] is None


def test_the_calibration_error_equals_a_count_by_hand():
    """0.9 confident and right in 8 of 10, 0.6 confident and right in 3 of 5: 10/15 x 0.1 + 5/15 x 0."""
    p = np.array([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 5)
    targets = np.array([0] * 8 + [1] * 2 + [1] * 3 + [0] * 2)
    rows = scores.reliability(targets, p)
    assert [(row["images"], round(row["accuracy"], 9)) for row in rows] == [(5, 0.6), (10, 0.8)]
    assert all(row["from"] < row["confidence"] <= row["to"] + 1e-12 for row in rows)
    assert np.isclose(scores.calibration_error(rows), 10 / 15 * 0.1)
    certain = scores.reliability(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert [row["images"] for row in certain] == [2] and scores.calibration_error(certain) == 0.5


def test_macro_f1_is_recorded_watched_and_chosen_by(make):
    config, learn = make("--monitor", "macro_f1", "--keep", "macro_f1", "--epochs", 3, "--lr", 0.05)
    seen = []

    class Look(KeepBest):
        order = 71

        def after_epoch(self):
            p, y = learn.get_preds()
            seen.append(metrics.f1_score(y.numpy(), p.argmax(1).numpy(), average="macro", zero_division=0))

    best = KeepBest(column=config.keep)
    learn.add_cbs([best, Look()])
    fit(learn, config, 0.05)
    rows = learn.recorder.rows
    assert [row["macro_f1"] for row in rows] == seen and len(set(seen)) > 1
    assert best.epoch_number == max(rows, key=lambda row: (row["macro_f1"], -row["valid_loss"]))["epoch"]


@pytest.mark.parametrize("by, sign", [("valid_acc", 1), ("valid_loss", -1)])
def test_the_weights_kept_are_best_by_what_is_asked_for(make, by, sign):
    config, learn = make("--epochs", 4, "--keep", by)
    best = KeepBest(column=config.keep)
    learn.add_cb(best)
    fit(learn, config, 0.2)
    rows = learn.recorder.rows
    assert best.epoch_number == max(rows, key=lambda row: (sign * row[by], -row["valid_loss"]))["epoch"]


def test_a_run_writes_them_and_says_so_where_classes_are_uneven(photos, tmp_path, capsys):
    for path in sorted((photos / "b").iterdir())[4:]:
        path.unlink()
    options = ["--size", "16", "--model", "small", "-b", "4", "--epochs", "1", "--lr", "0.05", "--valid-pct", "0.2"]
    assert main(["--data", str(photos), *options, "--keep", "valid_loss", "--out", str(tmp_path), "--name", "x"]) == 0
    out, summary = capsys.readouterr().out, json.loads((tmp_path / "x/summary.json").read_text())
    assert f"classes are uneven: balanced accuracy {summary['balanced_acc']:.4f}" in out
    parts = [summary[f"{part}_seconds"] for part in ("start", "train", "end")]
    assert "target" not in out and 0 < min(parts) < sum(parts) <= summary["total_seconds"]
    assert "best by valid loss" in out and summary["chosen_by"] == "loss"
    with open(tmp_path / "x/classes.csv") as f:
        rows = list(csv.DictReader(f))
    assert [row["class"] for row in rows] == ["a", "b"]
    f1 = [float(row["f1"]) for row in rows]
    assert np.isclose(np.mean(f1), summary["macro_f1"])
    with open(tmp_path / "x/calibration.csv") as f:
        bins = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    assert np.isclose(scores.calibration_error(bins), summary["calibration_error"])
    page = (tmp_path / "x/report.html").read_text()
    assert '"scores": [["a"' in page and '"reliability": {"from"' in page
