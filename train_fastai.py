"""Train an image classifier in one command: range test, SGD under a schedule, curves, explained mistakes.

uv run train_fastai.py                       CIFAR-10, 50 epochs, SGD with momentum, ReduceLROnPlateau
uv run train_fastai.py --data digits         no download, a minute
uv run train_fastai.py --schedule plateau one_cycle --seeds 0 1 2      a comparison
uv run train_fastai.py --help                every setting
"""

import dataclasses
import signal
import sys
from pathlib import Path

from lib import cli
from lib import config as settings


def main(argv=None):
    """Runs the command line `argv`; returns the exit status: 0, 2 bad input, 3 diverged, 130 interrupted."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no é stops no run
    try:
        configs = settings.variants(argv)
        if len(configs) == 1:
            return train(configs[0])
        from lib import compare

        return compare.run(configs, train)
    except cli.BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        if not (isinstance(e, MemoryError) or "out of memory" in str(e) or "t allocate memory" in str(e)):
            raise
        print(f"error: {cli.one_line(e)}; try a smaller --batch-size, --size or --model", file=sys.stderr)
        return 2
    except cli.OneLine as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume and the run folder go on from its last checkpoint", file=sys.stderr)
        return 130


def train(config):
    """One run, from data to explained mistakes, in this process or in all that torchrun started."""
    from lib import data, machine, models, report, runs
    from lib.data.decode import RESIZE_RULE
    from lib.explain import evaluate
    from lib.train import averaging, checkpoint, learner, ranks, recorder, schedules
    from lib.train.lecture import batch_sizes

    models.check(config.model, config.pretrained)
    runs.check_out(config)
    runs.check_log(config.log)
    device = machine.pick_device(config)
    precision = machine.pick_precision(config, device)
    threads = machine.set_threads(config)
    machine.keep_memory()
    with ranks.joined(device) as leads:  # the first process reads first, and is the one that writes and prints
        with ranks.first_alone():
            dls = data.get_dls(config, device)
        asked, config = config, dataclasses.replace(config, batch_size=dls.train.bs)
        machine.seed_everything(config.seed)
        model = models.build(config.model, len(dls.vocab), config.pretrained, dls.train.plain()[0])
        side = models.smallest_side(model, config, dls.store.size)  # what cannot be explained is not trained
        models.check_batches(model, config, batch_sizes(config), len(dls.train.ids), side, ranks.world())
        learn = learner.build(config, dls, model, precision)
        facts = learner.facts(config, learn, precision, threads)
        if config.dry_run:
            if leads:
                print(*(f"{name}: {value}" for name, value in asked.to_dict().items()), sep="\n")
                print(learner.banner(config, facts, "nothing is written: dry run"))
            return 0

        run = past = lr = None
        if leads:
            past = checkpoint.load(Path(config.resume).expanduser() / "weights/last.pt") if config.resume else None
            run = runs.reopen(config, **facts) if config.resume else runs.start(asked, **facts)
            print(learner.banner(config, facts, run.path), flush=True)
            if past:
                lr = run.env["lr"]
            else:
                if dls.store.skipped:
                    runs.write_table(run / "skipped.csv", ("file", "reason"), dls.store.skipped)
                evaluate.save_train_batch(learn, config, run)
                run.save_model_card(models.card(config.model, dls, RESIZE_RULE, config.flip))
                lr = evaluate.range_test(learn, config, run) if config.lr == "find" else config.lr
                run.note(lr=lr)
            report.write(run.path, live=not config.lr_find_only, show=config.open)
        past, lr = ranks.same([past, lr])
        if config.lr_find_only:
            return 0

        best = averaging.KeepBest(run and run.save_weights)
        progress = recorder.Progress(config.progress, run and report.follow(run, config.log))
        saved = checkpoint.Checkpoint(run and run / "weights/last.pt", past, config.checkpoint_seconds)
        learn.add_cbs([best, saved, *([progress] if leads else []), *ranks.callbacks()])
        try:
            with saved.signals():
                schedules.fit(learn, config, lr)
            if leads:
                evaluate.report(learn, config, run, learn.recorder.rows, best)
            return 0
        except recorder.Diverged as e:
            if leads:
                kept = f"; the epochs before are in {run.path}" if learn.recorder.rows else ""
                print(f"error: {e}{kept}", file=sys.stderr)
            return 3
        except checkpoint.Interrupted:
            if leads:
                print(f"interrupted and saved; go on with: {sys.argv[0]} --resume {run.path}", file=sys.stderr)
            return 130
        finally:
            progress.close()
            if leads:
                report.write(run.path)  # however it ended: the page renews itself no more


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
