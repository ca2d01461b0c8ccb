"""Which folders are sets, classes, leftovers, or images to predict."""

import csv
import re

import pytest

from lib import predict
from lib.cli import BadInput
from lib.config import Config
from lib.data import folders, loader
from tests.conftest import SMALL, good, save
from tests.test_data import RNG, names, picture, tree
from train_fastai import main

CLASSES = {"a": 12, "b": 12}
FEW = {"a": 3, "b": 3}


@pytest.mark.parametrize(
    "train, held",
    [
        ("training", "testing"), ("seg_train/seg_train", "seg_test/seg_test"), ("training_set", "test_set"),
        ("train", "testing"), ("train", "dev"), ("train", "eval"), ("Train-Images", "Validation images"),
        ("trainset", "testset"), ("train2017", "val2017"),
    ],
)  # fmt: skip
def test_sets_by_the_names_that_people_use(train, held, tmp_path, capsys):
    root = folders.enter(tree(tmp_path, {f"pack/{train}": CLASSES, f"pack/{held}": FEW}))
    sets, is_test = folders.find_images(root, 0.1, 0), "test" in held
    assert [len(images) for images in sets] == ([22, 2, 6] if is_test else [20, 6, 4])
    assert all({name for _, name in images} == {"a", "b"} for images in sets)
    assert {p.relative_to(root).parts[0] for p, _ in sets[1 + is_test]} == {held.split("/")[0]}
    assert loader.get_dls(Config(data=str(tmp_path), size=16)).vocab == ["a", "b"]
    assert capsys.readouterr().out == ""


SAYS = {  # sets that are there, --valid-pct: what is said of them
    ("train", "val", "test", 0.1): "train/ is train, val/ is valid, test/ is test",
    ("train", "val", 0.1): "val/ is valid; there is no test/; held out of train/: 20% of each class is test",
    ("train", "val", 0): "val/ is valid; there is no test/; one set is both valid and test (--valid-pct 0)",
    ("train", "testing", 0.25): "test; there is no valid/; held out of train/: 25% of each class is valid",
    ("train", 0.1): "train/ is train; there is no valid/ and no test/; held out of train/: 20% of each class is test, "
    "10% of the rest is valid",
    ("", 0.1): "its folders are classes; there is no valid/ and no test/; 20% of each class is test, 10% of the rest "
    "is valid",
    ("", 0): "no test/; 20% of each class is test, one set is both valid and test (--valid-pct 0)",
}


@pytest.mark.parametrize("layout", SAYS, ids=str)
def test_a_line_says_which_folder_is_which_set_and_it_is_true(layout, tmp_path):
    *names, pct = layout
    root = tree(tmp_path, {name: CLASSES for name in names})
    assert folders.told_sets(root, pct).endswith(SAYS[layout])
    train, valid, test = map(set, folders.find_images(root, pct, 0))
    assert not train & (valid | test) and (valid == test if pct == 0 else not valid & test)
    held = {"20%": 4, "10%": 2, "25%": 6}
    assert len(test) == (held["20%"] if "20%" in SAYS[layout] else 24)
    assert len(valid) == next(
        (held[part] for part in ("10%", "25%") if part in SAYS[layout]), len(test) if not pct else 24
    )
    assert len(train | valid | test) == 24 * len(names)


def test_every_image_is_in_one_fold_and_every_class_in_each(tmp_path):
    root = tree(tmp_path, {"": {"a": 20, "b": 10}})
    sets = [folders.find_images(root, 0.1, 0, folds=5, fold=fold) for fold in range(1, 6)]
    assert sorted(sum((test for _, _, test in sets), [])) == sorted(sum(folders.find_images(root, 0.1, 0), []))
    for train, valid, test in sets:
        assert [sum(name == c for _, name in test) for c in "ab"] == [4, 2]
        assert len({*train, *valid, *test}) == 30 and {name for _, name in valid} == {"a", "b"}
    assert folders.find_images(root, 0.1, 1, folds=5, fold=1) != sets[0] == folders.find_images(root, 0.1, 0, 5, 1)
    assert "fold 2 of 5 is test, 10% of the rest is valid" in folders.told_sets(root, 0.1, 5, 2)


def test_folds_that_make_no_sense_are_refused(tmp_path):
    root = tree(tmp_path / "x", {"train": {"a": 6, "b": 9}, "val": FEW})
    with pytest.raises(BadInput, match=f"--folds: {root} has val/ already; pass --data {root / 'train'} for"):
        folders.find_images(root, 0.1, 0, 5, 1)
    with pytest.raises(BadInput, match="1 of 2 classes .* fewer than 7: 'a' has 6"):
        folders.find_images(root / "train", 0.1, 0, 5, 1)
    with pytest.raises(BadInput, match="--fold: which of the 5"):
        folders.find_images(root / "train", 0.1, 0, 5)


@pytest.mark.parametrize("name", ["training wheels", "evaluator", "latest", "trainers", "test tubes"])
def test_other_names_are_classes(name, tmp_path):
    root = tree(tmp_path, {"": {name: 9, "train": 9, "car": 9}})
    assert {c for images in folders.find_images(root, 0.1, 0) for _, c in images} == {name, "train", "car"}


@pytest.mark.parametrize("sets", [("part1", "part2"), ("mine_train", "mine_test"), ("valid", "test"), ("x", "y", "z")])
def test_folders_that_hold_the_same_folders_are_no_classes(sets, tmp_path):
    root, (a, b) = tree(tmp_path / "x/train", {name: CLASSES for name in sets}), sorted(sets)[:2]
    with pytest.raises(
        BadInput, match=rf"{a}/ and {b}/ hold the same folders \(a, b\): are these sets\? .* into train/"
    ):
        folders.find_images(root, 0.1, 0)
    classes = {name for _, name in folders.find_images(root.parent, 0.1, 0)[0]}  # as the line says
    assert classes == set(sets)


def test_sets_deeper_than_other_folders_are_asked_for(tmp_path):
    root = tree(tmp_path / "x", {"images/train": CLASSES, "images/test": FEW, "": {"annotations": 5}})
    with pytest.raises(BadInput, match=f"images/ holds sets beside 1 other folders; pass --data {root / 'images'}"):
        folders.find_images(root, 0.1, 0)
    assert [len(images) for images in folders.find_images(root / "images", 0.1, 0)] == [22, 2, 6]


def test_a_class_that_is_a_link_is_a_class_of_its_own_folder(tmp_path, capsys):
    """photos/cats/ has folders of years, photos/dogs is a link: the years are no classes."""
    root = tree(tmp_path / "photos", {"cats": {"2019": 9, "2020": 9}, "birds": {"x": 9}})
    (root / "birds").rename(tmp_path / "elsewhere")
    (root / "dogs").symlink_to(tmp_path / "elsewhere")
    assert folders.enter(root) == root
    with pytest.raises(BadInput, match="only one class"):
        folders.find_images(root, 0.1, 0)
    assert "links and devices are passed over" in capsys.readouterr().out


def test_images_to_be_predicted_are_no_link(tmp_path):
    root = tree(tmp_path / "photos", {"train": CLASSES, "elsewhere": {"x": 4}})
    (root / "pred").symlink_to(root / "elsewhere/x")
    assert folders.unlabelled(root) == []


def test_a_class_may_have_the_name_of_images_to_be_predicted(tmp_path):
    root = tree(tmp_path / "photos", {"": {"train": 9, "car": 9, "unlabelled": 9}})
    sets = folders.find_images(root, 0.2, 0)
    assert {name for images in sets for _, name in images} == {"train", "car", "unlabelled"}
    assert folders.unlabelled(root) == []


def test_a_set_without_train_is_said_to_be_a_class(tmp_path, capsys):
    folders.find_images(tree(tmp_path / "photos", {"": {"cats": 9, "dogs": 9, "test": 9}}), 0.1, 0)
    assert "photos/test: is taken as a class" in capsys.readouterr().out


def test_runs_do_not_lie_among_class_folders(tmp_path, parse):
    """They would be a class of the next run; also where `--out` is a folder of the set that one stands in."""
    sets = tree(tmp_path / "sets", {"train": CLASSES, "valid": FEW})
    plain = tree(tmp_path / "plain", {"": CLASSES})
    check = lambda root, out: loader.check_apart(parse("--data", root, "--out", out), root)
    for root, out in ((sets, sets / "train/runs"), (sets, sets / "valid/a/x"), (plain, plain / "runs")):
        with pytest.raises(BadInput, match="--out .*: lies among the class folders of .*; pass another folder"):
            check(root, out)
    for root, out in ((sets, sets / "runs"), (sets, sets / "train/.runs"), (plain, tmp_path / "runs")):
        check(root, out)


def test_folders_of_classes_may_differ(tmp_path):
    root = tree(tmp_path, {"cat": {"2019": 4, "2020": 4}, "dog": {"2020": 4, "2021": 4}})
    assert sum(map(len, folders.find_images(root, 0.1, 0))) == 16


def test_train_without_classes_is_no_class(tmp_path):
    for sets in ({"train": 9, "test": 9}, {"train": 9, "val": 9, "other": 9}):
        root = tree(tmp_path / "-".join(sets), {"": sets})
        with pytest.raises(BadInput, match=r"train: looks like a set, and has no class folders"):
            folders.find_images(root, 0.1, 0)


def test_what_is_passed_over_beside_train_is_said(tmp_path, capsys):
    root = tree(tmp_path, {"train": CLASSES, "holdout": FEW, "annotations": FEW, "pred": FEW})
    for name in ("models", "lost+found"):
        (root / name).mkdir()
    folders.find_images(root, 0.1, 0)
    out = capsys.readouterr().out
    assert "annotations/, holdout/, pred/, lost+found/, models/ beside train/: passed over" in out


def test_the_first_lines_name_the_classes(tmp_path, capsys):
    root = good(tmp_path / "photos", ("cat", "dog\x1b[31m", *"efgh"))
    assert main([*map(str, ["--data", root, *SMALL, "--dry-run"])]) == 0
    assert r"6 classes (cat, dog\x1b[31m, e, f, g, …), 16 x 16 pixels" in capsys.readouterr().out


LEFT = ("lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "__MACOSX", "__pycache__")


@pytest.mark.parametrize("name", [*LEFT, "LOST.DIR", "models", "weights", "outputs", "lightning_logs", "wandb"])
def test_what_systems_and_programs_leave_is_passed_over_and_said(name, tmp_path, capsys):
    root = tree(tmp_path, {"": CLASSES})
    (root / name).mkdir()
    (root / name / "model.pth").write_bytes(b"")
    inside = root / "a" / name
    inside.mkdir()
    if name in LEFT:
        save(inside / "thumbnail.png", picture(RNG, 0))
        save(root / name / "thumbnail.png", picture(RNG, 0))
    assert sum(map(len, folders.find_images(root, 0.1, 0))) == 24
    out = capsys.readouterr().out
    assert "that systems and programs leave are passed over" in out and "remove" not in out
    assert len(predict.find([root])) == 24
    pack = tree(tmp_path / "outer/pack", {"": CLASSES})
    (pack.parent / name).mkdir()
    assert folders.enter(pack.parent) == pack


@pytest.mark.parametrize("names", [("models", "logs"), ("compost", "Recycled", "recycler")])
def test_a_class_may_have_a_programs_name(names, tmp_path):
    root = tree(tmp_path, {"": dict.fromkeys(names, 9)})
    assert sum(map(len, folders.find_images(root, 0.1, 0))) == 9 * len(names) == len(predict.find([root]))


def test_what_a_learner_saves_is_no_part_of_the_data(make, bands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(bands.rglob("*"))
    _, learn = make()
    learn.save("m")
    assert sorted(bands.rglob("*")) == before and (tmp_path / "models/m.pth").exists()


@pytest.mark.parametrize("where", ["test", "pred/pred"])
def test_images_without_classes_are_predicted(where, tmp_path, capsys):
    root = good(tmp_path / "photos/train").parent
    good(root / "valid", n=3)
    good((root / where).parent, (where.split("/")[-1],), 5)
    (root / where / "bad.png").write_bytes(b"")
    assert main([*map(str, ["--data", root, "--out", tmp_path, "--name", "x", *SMALL])]) == 0
    out, err = capsys.readouterr()
    assert f"{where[:4]}/: without classes; to be predicted" in out and "5 images without classes are predicted" in out
    assert "bad.png: is no whole" in err and err.count("\n") == 1
    with open(tmp_path / "x/predictions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    files = [root / where / f"{i}.png" for i in range(5)]
    assert [row["file"] for row in rows] == list(map(str, files))
    assert [row["prediction"] for row in rows] == predict.load(tmp_path / "x")(files)[0]


def test_all_classes_that_are_too_small_are_named(tmp_path):
    root = tree(tmp_path, {"": {"a": 9, "b": 2, "c": 1, "d": 9}})
    with pytest.raises(BadInput, match="2 of 4 classes have too few images .* fewer than 3: 'b' has 2, 'c' has 1;"):
        folders.find_images(root, 0.1, 0)
    with pytest.raises(BadInput, match="1 of 4 classes .* fewer than 2: 'c' has 1;"):
        folders.find_images(root, 0, 0)
    for name in "efghijklmnop":
        (root / name).mkdir()
    with pytest.raises(BadInput, match=re.escape("e and 11 more folders (f, g, h, i, j, k, l, m, n, o, …): no images")):
        folders.find_images(root, 0.1, 0)


def test_links_have_a_way_out(tmp_path):
    real = tree(tmp_path / "real", {"": CLASSES})
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / name).symlink_to(real / name)
    with pytest.raises(BadInput, match=f"cp -rL {tmp_path / 'photos'} COPY makes files of links"):
        folders.find_images(tmp_path / "photos", 0.1, 0)


def test_the_split_of_sets_is_by_class(tmp_path):
    root = tree(tmp_path, {"training": CLASSES})
    train, valid, test = folders.find_images(root, 0.1, 0)
    assert (len(train), len(valid), len(test)) == (18, 2, 4) and len({*names(train), *names(test)}) == 22
