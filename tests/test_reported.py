"""What users of other projects have reported, tried here (docs/reported-elsewhere.md); most has its test elsewhere."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.tracker import SaveModelCallback
from matplotlib import pyplot
from PIL import Image

from lib.data import Cutout, loader
from tests.conftest import good

ROOT = Path(__file__).parent.parent


def test_a_set_that_lacks_a_class_keeps_the_labels_of_the_others(tmp_path, parse):
    """Labels go by name, not by the order of the folders that a set happens to have."""
    for name, classes in (("train", "abcd"), ("valid", "abd"), ("test", "bd")):
        good(tmp_path / "data" / name, classes, 4)
    dls = loader.get_dls(parse("--data", tmp_path / "data", "--size", 16, "-b", 4))
    assert list(dls.vocab) == list("abcd")
    for dl in (dls.train, dls.valid, dls.test):
        assert [dls.vocab[k] for k in dl.labels] == [Path(dls.store.names[i]).parent.name for i in dl.ids]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_cutout_of_any_size_hides_pixels(size):
    image, hidden = np.full((16, 16, 3), 200, np.uint8), []
    transform = Cutout(size, (0, 0, 0), p=1.0)
    for _ in range(200):
        hidden.append(int((transform(image=image)["image"] == 0).all(2).sum()))
    assert max(hidden) == size**2 and min(hidden) >= 1


@pytest.mark.filterwarnings("ignore")  # fastprogress draws for notebooks
def test_a_fit_that_begins_later_goes_on_with_files_and_graph(make, tmp_path, monkeypatch):
    _, learn = make("--epochs", 4)
    learn.path = tmp_path
    save = lambda: SaveModelCallback(every_epoch=True, fname="m")
    learn.fit(2, 0.01, cbs=save())
    first = {path: path.read_bytes() for path in (tmp_path / "models").iterdir()}
    assert sorted(path.name for path in first) == ["m_0.pth", "m_1.pth"]
    learn.add_cb(ProgressCallback)  # which the graph needs
    learn.fit(4, 0.01, start_epoch=2, cbs=[save(), ShowGraphCallback()])
    pyplot.close("all")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [f"m_{i}.pth" for i in range(4)]
    assert all(path.read_bytes() == content for path, content in first.items())


def test_looks_leave_the_log_and_the_record(make, tmp_path):
    def look(learn):
        learn.validate(), learn.get_preds(), learn.show_results(max_n=2)
        pyplot.close("all")

    class Looks(Callback):
        order = 90  # after the log

        def after_epoch(self):
            look(self.learn)

    told = []
    for cbs in ([], [Looks()]):
        _, learn = make()
        learn.path = tmp_path
        learn.fit(2, 0.01, cbs=[CSVLogger(), *cbs])
        log, values = (tmp_path / "history.csv").read_text(), [list(row) for row in learn.recorder.values]
        look(learn)
        assert (tmp_path / "history.csv").read_text() == log
        assert [list(row) for row in learn.recorder.values] == values
        told.append(([line.rsplit(",", 1)[0] for line in log.splitlines()], values))  # without the time
    assert told[0] == told[1] and len(told[0][0]) == 3


def test_small_and_wide_images_train_as_they_are(tmp_path, parse):
    rng = np.random.default_rng(0)
    for k in range(2):
        for i in range(6):
            path = tmp_path / "wide" / str(k) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (21, 52, 3), dtype=np.uint8)).save(path)
    dls = loader.get_dls(parse("--data", tmp_path / "wide", "--size", 16, "-b", 4))
    x, _ = dls.one_batch()
    assert x.shape[1:] == (3, 16, 16) and torch.isfinite(x).all()
    assert dls.store.shapes[0].tolist() == [16, 40]  # the shorter side fits; nothing is squeezed


def test_the_table_has_30_reports_and_tests_that_exist():
    text = (ROOT / "docs/reported-elsewhere.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) >= 30
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        for name in named:
            files = [ROOT / f"tests/{name}.py", *(ROOT / "tests").glob("*.py")]
            assert files[0].exists() or any(f"def {name}(" in f.read_text() for f in files[1:]), name
