"""Bad input: it ends with status 2, one line on stderr and nothing left behind, or is handled right and said."""

import csv
import dataclasses
import errno
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from PIL import Image

from lib import cli, data, predict, runs
from lib import config as settings
from lib.cli import BadInput
from lib.config import Config
from lib.data import decode, folders, loader, store
from lib.models import zoo
from lib.train import lecture
from tests.conftest import SMALL, good, picture, save
from train_fastai import main

RNG = np.random.default_rng(0)


def encoded(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


# --- images ----------------------------------------------------------------------------------------------------------

IMAGE = Image.fromarray(picture(RNG, 1, 40, 40))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def png(w, h, pixels):
    """A PNG whose header says w x h pixels, whatever `pixels` says."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def lzw_with_errors():
    content = bytearray(encoded(IMAGE, "tiff", compression="tiff_lzw"))
    content[20:900:7] = bytes(b ^ 0x55 for b in content[20:900:7])
    return bytes(content)


half = lambda content: content[: len(content) // 2]
BROKEN = {  # name of the file: (content, words of the line)
    "truncated.png": (half(encoded(IMAGE, "png")), "truncated"),
    "truncated.jpg": (half(encoded(IMAGE, "jpeg")), "truncated"),
    "truncated.gif": (half(encoded(IMAGE, "gif")), "cannot be read"),
    "truncated.webp": (half(encoded(IMAGE, "webp")), "cannot be read"),
    "truncated.bmp": (half(encoded(IMAGE, "bmp")), "truncated"),
    "truncated.tif": (half(encoded(IMAGE, "tiff")), "cannot be read"),
    "truncated.ppm": (half(encoded(IMAGE, "ppm")), "truncated"),
    "header only.png": (encoded(IMAGE, "png")[:33], "is no whole"),
    "empty.png": (b"", "is no whole"),
    "no pixels.png": (png(0, 0, zlib.compress(b"")), "is no whole"),
    "no pixels.ppm": (b"P6 0 0 255\n", "is no whole"),
    "bomb.png": (png(20_000, 20_000, zlib.compress(bytes(10**6))), "decompression bomb (mogrify -resize 50%"),
    "large.png": (png(14_000, 14_000, zlib.compress(bytes(10**6))), "more than 178,956,970 pixels"),
    "no end.jpg": (encoded(IMAGE, "jpeg")[:-2], "runcated"),
    "no end, progressive.jpg": (encoded(IMAGE, "jpeg", progressive=True)[:-2], "runcated"),
    "truncated, progressive.jpg": (half(encoded(IMAGE, "jpeg", progressive=True)), "runcated"),
    "ribbon.png": (encoded(Image.new("RGB", (1, 2000)), "png"), "1 x 2000 pixels"),
    "text.png": (b"no image at all\n" * 20, "is no whole"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "is no whole"),
    "web page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "is no whole"),
    "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is no whole"),
    "not a number.tif": (encoded(Image.fromarray(np.full((20, 20), np.nan, np.float32)), "tiff"), "not numbers"),
    "noisy zlib.png": (png(20, 20, b"\x78\x9cgarbage" * 9), "cannot be read"),  # libpng writes to stderr itself
    "noisy lzw.tif": (lzw_with_errors(), "cannot be read"),  # so does libtiff
    "two\nlines \x1b[31mred.png": (b"", r"two\nlines \x1b[31mred.png"),
}


@pytest.mark.parametrize("name", BROKEN, ids=ascii)
def test_an_image_that_cannot_be_read_is_named(name, photos, refused):
    content, words = BROKEN[name]
    (photos / "b" / name).write_bytes(content)
    line = refused("--data", photos)
    assert words in line and cli.printable(name) in line
    assert "repair or remove it, or pass --bad-images skip" in line


def test_a_file_too_large_for_an_image_is_not_read(photos, refused):
    with open(photos / "a" / "sparse.png", "wb") as f:
        f.truncate(10**12)
    assert "sparse.png" in refused("--data", photos)


def test_ghostscript_is_never_asked(tmp_path, monkeypatch):
    """Pillow would hand PostScript to it, whatever the name of the file."""
    content = BROKEN["postscript.png"][0]
    asked = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: asked.append(args) or IMAGE.im)
    Image.open(io.BytesIO(content)).load()
    assert asked
    del asked[:]
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BadInput):
        decode.read(tmp_path / "x.png", 16)
    assert not asked


FRAMES = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
clear = FRAMES[0].quantize(4)
HANDLED = {  # name of the file: (content, or what makes it, mean colour)
    "animated.gif": (encoded(FRAMES[0], "gif", save_all=True, append_images=FRAMES[1:]), (255, 0, 0)),
    "animated.png": (encoded(FRAMES[0], "png", save_all=True, append_images=FRAMES[1:]), (255, 0, 0)),
    "animated.webp": (encoded(FRAMES[0], "webp", save_all=True, append_images=FRAMES[1:], lossless=True), (255, 0, 0)),
    "many pages.tif": (encoded(FRAMES[0], "tiff", save_all=True, append_images=FRAMES[1:]), (255, 0, 0)),
    "several views.jpg": (encoded(FRAMES[1], "mpo", save_all=True, append_images=FRAMES[:1]), (0, 0, 254)),
    "a png.jpg": (encoded(FRAMES[1], "png"), (0, 0, 255)),
    "a jpeg.png": (encoded(FRAMES[1], "jpeg"), (0, 0, 254)),
    "a webp.gif": (encoded(FRAMES[2], "webp", lossless=True), (0, 255, 0)),
    "a tiff.JPEG": (encoded(FRAMES[2], "tiff"), (0, 255, 0)),
    "cmyk.jpg": (encoded(Image.new("CMYK", (20, 20), (255, 0, 0, 0)), "jpeg"), (0, 255, 255)),
    "palette.png": (encoded(FRAMES[1].quantize(4), "png"), (0, 0, 255)),
    "clear palette.png": (encoded(clear, "png", transparency=clear.getpixel((0, 0))), (255, 255, 255)),
    "grey and clear.png": (encoded(Image.new("LA", (20, 20), (0, 0)), "png"), (255, 255, 255)),
    "bilevel.png": (encoded(Image.new("1", (20, 20), 1), "png"), (255, 255, 255)),
    "16 bits.png": (encoded(Image.fromarray(np.full((20, 20), 204 * 257, np.uint16)), "png"), (204, 204, 204)),
    "16 bits.tif": (encoded(Image.fromarray(np.full((20, 20), 204 * 257, np.uint16)), "tiff"), (204, 204, 204)),
    "14 bits.png": (encoded(Image.fromarray(np.full((20, 20), 51 * 257, np.uint16)), "png"), (204, 204, 204)),
    "108 megapixels.jpg": (lambda: encoded(Image.new("RGB", (12_000, 9_000), "blue"), "jpeg"), (0, 0, 254)),
    "108 megapixels.png": (lambda: encoded(Image.new("L", (12_000, 9_000), 255), "png"), (255, 255, 255)),
    "avif.avif": (encoded(FRAMES[1], "avif", quality=100), (0, 0, 255)),
    "float.tif": (encoded(Image.fromarray(np.full((20, 20), 0.2, np.float32)), "tiff"), (51, 51, 51)),
    "one pixel.png": (encoded(Image.new("RGB", (1, 1), "lime"), "png"), (0, 255, 0)),
    "spoiled exif.jpg": (
        encoded(FRAMES[1], "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 30),
        (0, 0, 254),
    ),
    "no exif.png": (encoded(FRAMES[1], "png", exif=bytes(40)), (0, 0, 255)),
}


@pytest.mark.parametrize("name", HANDLED)
def test_unusual_images_are_read_right(name, tmp_path, capfd):
    content, colour = HANDLED[name]
    (tmp_path / name).write_bytes(content() if callable(content) else content)
    found = store.Store([tmp_path / name], 16, tmp_path)
    assert np.abs(found[0].reshape(-1, 3).mean(0) - colour).max() < 3
    assert capfd.readouterr().err == ""


# --- folders and names -----------------------------------------------------------------------------------------------


def sets(root, **classes):
    shutil.rmtree(root)
    for where, names in classes.items():
        good(root / where, names, 4)


def links_only(root):
    (root / "c").mkdir()
    for p in (root / "a").iterdir():
        (root / "c" / p.name).symlink_to(p)


def pipe(root):
    (root / "c").mkdir()
    os.mkfifo(root / "c" / "0.png")


def twin_sets(root):
    sets(root, train="ab", Train="ab")


def linked_set(root):
    sets(root, train="ab")
    good(root.parent / "elsewhere")
    (root / "test").symlink_to(root.parent / "elsewhere")


FOLDERS = {  # what happens to a good folder, and words of the line
    "an empty class": (lambda root: (root / "c").mkdir(), "photos/c: no images"),
    "a class of text": (lambda root: (root / "c").mkdir() or (root / "c" / "0.txt").write_text("x"), "c: no images"),
    "one class": (lambda root: shutil.rmtree(root / "b"), "only one class ('a')"),
    "one image": (lambda root: sets(root, **{"": "a"}) or [p.unlink() for p in root.glob("*/[123].png")], "one class"),
    "a class of one image": (
        lambda root: [p.unlink() for p in root.glob("b/[1-9].png")],
        "1 of 2 classes have too few",
    ),
    "no folders": (lambda root: shutil.rmtree(root) or save(root / "0.png", picture(RNG, 0)), "in class folders"),
    "nothing": (lambda root: shutil.rmtree(root) or root.mkdir(), "in class folders"),
    "no folder": (lambda root: shutil.rmtree(root), "not found"),
    "a file": (lambda root: shutil.rmtree(root) or root.write_text(""), "neither a folder nor an archive"),
    "a class only in test": (lambda root: sets(root, train="ab", test="abc"), "class 'c' is not among those of train"),
    "a class only in valid": (lambda root: sets(root, train="ab", val="abc"), "class 'c' is not among those of train"),
    "an empty test": (lambda root: sets(root, train="ab") or (root / "test").mkdir(), "fill it or remove it"),
    "valid twice": (lambda root: sets(root, train="ab", val="ab", valid="ab"), "keep one"),
    "train twice": (twin_sets, "keep one"),
    "a set that is a link": (linked_set, "links are not followed"),
    "a class of links": (links_only, "links do not count"),
    "a class of pipes": (pipe, "c: no images"),
    "a loop alone": (lambda root: shutil.rmtree(root) or root.mkdir() or (root / "x").symlink_to(root), "in class"),
    "a loop for a root": (lambda root: shutil.rmtree(root) or root.symlink_to(root), "not found"),
    "codes in a name": (lambda root: (root / "\x1b]0;x\x07\x9b2J").mkdir(), r"\x1b]0;x\x07\x9b2J: no images"),
    "lines in a name": (lambda root: (root / "x\nerror: y\u2028").mkdir(), r"x\nerror: y\u2028: no images"),
    "bytes that are no text": (lambda root: (root / os.fsdecode(b"\xff\xfe")).mkdir(), r"\udcff\udcfe: no images"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_cannot_be_trained_on_is_named(what, photos, refused):
    change, words = FOLDERS[what]
    change(photos)
    assert words in refused("--data", photos)


def test_links_out_of_the_root_and_loops_are_passed_over_and_said(photos, capsys):
    outside = good(photos.parent / "outside", "c")
    (photos / "a" / "loop").symlink_to(photos)
    (photos / "a" / "out").symlink_to(outside)
    (photos / "a" / "one.png").symlink_to(outside / "c" / "0.png")
    (photos / "c").symlink_to(outside / "c")
    os.mkfifo(photos / "b" / "pipe.png")
    found = folders.scan(photos)
    assert len(found) == 16 and {c for _, c in found} == {"a", "b"}
    out = capsys.readouterr().out
    assert "links and devices are passed over, 5 in all" in out and f"cp -rL {photos} COPY makes files of links" in out


def test_a_name_in_two_unicode_forms_is_one_class(photos, capsys):
    good(photos, ("caf\u00e9", "cafe\u0301"))
    found = folders.scan(photos)
    assert {c: [k for _, k in found].count(c) for _, c in found} == {"a": 8, "b": 8, "caf\u00e9": 16}
    assert "taken as one class" in capsys.readouterr().out


STRANGE = (
    "two words",
    "👩‍👩‍👧 猫",
    "<script>alert(1)<",
    "a\nb",
    "c\rd",
    "\x1b[31mred",
    r"$x^2$ \frac{",
    os.fsdecode(b"\xff"),
    '"q",=1',
)


def test_strange_names_train_and_nothing_of_them_reaches_the_terminal(tmp_path, capfd):
    root = good(tmp_path / "\x1b[31m photos\n", STRANGE)
    (tmp_path / "été 👩‍👩‍👧").symlink_to(root)
    argv = ["--data", tmp_path / "été 👩‍👩‍👧", "--out", tmp_path / "runs", *SMALL, "--gallery", 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's, on letters that its font lacks
        assert main([*map(str, argv)]) == 0
    seen = capfd.readouterr()
    assert seen.err == "" and all(line.isprintable() or "👩" in line for line in seen.out.splitlines())
    assert "\x1b" not in seen.out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.isprintable()
    assert json.loads((run / "weights/model.json").read_text())["classes"] == sorted(STRANGE)
    with open(run / "confusion_matrix.csv", newline="", errors="surrogateescape") as f:
        assert next(csv.reader(f)) == ["truth", *sorted(STRANGE)]
    assert (run / "report.html").exists()


@pytest.mark.parametrize("name", ["out", "cache"])
def test_what_a_run_writes_must_not_become_a_class(name, photos, refused):
    assert f"--{name}" in refused("--data", photos, f"--{name}", photos / "runs")


@contextmanager
def nobody(folder, mode):
    """`folder`, of mode `mode`, as somebody sees it whom its mode binds: root is bound by none."""
    before, root = folder.stat().st_mode, os.geteuid() == 0
    folder.chmod(mode)
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)
        folder.chmod(before)


@pytest.fixture
def open_tmp():
    """A temporary folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_folder_or_file_that_may_not_be_read_is_named(open_tmp):
    photos = good(open_tmp / "photos")
    for what, mode in ((photos / "b", 0o000), (photos, 0o000), (photos / "a" / "0.png", 0o000)):
        with nobody(what, mode), pytest.raises(BadInput, match=f"{what}.*Permission denied|Permission denied.*{what}"):
            loader.get_dls(Config(data=str(photos), size=16))
    for what, mode in ((photos / "b", 0o000), (photos, 0o000)):
        with nobody(what, mode), pytest.raises(BadInput, match=f"^{what}.*: permission denied$"):
            predict.find([photos if what != photos else photos / "a/0.png"])


def test_a_folder_that_may_not_be_written_to_is_seen_before_the_images_are_read(open_tmp, monkeypatch):
    for mode in (0o555, 0o000):
        with nobody(open_tmp, mode), pytest.raises(BadInput, match="--out .*cannot be written to"):
            runs.check_out(Config(out=str(open_tmp / "a/b")))


def test_an_out_that_cannot_be_a_folder(photos, refused, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out in ("file", "file/below", "dangling"):
        assert "--out" in refused("--data", photos, "--out", tmp_path / out)
    assert "--out" in refused("--data", photos, "--name", "n" * 300)
    if Path("/proc/self").exists():
        assert "--out" in refused("--data", photos, "--out", "/proc/runs")


@contextmanager
def full_disk(size):
    """A disk on which no file can be larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_is_seen_before_training(photos, refused, monkeypatch):
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    line = refused("--data", photos)
    assert "no room for the" in line and "--out" in line


def test_no_room_for_decoded_images_leaves_nothing(photos, refused, tmp_path):
    with full_disk(1000):
        assert "--cache" in refused("--data", photos, "--cache", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_room_for_an_archive_leaves_nothing(photos, refused, tmp_path):
    shutil.make_archive(tmp_path / "x", "zip", photos)
    with full_disk(1000):
        assert "x.zip: cannot be unpacked" in refused("--data", tmp_path / "x.zip", "--cache", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_disk_that_fills_up_ends_in_one_line_and_the_run_can_go_on(photos, tmp_path, capfd, monkeypatch):
    argv = ["--data", photos, "--out", tmp_path / "runs", *SMALL, "--epochs", 2]
    with monkeypatch.context() as m, full_disk(10**8):
        write_csv = runs.write_csv

        def fill(path, rows):
            write_csv(path, rows)
            if path.name == "results.csv" and len(rows) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        m.setattr(runs, "write_csv", fill)
        assert main([*map(str, argv)]) == 2
    err = capfd.readouterr().err
    assert "cannot be written" in err and err.count("\n") == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert [p.name for p in run.rglob(".*")] == [".lock"]
    assert main(["--resume", str(run)]) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or sys.platform != "linux", reason="mounts a disk")
def test_a_small_disk(photos, tmp_path, refused):
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        assert "No space left" in refused("--data", photos, "--out", disk / "runs")
        assert list((disk / "runs").iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# --- how many images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, ok", [(7, False), (3, False), (21, False), (1, False), (8, True), (500, True)])
def test_a_last_batch_of_one_is_refused_where_batchnorm_cannot_take_it(batch, ok, tmp_path, refused, capfd):
    """Of 22 training images; ResNet-18 at 32 pixels ends in maps of 1 x 1."""
    root = good(tmp_path / "photos", "ab", 15)
    argv = ["--data", root, "--size", 32, "--valid-pct", 0.1, "--lr", 0.01, "-b", batch, "--out", tmp_path / "runs"]
    for model in ("resnet18", "small"):
        if ok or model == "small":
            assert main([*map(str, argv), "--model", model, "--dry-run"]) == 0
            assert "22 train" in capfd.readouterr().out
        else:
            line = refused(*argv, "--model", model)
            assert f"--batch-size {batch}" in line
            argv[argv.index("-b") + 1] = line.split()[-1]  # what it says to pass
            assert main([*map(str, argv), "--model", model, "--dry-run"]) == 0


def test_a_batch_that_grows_to_leave_one_image_is_refused_before_training():
    model = zoo.build("resnet18", 2)
    config = Config(data="x", schedule="grow_batch", batch_size=6, factor=0.5, max_batch_size=24, model="resnet18")
    assert lecture.batch_sizes(config) == [6, 12, 24]
    zoo.check_batches(model, config, lecture.batch_sizes(config), 26, 32)
    with pytest.raises(BadInput, match="pass another, such as 7"):
        zoo.check_batches(model, dataclasses.replace(config, schedule="plateau"), [6], 25, 32)
    with pytest.raises(BadInput, match="add images, or pass another --model"):  # three, for two ranks
        zoo.check_batches(model, config, [6], 3, 32, 2)
    with pytest.raises(BadInput, match="6, 12, 24.*pass another, or another --max-batch-size"):
        zoo.check_batches(model, config, lecture.batch_sizes(config), 25, 32)
    with pytest.raises(ValueError, match="more than 1 value"):  # what torch would have said, an hour later
        model.train()(torch.zeros(1, 3, 32, 32))


def test_few_images_train(tmp_path, capfd):
    """Fewer than a batch in valid and test, a last batch of one in train."""
    root = good(tmp_path / "photos", "ab", 4)
    argv = ["--data", root, "--out", tmp_path, *SMALL, "--name", "few", "-b", 3, "--size", 20]
    assert main([*map(str, argv)]) == 0
    assert json.loads((tmp_path / "few/env.json").read_text())["images"] == {"train": 4, "valid": 2, "test": 2}
    capfd.readouterr()
    assert main([*map(str, argv), "--mixup", "0.4"]) == 2  # fastai's MixUp fails on one image
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "which --mixup cannot mix; pass another, such as 4" in err


# --- --bad-images skip -----------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tmp_path):
    """40 images of two classes, of which these three cannot be read: a/5, b/0, b/7."""
    root = good(tmp_path / "photos", "ab", 20)
    (root / "a/5.png").write_bytes(b"")
    (root / "b/0.png").write_bytes(b"no image")
    (root / "b/7.png").write_bytes(half((root / "b/7.png").read_bytes()))
    return root


@pytest.mark.parametrize("where", ["unnamed", "cache"])
def test_images_that_cannot_be_read_are_skipped_as_if_they_were_not_there(where, spoiled, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache") if where == "cache" else ""
    config = Config(data=str(spoiled), size=16, bad_images="skip", cache=cache)
    images = lambda dls: [[dls.store.names[i] for i in dl.ids] for dl in dls]
    first = loader.get_dls(config)
    assert sorted(name for name, _ in first.store.skipped) == ["a/5.png", "b/0.png", "b/7.png"]
    assert all("0x" not in reason and "repair" not in reason for _, reason in first.store.skipped)
    with monkeypatch.context() as m:
        if cache:
            m.setattr(store, "decode_all", None)
        again = loader.get_dls(config)
    assert again.store.skipped == first.store.skipped and images(again) == images(first)
    with pytest.raises(BadInput, match="[ab]/[057].png: .*or pass --bad-images skip"):
        loader.get_dls(Config(data=str(spoiled), size=16, cache=cache))
    for name, _ in first.store.skipped:
        (spoiled / name).unlink()
    clean = loader.get_dls(Config(data=str(spoiled), size=16))
    assert images(clean) == images(first) and clean.vocab == first.vocab
    assert (clean.mean == first.mean).all() and clean.store.skipped == []
    for name in ("valid", "test"):
        for a, b in zip(getattr(clean, name), getattr(first, name)):
            assert (a[0] == b[0]).all() and (a[1] == b[1]).all()


def test_skipped_images_are_listed_and_the_setting_is_kept(spoiled, tmp_path, capfd):
    argv = ["--data", spoiled, "--out", tmp_path, "--name", "run", *SMALL, "--bad-images", "skip"]
    assert main([*map(str, argv)]) == 0
    out, err = capfd.readouterr()
    assert err == "" and "3 that cannot be read are skipped" in out
    run = tmp_path / "run"
    with open(run / "skipped.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert sorted(row["file"] for row in rows) == ["a/5.png", "b/0.png", "b/7.png"] and rows[0]["reason"]
    assert yaml.safe_load((run / "args.yaml").read_text())["bad_images"] == "skip"
    assert json.loads((run / "env.json").read_text())["skipped"] == 3
    assert main(["--resume", str(run), "--bad-images", "fail"]) == 2
    assert "has skip, not fail; leave it out" in capfd.readouterr().err
    (spoiled / "b/0.png").unlink()
    assert main(["--resume", str(run), "--epochs", "2"]) == 2
    assert "are not those" in capfd.readouterr().err


@pytest.mark.parametrize("some", ["b", "ab"])
def test_a_class_that_is_left_empty_is_the_usual_error(some, spoiled, refused, tmp_path):
    for name in some:
        for p in (spoiled / name).iterdir():
            p.write_bytes(b"")
    for cache in ((), ("--cache", tmp_path / "cache")):
        line = refused("--data", spoiled, "--bad-images", "skip", *cache)
        assert ("b: no images that can be read" if some == "b" else "and so for every image") in line
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


@pytest.mark.parametrize("file, content", [("shapes.npy", b"x"), ("facts.json", b"[]"), ("pixels", b"xy")])
def test_a_damaged_file_of_decoded_images_is_named(file, content, photos, refused, tmp_path):
    cache = tmp_path / "cache"
    folder = store.Store(sorted(photos.rglob("*.png")), 16, photos, cache=cache).folder
    loader.get_dls(Config(data=str(photos), size=16, cache=str(cache)))
    for folder in cache.iterdir():
        (folder / file).write_bytes(content)
    assert "is damaged" in refused("--data", photos, "--cache", cache)


def test_statistics_of_large_and_ragged_images_are_those_of_every_pixel(tmp_path, monkeypatch):
    for i in range(9):
        save(tmp_path / f"{i}.png", RNG.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8))
    found = store.Store(sorted(tmp_path.glob("*.png")), 20, tmp_path)
    ids = [8, 0, 3, 4, 7]
    pixels = np.concatenate([found[i].reshape(-1, 3) for i in ids]) / 255
    results = []
    for step in (1, 1000, 10**9):
        monkeypatch.setattr(store, "STATS_PIXELS", step)
        results.append(np.stack(found.stats(ids)))
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()
    assert np.allclose(results[0], [pixels.mean(0), pixels.std(0)], rtol=1e-12)


# --- settings --------------------------------------------------------------------------------------------------------

FIELDS = list(settings.FIELDS)
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.dates(), st.complex_numbers(),
    st.sampled_from([0, -1, 10**400, 2**63, 1e308, 5e-324, "nan", "1e400", "auto", "find", "~", "~nobody-here/x"]),
    st.sampled_from([word for f in settings.FIELDS.values() for word in settings.kind_and_words(f.type)[1]]),
)  # fmt: skip
anything = st.one_of(
    plain, st.lists(plain), st.dictionaries(st.text(), plain), st.lists(st.lists(plain)), st.builds(object)
)


def config_or_one_line(make, *names):
    """What `make` gives, which is a Config or a list of them; or None, where it raised a good BadInput."""
    try:
        made = make()
        assert all(isinstance(c, Config) for c in (made if isinstance(made, list) else [made]))
        return made
    except BadInput as e:
        assert "\n" not in str(e) and str(e).isprintable() and len(str(e)) < 2000
        assert any(name in str(e) for name in (*names, "args.yaml", *map(settings.flag_of, FIELDS))), str(e)


@hypothesis(max_examples=300, deadline=None)
@given(st.sampled_from(FIELDS), anything)
@example("batch_size", 2**63)
@example("epochs", 1.1126278161198728e18)
@example("data", "")
@example("data", "a\0b")
@example("out", "~nobody-here/x")
def test_any_value_of_any_setting_is_a_config_or_one_line(name, value):
    config = config_or_one_line(lambda: Config(**{"data": "digits", "grad_noise": 0.1, name: value}))
    if config:
        text = yaml.safe_dump(config.to_dict())
        assert Config(**yaml.safe_load(text)) == config
        assert lecture.batch_sizes(config) if config.factor < 0.9 else True


@hypothesis(max_examples=150, deadline=None)
@given(st.sampled_from(FIELDS), st.lists(st.text().filter(lambda s: s not in ("-h", "--help")), max_size=3))
def test_any_words_behind_any_flag_are_a_config_or_one_line(name, words):
    config_or_one_line(lambda: settings.variants([settings.flag_of(name), *words]), "see --help")


@hypothesis(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.binary(),
        st.text().map(str.encode),
        st.dictionaries(st.sampled_from(FIELDS), anything).map(yaml.dump).map(str.encode),
    )
)
def test_any_file_of_settings_is_a_config_or_one_line(tmp_path, content):
    (tmp_path / "args.yaml").write_bytes(content)
    config_or_one_line(lambda: settings.variants(["-c", str(tmp_path / "args.yaml")]))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--monitor", "valid_los"], "did you mean valid_loss?"),
        (["--bad-images", "skipp"], "did you mean skip?"),
        (["--data", ""], "--data: is empty"),
        (["--data", "~nobody-here/photos"], "~nobody-here/photos is the home of nobody"),
        (["--data", "\x1b[2J"], r"not '\x1b[2J'"),
        (["--name", "a\nb"], r"not 'a\nb'"),
        (["--name", "a\u202eb"], r"not 'a\u202eb'"),
        (["--\x1b[31mname", "x"], r"--\x1b[31mname"),
        (["--model", "resnet81"], "did you mean resnet18?"),
        (["--model", "vit_b_16"], "try a larger --size"),
        (["-b", str(10**30)], "--batch-size"),
        (["--config", "/dev/zero"], "more than 1,000,000 characters"),
        (["--config", "."], "cannot be read"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_used_is_named(argv, words, photos, refused):
    assert words in refused("--data", photos, *argv)


def test_a_home_that_cannot_be_written_to_is_not_needed(photos, monkeypatch):
    def fail(config):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(loader, "cache_dir", fail)
    assert len(loader.get_dls(Config(data=str(photos), size=16)).store) == 16
    with pytest.raises(BadInput, match="Read-only file system"):
        loader.get_dls(Config(data=str(photos), size=16, cache="x"))


def test_short_memory_is_one_line(photos, refused, monkeypatch):
    def fail(*args):
        raise errors.pop(0)

    monkeypatch.setattr(data, "get_dls", fail)
    errors = [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory:\n you tried"),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. …'s workers are out of shared memory."),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("a bug"),
    ]  # fmt: skip
    for remedy in [*["a smaller --batch-size"] * 5, *["--workers 0"] * 3, "a smaller --batch-size"]:
        assert f"try {remedy}" in refused("--data", photos)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["--data", str(photos)])


def test_a_terminal_without_the_letters_stops_no_run(photos, monkeypatch):
    photos.rename(photos.with_name("猫"))
    terminal = type("Terminal", (io.TextIOWrapper,), {"isatty": lambda self: True})
    monkeypatch.setattr(sys, "stdout", terminal(io.BytesIO(), encoding="ascii"))
    assert main(["--data", str(photos.with_name("猫")), "--dry-run", *map(str, SMALL)]) == 0
    sys.stdout.seek(0)
    assert r"\u732b" in sys.stdout.read()
