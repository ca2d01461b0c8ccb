"""Images of more than 8 bits: one scale for the whole set, from the bits in use."""

import io
import json
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from lib import predict
from lib.cli import BadInput
from lib.config import Config
from lib.data import decode, loader
from tests.conftest import SMALL
from train_fastai import main

RNG = np.random.default_rng(0)


def waves(bits):
    """20 grey images of `bits` bits, of which the least and the most level are used somewhere: (h, w) int64."""
    images = [RNG.integers(2 ** (bits - 2), 2 ** (bits - 1), (24, 24)) for _ in range(20)]
    images[3][5, 5], images[4][6, 6] = 0, 2**bits - 1
    return images


def written(root, images, ext="png", dtype=np.uint16, colours=False):
    for i, image in enumerate(images):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        array = np.dstack([image, image // 2, image // 4, image * 0 + 65535][:colours]) if colours else image
        ok, content = cv2.imencode(
            f".{ext}", array.astype(dtype)[..., [2, 1, 0, 3][:colours]] if colours else array.astype(dtype)
        )
        (root / "ab"[i % 2] / f"{i:02}.{ext}").write_bytes(content)
    return root


def stored(root, **more):
    return loader.get_dls(Config(data=str(root), size=24, **more)).store


@pytest.mark.parametrize("bits, ext, colours", [
    (10, "png", 0), (12, "png", 0), (12, "tif", 0), (14, "png", 0), (16, "png", 0), (12, "png", 3), (12, "tif", 3),
    (16, "png", 3), (12, "png", 4),
])  # fmt: skip
def test_the_bits_in_use_are_scaled_to_eight(bits, ext, colours, tmp_path):
    images = waves(bits)
    store = stored(written(tmp_path / "deep", images, ext, colours=colours))
    assert store.levels == [0, 2**bits - 1]
    for path, i in store.index.items():
        image, found = images[int(path.stem)], store[i].astype(float)
        for channel in range(3):
            expected = image // (2**channel if colours else 1) * 255 / (2**bits - 1)
            assert np.abs(found[..., channel] - expected).max() <= 0.51


@pytest.mark.parametrize("name, least, most, levels", [
    ("signed", -1024, 3071, [-1024, 4095]), ("signed", -5, 60_000, [-5, 65535]), ("floats", 0, 0.25, [0, 1]),
    ("floats", -1, 1, [-1, 1]), ("floats", -1000, 2000, [-1000, 2047]),
])  # fmt: skip
def test_negative_levels_and_floats_keep_their_order(name, least, most, levels, tmp_path):
    ramp = np.linspace(least, most, 24 * 24).reshape(24, 24)
    dtype = np.float32 if name == "floats" else np.int32
    for i in range(20):
        (tmp_path / "x" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray((ramp * (1 if i == 7 else 0.5)).astype(dtype)).save(
            tmp_path / "x" / "ab"[i % 2] / f"{i:02}.tif"
        )
    store = stored(tmp_path / "x")
    assert store.levels == levels
    whole = store[store.index[tmp_path / "x/b/07.tif"]][..., 0].astype(float).reshape(-1)
    expected = (ramp.astype(dtype).reshape(-1) - levels[0]) * 255 / (levels[1] - levels[0])
    assert np.abs(whole - expected).max() <= 0.51 and (np.diff(whole) >= 0).all()


def test_eight_bits_stay_as_they_are_beside_deep_ones(tmp_path):
    root = written(tmp_path / "x", waves(12))
    Image.fromarray(np.full((24, 24), 77, np.uint8)).save(root / "a/z.png")
    store = stored(root)
    assert (store[store.index[root / "a/z.png"]] == 77).all() and store.levels == [0, 4095]
    (root / "a/z.png").unlink()
    assert stored(root, cache=str(tmp_path / "cache")).fingerprint == stored(root).fingerprint
    again = stored(root, cache=str(tmp_path / "cache"))  # from the file that is there
    assert again.levels == [0, 4095] and again.fingerprint == stored(root).fingerprint


def test_colours_of_16_bits_are_upright(tmp_path):
    array = np.zeros((20, 40, 3), np.uint16)
    array[:, :20] = 40_000
    content = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(array[..., 0].astype(np.uint8)).convert("RGB").save(content, "png", exif=exif)
    chunk = content.getvalue()[content.getvalue().index(b"eXIf") - 4 : content.getvalue().index(b"IDAT") - 4]
    deep = cv2.imencode(".png", array)[1].tobytes()
    at = deep.index(b"IDAT") - 4
    found = decode.read(deep[:at] + chunk + deep[at:], 20)
    assert found.shape == (40, 20, 3) and found[:20].min() == 156 and found[20:].max() == 0


def tiff(array, orientation):
    """The bytes of an RGB TIFF of uint8 or uint16 pixels."""
    h, w, _ = array.shape
    tags = {256: w, 257: h, 258: 8, 259: 1, 262: 2, 273: 14, 274: orientation, 277: 3, 278: h, 279: array.nbytes}
    entries = [struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, n) for tag, n in tags.items()]
    start = b"II*\0" + struct.pack("<I3H", 14 + array.nbytes, *[8 * array.itemsize] * 3)
    return start + array.tobytes() + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_of_16_bits_are_upright_as_those_of_8(orientation):
    array = RNG.integers(0, 256, (20, 40, 3), dtype=np.uint8)
    found = decode.read(tiff(array.astype(np.uint16) * 257, orientation), 20)
    assert (found == decode.read(tiff(array, orientation), 20)).all()


def test_a_clear_level_of_16_bits_is_white():
    array, content = np.full((20, 20), 100, np.uint16), io.BytesIO()
    array[:, :10] = 1
    Image.fromarray(array).save(content, "png", transparency=1)
    found = decode.read(content.getvalue(), 20)
    assert (found[:, :10] == 255).all() and (found[:, 10:] == 0).all()


def test_a_run_says_its_levels_and_predict_takes_them(tmp_path, capsys):
    root = written(tmp_path / "x", waves(12))
    argv = ["--data", root, "--out", tmp_path, "--name", "run", *SMALL]
    assert main([*map(str, argv)]) == 0
    assert "of more than 8 bits, 0 is black and 4095 white" in capsys.readouterr().out
    card = tmp_path / "run/weights/model.json"
    assert json.loads(card.read_text())["levels"] == [0, 4095]
    use, store = predict.load(tmp_path / "run"), loader.get_dls(Config(data=str(root), size=16)).store
    path = store.paths[0]
    assert (use.prepared(path) == store[0]).all()
    assert main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    for wrong in ([5, 5], [1], "x", [0, 1e999]):
        card.write_text(json.dumps({**json.loads(card.read_text()), "levels": wrong}))
        with pytest.raises(BadInput, match="is damaged"):
            predict.load(tmp_path / "run")
