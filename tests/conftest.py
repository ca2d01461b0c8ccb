import functools
import hashlib
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback

os.environ["FASTAI_HOME"] = tempfile.mkdtemp()  # where fastai keeps data sets: what lies in ~/.fastai must not matter
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ["no_proxy"] = "127.0.0.1,localhost"  # the servers of the tests are here
os.environ["MPLBACKEND"] = "agg"  # a notebook's terminal hands on its own
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, a thread each
if "PYTEST_XDIST_WORKER" not in os.environ and "cuda" not in " ".join(sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for a CPU; those for a GPU are pytest -m cuda

import numpy as np
import pytest
import torch
from PIL import Image

from lib import config as settings
from lib import machine
from lib.data import loader
from lib.models import zoo
from lib.train import learner, sharing
from train_fastai import main

# the options of a run of a second
SMALL = ("--size", 16, "--model", "small", "-b", 8, "--epochs", 1, "--lr", 0.05, "--gallery", 2)


def pytest_unconfigure():
    shutil.rmtree(os.environ["FASTAI_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` are skipped where there is no such device."""
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m cuda"))


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """As many threads in every test, whatever a run in the one before asked for, and whoever else is busy."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    monkeypatch.setattr(sharing, "WINDOW", math.inf)
    if sys.platform == "darwin":  # a Mac's tests are those of a CPU
        monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: False))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder that the session shares: the digits are written into it once."""
    return tmp_path_factory.mktemp("cache")


def picture(rng, k, h=32, w=32):
    """A noisy image of class `k`: a bright band whose place depends on the class."""
    image = rng.integers(0, 120, (h, w, 3))
    image[h * k // 4 : h * (k + 1) // 4] += 130
    return image.astype(np.uint8)


def save(path, array, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kwargs)


@pytest.fixture(scope="session")
def bands(tmp_path_factory):
    """A folder of 4 classes x 30 generated images, 32 x 32."""
    root, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for k in range(4):
        for i in range(30):
            save(root / f"class {k}" / f"{i:02}.png", picture(rng, k))
    return root


@pytest.fixture
def parse(cache):
    """`config.parse` with the session's cache folder."""
    return lambda *argv: settings.parse(["--cache", str(cache), *map(str, argv)])


@pytest.fixture
def make(bands, parse):
    """make(*argv) -> (config, learner) on the generated images."""

    def make(*argv, cbs=None, precision="float32"):
        config = parse("--data", bands, "--size", 32, "--model", "small", "-b", 16, "--epochs", 2, *argv)
        dls = loader.get_dls(config)
        torch.manual_seed(config.seed)
        model = zoo.build(config.model, len(dls.vocab), images=dls.train.plain()[0])
        config = loader.without_auto(config, dls)
        return config, learner.build(config, dls, model, precision, cbs)

    return make


def good(root, classes=("a", "b"), n=8):
    """Writes `n` images of each class under `root`."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        for i in range(n):
            save(root / name / f"{i}.png", picture(rng, k % 4, 20, 20))
    return root


@pytest.fixture
def photos(tmp_path):
    return good(tmp_path / "photos")


@pytest.fixture
def refused(tmp_path, capfd, recwarn):
    """refused(*argv) runs the command and returns its line: it must refuse, in one, and leave nothing but a cache."""

    def refused(*argv):
        before = set(tmp_path.rglob("*"))
        assert main([*map(str, SMALL), "--out", str(tmp_path / "runs"), *map(str, argv)]) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and err[:-1].isprintable(), err
        made = {p.relative_to(tmp_path) for p in set(tmp_path.rglob("*")) - before}
        assert not [p for p in made if p.name != "runs" and "cache" not in p.parts]
        told = [w for w in recwarn if "PIL" not in w.filename and w.category is not ResourceWarning]  # PIL's go nowhere
        assert [str(w.message) for w in told] == []
        return err

    return refused


def fingerprint(*things):
    """A hash of tensors, arrays and plain values, nested in dicts and lists: equal if and only if equal to the bit."""
    h = hashlib.sha256()

    def add(x):
        if isinstance(x, dict):
            for k in x:
                add(k), add(x[k])
        elif isinstance(x, (list, tuple)):
            for y in x:
                add(y)
        elif isinstance(x, torch.Tensor):
            h.update(x.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(x, np.ndarray):
            h.update(x.tobytes())
        else:
            h.update(repr(x).encode())

    add(things)
    return h.hexdigest()


def state_of(learn):
    """All that a look must leave alone."""
    import random

    return fingerprint(
        learn.model.state_dict(),
        [p.grad for p in learn.model.parameters()],
        learn.opt.state_dict() if learn.opt else None,
        [m.training for m in learn.model.modules()],
        [len(m._forward_hooks) + len(m._backward_hooks) for m in learn.model.modules()],
        [dl.epoch for dl in learn.dls.loaders],
        [dl.rng.getstate() for dl in learn.dls.loaders],
        learn.recorder.values,
        learn.epochs_trained,
        learn.recorder.rows,
        [type(cb).__name__ for cb in learn.cbs],
        torch.get_rng_state(),
        str(np.random.get_state()),
        random.getstate(),
    )


def logits_of(learn, dl):
    """(logits, targets) of every image of a loader, in float32."""
    with learn.in_float32():
        return learn.get_preds(dl=dl, act=lambda logits: logits)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_ranks(n, job, path):
    """Runs `job(rank)` in `n` processes as torchrun would; returns their exit statuses, -9 for a SIGKILL.

    They are forked from this process, which saves them the imports; what they print goes to rank<n>.txt in `path`.
    """
    port, children = str(free_port()), []
    for rank in range(n):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                out = os.open(path / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1), os.dup2(out, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                loop = "lo0" if sys.platform == "darwin" else "lo"
                os.environ["GLOO_SOCKET_IFNAME"] = loop  # the machine's own name may lead nowhere
                os.environ.update(zip(machine.TORCHRUN, (str(rank), str(n), str(rank), str(n), "127.0.0.1", port)))
                torch.set_num_threads(1)  # the threads of the parent are not there
                status = job(rank) or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        children.append(child)
    statuses, ends = {}, time.monotonic() + 300  # gloo itself waits for hours
    while len(statuses) < n:
        for child in set(children) - set(statuses):
            if time.monotonic() > ends:
                os.kill(child, signal.SIGKILL)
            pid, status = os.waitpid(child, os.WNOHANG)
            statuses |= {child: os.waitstatus_to_exitcode(status)} if pid else {}
        time.sleep(0.02)
    return [statuses[child] for child in children]
