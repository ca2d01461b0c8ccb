"""A run, used: lib.predict and lib.export."""

import csv
import io
import json
import mimetypes
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import config as settings
from lib import export, predict
from lib.cli import BadInput
from lib.data import loader
from lib.data.decode import centre, read
from lib.explain import evaluate
from lib.train import learner
from tests.conftest import picture, save


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, data folder) of a run on photograph-like files: JPEG large and small, EXIF, grey, transparent."""
    from train_fastai import main

    out, rng = tmp_path_factory.mktemp("used"), np.random.default_rng(0)
    root, turned = out / "photos", Image.Exif()
    turned[0x0112] = 6
    for k in range(3):
        for i in range(24):
            h, w = (int(v) for v in rng.integers(30, 60 if i % 2 else 260, 2))
            array, folder = picture(rng, k, h, w), root / f"class, {k}"
            kind = i % 6
            if kind == 4:
                array = array[..., 0]
            if kind == 5:
                array = np.dstack([array, rng.integers(0, 256, (h, w, 1), np.uint8)])
            exif = dict(exif=turned) if kind == 3 else {}
            save(folder / f"{i:02}.{'png' if kind in (2, 5) else 'jpg'}", array, **exif)
    argv = ["--data", root, "--size", 32, "--model", "small", "-b", 16, "--epochs", 3, "--lr", 0.05, "--out", out]
    assert main([*map(str, argv), "--name", "x"]) == 0
    return out / "x", root


@pytest.fixture(scope="module")
def evaluated(trained):
    """(paths, targets, probabilities) of the run's test images, as evaluation has them."""
    run, _ = trained
    config = settings.parse(["-c", str(run / "args.yaml")])
    dls = loader.get_dls(config)
    learn = learner.build(config, dls, predict.load(run, "cpu").model)
    targets, p, _ = evaluate.outcome(learn, dls.test)
    return [dls.store.paths[i] for i in dls.test.ids], targets, p


def table(argv, capsys):
    """(exit status, rows of the CSV on stdout, stderr) of lib.predict."""
    status = predict.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return status, list(csv.DictReader(io.StringIO(out, newline=""))), err


def test_predictions_are_those_of_evaluation(trained, evaluated, capsys):
    run, _ = trained
    paths, targets, p = evaluated
    use = predict.load(run, "cpu")
    classes, found = use(paths)
    assert (found == p).all() and found.shape == (len(paths), 3) and found.dtype == np.float64
    assert classes == [use.classes[k] for k in p.argmax(1)]
    summary = json.loads((run / "summary.json").read_text())
    assert np.mean(found.argmax(1) == targets) == summary["test_acc"]
    assert -np.log(found[np.arange(len(p)), targets]).mean() == pytest.approx(summary["test_loss"], rel=1e-6)
    status, rows, err = table([run, *paths], capsys)
    assert status == 0 and err == "" and [row["file"] for row in rows] == list(map(str, paths))
    assert [row["prediction"] for row in rows] == classes
    assert np.abs([float(row["probability"]) for row in rows] - p.max(1)).max() <= 5e-7


def test_tta_looks_at_mirror_images_too(trained, evaluated, capsys, tmp_path):
    run, root = trained
    paths, targets, p = evaluated
    pixels = [centre(read(path, 32), 32) for path in paths]
    turned = predict.load(run, "cpu")([image[:, ::-1] for image in pixels])[1]
    both = np.sqrt(p * turned)  # the mean of logits
    found = predict.load(run, "cpu", tta=True)(paths)[1]
    assert np.abs(found - both / both.sum(1, keepdims=True)).max() < 1e-6 < np.abs(found - p).max()
    summary = json.loads((run / "summary.json").read_text())
    assert np.mean(found.argmax(1) == targets) == summary["tta_test_acc"]
    status, rows, _ = table([run, *paths, "--tta"], capsys)
    assert status == 0 and np.abs([float(row["probability"]) for row in rows] - found.max(1)).max() <= 5e-7
    shutil.copytree(run / "weights", tmp_path / "weights")
    for flip in (False, None):  # None: a run of before
        card = json.loads((run / "weights/model.json").read_text())
        card.pop("flip") if flip is None else card.update(flip=flip)
        (tmp_path / "weights/model.json").write_text(json.dumps(card))
        status, rows, err = table([tmp_path, root, "--tta"], capsys)
        assert status == 2 and rows == [] and err.startswith("error: --tta:") and err.count("\n") == 1
        assert table([tmp_path, root], capsys)[0] == 0


def test_batches_and_threads_change_nothing(trained, monkeypatch):
    run, root = trained
    use, files = predict.load(run, "cpu"), predict.find([root])
    assert len(files) == 72
    all_at_once = use(files)[1]
    for batch in (5, 1, 72):
        monkeypatch.setattr(predict, "evaluation_batch", lambda size, batch=batch: batch)
        assert np.abs(use(iter(files))[1] - all_at_once).max() < 1e-6


def test_images_may_be_paths_pillow_images_or_arrays(trained):
    run, root = trained
    use, rng = predict.load(run, "cpu"), np.random.default_rng(1)
    for shape in ((40, 50, 3), (40, 50), (32, 64, 4)):
        array = rng.integers(0, 256, shape, np.uint8)
        save(root.parent / "one.png", array)
        forms = [root.parent / "one.png", str(root.parent / "one.png"), Image.fromarray(array), array]
        together = use(forms)[1]
        assert (together == together[0]).all()
        for form in forms:
            classes, p = use(form)
            assert len(classes) == 1 and np.allclose(p, together[:1], atol=1e-6)
    stack = rng.integers(0, 256, (4, 40, 40, 3), np.uint8)
    assert (use(stack)[1] == use(list(stack))[1]).all() and len(use(stack)[0]) == 4
    upright = next(p for p in predict.find([root]) if p.stem == "03")  # turned by EXIF
    assert np.allclose(use(Image.open(upright))[1], use(upright)[1], atol=0.05)
    classes, p = use([])
    assert classes == [] and p.shape == (0, 3)
    for wrong in (stack / 255, stack[..., :2], [np.zeros((0, 4, 3), np.uint8)], np.zeros(7, np.uint8)):
        with pytest.raises(BadInput, match="an image must be uint8"):
            use(wrong)


def test_folders_are_searched_in_a_fixed_order_and_hidden_names_passed_over(trained, tmp_path):
    for name in ("b/2.png", "a.PNG", "b/.hidden.png", ".git/x.png", "notes.txt", "b/c/1.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [str(p.relative_to(tmp_path)) for p in predict.find([tmp_path])]
    assert found == ["a.PNG", "b/2.png", "b/c/1.jpeg"]
    assert predict.find([tmp_path / "notes.txt", tmp_path / "a.PNG"]) == [tmp_path / "notes.txt", tmp_path / "a.PNG"]


HOSTILE = 'a,"b"\n<i>\x1b[31m=1.png'
RETURN = "c\rd.png"


@pytest.fixture
def hostile(tmp_path):
    rng = np.random.default_rng(2)
    save(tmp_path / "in" / HOSTILE, picture(rng, 1))
    save(tmp_path / "in" / "b.png", picture(rng, 2))
    save(tmp_path / "in" / RETURN, picture(rng, 2))
    return tmp_path / "in"


def test_links_that_lead_to_no_image_are_named(trained, hostile, capsys):
    (hostile / "gone.png").symlink_to(hostile / "nowhere.png")
    (hostile / "more").symlink_to(hostile.parent)
    status, rows, err = table([trained[0], hostile], capsys)
    assert status == 2 and len(rows) == 3 and err.count("is passed over; links to folders") == 2


def test_hostile_names_survive_csv(trained, hostile, capsys):
    status, rows, _ = table([trained[0], hostile], capsys)
    assert status == 0 and [row["file"] for row in rows] == [str(hostile / name) for name in (HOSTILE, "b.png", RETURN)]
    assert all(row["prediction"].startswith("class, ") and 1 / 3 < float(row["probability"]) <= 1 for row in rows)


def test_a_terminal_gets_no_control_character(trained, hostile, monkeypatch):
    (hostile / "broken\x1b]0;x\x07.png").write_bytes(b"no image")
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal, monkeypatch.context() as m:
        m.setattr(sys, "stdout", terminal)
        m.setattr(sys, "stderr", terminal)
        assert predict.main([str(trained[0]), str(hostile / HOSTILE)]) == 0
        assert predict.main([str(trained[0]), str(hostile)]) == 2
        terminal.flush()
        out = b""
        while select.select([ours], [], [], 0.5)[0]:
            out += os.read(ours, 65536)
    os.close(ours)
    text = out.decode().replace("\r\n", "\n")
    assert r"\x1b[31m=1.png" in text and r"broken\x1b]0;x\x07.png: is no whole JPEG" in text and text.count("\n") == 7
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_reader_that_has_enough_is_no_error(trained, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out, monkeypatch.context() as m:
        m.setattr(sys, "stdout", out)
        assert predict.main([str(trained[0]), str(trained[1])]) == 0


def test_each_good_image_has_a_row_and_each_other_a_line(trained, tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(3)
    for i in range(4):
        save(tmp_path / "in" / f"{i}.png", picture(rng, 1))
    save(tmp_path / "in" / "5.avif", picture(rng, 1))
    (tmp_path / "in/4.jpg").write_bytes(b"no image")
    (tmp_path / "in/6.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (tmp_path / "in/7.psd").write_bytes(b"")
    (tmp_path / "in/notes.txt").write_text("")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "in/0.png")
    monkeypatch.setattr(mimetypes, "guess_type", lambda path: (None, None))  # as on a system without a list of them
    for batch in (500, 1):
        monkeypatch.setattr(predict, "evaluation_batch", lambda size, batch=batch: batch)
        status, rows, err = table([trained[0], tmp_path / "in", "--explain", tmp_path / "why"], capsys)
        names = ["0.png", "1.png", "2.png", "3.png", "5.avif", "link.png"]
        assert status == 2 and [row["file"] for row in rows] == [str(tmp_path / "in" / name) for name in names]
        assert [sum(name in line for line in err.splitlines()) for name in ("4.jpg", "6.HEIC", "7.psd")] == [1, 1, 1]
        assert err.count("\n") == 3 and all(line.startswith("error: ") for line in err.splitlines())
        assert len(list((tmp_path / "why").iterdir())) == 6


def test_heic_is_read_where_its_package_is_installed(trained, tmp_path, capsys, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    image = Image.fromarray(picture(np.random.default_rng(3), 1))
    image.save(tmp_path / "a.heic", quality=90)
    shutil.copy(tmp_path / "a.heic", tmp_path / "a.jpg")
    assert np.abs(read(tmp_path / "a.heic", 32).astype(int) - np.asarray(image)).mean() < 30  # of noise
    status, rows, err = table([trained[0], tmp_path], capsys)
    assert (status, len(rows), err) == (0, 2, "")
    for i in range(24):
        (tmp_path / f"photos/{i % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "a.heic", tmp_path / f"photos/{i % 2}/{i}.heic")
    command = [sys.executable, "train_fastai.py", "--data", tmp_path / "photos", "--cache", tmp_path / "cache"]
    for _ in range(2):  # the second process finds the pixels, and decodes nothing
        subprocess.run([*command, "--model", "small", "--dry-run"], cwd=Path(predict.__file__).parents[1], check=True)


def test_a_flag_that_only_another_command_has_is_not_suggested(capsys):
    assert predict.main(["runs/x", "a.png", "--output", "p.csv"]) == 2
    err = capsys.readouterr().err
    assert "unrecognized arguments: --output" in err and "did you mean" not in err


def test_heic_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.data.decode.find_spec", lambda name: None)
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))  # as phones send them
    with pytest.raises(BadInput, match="a.jpg: is HEIC, which takes pillow-heif"):
        read(tmp_path / "a.jpg", 32)


def test_explain_writes_a_picture_an_image(trained, hostile, capsys, tmp_path):
    status, rows, _ = table([trained[0], hostile, "--explain", tmp_path / "why"], capsys)
    made = sorted(p.name for p in (tmp_path / "why").iterdir())
    assert status == 0 and made == ["00001-a__b___i___31m_1.png", "00002-b.png", "00003-c_d.png"]
    for name in made:
        with Image.open(tmp_path / "why" / name) as image:
            left, right = np.split(np.asarray(image.convert("RGB")).astype(int), 2, axis=1)
        assert min(image.size) > 400 and np.ptp(right[150:]) > 100 and (left[150:] != right[150:]).mean() > 0.2


def test_explain_shortens_a_long_name_and_options_may_come_first(trained, tmp_path, capsys):
    image = tmp_path / f"{'猫' * 80}.png"
    shutil.copy(predict.find([trained[1]])[0], image)
    status, rows, _ = table([trained[0], "--explain", tmp_path / "why", image, "--device", "cpu"], capsys)
    assert status == 0 and len(rows) == 1 and len(list((tmp_path / "why").iterdir())) == 1


def test_bad_input_is_one_line_that_names_it(trained, tmp_path, capsys):
    run, root = trained
    image = predict.find([root])[0]
    bare, damaged, other = (tmp_path / name for name in ("bare", "damaged", "other"))
    (bare / "weights").mkdir(parents=True)
    shutil.copy(run / "weights/model.json", bare / "weights")
    for folder in (damaged, other):
        shutil.copytree(run, folder)
    (damaged / "weights/best.safetensors").write_bytes(b"\0" * 100)
    card = json.loads((run / "weights/model.json").read_text())
    (other / "weights/model.json").write_text(json.dumps({**card, "args": {**card["args"], "stem": 9}}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    cases = [
        ([tmp_path / "no-run", image], "no-run: no such run folder"),
        ([bare, image], "best.safetensors: not found"),
        ([damaged, image], "damaged: its weights cannot be loaded"),
        ([other, image], "other: its weights cannot be loaded"),
        ([run, tmp_path / "no.png"], "no.png: no such file"),
        ([run, tmp_path / "empty"], "empty: no images"),
        ([run, tmp_path / "text.png"], "text.png: is no whole JPEG"),
        ([run, image, "--device", "abacus"], "--device"),
        ([run, image, "--explain", tmp_path / "text.png"], "--explain"),
        ([run], "or --serve alone"),
    ]
    for argv, words in cases:
        status, _, err = table(argv, capsys)
        assert status == 2 and words in err and err.count("\n") == 1, (argv, err)
    assert export.main([str(tmp_path / "no-run")]) == 2
    assert "no such run folder" in capsys.readouterr().err


@pytest.mark.parametrize("module", [predict, export])
def test_help_is_short(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.startswith(f"usage: python -m {module.__name__}") and out.count("\n") < 25


# --- export ----------------------------------------------------------------------------------------------------------


def test_onnx_without_its_packages_says_what_to_install(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.main([str(trained[0])]) == 2
    err = capsys.readouterr().err
    assert "--extra onnx" in err and "onnxruntime" in err and err.count("\n") == 1
    assert not (trained[0] / "model.onnx").exists()


def test_onnx_gives_torchs_probabilities(trained, evaluated, capsys):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    run, _ = trained
    paths, _, p = evaluated
    assert export.main([str(run)]) == 0
    assert re.search(r"bytes; onnxruntime's probabilities are within \S+ of torch's$", capsys.readouterr().out.strip())
    session = runtime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    for n in (1, len(paths)):
        images = np.stack([centre(read(path, 32), 32) for path in paths[:n]])
        assert np.abs(session.run(None, {"images": images})[0] - p[:n]).max() < 1e-5
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["classes"]) == predict.load(run).classes and "shorter side" in notes["resize"]


def test_onnx_that_differs_is_not_written(trained, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Wrong:
        def __init__(self, *args, **kwargs):
            pass

        def run(self, names, feed):
            return [np.zeros((len(feed["images"]), 3), np.float32)]

    monkeypatch.setattr(runtime, "InferenceSession", Wrong)
    (trained[0] / "model.onnx").unlink(missing_ok=True)
    assert export.main([str(trained[0])]) == 2
    assert "nothing is written" in capsys.readouterr().err and not (trained[0] / "model.onnx").exists()
