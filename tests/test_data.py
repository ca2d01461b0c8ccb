import functools
import http.server
import io
import json
import random
import struct
import tarfile
import threading
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml
from fastai.data.external import URLs, fastai_cfg
from fastai.data.transforms import Normalize
from fastai.torch_core import TensorImage
from PIL import Image

from lib.cli import BadInput
from lib.data import decode, folders, loader, sources
from tests.conftest import SMALL, picture, save
from train_fastai import main

RNG = np.random.default_rng(0)


def tree(root, sets):
    """Writes {set folder: {class: number of images}} under `root`."""
    for where, classes in sets.items():
        for k, (name, n) in enumerate(classes.items()):
            for i in range(n):
                save(root / where / name / f"{i:03}.png", picture(RNG, k, 20 + i % 3, 24))
    return root


def names(items):
    return [f"{p.parent.name}/{p.name}" for p, _ in items]


def test_plain_class_folders_become_three_stratified_sets(tmp_path):
    root = tree(tmp_path, {"": {"a": 50, "b": 20}})
    train, valid, test = folders.find_images(root, 0.1, 0)
    count = lambda items: [sum(c == k for _, c in items) for k in "ab"]
    assert (count(train), count(valid), count(test)) == ([36, 14], [4, 2], [10, 4])
    assert len(set(train + valid + test)) == 70
    assert folders.find_images(root, 0.1, 0) == (train, valid, test)
    assert set(folders.find_images(root, 0.1, 1)[2]) != set(test)


def test_sets_that_are_there_are_taken(tmp_path):
    both = tree(tmp_path / "both", {"train": {"a": 9, "b": 9}, "val": {"a": 3, "b": 3}, "test": {"a": 4, "b": 4}})
    assert [len(s) for s in folders.find_images(both, 0.1, 0)] == [18, 6, 8]
    for one in ("valid", "val", "validation", "test"):
        root = tree(tmp_path / one, {"train": {"a": 20, "b": 20}, one: {"a": 3, "b": 3}})
        train, valid, test = folders.find_images(root, 0.1, 0)
        sizes, held, own = ((36, 4, 6), valid, test) if one == "test" else ((32, 6, 8), test, valid)
        assert (len(train), len(valid), len(test)) == sizes
        assert all(one in p.parts for p, _ in own) and all("train" in p.parts for p, _ in held)
    alone = tree(tmp_path / "alone", {"train": {"a": 20, "b": 20}})
    assert [len(s) for s in folders.find_images(alone, 0.1, 0)] == [28, 4, 8]


def test_the_split_does_not_follow_the_runs_seed(bands, parse):
    def of(*argv):
        dls = loader.get_dls(parse("--data", bands, "--size", 32, *argv))
        return [[dls.store.names[i] for i in dl.ids] for dl in dls]

    assert of("--seeds", 0) == of("--seeds", 1) != of("--split-seed", 1)


def test_valid_pct_0_lets_test_choose(make):
    _, learn = make("--valid-pct", 0)
    assert learn.dls.valid.ids == learn.dls.test.ids
    assert len(learn.dls.train.ids) + len(learn.dls.test.ids) == 120


def test_the_order_of_the_file_system_does_not_matter(tmp_path, monkeypatch):
    root = tree(tmp_path, {"": {"b": 8, "a": 8, "c": 8}})
    before = folders.find_images(root, 0.1, 0)
    scandir, listdir = folders.os.scandir, folders.os.listdir
    shuffled = lambda entries: random.sample(entries, len(entries))
    monkeypatch.setattr(folders.os, "scandir", lambda path: nullcontext(shuffled(list(scandir(path)))))
    monkeypatch.setattr(folders.os, "listdir", lambda path: shuffled(listdir(path)))
    assert folders.find_images(root, 0.1, 0) == before


def test_files_that_are_not_taken_are_said(tmp_path, capsys):
    root = tree(tmp_path / "data", {"": {"a": 9, "b": 9}})
    (root / "a" / "photo.heic").write_bytes(b"")
    save(root / "loose.png", picture(RNG, 0))
    assert sum(map(len, folders.find_images(root, 0.1, 0))) == 18
    out = capsys.readouterr().out
    assert "HEIC files, which take uv run --extra heif …, are passed over, 1 in all" in out
    assert "files not named as images, or in no class folder, are passed over, 1 in all, such as" in out


def test_hidden_files_and_linked_folders_are_passed_over(tmp_path):
    root = tree(tmp_path / "data", {"": {"a": 9, "b": 9}})
    (root / "a" / ".hidden.png").write_bytes(b"")
    (root / "a" / "notes.txt").write_text("")
    save(root / "a" / ".thumbnails" / "x.png", picture(RNG, 0))
    (root / ".cache").mkdir()
    (root / "loop").symlink_to(root)
    assert sum(map(len, folders.find_images(root, 0.1, 0))) == 18


@pytest.mark.parametrize("kind", ["zip", "tgz", "tar.gz", "tar"])
def test_archives_with_a_single_root_folder(tmp_path, bands, parse, kind):
    archive = tmp_path / f"my images.{kind}"
    files = [(p, f"pack/{p.relative_to(bands)}") for p in sorted(bands.rglob("*.png"))]
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as z:
            [z.write(p, name) for p, name in files]
    else:
        with tarfile.open(archive, "w" if kind == "tar" else "w:gz") as t:
            [t.add(p, name) for p, name in files]
            with zipfile.ZipFile(tmp_path / "inner.zip", "w") as z:  # the last bytes of the tar are a zip's
                z.writestr("labels.npy", RNG.bytes(1000))
            t.add(tmp_path / "inner.zip", "pack/labels.npz")
    config = parse("--data", archive, "--size", 32, "--cache", tmp_path / "cache")
    dls = loader.get_dls(config)
    assert len(dls.store) == 120 and dls.store.names[0].startswith("class 0/")
    plain = loader.get_dls(parse("--data", bands, "--size", 32))
    assert plain.store.fingerprint == dls.store.fingerprint == loader.get_dls(config).store.fingerprint


def test_a_download_that_fastai_does_not_know_is_refused(tmp_path, parse, monkeypatch):
    """By fastai's own size and hash, of its own address. What is left of a download that was cut is fetched anew."""
    asked, archive = [], tmp_path / "cifar10.tgz"
    archive.write_bytes(b"a download that was cut")
    fetch = lambda url, path, **_: asked.append(url) or path.write_bytes(b"not CIFAR-10")
    monkeypatch.setattr("fastdownload.core.download_url", fetch)
    with pytest.raises(BadInput, match="cifar10.tgz: not the file that fastai knows"):
        loader.get_dls(parse("--cache", tmp_path))
    assert asked == [URLs.CIFAR] and not (tmp_path / "cifar10").exists()


def test_class_names_are_compared_in_one_form(tmp_path):
    root = tree(tmp_path, {"Train": {"caf\u00e9": 9, "b": 9}, "Val": {"cafe\u0301": 3, "b": 3}})
    (root / "LICENSE").write_text("")
    train, valid, _ = folders.find_images(root, 0.1, 0)
    assert {c for _, c in train} == {c for _, c in valid} == {"caf\u00e9", "b"}
    assert folders.enter(tmp_path.parent / tmp_path.name) == tmp_path


def test_cifar10_is_downloaded_once_from_fastais_url(tmp_path, parse, monkeypatch):
    """Against a local server: same code, same file name, same layout as fastai's."""
    site = tmp_path / "site"
    images = tree(tmp_path / "cifar10", {"train": {"cat": 9, "dog": 9}, "test": {"cat": 3, "dog": 3}})
    (images / "labels.txt").write_text("cat\ndog\n")
    site.mkdir()
    with tarfile.open(site / "cifar10.tgz", "w:gz") as t:
        t.add(images, "cifar10")
    hits = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            hits.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(URLs, "CIFAR", f"http://127.0.0.1:{server.server_port}/cifar10.tgz")
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    fastai_cfg.cache_clear()
    try:
        for _ in range(2):
            dls = loader.get_dls(parse("--cache", ""))
        assert dls.vocab == ["cat", "dog"] and [len(dl.ids) for dl in dls] == [16, 2, 6]
        assert hits == ["/cifar10.tgz"] and (tmp_path / "home/data/cifar10/train/cat").is_dir()
    finally:
        server.shutdown()
        fastai_cfg.cache_clear()


def test_no_network_is_one_line_that_says_what_to_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(URLs, "CIFAR", "http://127.0.0.1:9/cifar10.tgz")
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    fastai_cfg.cache_clear()
    try:
        assert main(["--out", str(tmp_path / "runs")]) == 2
    finally:
        fastai_cfg.cache_clear()
    err = capsys.readouterr().err
    assert "--data digits" in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_folder_of_a_known_name_is_not_taken_and_that_is_said(tmp_path, monkeypatch, parse, capsys):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sources.root_folder(parse("--data", "digits", "--cache", tmp_path / "cache")) == tmp_path / "cache/digits"
    assert "for the folder digits/ here, pass ./digits" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "cache")
    sources.root_folder(parse("--data", "digits", "--cache", tmp_path / "cache"))
    assert capsys.readouterr().out == ""


def test_digits_are_scikit_learns(parse):
    from sklearn.datasets import load_digits

    dls = loader.get_dls(parse("--data", "digits", "--size", 32))
    assert len(dls.store) == 1797 and len(dls.vocab) == 10
    found, i = load_digits(), 1234
    saved = np.asarray(Image.open(next(p for p in dls.store.paths if p.stem == str(i))))
    assert (saved == np.round(found.images[i] * 255 / 16)).all()


MODES = {  # name: (how it is saved, what mean it must have in 0..255)
    "rgb.png": (lambda a: Image.fromarray(a), None),
    "rgb.bmp": (lambda a: Image.fromarray(a), None),
    "grey.png": (lambda a: Image.fromarray(a).convert("L"), "grey"),
    "palette.gif": (lambda a: Image.fromarray(a[:, :, 0] // 4 * 4), "first"),
    "cmyk.jpg": (lambda a: Image.fromarray(a).convert("CMYK"), None),
    "deep.png": (lambda a: Image.fromarray(a[:, :, 0].astype(np.uint16) * 257), "first"),
    "dark.png": (lambda a: Image.fromarray(a[:, :, 0].astype(np.uint16)), "first"),  # 16 bits, none used
    "float.tif": (lambda a: Image.fromarray(a[:, :, 0].astype(np.float32) / 255), "first"),
    "opaque.png": (lambda a: Image.fromarray(np.dstack([a, np.full(a.shape[:2], 255, np.uint8)])), None),
    "clear.png": (lambda a: Image.fromarray(np.dstack([a, np.zeros(a.shape[:2], np.uint8)])), "white"),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_decodes_to_its_mean(tmp_path, name):
    array = picture(RNG, 1, 40, 40) // 2
    how, expected = MODES[name]
    image = how(array)
    image.save(tmp_path / name)
    mean = {
        None: array.mean(),
        "grey": np.asarray(image).mean(),
        "first": np.asarray(image).astype(float).mean()
        / {"deep.png": 257, "dark.png": 257, "float.tif": 1 / 255}.get(name, 1),
        "white": 255,
    }[expected]
    out = decode.read(tmp_path / name, 40)
    assert out.shape == (40, 40, 3) and out.dtype == np.uint8
    assert abs(out.mean() - mean) < 3


def test_exif_rotation_sizes_and_shapes(tmp_path):
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    out = decode.read(tmp_path / "a.png", 10)
    assert out.shape == (30, 10, 3) and out[:10].mean() > 245 and out[-10:].mean() < 10
    content = (tmp_path / "a.png").read_bytes()
    for image in (str(tmp_path / "a.png"), content, Image.open(tmp_path / "a.png"), array.swapaxes(0, 1)):
        assert (decode.read(image, 10) == out).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation, kind):
    array, content = RNG.integers(0, 256, (20, 40, 3), dtype=np.uint8), io.BytesIO()
    tags = (0x0112, 3, 1, orientation, 0, 0x0128, 4, 1, 70_000)  # a ResolutionUnit that Pillow cannot write anew
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIHHHHIII", 2, *tags, 0)
    Image.fromarray(array).save(content, kind, exif=exif)
    found, stored = decode.read(content.getvalue(), 20), np.asarray(Image.open(content))
    turns = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1)}
    turns |= {6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: np.rot90}
    assert (found == turns.get(orientation, lambda a: a)(stored)).all()


def test_arrays_are_images_where_they_have_the_shape_of_one():
    grey = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    clear = np.dstack([grey] * 3 + [np.zeros_like(grey)])
    assert (decode.read(grey, 20) == grey[:, :, None]).all() and (decode.read(clear, 20) == 255).all()
    for a in (
        grey.astype(float),
        grey[0],
        grey[None, None],
        np.zeros((0, 3, 3), np.uint8),
        np.dstack([grey, grey]),
        "x".split(),
    ):
        with pytest.raises(BadInput, match=r"^an image must be uint8 \(h, w\), \(h, w, 3\) or \(h, w, 4\), not "):
            decode.read(a, 20)
    with pytest.raises(BadInput, match="an image: cannot be read as an image .*one side more than 100 times"):
        decode.read(np.zeros((2, 500), np.uint8), 20)
    png = io.BytesIO()
    Image.new("RGB", (2, 500)).save(png, "png")
    with pytest.raises(BadInput, match="one side more than 100 times"):
        decode.read(png.getvalue()[:48], 20)  # seen in the header: the pixels are missing


def test_statistics_are_those_of_the_training_images(make):
    _, learn = make()
    store, ids = learn.dls.store, learn.dls.train.ids
    pixels = np.stack([store[i] for i in ids]).reshape(-1, 3) / 255
    assert np.allclose(learn.dls.mean, pixels.mean(0)) and np.allclose(learn.dls.std, pixels.std(0))
    x = learn.dls.valid.one_batch()[0][0].permute(1, 2, 0).numpy()
    assert np.allclose(x, (store[learn.dls.valid.ids[0]] / 255 - pixels.mean(0)) / pixels.std(0), atol=1e-5)


def test_every_image_is_seen_once_an_epoch(make):
    _, learn = make("-b", 33)  # leaves a last batch that is not full
    dl = learn.dls.train
    assert sum(len(y) for _, y in dl) == len(dl.ids) and len(dl.ids) % 33 != 0
    assert sorted(dl.get_idxs()) == list(range(len(dl.ids)))


def test_fewer_images_than_a_batch_is_one_batch(make):
    _, learn = make("-b", 500)
    assert len(learn.dls.train) == 1 and len(learn.dls.train.one_batch()[1]) == len(learn.dls.train.ids)


def test_new_files_go_through_the_same_preprocessing(make):
    _, learn = make()
    known = learn.dls.valid
    paths = [learn.dls.store.paths[i] for i in known.ids[:5]]
    x = learn.dls.test_dl(paths).one_batch()[0]
    assert (x == known.one_batch()[0][:5]).all()


def test_normalizing_in_place_gives_fastais_numbers():
    mean, std, x = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26], RNG.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    images = TensorImage(torch.from_numpy(x).permute(0, 3, 1, 2)).float().div_(255)
    theirs = Normalize.from_stats(mean, std, cuda=False)
    ours = loader.NormalizeInPlace(np.array(mean), np.array(std), 16)
    expected = theirs.encodes(images)
    found = ours.encodes(images.clone())
    assert (found == expected).all() and (ours.decodes(found) == theirs.decodes(expected)).all()


@pytest.mark.parametrize("n, size", [(1, 16), (608, 16), (609, 32), (1_294, 64), (2_432, 64), (2_433, 128)])
def test_auto_makes_20_steps_an_epoch_where_it_can(parse, n, size):
    assert loader.images_a_step(parse(), n) == size and loader.images_a_step(parse("-b", 100), n) == 100


def test_a_run_keeps_what_was_asked_and_what_auto_became(tmp_path, bands):
    argv = ["--data", bands, *SMALL, "--out", tmp_path, "--name", "x"]
    argv[argv.index("-b") + 1] = "auto"
    assert main(list(map(str, argv))) == 0 and main(["--resume", str(tmp_path / "x"), "--epochs", "2"]) == 0
    assert yaml.safe_load((tmp_path / "x/args.yaml").read_text())["batch_size"] == "auto"
    assert json.loads((tmp_path / "x/env.json").read_text())["batch_size"] == 16
    rows = (tmp_path / "x/results.csv").read_text().split()
    assert [row.split(",")[4] for row in rows] == ["batch_size", "16", "16"]
