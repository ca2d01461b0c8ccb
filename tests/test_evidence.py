"""The command behind the lecture's evidence, on numbers that are made up. test_docs.py runs it on images."""

import json
from types import SimpleNamespace

import pytest
import yaml
from scipy import stats

from lib.config import parse
from tests.benchmarks import evidence


@pytest.fixture
def options(tmp_path):
    names = dict(epochs=30, grid_epochs=10, seeds=["0"], jobs=1, data=None)
    return SimpleNamespace(out=tmp_path, runs=tmp_path / "runs", **names)


def finished(folder, words=(), precision="bf16", **summary):
    folder.mkdir(parents=True, exist_ok=True)
    settings = parse([*evidence.COMMON, "--epochs", "30", *words]).to_dict()
    (folder / "args.yaml").write_text(yaml.safe_dump(settings))
    (folder / "env.json").write_text(json.dumps(dict.fromkeys(evidence.SAME, "the same") | {"precision": precision}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.mark.parametrize(
    "best, found, tried",
    [
        (0.1, 0.12, {0.03, 0.1, 0.3}),
        (0.3, 0.12, {0.03, 0.1, 0.3, 1.0}),  # the grid grows where its end is best
        (0.003, 0.12, {0.001, 0.003, 0.01, 0.03, 0.1, 0.3}),
        (0.01, None, {0.003, 0.01, 0.03}),  # the run at the range test's rate diverged
    ],
)
def test_the_grid_goes_on_until_its_best_rate_is_inside(options, monkeypatch, best, found, tried):
    rates = []

    def run(options, name, words, epochs, seed):
        if "--lr" not in words:
            return found and finished(options.out / "first", lr=found)
        rate = float(words[words.index("--lr") + 1])
        rates.append(rate)
        if rate > 0.9:
            return None  # it diverged
        apart = abs(evidence.RATES.index(rate) - evidence.RATES.index(best))
        return finished(options.out / f"{rate}", valid_acc=0.9 - apart / 10)

    monkeypatch.setattr(evidence, "run", run)
    assert evidence.best_rate(options, "adam", ["--optimizer", "adam"]) == best
    assert set(rates) == tried and len(rates) == len(tried)


def test_best_rates_are_compared_with_each_other(options, monkeypatch):
    monkeypatch.setattr(evidence, "best_rate", lambda options, name, words: 0.03)
    plain, best = evidence.tables(options, "optimizers")
    assert plain[0] == "optimizers" and best[0] == "optimizers-best-rates"
    assert list(best[1]) == [f"{name} at 0.03" for name in plain[1]]
    assert best[1]["adam at 0.03"] == ["--optimizer", "adam", "--lr", "0.03"]
    assert [table for table, _ in evidence.tables(options, "noise")] == ["noise"]


def test_the_table_of_best_rates_has_the_better_of_two_rates_on_valid(options):
    made = lambda name, *accs: [acc and finished(options.out / f"{name}-{acc}", valid_acc=acc) for acc in accs]
    found = {"plateau": made("p", 0.84, 0.80), "adam": made("a", 0.75, 0.70), "nesterov": made("n", None, 0.9)}
    grid = {f"{name} at 0.1": made(f"{name} at 0.1", 0.81, 0.82) for name in found}
    expected = {"plateau": found["plateau"]} | {name: grid[name] for name in ("adam at 0.1", "nesterov at 0.1")}
    assert evidence.better(found, grid) == expected  # a run that diverged counts as 0


def test_the_table_of_rates_has_paired_differences(options):
    made = lambda name, accs: [
        acc and finished(options.out / f"{name}-{i}", test_acc=acc) for i, acc in enumerate(accs)
    ]
    found = {"adam": made("a", [0.70, 0.72, None]), "sgd": made("s", [None])}
    grid = {"adam at 0.1": made("g", [0.80, 0.84, 0.9]), "sgd at 1": made("h", [0.9])}
    (row,) = evidence.rates(found, grid)  # without the runs that have no partner
    assert (row["variant"], row["grid"], row["n"]) == ("adam", "adam at 0.1", 2) and row["gain"] == pytest.approx(0.11)
    half = stats.ttest_rel([0.80, 0.84], [0.70, 0.72]).confidence_interval().high - 0.11
    assert row["half_of_95_interval"] == pytest.approx(half)
    assert row["grid_test_acc"] - row["range_test_acc"] == pytest.approx(0.11) and [*row] == evidence.RATES_CSV


def test_what_is_finished_is_not_run_again_and_must_be_the_same(options):
    words = ["--warmup-epochs", "2"]
    folder = finished(options.out / "runs/warm-up-s0", words)
    assert evidence.run(options, "warm-up", words, 30, "0") == folder
    for other, epochs, name in ((words, 10, "epochs"), (["--warmup-epochs", "3"], 30, "warmup_epochs")):
        with pytest.raises(SystemExit, match=f"warm-up-s0: differs in {name}.*; pass another --out"):
            evidence.run(options, "warm-up", other, epochs, "0")
    finished(options.out / "runs/warm-up-s1", [*words, "--seeds", "1"], precision="float32")
    with pytest.raises(SystemExit, match="warm-up-s1: differs in precision"):
        evidence.run(options, "warm-up", words, 30, "1")
    (options.out / "runs/noise-s0").mkdir()
    (options.out / "runs/noise-s0/diverged").write_text("")
    assert evidence.run(options, "noise", [], 30, "0") is None
