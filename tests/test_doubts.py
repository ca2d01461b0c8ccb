"""What is worth a look before training: made folders in which it is known."""

import csv
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from lib.data import doubts, loader
from train_fastai import main

OPTIONS = ["--size", 48, "--model", "small", "-b", 8, "--epochs", 1, "--lr", 0.05, "--valid-pct", 0.2]


def photo(rng, side=96):
    """A crop of a photograph with much in it."""
    temple = load_sample_images().images[0]
    y, x = rng.integers(150, temple.shape[0] - side), rng.integers(0, temple.shape[1] - side)
    return temple[y : y + side, x : x + side]


@pytest.fixture
def folder(tmp_path):
    """train/ with 12 images of each of two classes, test/ with 4 of each; no two of them overlap much."""
    rng, root = np.random.default_rng(3), tmp_path / "photos"
    for where, n in (("train", 12), ("test", 4)):
        for name in ("a", "b"):
            (root / where / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(photo(rng)).save(root / where / name / f"{i:02}.png")
    return root


def looked(parse, root):
    return doubts.look(loader.get_dls(parse("--data", root, *OPTIONS)))


def test_images_without_a_fault_raise_no_doubt(parse, folder):
    assert looked(parse, folder) == []


@pytest.mark.parametrize("how", ["file", "jpeg", "larger", "darker"])
def test_near_copies_are_found_across_sets(parse, folder, how):
    image = np.asarray(Image.open(folder / "train/a/03.png"))
    changed = {
        "file": image,
        "jpeg": cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR),
        "larger": cv2.resize(image, (150, 150), interpolation=cv2.INTER_CUBIC),
        "darker": (image * 0.96).astype(np.uint8),
    }[how]
    Image.fromarray(changed).save(folder / "test/a/copy.png")
    (row,) = [row for row in looked(parse, folder) if row["doubt"] == doubts.ACROSS]
    assert row["file"] == "test: test/a/copy.png" and row["detail"].endswith(": train/a/03.png")


def test_copies_in_two_classes_come_before_those_in_one(parse, folder):
    shutil.copy(folder / "test/a/01.png", folder / "test/b/again.png")
    shutil.copy(folder / "test/b/02.png", folder / "test/b/twice.png")
    rows = looked(parse, folder)
    assert [row["doubt"] for row in rows] == ["near copies in two classes", "near copies"]
    assert {rows[1]["file"], rows[1]["detail"]} == {"test: test/b/02.png", "test: test/b/twice.png"}


def test_many_copies_are_a_row_each(parse, folder):
    """Frames of a camera that stands still: all are copies of each other."""
    for i in range(40):
        shutil.copy(folder / "train/a/03.png", folder / "train/a" / f"frame {i:02}.png")
    shutil.copy(folder / "train/a/03.png", folder / "test/a/copy.png")
    rows = looked(parse, folder)
    told = [(row["doubt"], row["file"]) for row in rows]
    assert len(told) == len(set(told)) >= 41 and (doubts.ACROSS, "test: test/a/copy.png") in told


def test_copies_of_pale_images_are_found_though_pale_images_are_alike(parse, tmp_path):
    """Noise about one tint, as in the copies of issue reports: a thumbnail has little of it left."""
    rng, root = np.random.default_rng(4), tmp_path / "pale"
    for where, n in (("train", 12), ("test", 4)):
        for name, tint in (("a", 90), ("b", 160)):
            (root / where / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.normal(tint, 40, (48, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / where / name / f"{i:02}.png")
    assert looked(parse, root) == []
    for i in range(4):
        shutil.copy(root / f"train/a/{i:02}.png", root / f"test/a/{i:02}.png")
    rows = looked(parse, root)
    assert [row["doubt"] for row in rows] == [doubts.ACROSS] * 4
    assert [row["file"] for row in rows] == [f"test: test/a/{i:02}.png" for i in range(4)]


def test_small_classes_plain_drawn_and_huge_images_are_named(parse, folder):
    rng = np.random.default_rng(5)
    for path in sorted((folder / "train/b").iterdir())[7:]:
        path.unlink()
    Image.new("RGB", (96, 96), (200, 190, 180)).save(folder / "train/a/grey.png")
    drawn = np.full((96, 96, 3), 255, np.uint8)
    cv2.putText(drawn, "404", (8, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.3, (0, 0, 0), 3)
    Image.fromarray(drawn).save(folder / "train/a/none.png")
    Image.fromarray(photo(rng).repeat(5, 0).repeat(5, 1)).save(folder / "test/a/huge.png")
    found = {}
    for row in looked(parse, folder):
        found.setdefault(row["doubt"], []).append((row["file"], row["detail"]))
    ((name, number),) = found["under 10 training images"]
    assert name == "b" and int(number.split()[0]) < 7 and number.endswith(" in train")
    assert found["nearly one colour"] == [("train/a/grey.png", "")]
    assert ("train/a/none.png", "") in found["drawn, not a photograph"]
    assert found["far from the usual size"] == [("test/a/huge.png", "480 pixels; the median is 96")]


def test_pairs_are_those_of_a_search_through_all(monkeypatch):
    rng = np.random.default_rng(0)
    thumbnails = rng.uniform(0, 255, (80, 192)).astype(np.float32)
    hashes = rng.integers(0, 2**63, 80, dtype=np.uint64)
    for row in range(0, 40, 2):  # one, two or three bits apart
        flips = rng.choice(64, row % 3 + 1, replace=False)
        hashes[row + 1] = hashes[row] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
        thumbnails[row + 1] = thumbnails[row] + rng.uniform(-5, 5, 192)
    found = doubts.pairs(hashes, thumbnails)
    near = lambda a, b: bin(int(hashes[a] ^ hashes[b])).count("1") <= 3
    there = [[a, b] for a in range(80) for b in range(a + 1, 80) if near(a, b)]
    assert found.tolist() == there and len(found) >= 20
    thumbnails[1] += 20
    assert len(doubts.pairs(hashes, thumbnails)) == len(found) - 1


def test_small_things_on_a_plain_ground_are_no_copies(tmp_path):
    """As under a microscope: a few bright discs on black, each image with its own."""
    rng, images = np.random.default_rng(0), np.zeros((200, 96, 96, 3), np.uint8)
    for i, image in enumerate(images):
        for _ in range(i % 3 + 1):
            cv2.circle(image, tuple(map(int, rng.integers(8, 88, 2))), int(rng.integers(4, 9)), (255, 255, 255), -1)
    hashes, thumbnails = doubts.fingerprints(images, range(200))
    assert len(doubts.pairs(hashes, thumbnails)) < 20  # some lie by chance in nearly the same place
    thumbnails[1], hashes[1] = thumbnails[0] + 1, hashes[0]
    assert [0, 1] in doubts.pairs(hashes, thumbnails).tolist()


def test_a_run_and_a_dry_run_say_it_and_the_run_writes_it(folder, tmp_path, capsys):
    shutil.copy(folder / "train/a/03.png", folder / "test/a/copy.png")
    argv = ["--data", folder, *OPTIONS, "--gallery", 0, "--out", tmp_path / "runs", "--name", "x"]
    assert main([*map(str, argv), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "worth a look before training:\n  near copies across sets: 1 of 9 test images: test: test/a/copy.png" in out
    assert main([*map(str, argv)]) == 0
    assert "worth a look before training (doubts.csv has all):" in capsys.readouterr().out
    with open(tmp_path / "runs/x/doubts.csv", newline="") as f:
        assert [row["doubt"] for row in csv.DictReader(f)] == [doubts.ACROSS]
    assert '"doubts": [["near copies across sets"' in (tmp_path / "runs/x/report.html").read_text()
