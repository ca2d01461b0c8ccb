"""From a folder of class folders to three lists of images: train, valid, test."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from fastcore.basics import groupby
from fasttransform import Transform
from sklearn.model_selection import StratifiedKFold

from lib.cli import BadInput, printable
from lib.data.decode import EXTENSIONS, HEIF

SETS = {  # words that name a set; a word of FILLERS may come with them, as in training_set, seg_test, val2017
    "train": {"train", "training"},
    "valid": {"valid", "val", "validation", "dev", "eval"},
    "test": {"test", "testing"},
    "new": {"pred", "predict", "unlabelled", "unlabeled"},  # images without classes
}
FILLERS = {"set", "data", "dataset", "images", "imgs", "seg", "split"}
TEST_PCT = 0.2  # of the images, if the data has no test set
SYSTEM = (  # names of files and folders that systems leave anywhere, in lower case
    "lost+found", "$recycle.bin", "#recycle", "@recycle", "@eadir", "#snapshot", "found.000",
    "system volume information", "__macosx", "__pycache__", "thumbs.db", "desktop.ini", "lost.dir",
    "network trash folder", "temporary items",
)  # fmt: skip
# names of folders that programs leave; a folder that holds images is not such a folder
PROGRAMS = (
    "models", "checkpoints", "weights", "runs", "outputs", "logs", "lightning_logs", "tb_logs", "mlruns", "wandb",
)  # fmt: skip
LEFT, LINKS = "files and folders that systems and programs leave", "links and devices"  # kinds that are passed over
OTHERS, UNREAD = "files not named as images, or in no class folder,", "HEIC files, which take uv run --extra heif …,"


class Label(Transform):
    """The class of an image file: the class folder that it lies in, directly below one of `roots`; else its folder."""

    input_types = (object,)

    def __init__(self, roots):
        super().__init__()
        self.roots = [root.parts for root in roots]

    def encodes(self, path: object) -> str:
        return self.name_of(path)

    def name_of(self, path):
        """As `encodes`, without the dispatch by type, which takes a hundred times as long."""
        path = path if isinstance(path, Path) else Path(path)
        inside = [r for r in self.roots if path.parts[: len(r)] == r and len(path.parts) > len(r) + 1]
        return unicodedata.normalize("NFC", path.parts[len(inside[0])] if inside else path.parent.name)


def left_over(path):
    """Whether `path` is a file or folder that a system or a program left. Such a folder is never a class."""
    name = path.name.lower()
    return name in SYSTEM or (name in PROGRAMS and path.is_dir() and not images_in(path, defaultdict(list)))


def visible(folder, of_kind=lambda entry: True):
    """The paths in `folder`, by name; without hidden ones, and without those that systems and programs leave."""
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if not entry.name.startswith(".") and of_kind(entry)]
    return sorted((p for p in found if not left_over(p)), key=lambda p: p.name)


folders_in = partial(visible, of_kind=os.DirEntry.is_dir)  # the folders in a folder, and links to folders


def set_of(name):
    """Which set the name of a folder stands for: a key of SETS, or ""."""
    words = set(re.findall("[a-z]+", re.sub("(?<=[a-z])set$", "", name.lower()))) - FILLERS
    return next((kind for kind, known in SETS.items() if len(words) == 1 and words <= known), "")


def by_set(root):
    """{set: the folders of `root` whose names stand for it}; the set is "" for all other folders."""
    return defaultdict(list, groupby(folders_in(root), lambda folder: set_of(folder.name)))


def enter(folder):
    """`folder`, or the single folder in it that holds all class folders. Archives often have such a folder."""
    while True:
        inside = visible(folder)
        folders = [p for p in inside if p.is_dir()]
        if len(folders) != 1 or folders[0].is_symlink() or set_of(folders[0].name) == "train":
            return folder
        if any(p.suffix.lower() in EXTENSIONS for p in inside) or not folders_in(folders[0]):
            return folder
        folder = folders[0]


def images_in(folder, passed):
    """The images under `folder`. Everything that is left out is added to `passed`, {what it is: paths}."""
    images, folders = [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                name = entry.name.lower()
                known = name.endswith(EXTENSIONS)
                if name.startswith("."):
                    continue
                if name in SYSTEM:
                    passed[LEFT].append(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif known and entry.is_file(follow_symlinks=False):
                    images.append(entry.path.replace(os.sep, "/"))
                else:
                    unread = UNREAD if name.endswith(HEIF) else OTHERS
                    passed[LINKS if known or entry.is_dir() else unread].append(entry.path)
    return list(map(Path, sorted(images)))


def scan(folder, without=frozenset()):
    """The images under `folder` except those in `without`: [(path, class name)], in an order that only names decide.

    Each folder in `folder` is a class. Hidden names, links and files that systems leave are left out; except for hidden
    names, a line says so. Raises BadInput for empty classes.
    """
    images, passed, notes, names, empty = [], defaultdict(list), [], {}, []
    passed[LEFT] += [p for p in folder.iterdir() if not p.name.startswith(".") and left_over(p)]
    for sub in visible(folder):
        if not sub.is_dir():
            passed[OTHERS] += [sub] if sub.name.lower().endswith(EXTENSIONS) else []
            continue
        if sub.is_symlink():
            passed[LINKS].append(sub)
            continue
        files = [p for p in images_in(sub, passed) if p not in without]
        if not files:
            empty.append(sub)
        label = unicodedata.normalize("NFC", sub.name)  # file systems store é in different code points
        if names.setdefault(label, sub.name) != sub.name:
            notes.append(f"{sub}: is the class {label!r} in other code points; the two folders are taken as one class")
        images += [(path, label) for path in files]
    remedy = f"cp -rL {folder} COPY makes files of links"
    for what, paths in passed.items():
        if paths:
            note = f"{folder}: {what} are passed over, {len(paths):,} in all, such as {min(map(str, paths))}"
            notes.append(f"{note}; {remedy}" if what == LINKS else note)
    for note in notes if not without else ():
        print(printable(note), flush=True)
    if empty:
        kinds = f"{' that can be read' if without else ''} ({' '.join(EXTENSIONS)}; links do not count, {remedy})"
        more = f" and {len(empty) - 1:,} more folders ({listed(p.name for p in empty[1:])})" if empty[1:] else ""
        raise BadInput(f"{empty[0]}{more}: no images{kinds}; remove the folder, or put images of its class in it")
    if not images and passed[LINKS]:
        raise BadInput(f"{folder}: no images in class folders but links, which are not followed; {remedy}")
    return images


def listed(names, most=10):
    """The first of `names` as text."""
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def find_sets(root, tell=False):
    """{set: folder that holds its class folders} of `root`, for train, valid and test; {"train": root} without sets.

    With `tell` it prints which folders are left out. Raises BadInput if the names do not tell what the folders are.
    """
    found, sets = by_set(root), {}
    if not any(map(folders_in, found["train"])):
        check_classes(root, found)
        for folder in (p for kind in SETS for p in found[kind] if tell and not p.is_symlink()):
            print(printable(f"{folder}: is taken as a class, as no train/ here has class folders"), flush=True)
        return {"train": root}
    for kind in ("train", "valid", "test"):
        for folder in found[kind]:
            if folder.is_symlink():
                remedy = f"cp -rL {root} COPY makes folders of links"
                raise BadInput(f"{folder}: is a link, and links are not followed; {remedy}")
            if kind in sets:
                raise BadInput(f"{root}: has both {found[kind][0].name}/ and {folder.name}/; keep one")
            sets[kind] = unwrapped(folder)
    new = flat(found)
    if {*found["test"]} & {*new}:  # a test set without classes is predicted, not scored
        del sets["test"]
    other = [p.name + "/" for p in [*found[""], *found["new"]] if p not in new]
    other += sorted(p.name + "/" for p in root.iterdir() if p.is_dir() and left_over(p)) if tell else []
    if tell and other:
        names = ", ".join(p.name + "/" for kind in sets for p in found[kind])
        print(printable(f"{root}: {listed(other)} beside {names}: passed over"), flush=True)
    if tell and new:
        print(printable(f"{root}: {listed(p.name + '/' for p in new)}: without classes; to be predicted"), flush=True)
    return sets


def unwrapped(folder):
    """`folder` of a set, or the folder in it with a name of the same set, as in archives of Kaggle (train/train/)."""
    inside = folders_in(folder)
    return inside[0] if len(inside) == 1 and set_of(inside[0].name) == set_of(folder.name) else folder


def flat(found):
    """The folders for test and for prediction that have images but no class folders."""
    plain = [p for p in [*found["test"], *found["new"]] if not p.is_symlink() and not folders_in(unwrapped(p))]
    return [p for p in plain if images_in(p, defaultdict(list))]


def unlabelled(root):
    """The images of `root` to be predicted. They are in a test set without classes beside train/, or in pred/."""
    found = by_set(root)
    folders = flat(found) if any(map(folders_in, found["train"])) else []  # else all of them are classes
    return [p for folder in folders for p in images_in(folder, defaultdict(list))]


def check_classes(root, found):
    """Raises BadInput if class folders look like sets. `found` has the folders by the set of their names."""
    if found["train"] and (not found[""] or found["valid"] or found["test"]):
        text = "looks like a set, and has no class folders; expected train/<class>/<image>, or <class>/<image>"
        raise BadInput(f"{found['train'][0]}: {text}")
    inside = {p: {q.name for q in folders_in(p)} for p in sum(found.values(), []) if not p.is_symlink()}
    for p, names in inside.items():
        if any(set_of(name) == "train" and folders_in(p / name) for name in names):
            raise BadInput(f"{root}: {p.name}/ holds sets beside {len(inside) - 1:,} other folders; pass --data {p}")
    for (a, of_a), (b, of_b) in combinations([(p, names) for p, names in inside.items() if len(names) > 1], 2):
        if len(same := of_a & of_b) > 1:
            text = f"hold the same folders ({listed(sorted(same), 5)}): are these sets? Name them train/, valid/, test/"
            raise BadInput(f"{root}: {a.name}/ and {b.name}/ {text}; if they are classes, put all of them into train/")


def split_off(images, pct, seed):
    """Splits [(path, class)] into (rest, held). `held` has `pct` of every class, at least one image, by `seed`."""
    held, (names, numbers) = set(), np.unique([name for _, name in images], return_inverse=True)
    for k in range(len(names)):
        of_class = np.flatnonzero(numbers == k)
        n = min(max(round(len(of_class) * pct), 1), len(of_class) - 1)
        held.update(np.random.default_rng([seed, k]).permutation(of_class)[:n].tolist())
    return [x for i, x in enumerate(images) if i not in held], [x for i, x in enumerate(images) if i in held]


def fold_off(images, folds, fold, seed):
    """Splits [(path, class)] into (rest, fold number `fold` of `folds`). scikit-learn makes the folds, by `seed`."""
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(images, [name for _, name in images])
    return [[images[i] for i in part] for part in list(splits)[fold - 1]]


def held_out(sets, valid_pct):
    """Which of test and valid are held out of train: those not in `sets`. With valid_pct 0 one set is both of them."""
    missing = [kind for kind in ("test", "valid") if kind not in sets]
    return missing if valid_pct else missing[:-1]


def told_sets(root, valid_pct, folds=0, fold=0):
    """A line that says which folder of `root` is which set, and where the other sets come from."""
    sets = find_sets(root)
    own = ", ".join(f"{p.relative_to(root).parts[0]}/ is {kind}" for kind, p in sets.items() if p != root)
    missing, held = [f"{kind}/" for kind in ("valid", "test") if kind not in sets], held_out(sets, valid_pct)
    notes = [f"fold {fold} of {folds} is test" if folds else f"{TEST_PCT:.0%} of each class is test"] * ("test" in held)
    notes += [f"{100 * valid_pct:.3g}% of {'the rest' if notes else 'each class'} is valid"] * ("valid" in held)
    notes += ["one set is both valid and test (--valid-pct 0)"] if missing and not valid_pct else []
    of_train = "held out of train/: " if own and held else ""
    gaps = f"; there is no {' and no '.join(missing)}; {of_train}{', '.join(notes)}" if missing else ""
    return (own or "its folders are classes") + gaps


def find_images(root, valid_pct, split_seed, folds=0, fold=0, without=frozenset()):
    """Three lists of (path, class) under `root`: train, valid, test; with `folds`, test is fold number `fold` of them.

    `train/`, `valid/` and `test/`, or folders with other names of these sets (SETS), are used as they are. Missing sets
    are held out of train, stratified, by `split_seed`: first 20% of each class or a fold for test, then `valid_pct` for
    valid. With valid_pct 0 one set is both. The images in `without` are left out.
    """
    folders = find_sets(root, tell=not without)
    if folds and len(folders) > 1:
        names = " and ".join(folder.name + "/" for kind, folder in folders.items() if kind != "train")
        raise BadInput(f"--folds: {root} has {names} already; pass --data {folders['train']} for folds of its images")
    if folds and not fold:
        raise BadInput(f"--fold: which of the {folds} folds is test? Pass a number from 1")
    sets = {kind: scan(folder, without) for kind, folder in folders.items()}
    if not sets["train"]:
        raise BadInput(f"{root}: no images in class folders; expected <class>/<image>, or train/<class>/<image>")
    counts = Counter(name for _, name in sets["train"])
    for folder, images in zip(folders.values(), sets.values()):
        if not images:
            raise BadInput(f"{folder}: no images in class folders; fill it or remove it")
        for path, name in images:
            if name not in counts:
                known = listed(sorted(counts), 5)
                raise BadInput(f"{path.parent}: class {name!r} is not among those of train ({known})")
    if len(counts) < 2:
        raise BadInput(f"{root}: only one class ({min(counts)!r}); a classifier needs at least two class folders")
    held = held_out(sets, valid_pct)
    needed = 1 + ("test" in held) * max(folds, 1) + ("valid" in held)
    if small := {name: n for name, n in sorted(counts.items()) if n < needed}:
        which = listed(f"{name!r} has {n}" for name, n in small.items())
        text = f"{len(small):,} of {len(counts):,} classes have too few images to hold some out, fewer than {needed}"
        raise BadInput(f"{root}: {text}: {which}; add images, or remove these folders")
    if "test" in held:
        split = partial(fold_off, folds=folds, fold=fold) if folds else partial(split_off, pct=TEST_PCT)
        sets["train"], sets["test"] = split(sets["train"], seed=split_seed)
    if "valid" in held:
        sets["train"], sets["valid"] = split_off(sets["train"], valid_pct, split_seed + 1)
    return sets["train"], sets.get("valid", sets.get("test")), sets.get("test", sets.get("valid"))
