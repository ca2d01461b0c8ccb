"""From a folder of class folders to three lists of images: train, valid, test."""

import os
import unicodedata
from pathlib import Path

import numpy as np

from lib.cli import BadInput, printable
from lib.data.decode import EXTENSIONS

VALID_NAMES = ("valid", "val", "validation")


TEST_PCT = 0.2  # of the images, where the data brings no test set


def visible(folder):
    return sorted((p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))), key=lambda p: p.name)


def enter(folder):
    """`folder`, or the single folder in it that holds all the class folders, as archives often have."""
    while True:
        inside = visible(folder)
        folders = [p for p in inside if p.is_dir() and not p.is_symlink()]
        if len(folders) != 1 or folders[0].name.lower() == "train":
            return folder
        if any(p.suffix.lower() in EXTENSIONS for p in inside) or not any(p.is_dir() for p in visible(folders[0])):
            return folder
        folder = folders[0]


def images_in(folder, odd, others):
    """The images under `folder`. Links and devices are added to `odd`, files not named as images to `others`."""
    found, ahead = [], [folder]
    while ahead:
        with os.scandir(ahead.pop()) as entries:
            for entry in entries:
                known = entry.name.lower().endswith(EXTENSIONS)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    ahead.append(entry.path)
                elif known and entry.is_file(follow_symlinks=False):
                    found.append(Path(entry.path))
                elif known or entry.is_dir():
                    odd.append(entry.path)
                else:
                    others.append(entry.path)
    return sorted(found, key=Path.as_posix)


def scan(folder, without=frozenset()):
    """The images under `folder` but those in `without`: [(path, class name)], in an order that the names alone decide.

    Each folder in it is a class. Hidden names and links are passed over. Raises BadInput for an empty class.
    """
    found, odd, others, notes, spelled = [], [], [], [], {}
    for sub in visible(folder):
        if not sub.is_dir():
            others += [sub] if sub.name.lower().endswith(EXTENSIONS) else []
            continue
        if sub.is_symlink():
            odd.append(sub)
            continue
        files = [p for p in images_in(sub, odd, others) if p not in without]
        if not files:
            raise BadInput(
                f"{sub}: no images{' that can be read' if without else ''} ({' '.join(EXTENSIONS)}; links do not "
                "count); remove the folder, or put images of its class in it"
            )
        label = unicodedata.normalize("NFC", sub.name)  # file systems differ in how they write é
        if spelled.setdefault(label, sub.name) != sub.name:
            notes.append(f"{sub}: is the class {label!r} in other code points; the two folders are taken as one class")
        found += [(path, label) for path in files]
    if odd:
        notes.append(f"{folder}: links and devices are passed over, {len(odd):,} in all, such as {odd[0]}")
    if others:
        text = "not named as images, or in no class folder, are passed over"
        notes.append(f"{folder}: {len(others):,} files {text}, such as {others[0]}")
    for note in notes if not without else ():
        print(printable(note), flush=True)
    return found


def split_off(items, pct, seed):
    """Splits [(path, class)] into (rest, held): `pct` of every class, at least one image, a function of `seed`."""
    held, classes = set(), {}
    for i, (_, name) in enumerate(items):
        classes.setdefault(name, []).append(i)
    for k, (name, own) in enumerate(sorted(classes.items())):
        if len(own) < 2:
            raise BadInput(f"class {name!r} has too few images to hold some out; it needs at least 3 in all")
        n = min(max(round(len(own) * pct), 1), len(own) - 1)
        held.update(np.random.default_rng([seed, k]).permutation(own)[:n].tolist())
    return [x for i, x in enumerate(items) if i not in held], [x for i, x in enumerate(items) if i in held]


def named_folders(root, *names):
    return [p for p in visible(root) if p.is_dir() and p.name.lower() in names]


def find_images(root, valid_pct, split_seed, without=frozenset()):
    """Three lists of (path, class) under `root`: train, valid, test. With valid_pct 0 and no valid set, valid is test.

    `train/` beside `valid|val|validation` and `test` is taken as it is; a single set beside `train/` is test; plain
    class folders, or `train/` alone, give 20% of each class to test. What is held out is stratified, by `split_seed`.
    `without` are images to leave out.
    """
    root = Path(root)
    trains, valids, test = (named_folders(root, *names) for names in (["train"], VALID_NAMES, ["test"]))
    if not trains:
        valids, test = [], []
    for folders in (trains, valids, test):
        if len(folders) > 1:
            raise BadInput(f"{root}: has both {folders[0].name}/ and {folders[1].name}/; keep one")
        if folders and folders[0].is_symlink():
            raise BadInput(f"{folders[0]}: is a link, and links are not followed; put the folder itself there")
    train = scan(trains[0] if trains else root, without)
    if not train:
        raise BadInput(f"{root}: no images in class folders; expected <class>/<image>, or train/<class>/<image>")
    sets = [scan(s, without) for s in valids + test]
    classes = sorted({c for _, c in train})
    for folder, found in zip(valids + test, sets):
        if not found:
            raise BadInput(f"{folder}: no images in class folders; fill it or remove it")
        for path, name in found:
            if name not in classes:
                raise BadInput(f"{path.parent}: class {name!r} is not among those of train ({', '.join(classes[:5])}…)")
    if len(classes) < 2:
        raise BadInput(f"{root}: only one class ({classes[0]!r}); a classifier needs at least two class folders")
    if len(sets) == 2:
        return train, sets[0], sets[1]
    if sets:
        held = sets[0]
    else:
        train, held = split_off(train, TEST_PCT, split_seed)
    if valid_pct == 0:
        return train, held, held
    train, valid = split_off(train, valid_pct, split_seed + 1)
    return train, valid, held
