"""Images, decoded once and kept as bytes in a file that is mapped into memory."""

import hashlib
import json
import os
import sys
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
from tqdm import tqdm

from lib.cli import BadInput, printable, read_json, refused
from lib.data import decode
from lib.machine import cores
from lib.runs import whole_folder

REMEDY = "repair or remove it, or pass --bad-images skip"
FORMAT = 6  # of the cached files; a new number makes old ones unused
CHUNK, CHUNK_BYTES = 256, 2**24  # images that a thread decodes at a time, and about the most bytes they make
STATS_PIXELS = 2**18  # that `Store.stats` counts at a time


class Store:
    """Decoded images as uint8; `store[i]` is a (h, w, 3) view of image i.

    Their pixels lie one after another in a file that is mapped into memory. Under `cache` the file is named by a hash
    of the image files' names, sizes and times, and used again while these stay. Without `cache` it has no name, and
    disappears with the process.
    """

    resize_rule = decode.RESIZE_RULE  # how an image file becomes pixels, in words

    def __init__(
        self,
        paths,  # image files
        size,  # shorter side, in pixels
        root=Path(),  # folder that `names` are relative to
        cache=None,  # folder of files to use again; None: an unnamed file
        skip=False,  # whether images that cannot be read are passed over and listed in `skipped`; else they raise
        temporary=None,  # folder of the unnamed file, made if need be; where it cannot be written, the system's
    ):
        self.paths, self.size, self.folder = list(paths), size, None
        start = os.path.join(root, "")  # relpath alone takes half a second of 60,000
        relative = lambda p: p.removeprefix(start) if p.startswith(start) else os.path.relpath(p, root)
        self.names = [relative(os.fspath(p)).replace(os.sep, "/") for p in self.paths]
        facts = self.in_folder(Path(cache), skip) if cache else self.unnamed(temporary, skip)
        self.fingerprint = facts["fingerprint"]  # a hash of names, shapes and pixels: 16 hexadecimal digits
        self.skipped = [(self.names[i], reason) for i, reason in facts["skipped"]]
        self.levels = facts["levels"]  # that are black and white in images of more than 8 bits; None without such
        if self.skipped and not skip:  # in a file that another run has written
            raise BadInput(f"{Path(root, self.skipped[0][0])}: {self.skipped[0][1]}; {REMEDY}")
        self.index = {p: i for i, (p, read) in enumerate(zip(self.paths, self.shapes.all(1))) if read}

    def in_folder(self, cache, skip):
        """Maps the file of these images under `cache`, written first where there is none; returns its facts."""
        self.folder = cache / f"images-{self.size}-{self.key()}"
        if not self.folder.is_dir():
            with whole_folder(self.folder) as part, open(part / "pixels", "wb", buffering=0) as file:
                facts = self.read(file, skip)
                os.fsync(file.fileno())
                np.save(part / "shapes.npy", self.shapes)
                (part / "facts.json").write_text(json.dumps(facts))
        with refused(f"--cache {self.folder}: is damaged", "remove this folder"):
            self.shapes = np.load(self.folder / "shapes.npy", allow_pickle=False)
            self.map(self.folder / "pixels")
            return read_json(self.folder / "facts.json")

    def unnamed(self, folder, skip):
        """Decodes into a file without a name; returns its facts."""
        try:
            Path(folder or tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(buffering=0, dir=folder)
        except OSError:
            file = tempfile.TemporaryFile(buffering=0)
        with file:
            facts = self.read(file, skip)
            self.map(file)
        return facts

    def map(self, file):
        self.pixels = np.memmap(file, np.uint8, "r").view(np.ndarray)
        self.starts = np.concatenate([[0], self.shapes.astype(np.int64).prod(1).cumsum() * 3])
        if self.shapes.shape != (len(self), 2) or self.starts[-1] != len(self.pixels):
            raise ValueError("its files do not fit each other")

    def read(self, file, skip):
        """Decodes all images into `file`, and sets `shapes`, (n, 2).

        Returns the facts: the fingerprint, [number, reason] of each skipped image (its shape is (0, 0)), and the levels
        (black, white) that all deep images share. If one was decoded with others, all are decoded again.
        """
        seen, levels = [], None
        facts = self.decode_into(file, skip, None, seen)
        if seen:
            levels = decode.levels_of(seen)
            if any((0, white) != levels for _, _, white in seen):
                file.seek(0), file.truncate()
                facts = self.decode_into(file, skip, levels, None)
        return {**facts, "levels": levels and list(levels)}

    def decode_into(self, file, skip, levels, seen):
        """One pass over all images: writes their pixels to `file`, sets `shapes`, and returns facts."""
        shapes, skipped, digest = [], [], hashlib.blake2b(digest_size=8)
        n = min(CHUNK, max(CHUNK_BYTES // (3 * self.size**2), 1))
        chunks = [self.paths[i : i + n] for i in range(0, len(self), n)]
        pool, waiting = ThreadPoolExecutor(threads := cores()), deque()
        options = dict(total=len(self), desc="reading", unit="image", leave=False)
        with quiet() as terminal, tqdm(file=terminal, disable=not terminal.isatty(), **options) as bar:
            try:
                while chunks or waiting:
                    while chunks and len(waiting) < 2 * threads:  # no more than this ahead of what is written
                        waiting.append(pool.submit(decode_all, chunks.pop(0), self.size, skip, levels, seen))
                    pixels, shapes_of_chunk, faults = waiting.popleft().result()
                    digest.update(pixels)
                    skipped += [(len(shapes) + i, reason) for i, reason in faults]
                    shapes += shapes_of_chunk
                    while len(pixels):
                        pixels = pixels[file.write(pixels) :]
                    bar.update(len(shapes_of_chunk))
            finally:
                pool.shutdown(cancel_futures=True)  # the first file that cannot be read ends it
        if skipped and len(skipped) == len(self):
            raise BadInput(f"{self.paths[0]}: {skipped[0][1]}, and so for every image; repair or remove them")
        digest.update(repr([(name, (*shape, 3)) for name, shape in zip(self.names, shapes)]).encode())
        self.shapes = np.array(shapes, np.int32).reshape(-1, 2)
        return {"fingerprint": digest.hexdigest(), "skipped": skipped}

    def key(self):
        """A hash that changes with the files' paths, sizes and times, and with what decodes them."""
        heif = ("heif",) * (decode.HEIF[0] in decode.EXTENSIONS)
        digest = hashlib.blake2b(repr((FORMAT, PIL.__version__, *heif)).encode(), digest_size=8)
        for path in self.paths:
            status = os.stat(path)
            digest.update(f"{str(path)!r} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        return digest.hexdigest()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.pixels[self.starts[i] : self.starts[i + 1]].reshape(-1, self.shapes[i, 1], 3)

    def __getstate__(self):
        """Without what a worker process can map for itself."""
        return {k: v for k, v in self.__dict__.items() if k not in ("pixels", "starts") or not self.folder}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.folder:
            self.map(self.folder / "pixels")

    def stats(self, ids):
        """Mean and standard deviation a channel, in 0..1, over every pixel of images `ids`: two (3,) float arrays."""
        counts, step = np.zeros((3, 256)), max(STATS_PIXELS // self.size**2, 1)
        for start in range(0, len(ids), step):
            pixels = np.concatenate([self[i].reshape(-1, 3) for i in ids[start : start + step]])
            counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
        share, level = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
        mean = share @ level
        return mean, np.maximum(np.sqrt(np.maximum(share @ level**2 - mean**2, 0)), 1e-3)


def decode_all(paths, size, skip, levels, seen):
    """(pixels, one image after another, shapes (h, w), [(number, reason)] of those that cannot be read) of a chunk."""
    images, faults = [], []
    for i, path in enumerate(paths):
        try:
            images.append(decode.read(path, size, levels, seen))
        except BadInput as error:
            reason = error.text.removeprefix(printable(f"{path}: ")).rsplit("; ", 1)[0]
            if not skip:
                raise BadInput(f"{path}: {reason}; {REMEDY}") from None
            images.append(np.empty((0, 0, 3), np.uint8))
            faults.append((i, reason))
    return np.concatenate([image.reshape(-1) for image in images]), [image.shape[:2] for image in images], faults


@contextmanager
def quiet():
    """Silences stderr inside the block: image libraries write to it, past Python. Yields a stream to the true one."""
    if sys.stderr is None:  # a program without a window
        with open(os.devnull, "w") as nowhere:
            yield nowhere
        return
    sys.stderr.flush()
    with open(os.dup(2), "w") as terminal, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield terminal
        finally:
            os.dup2(terminal.fileno(), 2)
