"""Train an image classifier in one command: range test, SGD under a schedule, curves, explained mistakes.

uv run train_fastai.py                       CIFAR-10, 50 epochs, SGD with momentum, ReduceLROnPlateau
uv run train_fastai.py --data digits         no download, a minute
uv run train_fastai.py --schedule plateau one_cycle --seeds 0 1 2      a comparison
uv run train_fastai.py --help                every setting
"""

import contextlib
import dataclasses
import functools
import gc
import shlex
import signal
import sys
import time

from lib import cli
from lib import config as settings

NO_MEMORY = "out of memory", "ALLOC_FAILED", "t allocate memory", "not enough memory"  # GPU (2), Linux, Windows
NO_WORKERS = "shared memory", "killed by signal: Killed", "exited unexpectedly"  # of loader processes


def main(argv=None):
    """Runs the command line `argv`. Returns 0, 1 (a rank is lost), 2 (bad input), 3 (diverged) or 130 (interrupted)."""
    cli.prepare_output()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(cli.Lasting, streams)  # a run goes on when nobody reads its output any more
    gc.disable()  # before training there is no garbage, and looking for it takes a fifth of the start
    try:
        configs = settings.variants(argv)
        if len(configs) == 1:
            return attempt(configs[0])
        from lib import compare

        return compare.run(configs, attempt)
    except cli.OneLine as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, cli.BadInput) else 1
    except KeyboardInterrupt:
        print("interrupted; if there is a run folder, --resume goes on with it", file=sys.stderr)
        return 130
    finally:
        gc.enable()
        gc.unfreeze()
        sys.stdout, sys.stderr = streams


def attempt(config, tested=None):
    """As `train`. Raises BadInput for too little memory."""
    try:
        return train(config, tested)
    except (MemoryError, RuntimeError, OSError) as e:
        workers = any(words in str(e) for words in NO_WORKERS)
        if not (workers or isinstance(e, MemoryError) or any(words in str(e) for words in NO_MEMORY)):
            raise
        remedy = "--workers 0" if workers else "a smaller --batch-size, --size or --model"
        raise cli.BadInput(f"{cli.one_line(e)}; try {remedy}") from None


def train(config, tested=None):
    """One run, from data to explained mistakes, in this process or in all that torchrun started.

    `tested` is a run folder with the same range test; this run uses its result.
    """
    start = time.perf_counter()
    from lib import data, machine, models, runs
    from lib import train as training
    from lib.train import budget, checkpoint, lecture, ranks, timing

    if not gc.isenabled() and not gc.get_freeze_count():  # the first run of a command
        gc.freeze()  # the collector never looks through what the imports made
    if len(config.seeds) > 1:
        raise cli.BadInput(f"seeds {config.seeds}: train() makes one run; call it for each seed")
    models.check(config.model, config.pretrained)
    runs.check_out(config)
    runs.check_log(config.log)
    device, precision, threads = machine.prepare(config)
    with ranks.joined(device):
        with ranks.first_alone():  # the first process decodes the images, the others find them
            dls = data.get_dls(config, device)
        ranks.check_same(f"the images of --data {config.data}", dls.store.fingerprint)
        ranks.check_same("the number format of --precision auto", precision)
        chosen, choices = ranks.same(ranks.on_first(budget.choose)(config, dls, precision, start))
        config = dataclasses.replace(config, **chosen)
        asked, config = config, data.without_auto(config, dls)  # args.yaml has what was asked for
        machine.seed_everything(config.seed)
        model = models.build(config.model, len(dls.vocab), config.pretrained, dls.train.plain()[0])
        models.cam_layer(model, dls.store.size)  # raises BadInput if GradCAM could not explain the network
        sizes = lecture.batch_sizes(config)
        models.check_batches(model, config, sizes, len(dls.train.ids), dls.store.size, ranks.world())
        learn = training.build(config, dls, model, precision)
        gc.enable()
        facts = runs.facts(config, dls, model, precision, threads) | choices
        if config.dry_run:
            ranks.on_first(runs.show)(asked, config, facts)
            ranks.on_first(data.say_doubts)(dls)
            ranks.on_first(lambda: print(timing.expectation(learn, config, precision)[1]))()
            return 0
        past = ranks.same(ranks.on_first(checkpoint.of_run)(config.resume))
        make = functools.partial(runs.reopen, config) if config.resume else functools.partial(runs.start, asked)
        with contextlib.closing(ranks.on_first(make, runs.NOWHERE)(**facts)) as run:
            lr = ranks.same(ranks.on_first(begin)(learn, config, run, facts, past, tested))
            return 0 if config.lr_find_only else fit(learn, config, run, past, lr, start)


def begin(learn, config, run, facts, past, tested):
    """Writes and prints what comes before the training; returns the learning rate, given or from the range test."""
    from lib import data, models, report, runs
    from lib.data import augment
    from lib.explain import evaluate
    from lib.train import timing

    print(runs.banner(config, facts, run.path), flush=True)
    if not past:
        data.say_doubts(learn.dls, run.path)
        if skipped := learn.dls.store.skipped:
            runs.write_table(run / "skipped.csv", ("file", "reason"), skipped)
        runs.write(run / "augment.yaml", augment.saved(learn.dls.augment))
        runs.write_json(run / "weights/model.json", models.card(config.model, learn.dls))
        evaluate.save_train_batch(learn, run)
        lr, step = config.lr, None
        if lr == "find":
            lr, step = (tested and evaluate.same_test(run, tested)) or evaluate.range_test(learn, config, run)
        run.note(lr=lr)
        if not config.lr_find_only:
            seconds, line = timing.expectation(learn, config, facts["precision"], step)
            run.note(expected_seconds=seconds)
            print(line, flush=True)
    report.write(run.path, live=not config.lr_find_only, show=config.open)
    return run.env["lr"]


def fit(learn, config, run, past, lr, start):
    """Trains, then evaluates and explains the best weights; returns the exit status."""
    from lib import predict, report, runs
    from lib import train as training
    from lib.explain import evaluate
    from lib.train import averaging, checkpoint, progress, ranks, recorder

    save_weights = functools.partial(runs.write, run.path / "weights/best.safetensors")
    best = averaging.KeepBest(save_weights if ranks.leads() else None, config.keep)
    saved = checkpoint.Checkpoint(run.path / "weights/last.pt", past, config.checkpoint_seconds)
    complain = ranks.on_first(lambda text: print(text, file=sys.stderr))
    try:
        # the first rank prints and writes the page; the others get []
        lines = ranks.on_first(lambda: [progress.EpochLines(config.progress, report.follow(run, config.log))], [])()
        learn.add_cbs([best, saved, *lines] + [ranks.DataParallel()] * (ranks.world() > 1))
        began = time.perf_counter()
        with saved.signals():
            training.fit(learn, config, lr)
        ranks.on_first(evaluate.report)(learn, config, run, learn.recorder.rows, best, start, began)
        ranks.on_first(report.say)(run.path)
        if learn.dls.unlabelled:  # images of the data without classes
            ranks.on_first(predict.to_file)(run.path, learn.dls.unlabelled, learn.dls.device)
        return 0
    except recorder.Diverged as e:
        complain(f"error: {e}" + (f"; the epochs before are in {run.path}" if learn.recorder.rows else ""))
        if ranks.leads():
            run.note(ended=str(e))
        return 3
    except checkpoint.Interrupted:
        script = sys.argv[0] if sys.argv[0].endswith(".py") and "ipykernel" not in sys.argv[0] else "train_fastai.py"
        go_on = shlex.join(["uv", "run", script, "--resume", run.path.as_posix()])
        complain(f"interrupted and saved; go on with: {go_on}")
        return 130
    finally:
        ranks.on_first(report.write)(run.path)  # however the run ended, this page no longer reloads itself


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
