"""What to try next: each rule applies where its condition holds and not beside it, and names flags that there are."""

import re

import pytest
from scipy.stats import binomtest

from lib import advice, config
from lib.config import Config


def run(train=(0.5, 0.8, 0.97, 0.972), test=0.96, valid=(0.9, 0.95), summary=(), n=(10_000, 10_000), **more):
    """A run of which no rule applies. `n`: images of valid and test; `more`: recalls, doubts, cuts, settings."""
    facts = {name: more.pop(name) for name in ("recalls", "doubts", "cuts", "sets") if name in more}
    rows = dict(train_acc=list(train), valid_acc=list(valid), epoch=list(range(1, len(train) + 1)))
    kept = dict(best_epoch=len(train), test_acc=test, valid_acc=max(valid), chosen_on="valid", lr=0.1) | dict(summary)
    recalls = [("cat", 950, 1000), ("dog", 970, 1000)]
    found = dict(
        args=Config(**{"epochs": len(train)} | more).to_dict(),
        n=dict(train=1, valid=n[0], test=n[1]),
        rows=rows,
        summary=kept,
    )
    return {**found, "recalls": recalls, "doubts": [], "cuts": [1.5], "sets": "", **facts}


def told(rule, **facts):
    """(whether the rule applies, its numbers and what to try as one text)"""
    applies, *texts = rule(run(**facts))
    return applies, " | ".join(texts)


@pytest.mark.parametrize("share, n", [(0.0, 10), (0.5, 8), (0.9028, 10_000), (353 / 359, 359), (1.0, 24)])
def test_the_interval_is_wilsons(share, n):
    exact = binomtest(round(share * n), n).proportion_ci(0.95, method="wilson")
    assert advice.wilson(share, n) == pytest.approx([exact.low, exact.high], abs=1e-5)


def test_no_rule_applies_to_a_run_without_fault_and_each_states_itself():
    asked = advice.advice(run())
    assert not any(applies for applies, *_ in asked) and len(asked) == len(advice.RULES)
    for _, rule, numbers, what in asked:
        assert rule.endswith(".") and "\n" not in rule and numbers and what[-1] in ".?"
        for flag in re.findall(r"--[a-z-]+", what):
            assert flag[2:].replace("-", "_") in config.FIELDS, flag
        assert what.count("`") % 2 == 0


def test_images_worth_a_look_come_first_and_before_the_end_alone():
    doubts = [["near copies", "a", "b"], ["near copies", "c", "d"], ["nearly one colour", "e", ""]]
    facts = run(doubts=doubts)
    first = advice.advice(facts)[0]
    assert first[0] and first[2] == "near copies (2), nearly one colour (1)"
    assert advice.advice({**facts, "summary": None}) == [first]
    assert not advice.look_first(run())[0]


def test_train_far_above_test():
    applies, text = told(advice.overfitted, train=[0.95, 0.9733], test=0.9028, summary={"best_epoch": 2})
    assert applies and "train 0.9733 in the kept epoch; test 0.9028, its interval ends at 0.9085" in text
    assert "`--cutout 16`, `--weight-decay 0.002`, `--mixup 0.4`" in text
    assert not told(advice.overfitted, train=[0.9733, 0.93], test=0.9028)[0]  # of the kept epoch
    assert not told(advice.overfitted, train=[0.9733], test=0.9028, n=(100, 100))[0]  # within chance
    for settings, wanted in (
        (dict(augment="none"), "`--augment standard`"),
        (dict(cutout=0), "`--cutout 8`, `--weight-decay 0.002`, `--mixup 0.4`;"),
        (dict(cutout=16, weight_decay=0.0), ": `--weight-decay 0.0005`"),
    ):
        assert wanted in told(advice.overfitted, **settings)[1]


@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_a_rate_of_the_range_test_is_rough_for_adam_and_adagrad(optimizer):
    """On CIFAR-10 the best rate of a grid is a tenth of Adam's, and up to eight times Adagrad's (docs/lecture.md)."""
    applies, text = told(advice.rough_rate, optimizer=optimizer, summary={"lr": 0.0222})
    assert applies is (optimizer in ("adam", "adagrad"))
    assert f"{optimizer}, rate 0.0222 of the range test" in text and "`--lr 0.002 0.007 0.07 0.2`" in text
    assert not told(advice.rough_rate, optimizer=optimizer, lr=0.003)[0]


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_accuracy_on_mixtures_says_nothing(mix):
    """It counts one of the two classes of an image."""
    for rule in (advice.overfitted, advice.unfinished, advice.too_small):
        assert rule(run(train=[0.5, 0.5], test=0.6)) and rule(run(train=[0.5, 0.5], test=0.6, **{mix: 1.0})) is None


@pytest.mark.parametrize("n", [15, 30, 59, 1000])
def test_an_interval_stays_between_0_and_1(n):
    (low, high), (other, most) = advice.wilson(0, n), advice.wilson(1, n)
    assert low == 0 < high < 1 and 0 < other < 1 == most and f"{low:.4f}" == "0.0000"


def test_train_low_and_rising():
    rising = [0.1 * i for i in range(1, 10)] + [0.92]
    applies, text = told(advice.unfinished, train=rising, schedule="plateau")
    assert applies and "train 0.9200, +0.1200 in the last 2 of 10 epochs" in text
    assert "`--epochs 20` (`--resume`" in text
    assert "resume" not in told(advice.unfinished, train=rising, schedule="one_cycle")[1]
    stopped = told(advice.unfinished, train=rising, schedule="plateau", epochs=50, stop_after=2)[1]
    assert "Train longer: without `--stop-after`." in stopped
    assert not told(advice.unfinished, train=[*rising[:-1], 0.96])[0]
    assert not told(advice.unfinished, train=[*rising[:-3], 0.9, 0.9, 0.9])[0]
    assert advice.unfinished(run(train=[0.5])) is None  # one epoch tells no rise


def test_train_low_and_still():
    still = dict(train=[0.5, 0.6, 0.6], test=0.6)
    assert told(advice.too_small, **still, model="medium")[0]
    assert "`--model large` or `--model resnet18 --pretrained`." in told(advice.too_small, **still, model="medium")[1]
    assert ": `--model resnet18 --pretrained`." in told(advice.too_small, **still, model="large")[1]
    assert not told(advice.too_small, train=[0.5, 0.6, 0.7], test=0.6)[0]  # it rises
    assert not told(advice.too_small, train=[0.5, 0.6, 0.6], test=0.95)[0]  # augmentation alone makes train low
    assert advice.too_small(run(train=[0.5], test=0.5)) is None
    assert advice.too_small(run(**still, cuts=[])) is None  # a smaller rate may be all that is missing


def test_a_plateau_that_never_came():
    applies, text = told(advice.never_cut, cuts=[], patience_epochs=5)
    assert applies and "patience 5, rate lowered 0 times" in text
    assert (
        "`--epochs 8`; less patience, `--patience-epochs 2`;" in text
        and "`--epochs 12`" in told(advice.never_cut, cuts=[], patience_epochs=9)[1]
    )
    assert advice.never_cut(run(train=[0.5], cuts=[])) is None
    assert "--patience-epochs" not in told(advice.never_cut, cuts=[], patience_epochs=0)[1]
    assert not told(advice.never_cut)[0] and advice.never_cut(run(cuts=[], schedule="one_cycle")) is None


def test_a_class_far_below():
    one = lambda right, n: dict(recalls=[("cat", right, n), ("dog", 1000, 1000), ("none", 0, 0)])
    applies, text = told(advice.weak_class, **one(800, 1000))
    assert (
        applies and "cat has recall 0.8000 in 1,000 images, its interval ends at 0.8236; test accuracy 0.9600" in text
    )
    assert "--class-weights" not in text
    assert "Classes have 500 to 1,000 test images" in told(advice.weak_class, **one(400, 500))[1]
    all_on = dict(class_weights=True, balanced_batches=True, keep="macro_f1")
    assert "uneven: more images of the smallest." in told(advice.weak_class, **one(400, 500), **all_on)[1]
    assert "uneven: `--keep macro_f1`." in told(advice.weak_class, **one(400, 500), **{**all_on, "keep": "auto"})[1]
    assert not told(advice.weak_class, **one(900, 1000))[0]
    assert not told(advice.weak_class, **one(16, 20))[0]  # within chance


def test_valid_that_is_small():
    applies, text = told(advice.small_valid, valid=[0.75, 0.7, 0.79], n=(143, 1))
    assert applies and "143 valid images, standard error 0.0338; its best two epochs are 0.0400 apart" in text
    assert "`--valid-pct 0.2`, or" in text and "`--keep valid_loss`" in text
    assert "`--valid-pct 0.5`" in told(advice.small_valid, valid_pct=0.3)[1]
    assert advice.small_valid(run(valid_pct=0.5)) is None
    own = "train/ is train, val/ is valid, test/ is test"  # where --valid-pct has no effect
    for pct in (0.1, 0.5):
        applies, text = told(advice.small_valid, n=(143, 1), valid_pct=pct, sets=own)
        assert applies and "Put more images into the folder of valid, or" in text and "--valid-pct" not in text
    assert "--keep" not in told(advice.small_valid, summary={"chosen_by": "loss"})[1]
    assert told(advice.small_valid, valid=[1.0], n=(24, 1))[0]  # where all are right as well
    assert not told(advice.small_valid, valid=[0.75, 0.7, 0.79], n=(5000, 1))[0]
    assert advice.small_valid(run(summary={"chosen_on": "test"})) is None
