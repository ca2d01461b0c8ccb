"""What to try next, by rules. The report states each rule, with the numbers of the run. Needs neither torch nor numpy.

A rule is a function of the run. Its docstring is the condition, as report.html states it. The function returns whether
the rule applies, the numbers of this run, and what to try, with flags between backticks. If the rule makes no sense for
the run, it returns None.
"""

import math
from collections import Counter

from lib.cli import counted
from lib.config import ENDLESS, MODELS

Z = 1.96  # standard errors on each side of a 95% interval
UNEVEN = 1.5  # times as many images as the smallest class: then accuracy hides that class


def wilson(share, n):
    """Both ends of the 95% interval of a share that was seen in n images (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    z2 = Z**2 / n
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max((share + z2 / 2 - half) / (1 + z2), 0.0), min((share + z2 / 2 + half) / (1 + z2), 1.0)


def standard_error(share, n):
    """The standard error of a share seen in n images, from its interval: it is above 0 even if the share is 0 or 1."""
    low, high = wilson(share, n)
    return (high - low) / (2 * Z)


def look_first(run):
    """Some images are worth a look."""
    kinds = Counter(row[0] for row in run["doubts"])
    found = ", ".join(f"{kind} ({n:,})" for kind, n in kinds.items())
    return bool(kinds), found or "there are none", "Look at them first: the list below, or `doubts.csv`."


def mixed(run):
    """Whether training images were mixtures of two: train accuracy counts one of their two classes."""
    return bool(run["args"]["mixup"] or run["args"]["cutmix"])


def overfitted(run):
    """Train accuracy is more than 0.03 above the 95% interval of test accuracy."""
    args, summary = run["args"], run["summary"]
    if mixed(run):
        return None
    train, high = run["rows"]["train_acc"][summary["best_epoch"] - 1], wilson(summary["test_acc"], run["n"]["test"])[1]
    flags = [f"`--weight-decay {4 * args['weight_decay'] or 5e-4:g}`"]
    if args["augment"] == "none":
        flags.insert(0, "`--augment standard`")
    elif args["augment"] in ("standard", "photo") and args["cutout"] < 16:
        flags.insert(0, f"`--cutout {16 if args['cutout'] >= 8 else 8}`")
    flags.append("`--mixup 0.4`")
    numbers = f"train {train:.4f} in the kept epoch; test {summary['test_acc']:.4f}, its interval ends at {high:.4f}"
    text = f"Make the images harder to learn by heart: {', '.join(flags)}; or more images."
    return train - high > 0.03, numbers, text


def rise(run):
    """Train accuracy after the last epoch, its rise in the last fifth of the epochs, and the length of that fifth."""
    train = run["rows"]["train_acc"]
    last = min(max(len(train) // 5, 1), len(train) - 1)
    return train[-1], train[-1] - train[-1 - last], last


def unfinished(run):
    """Train accuracy is below 0.95, and rose by more than 0.01 in the last fifth of the epochs."""
    (train, more, last), n = rise(run), len(run["rows"]["epoch"])
    stopped, endless = n < run["args"]["epochs"], run["args"]["schedule"] in ENDLESS
    go_on = " (`--resume` with this folder goes on from here)" if endless and not stopped else ""
    longer = "without `--stop-after`" if stopped else f"`--epochs {2 * n}`"
    if not last or mixed(run):
        return None
    numbers = f"train {train:.4f}, {more:+.4f} in the last {last} of {n} epochs"
    return train < 0.95 and more > 0.01, numbers, f"Train longer: {longer}{go_on}."


def too_small(run):
    """Train and test are below 0.9, and train rose by at most 0.01 in the last fifth; under plateau, after a cut."""
    (train, more, last), model, test = rise(run), run["args"]["model"], run["summary"]["test_acc"]
    larger = [f"`--model {name}`" for name in MODELS[MODELS.index(model) + 1 :][:1]] if model in MODELS else []
    uncut = run["args"]["schedule"] == "plateau" and not run["cuts"]  # a smaller rate may be all that is missing
    if not last or mixed(run) or uncut or run["args"]["pretrained"]:
        return None
    numbers = f"train {train:.4f}, {more:+.4f} in the last {counted(last, 'epoch')}; test {test:.4f}"
    text = f"A network that learns more: {' or '.join([*larger, '`--model resnet18 --pretrained`'])}."
    return max(train, test) < 0.9 and more <= 0.01, numbers, text


def never_cut(run):
    """The schedule is plateau, and it never lowered the rate."""
    args, n = run["args"], len(run["rows"]["epoch"])
    patience = args["patience_epochs"]
    less = f" less patience, `--patience-epochs {patience // 2}`;" if patience else ""
    numbers = f"{args['schedule']}, {n} epochs, patience {patience}, rate lowered {counted(len(run['cuts']), 'time')}"
    if args["schedule"] != "plateau" or n == 1:
        return None
    more = max(2 * n, patience + 3)  # the first epoch is the best so far, and a cut needs an epoch to act
    text = f"Let the rate fall: more epochs, `--epochs {more}`;{less} or `--schedule one_cycle`."
    return not run["cuts"], numbers, text


def rough_rate(run):
    """The range test found the rate of adam or adagrad: the best may be ten times as small, or as large."""
    args, lr = run["args"], run["summary"]["lr"]
    found = args["lr"] == "find"
    numbers = f"{args['optimizer']}, rate {lr:.3g} {'of the range test' if found else 'of `--lr`'}"
    rates = " ".join(f"{lr * factor:.1g}" for factor in (0.1, 0.3, 3, 10))
    text = f"Compare rates by their valid accuracy: `--lr {rates}`."
    return found and args["optimizer"] in ("adam", "adagrad"), numbers, text


def weak_class(run):
    """The 95% interval of the recall of a class ends more than 0.05 below test accuracy."""
    classes = [(wilson(right / n, n)[1], right / n, name, n) for name, right, n in run["recalls"] if n]
    (high, recall, name, n), sizes = min(classes), sorted(size for *_, size in classes)
    text = "Look at its mistakes above: are they labelled right, and what do the maps look at?"
    if sizes[-1] >= UNEVEN * sizes[0]:
        flags = {"class_weights": "`--class-weights`", "balanced_batches": "`--balanced-batches`"}
        flags = [flag for name, flag in flags.items() if not run["args"][name]]
        flags += ["`--keep macro_f1`"] * (run["args"]["keep"] != "macro_f1")
        text += f" Classes have {sizes[0]:,} to {sizes[-1]:,} test images; if training is as uneven: "
        text += f"{', '.join(flags) or 'more images of the smallest'}."
    numbers = f"{name} has recall {recall:.4f} in {n:,} images, its interval ends at {high:.4f}"
    numbers += f"; test accuracy {run['summary']['test_acc']:.4f}"
    return run["summary"]["test_acc"] - high > 0.05, numbers, text


def small_valid(run):
    """The standard error of valid accuracy is above 0.01, so valid can hardly show which epoch is best."""
    (best, *others), n = sorted(run["rows"]["valid_acc"], reverse=True), run["n"]["valid"]
    own = "/ is valid" in run["sets"]
    if run["summary"]["chosen_on"] != "valid" or (run["args"]["valid_pct"] >= 0.5 and not own):
        return None
    error = standard_error(run["summary"]["valid_acc"], n)
    numbers = f"{n:,} valid images, standard error {error:.4f}"
    numbers += f"; its best two epochs are {best - others[0]:.4f} apart" if others else ""
    less = "" if run["summary"].get("chosen_by") == "loss" else ", or choose by what jumps less, `--keep valid_loss`"
    more = min(2 * run["args"]["valid_pct"], 0.5) or 0.2
    what = "Put more images into the folder of valid" if own else f"Hold out more, `--valid-pct {more:g}`"
    return error > 0.01, numbers, f"{what}{less}."


RULES = (look_first, overfitted, unfinished, too_small, never_cut, rough_rate, weak_class, small_valid)


def advice(run):
    """[applies, rule, numbers, what to try] for each rule that makes sense; while a run trains, for the first alone.

    `run`: args, sets (where they come from), n (images of each set), rows (columns of results.csv), summary (None while
    it trains), cuts (places between epochs where the rate fell, or the batch grew), recalls (name, right images and
    images of each class), doubts (rows of doubts.csv).
    """
    rules = RULES if run["summary"] else RULES[:1]
    return [[found[0], rule.__doc__, *found[1:]] for rule in rules if (found := rule(run))]
