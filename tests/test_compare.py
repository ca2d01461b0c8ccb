import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from lib import compare, config, runs, train
from lib.cli import BadInput
from lib.explain import evaluate, plots
from lib.machine import environment
from lib.train import lr_range, progress, recorder
from tests.conftest import SMALL, fingerprint
from train_fastai import main

ARGS = "--size 32 --model small --epochs 2 -b 16 --gallery 0 --schedule plateau one_cycle --seeds 0 1".split()


def argv(bands, out, *more):
    return ["--data", str(bands), "--out", str(out), "--name", "both", *ARGS, "--lr", "0.05", *more]


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def names_of(rows):
    return {row["variant"] for row in rows}


def untimed(path):
    """The rows without what depends on how fast and how busy the machine is."""
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "other_load"} for row in rows_of(path)]


@pytest.fixture(scope="module")
def compared(bands, tmp_path_factory):
    """(folder, {run: hash of what its fit started from}) of a comparison."""
    out, starts, fit = tmp_path_factory.mktemp("compared"), {}, train.fit

    def spy(learn, c, lr):
        batches = [[x.tolist(), y.tolist()] for x, y in learn.dls.train]
        learn.dls.train.epoch = 0
        starts[c.name] = (fingerprint(learn.model.state_dict()), fingerprint(batches))
        fit(learn, c, lr)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "fit", spy)
        assert main(argv(bands, out)) == 0
    return out / "both", starts


def test_a_run_for_each_variant_and_seed(compared):
    folder, _ = compared
    names = ["one_cycle-s0", "one_cycle-s1", "plateau-s0", "plateau-s1"]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == names
    rows = rows_of(folder / "comparison.csv")
    assert [f"{row['variant']}-s{row['seed']}" for row in rows] == [names[i] for i in (2, 3, 0, 1)]
    assert all(row["lr"] == "0.05" and (folder / row["folder"] / "gradcam.png").exists() is False for row in rows)
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "comparison.md").read_text()
    assert re.search(r"\| plateau \| 2 \| 0\.\d{4} ± 0\.\d{4} \|", text) and "one_cycle" in text
    assert re.search("^one_cycle (against|is|equals)", text, re.M)
    last = {name: [float(row["last_test_acc"]) for row in rows if row["variant"] == name] for name in names_of(rows)}
    mean, half = compare.interval(last["one_cycle"], last["plateau"])
    assert "| against plateau | against plateau, last |" in text and text.count(f"| {mean:+.4f} ± {half:.4f} |") >= 1


def test_the_variants_of_a_seed_start_alike_and_seeds_differ(compared):
    _, starts = compared
    assert starts["plateau-s0"] == starts["one_cycle-s0"] and starts["plateau-s1"] == starts["one_cycle-s1"]
    assert all(a != b for a, b in zip(starts["plateau-s0"], starts["plateau-s1"]))


def test_finished_runs_are_left_alone(compared, bands, monkeypatch, capsys):
    folder, _ = compared
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert main(argv(bands, folder.parent)) == 0
    assert capsys.readouterr().out.count("is finished") == 4
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert main(argv(bands, folder.parent, "--momentum", "0.5")) == 2
    assert "was made with momentum 0.9" in capsys.readouterr().err


def test_a_comparison_that_was_killed_goes_on_and_gives_the_same_table(compared, bands, tmp_path, monkeypatch):
    after_batch = recorder.EpochRecorder.after_batch

    def stop(self):
        if (self.epoch, self.iter) == (1, 1) and len(started) == 3:
            raise KeyboardInterrupt
        after_batch(self)

    started, before_fit = [], progress.EpochLines.before_train
    with monkeypatch.context() as m:
        m.setattr(progress.EpochLines, "before_train", lambda self: (self.epoch or started.append(1), before_fit(self)))
        m.setattr(recorder.EpochRecorder, "after_batch", stop)
        assert main(argv(bands, tmp_path)) == 130
    so_far = [(row["variant"], row["seed"]) for row in rows_of(tmp_path / "both/comparison.csv")]
    assert so_far == [("plateau", "0"), ("plateau", "1")] and (tmp_path / "both/one_cycle-s0/env.json").exists()
    assert main(argv(bands, tmp_path)) == 0
    assert untimed(tmp_path / "both/comparison.csv") == untimed(compared[0] / "comparison.csv")
    assert main(argv(bands, tmp_path)) == 0  # the run that went on still belongs to it
    assert "What differs: schedule." in (tmp_path / "both/comparison.md").read_text()


def test_a_comparison_does_not_take_a_runs_folder(compared, bands, capsys):
    out, page = compared[0], (compared[0] / "plateau-s0/report.html").read_bytes()
    assert main(argv(bands, out, "--name", "plateau-s0")) == 2
    assert "is a run folder, whose page would be lost; pass another --name" in capsys.readouterr().err
    assert (out / "plateau-s0/report.html").read_bytes() == page


def test_finished_runs_of_anywhere_are_compared(compared, tmp_path, capsys):
    folder, _ = compared
    assert compare.main([str(folder), "--out", str(tmp_path / "again")]) == 0
    names = ["test_acc", "variant", "seed"]
    pick = lambda path: sorted([row[n] for n in names] for row in rows_of(path))
    assert pick(tmp_path / "again/comparison.csv") == pick(folder / "comparison.csv")
    assert compare.main([str(folder / "plateau-s0"), str(folder / "one_cycle-s0"), "--out", str(tmp_path)]) == 0
    assert "cannot tell chance from a difference" in (tmp_path / "comparison.md").read_text()
    capsys.readouterr()
    assert compare.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path) in err


@pytest.fixture
def pair(compared, tmp_path):
    """Two finished runs of one variant: (function that changes the files of the second, that compares the two)."""
    for seed in (0, 1):
        shutil.copytree(compared[0] / f"plateau-s{seed}", tmp_path / f"s{seed}")

    def change(file, read, write, **values):
        path = tmp_path / "s1" / file
        path.write_text(write({**read(path.read_text()), **values}))

    def compared_text():
        assert compare.main([str(tmp_path / "s0"), str(tmp_path / "s1"), "--out", str(tmp_path / "both")]) == 0
        return (tmp_path / "both/comparison.md").read_text()

    return change, compared_text


def test_runs_of_two_machines_and_of_two_targets_are_one_variant(pair, bands, tmp_path):
    change, text = pair
    change("args.yaml", yaml.safe_load, yaml.safe_dump, data=f"/elsewhere/{bands.name}", target=0.01)
    change("summary.json", json.loads, json.dumps, target=0.01, epochs_to_target=1, seconds_to_target=1.0)
    assert "| plateau | 2 |" in text() and "epochs to 0.01" not in text()
    for seed in (0, 1):
        path = tmp_path / f"s{seed}/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target": [0.01, 2.0][seed]}))
    assert re.search(r"epochs to 0.01 .*\n.*\n\| plateau \| 2 \| .* \| 1.0 ± 0.0 \|", text())


def test_seconds_of_two_chips_are_not_compared(pair, monkeypatch):
    change, text = pair
    timed = []
    monkeypatch.setattr(plots, "comparison", lambda *args: timed.append(args[-1]) or Figure())
    change("summary.json", json.loads, json.dumps, other_load=0.0)
    change("env.json", json.loads, json.dumps, cpu_model="another")
    assert "their seconds are not to be compared" in text()
    change("env.json", json.loads, json.dumps, cpu_model=environment()["cpu_model"])
    assert "their seconds are not to be compared" not in text()
    change("summary.json", json.loads, json.dumps, other_load=2.0)
    assert "* |" in text() and timed[0] is timed[2] is False


def test_runs_of_two_sizes_saw_the_same_images(pair):
    change, text = pair
    change("env.json", json.loads, json.dumps, data_fingerprint="other")
    assert "saw different images" in text() and "| plateau | 2 |" in text()
    change("args.yaml", yaml.safe_load, yaml.safe_dump, data="/elsewhere/bands")
    assert "| data /elsewhere/bands | 1 |" in text()  # other images in a folder of the same name
    change("env.json", json.loads, json.dumps, size=64)
    assert "saw different images" not in text()


def test_epochs_to_the_target_are_whole_for_one_run_and_a_mean_for_more():
    scores = dict(
        test_acc=0.9,
        last_test_acc=0.9,
        valid_acc=0.9,
        seconds_to_target=60.0,
        train_seconds=90.0,
        target=0.88,
        chosen_on="valid",
    )
    args = lambda seed: {"seeds": [seed], "folds": 0, "fold": 0}
    run = lambda seed, epochs: {"args": args(seed), "summary": {**scores, "epochs_to_target": epochs}}
    assert "| 25 | 60 | 90 |" in compare.table({"plateau": [run(0, 25)]})[0]
    assert "| 24.5 ± 0.7 | 60 ± 0 |" in compare.table({"plateau": [run(0, 24), run(1, 25)]})[0]
    assert "| never | 60 |" in compare.table({"plateau": [run(0, None)]})[0]


def test_seconds_of_a_run_that_was_disturbed_are_marked():
    summary = dict.fromkeys(("test_acc", "last_test_acc", "valid_acc"), 0.9) | {
        "train_seconds": 90.0,
        "target": 0,
        "chosen_on": "valid",
    }
    run = lambda seed, **more: {"args": {"seeds": [seed], "folds": 0, "fold": 0}, "summary": summary | more}
    for load, mark in ((0.3, " *"), (0.2, ""), (None, "")):
        assert f"| 90 ± 0{mark} |" in compare.table({"x": [run(0), run(1, other_load=load)]})[0]
        timed = dict(target=0.88, epochs_to_target=3, seconds_to_target=60.0, other_load=load)
        assert f"| 60{mark} | 90{mark} |" in compare.table({"x": [run(0, **timed)]})[0]
        timed |= dict(epochs_to_target=None, seconds_to_target=None)
        assert f"| never | never | 90{mark} |" in compare.table({"x": [run(0, **timed)]})[0]


def test_folds_are_runs_of_a_comparison(photos, tmp_path, capsys):
    argv = ["--data", photos, "--out", tmp_path, *"--name x --folds 2 --seeds 0 1".split(), *SMALL, "--lr", 0.02, 0.05]
    assert main([*map(str, argv)]) == 0
    rows = rows_of(tmp_path / "x/comparison.csv")
    assert [(row["variant"], row["seed"], row["fold"]) for row in rows] == [
        (lr, seed, fold) for lr in ("lr 0.02", "lr 0.05") for seed in "01" for fold in "12"
    ]
    text = (tmp_path / "x/comparison.md").read_text()
    assert "different images" not in text and "paired by seed and fold" in text and "too small" in text
    wrong = [len(rows_of(tmp_path / f"x/0.02-s{seed}-f{fold}/mistakes.csv")) for seed in "01" for fold in "12"]
    right = [1 - sum(wrong[i : i + 2]) / 16 for i in (0, 2)]
    line = next(line for line in text.split("\n") if line.startswith("| lr 0.02 | 4 | "))
    assert line.split(" | ")[3] == f"{np.mean(right):.4f} ± {np.std(right, ddof=1):.4f}"
    assert [c.fold for c in config.variants(["--folds", "3", "--fold", "2"])] == [2]
    assert main(["--folds", "1"]) == 2 and main(["--fold", "1"]) == 2
    assert capsys.readouterr().err.count("error: --folds: must be 2 or more, and --fold one of them") == 2


def test_a_variant_that_diverges_is_named_and_the_others_compared(bands, tmp_path, capsys):
    few = "--size 32 --model small --epochs 1 -b 16 --gallery 0 --lr 0.05 1e12".split()
    assert main(["--data", str(bands), "--out", str(tmp_path), "--name", "x", *few]) == 3
    assert "Not finished, and left out" in (tmp_path / "x/comparison.md").read_text()
    assert [row["variant"] for row in rows_of(tmp_path / "x/comparison.csv")] == ["plateau"]
    env = json.loads((tmp_path / "x/1000000000000.0-s0/env.json").read_text())
    assert "the loss is" in env["ended"]
    (tmp_path / "x/1000000000000.0-s0").rename(tmp_path / "x/\x1b[31m-s0")  # as a stranger may name a folder
    compare.main([str(tmp_path / "x"), "--out", str(tmp_path / "x")])
    said = capsys.readouterr().out
    assert "left out: " in said and "\x1b" not in said and "Runs of 1 epoch;" in said
    capsys.readouterr()
    run = tmp_path / "x/0.05-s0"
    assert compare.main([str(run), "--out", str(run)]) == 2 and "whose page would be lost" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "is no run folder, and holds none" in capsys.readouterr().err
    compare.report([run, tmp_path / "x/failed-before-it-had-a-folder"], tmp_path / "y")
    assert "failed-before-it-had-a-folder." in (tmp_path / "y/comparison.md").read_text()


def test_a_network_that_is_none_ends_a_comparison_before_it_trains(bands, tmp_path, capsys):
    assert main(["--data", str(bands), "--out", str(tmp_path / "x"), "--model", "small", "mediun"]) == 2
    assert "did you mean medium" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_axes_multiply_and_name_the_runs():
    found = config.variants("--data digits --optimizer sgd adam --momentum .75 .9 --seeds 3 4 -b 32".split())
    assert [c.name for c in found[:3]] == ["sgd-0.75-s3", "sgd-0.75-s4", "sgd-0.9-s3"] and len(found) == 8
    assert {c.out for c in found} == {"runs/digits-sgd-0.75_vs_sgd-0.9_vs_adam-0.75_vs_adam-0.9"}
    digits = config.variants(["--schedule", *config.SCHEDULES, "--lr", ".1", ".2", "--data", "digits"])
    others = config.variants(["--schedule", *config.SCHEDULES, "--lr", ".1", ".3", "--data", "digits"])
    (one,), (other,) = {c.out for c in digits}, {c.out for c in others}
    assert one != other and len(one) == len(other) == len("runs/") + 120  # cut, and told apart by what was cut
    restarts = config.variants("--schedule one_cycle warm_restarts".split())[1]
    assert restarts.cycle_length == 1 / 7 and restarts.schedule == "warm_restarts" and restarts.seeds == (0,)
    (single,) = config.variants(["--schedule", "one_cycle"])
    assert single.name == "" and single.out == "runs"
    with pytest.raises(BadInput, match="twice"):
        config.variants("--momentum 0.9 .90".split())
    with pytest.raises(BadInput, match="did you mean plateau"):
        config.variants("--schedule one_cycle platau".split())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9))
def test_intervals_are_students(pairs):
    a, b = np.array(pairs).T
    d, n = b - a, len(a)
    if np.ptp(d) < 1e-6:
        return
    low, high = scipy.stats.t.interval(0.95, n - 1, loc=d.mean(), scale=scipy.stats.sem(d))
    mean, half = compare.interval(b, a)
    np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-6, atol=1e-9)
    assert ("no difference seen" in compare.verdict("x", "y", mean, half, n)) == (low <= 0 <= high)


def test_intervals_over_folds_allow_for_shared_images():
    """A fifth of the images is test: the variance of the mean is (1 / 5 + 1 / 4) of the folds' (Nadeau & Bengio)."""
    summary = dict.fromkeys(("last_test_acc", "valid_acc"), 0.9) | {
        "train_seconds": 90.0,
        "target": 0,
        "mistakes": 1,
        "chosen_on": "valid",
    }
    rng, env = np.random.default_rng(0), {"images": {"test": 10}}
    accs = rng.uniform(0.8, 0.9, (2, 5, 3))  # variant, fold, seed
    args = lambda seed, fold: {"seeds": [seed], "folds": 5, "fold": fold + 1}
    run = lambda place, acc: {"args": args(*place[::-1]), "env": env, "summary": {**summary, "test_acc": acc}}
    runs = {name: [run(place, acc) for place, acc in np.ndenumerate(of)] for name, of in zip("ab", accs)}
    apart = (accs[1] - accs[0]).mean(1)
    half = scipy.stats.t.ppf(0.975, 4) * apart.std(ddof=1) * (1 / 5 + 1 / 4) ** 0.5
    text, (sentence,) = compare.table(runs)
    assert f"{apart.mean():+.4f} ± {half:.4f}" in text and "n = 5" in sentence


def test_seeds_of_one_fold_are_pairs_as_without_folds():
    summary = dict.fromkeys(("last_test_acc", "valid_acc"), 0.9) | {
        "train_seconds": 90.0,
        "target": 0,
        "mistakes": 1,
        "chosen_on": "valid",
    }
    run = lambda seed, acc: {
        "args": {"seeds": [seed], "folds": 5, "fold": 2}, "env": {"images": {"test": 10}},
        "summary": {**summary, "test_acc": acc},
    }  # fmt: skip
    accs = [[0.8, 0.82, 0.85], [0.83, 0.84, 0.86]]
    _, (sentence,) = compare.table({name: [run(*pair) for pair in enumerate(of)] for name, of in zip("ab", accs)})
    _, half = compare.interval(*accs[::-1])
    assert f"{half:.4f}" in sentence and "n = 3" in sentence


def test_equal_and_single_scores_have_a_sentence(recwarn):
    assert compare.verdict("x", "y", *compare.interval([0.5, 0.7], [0.5, 0.7]), 2) == "y equals x in all 2 pairs."
    mean, half = compare.interval([0.75, 0.5], [0.5, 0.25])  # as many images in each pair, as happens with few images
    said = compare.verdict("x", "y", mean, half, 2)
    assert (mean, half) == (0.25, 0) and said == "y differs from x by +0.2500 in all 2 pairs."
    assert compare.interval([0.75], [0.5]) == (0.25, None) and not recwarn.list


def test_what_is_in_the_way_is_left_there(bands, tmp_path, capsys):
    mine = tmp_path / "both/plateau-s0/thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    assert main(argv(bands, tmp_path)) == 2
    assert "is in the way" in capsys.readouterr().err and mine.read_text() == "years of work"


def test_what_is_in_the_way_is_seen_before_the_first_run(tmp_path):
    configs = config.variants(["--schedule", "plateau", "one_cycle", "--out", str(tmp_path), "--data", "digits"])
    Path(configs[1].out, configs[1].name).mkdir(parents=True)
    with pytest.raises(BadInput, match="one_cycle-s0: is in the way"):
        compare.run(configs, lambda *args: pytest.fail("a run began"))


def test_bad_input_of_one_variant_does_not_stop_the_others(tmp_path, capsys):
    def train(config, tested=None):
        ran.append(config.name)
        if config.schedule == "plateau":
            raise BadInput("no fall")
        return 0

    ran, configs = [], config.variants(["--schedule", "plateau", "one_cycle", "--out", str(tmp_path), "--lr-find-only"])
    assert compare.run(configs, train) == 2 and ran == ["plateau-s0", "one_cycle-s0"]
    assert "error: plateau-s0: no fall" in capsys.readouterr().err


def test_too_little_memory_for_one_variant_does_not_stop_the_others(bands, tmp_path, monkeypatch, capsys):
    def train(config, tested=None):
        ran.append(config.name)
        if config.schedule == "plateau":
            raise MemoryError
        return 0

    ran = []
    monkeypatch.setattr("train_fastai.train", train)
    options = ["--data", str(bands), "--schedule", "plateau", "one_cycle", "--out", str(tmp_path), "--lr-find-only"]
    assert main(options) == 2 and ran == ["plateau-s0", "one_cycle-s0"]
    assert "error: plateau-s0: MemoryError" in capsys.readouterr().err


def test_a_comparison_of_which_every_run_diverges_has_that_status(bands, tmp_path, monkeypatch):
    monkeypatch.setattr("train_fastai.train", lambda config, tested=None: 3)
    assert main(["--data", str(bands), "--schedule", "plateau", "one_cycle", "--out", str(tmp_path)]) == 3


def test_curves_end_with_the_run_that_ends_first():
    """Else their seconds would run backwards, and few runs would look like all."""
    points = [(1, 10, 0.5), (2, 20, 0.6), (3, 30, 0.7), (1, 4, 0.3), (2, 8, 0.4)]
    epochs, seconds, mean, _, n = plots.means(points)
    assert epochs.tolist() == [1, 2] and seconds.tolist() == [7, 14] and mean == pytest.approx([0.4, 0.5]) and n == 2


def test_a_range_test_of_other_images_is_not_taken(tmp_path):
    for name, images in (("a", "x"), ("b", "y"), ("c", "x")):
        runs.write(tmp_path / name / "lr_find.csv", "")
        runs.write(tmp_path / name / "lr_find.png", "")
        runs.write_json(tmp_path / name / "env.json", dict(data_fingerprint=images, lr=0.5, lr_suggestions={}))

    class New(SimpleNamespace):
        __truediv__ = lambda self, name: tmp_path / "new" / name

    run = New(env={"data_fingerprint": "x"}, note=lambda **facts: None)
    assert evaluate.same_test(run, tmp_path / "b") is None and evaluate.same_test(run, tmp_path / "c")[0] == 0.5


def test_range_tests_alone_are_left_as_they_are_and_training_finds_the_same(bands, tmp_path, capsys):
    few = argv(bands, tmp_path, "--seeds", "0", "--epochs", "1", "--lr", "find", "--lr-iters", "40")
    assert main([*few, "--lr-find-only"]) == 0 and not list(tmp_path.rglob("results.csv"))
    found = {p: p.read_bytes() for p in tmp_path.rglob("lr_find.csv")}
    capsys.readouterr()
    assert main([*few, "--lr-find-only"]) == 0
    assert capsys.readouterr().out.count("is there") == len(found) == 2
    assert main(few) == 0 and len(rows_of(tmp_path / "both/comparison.csv")) == 2
    assert {p: p.read_bytes() for p in found} == found


def test_a_range_test_that_was_interrupted_is_made_again(bands, tmp_path, capsys, monkeypatch):
    few = argv(bands, tmp_path, "--seeds", "0", "--lr", "find", "--lr-iters", "40")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(lr_range, "find", interrupt)
        assert main([*few, "--lr-find-only"]) == 130
    asked, folder = config.variants([*few, "--checkpoint-seconds", "60"])[0], tmp_path / "both/plateau-s0"
    goes_on, env = compare.unfinished(asked, folder), json.loads((folder / "env.json").read_text())
    assert goes_on.checkpoint_seconds == 60 and goes_on.threads == env["threads"]  # what may change, and what was found
    assert main([*few, "--lr-find-only"]) == 0 and "is there" not in capsys.readouterr().out
    assert len(list(tmp_path.rglob("lr_find.csv"))) == 2 and not list(tmp_path.rglob("results.csv"))


def test_a_seed_has_one_range_test_where_settings_make_no_difference(bands, tmp_path, capsys, monkeypatch):
    few = ["--seeds", "0", "1", "--epochs", "1", "--lr", "find", "--lr-iters", "40"]
    alone, tests, find = {}, [], lr_range.find
    monkeypatch.setattr(lr_range, "find", lambda *args, **kwargs: tests.append(1) or find(*args, **kwargs))
    assert main(argv(bands, tmp_path, *few)) == 0 and len(tests) == 2
    assert capsys.readouterr().out.count("range test: that of plateau-s") == 2
    folder = tmp_path / "both"
    for seed in (0, 1):
        one, two = (folder / f"{name}-s{seed}" for name in ("plateau", "one_cycle"))
        assert (one / "lr_find.csv").read_bytes() == (two / "lr_find.csv").read_bytes() != b""
        alone[seed] = (two / "lr_find.csv").read_text()
    assert alone[0] != alone[1]
    single = ["--schedule", "one_cycle", "--name", "single", *few[3:], "--seeds", "1"]
    assert main(argv(bands, tmp_path, *single)) == 0  # by itself it finds the same
    assert (tmp_path / "single/lr_find.csv").read_text() == alone[1]
    assert (tmp_path / "single/results.csv").exists()
    shutil.rmtree(folder / "one_cycle-s1")
    assert main(argv(bands, tmp_path, *few)) == 0 and len(tests) == 3  # a comparison that goes on shares it too
    (folder / "plateau-s0/lr_find.png").unlink()
    shutil.rmtree(folder / "one_cycle-s0")
    assert main(argv(bands, tmp_path, *few)) == 0 and len(tests) == 4  # but not one whose figure was removed
    different = ["--optimizer", "sgd", "adam", "--schedule", "constant", "--name", "two", *few[3:]]
    assert main(argv(bands, tmp_path, *different, "--seeds", "0")) == 0 and len(tests) == 6


PRETRAINED = {"pretrained": "torchvision", "freeze_epochs": 1}


def fake(seed=0, **args):
    known = {"schedule": "plateau", "label_smoothing": 0.0, "momentum": 0.9, **args, "seeds": [seed], "fold": 0}
    return {"args": known, "folder": f"{args}-{seed}"}


def test_variants_are_named_by_what_varies_and_never_mixed():
    runs = [fake(s, schedule=name) for name in ("plateau", "one_cycle") for s in (0, 1)]
    assert {k: len(v) for k, v in compare.by_variant(runs)[0].items()} == {"plateau": 2, "one_cycle": 2}
    runs.append(fake(0, label_smoothing=0.1))
    assert list(compare.by_variant(runs)[0]) == ["plateau", "one_cycle", "plateau, label smoothing 0.1"]
    with pytest.raises(BadInput, match="more than once"):
        compare.by_variant([*runs, fake(0, label_smoothing=0.1)])
    switches = dict(flip=True, balanced_batches=False, warmup_epochs=0.0, accumulate=1)
    changed = [{}, {"flip": False}, {"balanced_batches": True, "accumulate": 4}, {"warmup_epochs": 2.0}]
    names = list(compare.by_variant([fake(0, **switches | new) for new in changed])[0])
    assert names == ["plateau", "no flip", "balanced batches, accumulate 4", "warmup epochs 2"]
    names = list(compare.by_variant([fake(0, data=data) for data in ("/x/a", "/x/b-1", "/x/b-1.0")])[0])
    assert names == ["plateau", "data /x/b-1", "data /x/b-1.0"]
    plain, averaged = dict(ema=0.0, threshold=1e-4), dict(ema=0.999, threshold=0.04)
    names = lambda *settings: list(compare.by_variant([fake(0, **one) for one in settings])[0])
    assert names(plain, averaged) == ["plateau", "ema 0.999"]  # which brings its threshold with it
    assert names(plain, plain | {"threshold": 0.04}) == ["plateau", "threshold 0.04"]
    assert names(averaged | {"flip": True}, averaged | {"threshold": 0.1, "flip": False})[1] == "threshold 0.1, no flip"
    runs = [fake(0, momentum=m, lr=lr) for m in (0.9, 0.0) for lr in (0.1, 1.0)]
    assert list(compare.by_variant(runs)[0])[:2] == ["momentum 0.9, lr 0.1", "momentum 0.9, lr 1"]
    batches = names({"batch_size": "auto", "lr": 1e-4}, {"batch_size": 512, "lr": 0.12345671})
    assert batches == ["lr 0.0001, batch size auto", "lr 0.12345671, batch size 512"]
    fresh = {"model": "resnet18", "pretrained": "", "freeze_epochs": 0}
    assert names(fresh | PRETRAINED, fresh)[1] == "no pretrained"
    for first, second, name in (  # settings that are refused one by one
        ({"model": "resnet18", **PRETRAINED}, {"model": "resnet34", **PRETRAINED}, "resnet34"),
        ({"pretrained": "", "freeze_epochs": 0}, PRETRAINED, "pretrained torchvision"),
        (dict(grad_noise=0.1, perturb_on_plateau=True), dict(grad_noise=0.0, perturb_on_plateau=False), "no perturb"),
        ({"folds": 5}, {"folds": 10}, "folds 10"),
    ):
        assert name in names({"model": "resnet18"} | first, {"model": "resnet18"} | second)[1]
    three = names(plain, averaged, averaged | {"threshold": 0.1})
    assert three == ["plateau", "ema 0.999, threshold 0.04", "ema 0.999, threshold 0.1"]


@pytest.mark.parametrize(
    "name, content",
    [(n, c) for n in ("env.json", "summary.json", "results.csv") for c in ("", "[]", "{", "a\n1")]
    + [("args.yaml", "{"), ("args.yaml", "a\n1")],
)
def test_a_damaged_run_is_one_line(name, content, compared, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(compared[0] / "plateau-s0", run)
    (run / name).write_text(content)
    assert compare.main([str(run), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(run) in err
