"""Train an image classifier in one command: range test, SGD under a schedule, curves, explained mistakes.

uv run train_fastai.py                       CIFAR-10, 50 epochs, SGD with momentum, ReduceLROnPlateau
uv run train_fastai.py --data digits         no download, a minute
uv run train_fastai.py --schedule plateau one_cycle --seeds 0 1 2      a comparison
uv run train_fastai.py --help                every setting
"""

import sys
from pathlib import Path

from lib import config as settings


def main(argv=None):
    """Runs the command line `argv`; returns the exit status: 0, 2 bad input, 3 diverged, 130 interrupted."""
    try:
        configs = settings.variants(argv)
        if len(configs) == 1:
            return train(configs[0])
        from lib import compare

        return compare.run(configs, train)
    except settings.BadInput as e:
        print("error:", *str(e).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume and the run folder go on from its last whole epoch", file=sys.stderr)
        return 130


def train(config):
    """One run, from data to explained mistakes."""
    from lib import callbacks, checkpoint, data, evaluate, learner, models, runs, schedules, store

    models.check(config.model, config.pretrained)
    device = models.pick_device(config)
    precision = learner.pick_precision(config, device)
    threads = learner.set_threads(config)
    dls = data.get_dls(config, device)
    learner.seed_everything(config.seed)
    model = models.build(config.model, len(dls.vocab), config.pretrained)
    models.cam_layer(model, dls.store.size)  # a network that cannot be explained is refused before it is trained
    learn = learner.build(config, dls, model, precision)
    facts = learner.facts(config, learn, precision, threads)
    if config.dry_run:
        print(*(f"{name}: {value}" for name, value in config.to_dict().items()), sep="\n")
        print(learner.banner(config, facts, "nothing is written: dry run"))
        return 0

    past = checkpoint.load(Path(config.resume).expanduser() / "weights/last.pt") if config.resume else None
    run = runs.reopen(config, **facts) if config.resume else runs.start(config, **facts)
    print(learner.banner(config, facts, run.path))
    if past:
        lr = run.env["lr"]
    else:
        evaluate.save_train_batch(learn, run)
        lr = evaluate.range_test(learn, config, run) if config.lr == "find" else config.lr
        run.note(lr=lr)
        if config.lr_find_only:
            return 0
        run.save_model_card(models.card(config.model, dls, store.RESIZE_RULE))

    best = callbacks.KeepBest(run.save_weights)
    progress = callbacks.Progress(config.progress, run.save_rows)
    learn.add_cbs([best, progress, checkpoint.Checkpoint(run / "weights/last.pt", past)])
    try:
        schedules.fit(learn, config, lr)
    except callbacks.Diverged as e:
        progress.close()
        print(f"error: {e}", file=sys.stderr)
        return 3

    evaluate.report(learn, config, run, learn.recorder.rows, best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
