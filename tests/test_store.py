import os
import pickle
import resource
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from lib.cli import BadInput
from lib.data import decode, loader, store
from lib.data.store import Store
from tests.conftest import save

RNG = np.random.default_rng(0)


def smooth(h, w):
    """A random picture with the smooth colours of photographs."""
    coarse = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def ragged(tmp_path):
    """300 images of mixed sizes: more than one chunk."""
    for i in range(300):
        h, w = RNG.integers(20, 50, 2)
        save(tmp_path / "images" / f"{i:03}.png", smooth(h, w))
    return sorted((tmp_path / "images").iterdir())


def test_the_store_in_a_folder_equals_that_in_an_unnamed_file(ragged, tmp_path, monkeypatch):
    unnamed = Store(ragged, 24, tmp_path)
    file = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    for i, path in enumerate(ragged):
        expected = decode.read(path, 24)
        assert min(expected.shape[:2]) == 24
        assert (unnamed[i] == expected).all() and (file[i] == expected).all()
    assert unnamed.fingerprint == file.fingerprint
    assert file.folder.parent == tmp_path / "cache" and unnamed.folder is None

    def fail(*args):
        raise AssertionError("decoded again")

    with monkeypatch.context() as m:
        m.setattr(decode, "read", fail)
        again = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    assert (again[299] == unnamed[299]).all() and again.fingerprint == unnamed.fingerprint


def test_few_large_images_are_decoded_at_a_time(ragged, tmp_path, monkeypatch):
    whole = Store(ragged, 24, tmp_path).fingerprint
    sizes, decode_all = [], store.decode_all
    monkeypatch.setattr(store, "CHUNK_BYTES", 10 * 3 * 24**2)
    monkeypatch.setattr(store, "decode_all", lambda paths, *rest: sizes.append(len(paths)) or decode_all(paths, *rest))
    assert Store(ragged, 24, tmp_path).fingerprint == whole and set(sizes) == {10}


@pytest.mark.parametrize("what", ["size", "mtime", "ctime"])
def test_each_fact_of_a_file_is_in_the_key(ragged, tmp_path, monkeypatch, what):
    some = Store(ragged, 24, tmp_path)
    before, stat = some.key(), os.stat
    changed = {"size": "st_size", "mtime": "st_mtime_ns", "ctime": "st_ctime_ns"}[what]
    names = ("st_size", "st_mtime_ns", "st_ctime_ns")
    fake = lambda path: SimpleNamespace(**{n: getattr(stat(path), n) + (n == changed) for n in names})
    monkeypatch.setattr(store.os, "stat", fake)
    assert some.key() != before


def test_a_changed_file_is_read_again(ragged, tmp_path):
    first = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    save(ragged[7], np.zeros((24, 24, 3), np.uint8))
    os.utime(ragged[7], (1, 1))
    second = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    assert second[7].max() == 0 and second.folder != first.folder


def test_images_are_read_again_where_heic_can_be_read_now(ragged, tmp_path, monkeypatch):
    keys = set()
    for known in (decode.KINDS, (".png",), (".png", *decode.HEIF)):
        monkeypatch.setattr(decode, "EXTENSIONS", known)
        keys.add(Store(ragged[:2], 24, tmp_path).key())
    assert len(keys) == 2


def test_a_worker_process_maps_the_file_for_itself(ragged, tmp_path):
    file = Store(ragged, 24, tmp_path, cache=tmp_path / "cache")
    content = pickle.dumps(file)
    assert len(content) < 300 * 300
    assert (pickle.loads(content)[299] == file[299]).all()


def test_an_unnamed_file_goes_with_the_process(ragged, tmp_path):
    (tmp_path / "no folder").write_text("")
    for temporary in (tmp_path / "new", tmp_path / "no folder", None):
        unnamed = Store(ragged, 24, tmp_path, temporary=temporary)
        assert (unnamed[299] == decode.read(ragged[299], 24)).all()
    assert list((tmp_path / "new").iterdir()) == []
    again = pickle.loads(pickle.dumps(unnamed))  # as a worker process that is spawned gets it
    assert (again[299] == unnamed[299]).all() and again.fingerprint == unnamed.fingerprint


@pytest.mark.parametrize("cached", [False, True])
def test_a_disk_that_fills_up_while_decoding_is_one_line(cached, ragged, tmp_path, parse):
    """Both kinds of file, in a process that may write no more than 100 kB to one."""
    argv = ["--data", tmp_path / "images", "--size", 24, "--cache", tmp_path / "cache" if cached else ""]
    for i, path in enumerate(ragged):
        path = tmp_path / "images" / "ab"[i % 2] / path.name
        path.parent.mkdir(exist_ok=True)
        ragged[i].rename(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(BadInput, match="--data .*File too large.*make room"):
            loader.get_dls(parse(*argv))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not cached or list((tmp_path / "cache").iterdir()) == []


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
