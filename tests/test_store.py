import io
import os
import pickle
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lib.cli import BadInput
from lib.data import decode, loader, store
from lib.data.store import Store
from tests.conftest import save

RNG = np.random.default_rng(0)


def pillow(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def smooth(h, w):
    """A random picture with the smooth colours of photographs."""
    coarse = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)


def encoded(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@settings(max_examples=150, deadline=None)
@given(st.integers(8, 63), st.integers(8, 63), st.integers(20, 95), st.integers(0, 2), st.booleans(), st.booleans())
def test_a_plain_jpeg_has_the_pixels_that_pillow_gives(h, w, quality, subsampling, progressive, grey):
    image = Image.fromarray(smooth(h, w)).convert("L" if grey else "RGB")
    content = encoded(image, "jpeg", quality=quality, subsampling=subsampling, progressive=progressive)
    found = decode.quick(content, 32)
    assert (found is None) == (min(h, w) >= 64)
    assert (found == pillow(content)).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_plain_png_has_the_pixels_that_pillow_gives(mode):
    for _ in range(20):
        h, w = RNG.integers(1, 70, 2)
        harmless = PngImagePlugin.PngInfo()
        harmless.add(b"sRGB", b"\0")
        harmless.add(b"pHYs", struct.pack(">IIB", 100, 200, 1))
        content = encoded(Image.fromarray(smooth(h, w)).convert(mode), "png", pnginfo=harmless)
        assert (decode.quick(content, 32) == pillow(content)).all()


def special():
    image = Image.fromarray(smooth(40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", struct.pack(">I", 20000))
    jpeg = encoded(image, "jpeg")
    yield "turned jpeg", encoded(image, "jpeg", exif=exif)
    yield "turned png", encoded(image, "png", exif=exif)
    yield "cmyk", encoded(image.convert("CMYK"), "jpeg")
    yield "large jpeg", encoded(image.resize((90, 80)), "jpeg")
    yield "transparent", encoded(image.convert("RGBA"), "png")
    yield "transparent colour", encoded(image, "png", transparency=(0, 0, 0))
    yield "palette", encoded(image.convert("P"), "png")
    yield "16 bits", encoded(Image.fromarray(np.full((9, 9), 60000, np.uint16)), "png")
    named = PngImagePlugin.PngInfo()
    named.add_text("XML:com.adobe.xmp", "<tiff:Orientation>6</tiff:Orientation>")
    yield "text that may turn it", encoded(image, "png", pnginfo=named)
    yield "gamma", encoded(image, "png", pnginfo=gamma)
    yield "animated", encoded(image, "png", save_all=True, append_images=[image.rotate(90)])
    yield "gif", encoded(image, "gif")
    yield "bmp", encoded(image, "bmp")
    yield "cut", jpeg[: len(jpeg) // 2]
    yield "no frame", jpeg[:2] + jpeg[-2:]
    yield "empty", b""


@pytest.mark.parametrize("name, content", list(special()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_other_kind_is_left_to_pillow(name, content):
    assert decode.quick(content, 32) is None


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_of_damaged_files_only_whole_images_are_taken(kind):
    """Flipped bytes: where both libraries see an image, they see the same one."""
    clean, seen = encoded(Image.fromarray(smooth(32, 32)), kind), 0
    for i in range(300):
        content = bytearray(clean)
        if i:
            content[RNG.integers(len(content))] = RNG.integers(256)
        try:
            found = decode.quick(bytes(content), 32)
            theirs = pillow(bytes(content))
        except Exception:
            continue
        if found is not None:
            seen += 1
            assert (found == theirs).all()
    assert seen > (3 if kind == "jpeg" else 0)


@pytest.fixture
def ragged(tmp_path):
    """300 images of mixed sizes: more than one chunk."""
    for i in range(300):
        h, w = RNG.integers(20, 50, 2)
        save(tmp_path / "images" / f"{i:03}.png", smooth(h, w))
    return sorted((tmp_path / "images").iterdir())


def test_the_store_in_a_file_equals_that_in_memory(ragged, tmp_path, monkeypatch):
    memory = Store(ragged, 24, tmp_path)
    file = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    for i, path in enumerate(ragged):
        expected = decode.decode(path, 24)
        assert min(expected.shape[:2]) == 24
        assert (memory[i] == expected).all() and (file[i] == expected).all()
    assert memory.fingerprint() == file.fingerprint()
    assert file.folder.parent == tmp_path / "cache" and not hasattr(memory, "folder")

    def fail(*args):
        raise AssertionError("decoded again")

    with monkeypatch.context() as m:
        m.setattr(decode, "decode", fail)
        again = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    assert (again[299] == memory[299]).all() and again.fingerprint() == memory.fingerprint()


def test_a_changed_file_is_read_again(ragged, tmp_path):
    first = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    save(ragged[7], np.zeros((24, 24, 3), np.uint8))
    os.utime(ragged[7], (1, 1))
    second = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    assert second[7].max() == 0 and second.folder != first.folder


def test_a_worker_process_maps_the_file_for_itself(ragged, tmp_path):
    file = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    content = pickle.dumps(file)
    assert len(content) < 300 * 300
    assert (pickle.loads(content)[299] == file[299]).all()


def test_where_memory_is_short_the_images_lie_in_a_file(ragged, tmp_path, monkeypatch):
    for left, in_file in ((None, False), (10**9, False), (10**6, True)):
        monkeypatch.setattr(store, "memory_left", lambda left=left: left)
        found = Store(ragged, 24, tmp_path, spare=lambda: tmp_path / "spare")
        assert hasattr(found, "folder") == in_file
    assert len(list((tmp_path / "spare").iterdir())) == 1


def test_memory_left_is_that_of_the_control_group(tmp_path, monkeypatch):
    real, files = store.Path.read_text, {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8000 kB\n",
        "/proc/self/cgroup": "0::/a/b\n",
        "/sys/fs/cgroup/a/b/memory.max": "max",
        "/sys/fs/cgroup/a/memory.max": "5000000",
        "/sys/fs/cgroup/a/memory.stat": "anon 1000000\nfile 3\n",
    }  # fmt: skip

    def read(self, *args, **kwargs):
        if str(self).startswith(("/proc", "/sys")):
            if str(self) not in files:
                raise FileNotFoundError
            return files[str(self)]
        return real(self, *args, **kwargs)

    monkeypatch.setattr(store.Path, "read_text", read)
    assert store.memory_left() == 4_000_000
    files["/sys/fs/cgroup/a/memory.max"] = "max"
    assert store.memory_left() == 8000 * 1024
    files.clear()
    assert store.memory_left() is None


def test_a_file_that_cannot_be_read_leaves_no_cache(ragged, tmp_path):
    ragged[280].write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(BadInput, match="280.png"):
        Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_training_sees_the_same_images_with_and_without_a_cache(bands, tmp_path, parse):
    def batch(*argv):
        dls = loader.get_dls(parse("--data", bands, "--size", 32, *argv))
        return next(iter(dls.train))[0], dls.mean

    (a, m), (b, n) = batch("--cache", ""), batch("--cache", tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert (a == b).all() and (m == n).all()
