"""docs/notebook.ipynb, cell by cell, and fastai's own functions on our objects."""

import base64
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from lib.data import folders, sources
from tests.conftest import logits_of, state_of

NOTEBOOK = Path(__file__).parent.parent / "docs/notebook.ipynb"


@pytest.fixture(autouse=True)
def no_windows():
    matplotlib.use("agg")
    yield
    pyplot.close("all")


def test_its_outputs_are_those_of_its_cells_small_and_good():
    spec = importlib.util.spec_from_file_location("notebook", NOTEBOOK.parent.parent / ".ci/notebook.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    made = {"executed": script.code_of(notebook), "language_info": {"name": "python"}}  # and no kernel by name
    assert notebook["metadata"] == made, "uv run --with nbclient --with ipykernel .ci/notebook.py"
    first, *cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells) and not first["outputs"]  # it imports
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 7 and sum(len(base64.b64decode(picture)) for picture in pictures) < 150_000
    printed = "".join(line for output in outputs for line in output.get("text", ()))
    accuracies = [float(share) for share in re.findall(r"accuracy:? (0\.\d{4})", printed)]
    assert len(accuracies) == 3 and min(accuracies) > 0.95
    assert not re.search(r"(?<![\w.~$])/(?:root|home|work|tmp)/", text)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys, parse):
    """On the first 25 of each digit; the notebook has them all."""
    whole, few = sources.root_folder(parse("--data", "digits")), tmp_path / "digits"
    for folder in folders.visible(whole):
        (few / folder.name).mkdir(parents=True)
        for file in folders.visible(folder)[:25]:
            shutil.copy(file, few / folder.name)
    monkeypatch.setitem(sources.SOURCES, "digits", lambda config: few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cells = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    names, shown = {"__name__": "notebook"}, []
    for cell in cells:
        *lines, last = "".join(cell["source"]).splitlines()
        exec("\n".join(lines), names)
        try:  # as a notebook shows its last line
            shown.append(eval(last, names))
        except SyntaxError:
            exec(last, names)
    out = capsys.readouterr().out
    assert len(names["learn"].recorder.rows) == 1 and shown[-2]["epoch"] == 1  # fit_one_cycle's
    assert sum(isinstance(s, Figure) for s in shown) == 2  # curves, mistakes
    assert names["best"].epoch_number in range(1, 9) and "epoch 8/8" in out and f"{names['right']:.4f}" in out
    assert 0 < len(names["wrong"]) <= 4 and all(row["truth"] != row["prediction"] for row in names["wrong"])
    assert names["probabilities"].shape == (4, 10) and len(names["classes"]) == 4
    assert (tmp_path / "runs/notebook/summary.json").exists()


def test_fastais_own_looks_show_our_images_and_change_nothing(make):
    from fastai.vision.all import ClassificationInterpretation

    _, learn = make()
    learn.fit(1, 0.05)
    dls, before = learn.dls, state_of(learn)
    dls.show_batch(max_n=4)
    dls.valid.show_batch(max_n=4)
    axes = pyplot.gcf().axes
    assert [ax.get_title() for ax in axes] == [dls.vocab[k] for k in dls.valid.labels[:4]]
    for ax, i in zip(axes, dls.valid.ids):
        assert np.abs(np.asarray(ax.images[0].get_array()).astype(int) - dls.store[i]).max() <= 1
    learn.show_results(max_n=6, shuffle=False)
    z, _ = logits_of(learn, dls.valid)
    expected = [f"{dls.vocab[y]}\n{dls.vocab[k]}" for y, k in zip(dls.valid.labels, z.argmax(1))]
    assert [ax.get_title() for ax in pyplot.gcf().axes] == expected[:6]
    interp = ClassificationInterpretation.from_learner(learn, dl=dls.test)
    interp.plot_top_losses(3)
    z, y = logits_of(learn, dls.test)
    worst = -z.log_softmax(1)[range(len(y)), y].min().item()
    assert f" {worst:.2f} " in pyplot.gcf().axes[0].get_title()
    interp.plot_confusion_matrix()
    assert interp.confusion_matrix().trace() == (z.argmax(1) == y).sum() and len(pyplot.gcf().axes[0].texts) == 16
    assert sum(n for _, _, n in interp.most_confused()) == (z.argmax(1) != y).sum()
    assert state_of(learn) == before
    assert "Total params" in str(learn.summary())
