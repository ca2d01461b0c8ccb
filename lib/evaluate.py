"""Looking at a learner: range test, test metrics, mistakes."""

from lib import runs


def save_train_batch(learn, run):
    pass


def range_test(learn, config, run):
    found = learn.lr_find(num_it=config.lr_iters)
    runs.write_csv(run / "lr_find.csv", found.rows())
    lr = found.suggestions[config.lr_suggest]
    print(f"range test: {found.suggestions}; {config.lr_suggest} is used: lr {lr:.3g}", flush=True)
    return lr


def report(learn, config, run, best):
    pass
