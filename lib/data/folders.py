"""From a folder of class folders to three lists of images: train, valid, test."""

import os
import unicodedata
from pathlib import Path

import numpy as np

from lib.cli import BadInput, printable
from lib.data.decode import EXTENSIONS

SETS = (["train"], ["valid", "val", "validation"], ["test"])  # names of their folders
TEST_PCT = 0.2  # of the images, where the data brings no test set


def visible(folder):
    return sorted((p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))), key=lambda p: p.name)


def named_folders(root, *names):
    return [p for p in visible(root) if p.is_dir() and p.name.lower() in names]


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
    images, folders = [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                known = entry.name.lower().endswith(EXTENSIONS)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif known and entry.is_file(follow_symlinks=False):
                    images.append(Path(entry.path))
                else:
                    (odd if known or entry.is_dir() else others).append(entry.path)
    return sorted(images, key=Path.as_posix)


def scan(folder, without=frozenset()):
    """The images under `folder` but those in `without`: [(path, class name)], in an order that the names alone decide.

    Each folder in it is a class. Hidden names and links are passed over, which is printed. Raises BadInput for an
    empty class.
    """
    images, odd, others, notes, names = [], [], [], [], {}
    for sub in visible(folder):
        if not sub.is_dir():
            others += [sub] if sub.name.lower().endswith(EXTENSIONS) else []
            continue
        if sub.is_symlink():
            odd.append(sub)
            continue
        files = [p for p in images_in(sub, odd, others) if p not in without]
        if not files:
            kinds = f"{' that can be read' if without else ''} ({' '.join(EXTENSIONS)}; links do not count)"
            raise BadInput(f"{sub}: no images{kinds}; remove the folder, or put images of its class in it")
        label = unicodedata.normalize("NFC", sub.name)  # file systems differ in how they write é
        if names.setdefault(label, sub.name) != sub.name:
            notes.append(f"{sub}: is the class {label!r} in other code points; the two folders are taken as one class")
        images += [(path, label) for path in files]
    if odd:
        notes.append(f"{folder}: links and devices are passed over, {len(odd):,} in all, such as {odd[0]}")
    if others:
        text = "not named as images, or in no class folder, are passed over"
        notes.append(f"{folder}: {len(others):,} files {text}, such as {others[0]}")
    for note in notes if not without else ():
        print(printable(note), flush=True)
    return images


def split_off(images, pct, seed):
    """Splits [(path, class)] into (rest, held): `pct` of every class, at least one image, a function of `seed`."""
    held, (names, numbers) = set(), np.unique([name for _, name in images], return_inverse=True)
    for k, name in enumerate(names):
        of_class = np.flatnonzero(numbers == k)
        if len(of_class) < 2:
            raise BadInput(f"class {str(name)!r} has too few images to hold some out; it needs at least 3 in all")
        n = min(max(round(len(of_class) * pct), 1), len(of_class) - 1)
        held.update(np.random.default_rng([seed, k]).permutation(of_class)[:n].tolist())
    return [x for i, x in enumerate(images) if i not in held], [x for i, x in enumerate(images) if i in held]


def find_images(root, valid_pct, split_seed, without=frozenset()):
    """Three lists of (path, class) under `root`: train, valid, test. With valid_pct 0 and no valid set, valid is test.

    `train/` beside `valid|val|validation` and `test` is taken as it is; a single set beside `train/` is test; plain
    class folders, or `train/` alone, give 20% of each class to test. What is held out is stratified, by `split_seed`.
    `without` are images to leave out.
    """
    folders = [named_folders(root, *names) for names in SETS]
    folders = folders if folders[0] else [[root], [], []]
    for same in folders:
        if len(same) > 1:
            raise BadInput(f"{root}: has both {same[0].name}/ and {same[1].name}/; keep one")
        if same and same != [root] and same[0].is_symlink():
            raise BadInput(f"{same[0]}: is a link, and links are not followed; put the folder itself there")
    sets = [scan(*same, without) for same in folders if same]
    if not sets[0]:
        raise BadInput(f"{root}: no images in class folders; expected <class>/<image>, or train/<class>/<image>")
    classes = sorted({name for _, name in sets[0]})
    for folder, images in zip(sum(folders, []), sets):
        if not images:
            raise BadInput(f"{folder}: no images in class folders; fill it or remove it")
        for path, name in images:
            if name not in classes:
                raise BadInput(f"{path.parent}: class {name!r} is not among those of train ({', '.join(classes[:5])}…)")
    if len(classes) < 2:
        raise BadInput(f"{root}: only one class ({classes[0]!r}); a classifier needs at least two class folders")
    if len(sets) == 3:
        return tuple(sets)
    train, test = sets if len(sets) == 2 else split_off(*sets, TEST_PCT, split_seed)
    if valid_pct == 0:
        return train, test, test
    return *split_off(train, valid_pct, split_seed + 1), test
