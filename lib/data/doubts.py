"""What is worth a look before an hour of training: near copies, classes with few images, images that stand out."""

import warnings
from collections import Counter

import cv2
import numpy as np
from fastcore.basics import groupby
from PIL import Image

from lib.cli import printable
from lib.data import decode
from lib.runs import write_csv

ACROSS = "near copies across sets"
COLUMNS = ("doubt", "file", "detail")
FEW = 10  # training images of a class; the word of the table says so too
BITS, LEVELS = 3, 6  # near copies differ in at most 3 of the hash's 64 bits, and by 6 of 255 levels on average
CONTRAST = 8  # and by at most 1/8 of their deviation: dark images with different small spots are no copies
PLAIN = 6  # levels: an image of a smaller deviation is nearly of one colour; below twice this it has little detail
DRAWN = 0.5  # share of one exact colour, where half of the images have no more than a tenth of it: drawn, not a photo
SAME, SOLID = 0.01, 1  # levels: equal thumbnails differ by no more; an image of one colour deviates by less
FAR = 4  # times as large or small as the median image
MANY = 10_000  # images above which files are not opened again to look at sizes and colours
REACH = 300  # neighbours in a band of the hash that are compared
SETS = ("train", "valid", "test")


def say(dls, folder=None):
    """Prints what stands out in the images of `dls`, and writes all of it to doubts.csv in `folder`."""
    rows = look(dls)
    if not rows:
        return
    if folder:
        write_csv(folder / "doubts.csv", rows)
    sizes = {name: len(getattr(dls, name).ids) for name in SETS}
    where = " (doubts.csv has all)" if folder else ""
    print(f"worth a look before training{where}:", *map(printable, table(rows, sizes)), sep="\n", flush=True)


def look(dls):
    """What stands out in the images of `dls`, as rows of doubts.csv: {doubt, file, detail}, the gravest first."""
    store = dls.store
    place = {i: name for name in reversed(SETS) for i in getattr(dls, name).ids}
    label = {i: k for name in SETS for i, k in zip(getattr(dls, name).ids, getattr(dls, name).labels)}
    ids = np.array(sorted(place))
    hashes, thumbnails = fingerprints(store, ids)
    rows = [*copies(store, ids, place, label, hashes, thumbnails), *few(dls)]
    return [dict(zip(COLUMNS, row)) for row in [*rows, *plain(store, ids, thumbnails), *odd(store, ids)]]


def fingerprints(store, ids):
    """A perceptual hash of 64 bits of each image, (n,) uint64, and its thumbnail of 8 x 8 colours, (n, 192).

    A bit of the hash says whether a patch is darker than the one to its right (Krawetz, dHash).
    """
    hashes, thumbnails = np.empty(len(ids), np.uint64), np.empty((len(ids), 192), np.float32)
    for row, i in enumerate(ids):
        pixels = store[i].astype(np.float32)
        grey = cv2.resize(pixels, (9, 8), interpolation=cv2.INTER_AREA).mean(2)
        hashes[row] = np.packbits(grey[:, 1:] > grey[:, :-1] + 0.5).view(np.uint64)[0]
        thumbnails[row] = cv2.resize(pixels, (8, 8), interpolation=cv2.INTER_AREA).ravel()
    return hashes, thumbnails


def pairs(hashes, thumbnails):
    """Pairs of rows that are near copies: (k, 2).

    If two hashes differ in at most 3 of 64 bits, at least one of their four 16-bit parts is equal. So rows are sorted
    by each part, and compared with their neighbours. Images with little detail, such as skies, look alike: they count
    as copies only if they are equal.
    """
    deviation, found = deviations(thumbnails), [np.zeros((0, 2), int)]
    most = np.minimum(LEVELS, deviation / CONTRAST)  # mean difference of copies; -1: images of one colour have none
    most = np.select([deviation < SOLID, deviation < 2 * PLAIN], [-1, SAME], most)
    for band in hashes.view(np.uint16).reshape(-1, 4).T:
        order = np.argsort(band, kind="stable")
        for shift in range(1, min(REACH, len(order))):
            same = band[order[shift:]] == band[order[:-shift]]
            if not same.any():
                break
            a, b = order[:-shift][same], order[shift:][same]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= BITS
            a, b = a[close], b[close]
            close = np.abs(thumbnails[a] - thumbnails[b]).mean(1) <= np.minimum(most[a], most[b])
            found.append(np.sort(np.stack([a, b], 1)[close]))
    return np.unique(np.concatenate(found), axis=0)


def deviations(thumbnails):
    """The standard deviation of the most varied channel of each thumbnail, in levels of 255."""
    return thumbnails.reshape(len(thumbnails), 64, 3).std(1).max(1)


def copies(store, ids, place, label, hashes, thumbnails):
    """Near copies: across sets first, then in two classes, then within one class. Each kind lists a file once."""
    kinds = {ACROSS: {}, "near copies in two classes": {}, "near copies": {}}
    for pair in pairs(hashes, thumbnails):
        one, other = sorted((ids[row] for row in pair), key=lambda i: -SETS.index(place[i]))
        kind = "near copies" if label[one] == label[other] else "near copies in two classes"
        kind = kind if place[one] == place[other] else ACROSS
        of = lambda i: f"{place[i]}: {store.names[i]}"
        kinds[kind].setdefault(one, (kind, of(one), of(other)))
    return [row for rows in kinds.values() for row in rows.values()]


def few(dls):
    """Classes with few training images."""
    counts = Counter(np.asarray(dls.train.labels).tolist())
    small = [(counts[k], name) for k, name in enumerate(dls.vocab) if counts[k] < FEW]
    return [("under 10 training images", name, f"{n} in train") for n, name in sorted(small)]


def plain(store, ids, thumbnails):
    """Images nearly of one colour, where they are the exception."""
    deviation = deviations(thumbnails)
    if np.median(deviation) < 3 * PLAIN:
        return []
    return [("nearly one colour", store.names[ids[row]], "") for row in np.flatnonzero(deviation < PLAIN)]


def odd(store, ids):
    """Images that are drawn among photographs, and those of a size far from the others'."""
    if len(ids) > MANY:
        return []
    decode.register_heif()  # nothing was decoded here if the pixels were cached
    sides, shares = [], []
    for i in ids:
        with warnings.catch_warnings(action="ignore"), Image.open(store.paths[i]) as image:  # its header alone is read
            sides.append(max(image.size))
        y, x = (max(side // 32, 1) for side in store[i].shape[:2])  # steps: some 32 x 32 pixels are enough
        colours = store[i][::y, ::x].reshape(-1, 3).astype(np.uint32) @ [65536, 256, 1]  # a number for each colour
        shares.append(np.unique(colours, return_counts=True)[1].max() / len(colours))
    usual, drawn = np.median(sides), (np.array(shares) > DRAWN) & (np.median(shares) < DRAWN / 10)
    rows = [("drawn, not a photograph", store.names[ids[row]], "") for row in np.flatnonzero(drawn)]
    far = [(store.names[i], side) for i, side in zip(ids, sides) if not usual / FAR <= side <= usual * FAR]
    rows += [("far from the usual size", name, f"{side} pixels; the median is {usual:.0f}") for name, side in far]
    return rows


def table(rows, sizes, shown=3):
    """`rows` as lines for the terminal: each doubt with how often it is there, and its first files.

    `sizes` are the numbers of images of each set.
    """
    lines = []
    for kind, found in groupby(rows, lambda row: row["doubt"]).items():
        number = f"{len(found):,}"
        if kind == ACROSS:
            in_sets = Counter(file.split(":")[0] for file in dict.fromkeys(row["file"] for row in found))
            number = ", ".join(f"{n:,} of {sizes[name]:,} {name} images" for name, n in in_sets.items())
        first = "; ".join(f"{row['file']} ({row['detail']})" if row["detail"] else row["file"] for row in found[:shown])
        lines.append(f"  {kind}: {number}: {first}" + ("; …" if len(found) > shown else ""))
    return lines
