"""Images: decoded once, kept as bytes in memory, or in a file mapped into memory."""

import hashlib
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
import PIL
from tqdm import tqdm

from lib.cli import BadInput, one_line, printable, read_json
from lib.data.decode import decode
from lib.machine import on_this_machine
from lib.runs import whole_folder

REMEDY = "repair or remove it, or pass --bad-images skip"


FORMAT = 2  # of the files of decoded images


CHUNK = 256  # images that are decoded, and lie in memory, together


MEMORY_SHARE = 0.5  # of the memory that is left: images that need more are kept in a file


STATS_PIXELS = 2**18  # that are counted together


class Store:
    """Decoded images as uint8; `store[i]` is a (h, w, 3) view of image i.

    They lie in memory, or, where `cache` is given or memory is short, in a file under the folder `cache` (by default
    `spare`) that is mapped into memory. The file is named by the names, sizes and times of the images' files, so that
    it is used again as long as these stay.
    """

    def __init__(
        self,
        paths,  # image files
        size,  # shorter side, in pixels
        root=Path(),  # folder that `names` are relative to
        threads=None,  # decoding threads; None: one a core
        cache=None,  # folder of the files; None: memory, where the images fit
        skip=False,  # whether images that cannot be read are passed over and listed in `skipped`; else they raise
        spare=lambda: None,  # gives the folder of the files where memory is short
    ):
        self.paths, self.size = list(paths), size
        self.names = [os.path.relpath(p, root).replace(os.sep, "/") for p in self.paths]
        cv2.setNumThreads(0)
        threads = threads or os.cpu_count()
        with quiet() as terminal:
            if not cache and not self.fits():
                cache = spare()
            if cache:
                facts = self.from_file(Path(cache), threads, terminal, skip)
            else:
                self.shapes, chunks, facts = self.read(threads, terminal, skip)
                self.lay_out(chunks)
        self.hash, self.skipped = facts["fingerprint"], [(self.names[i], reason) for i, reason in facts["skipped"]]
        if self.skipped and not skip:  # in a file that another run has written
            raise BadInput(f"{Path(root, self.skipped[0][0])}: {self.skipped[0][1]}; {REMEDY}")
        self.index = {p: i for i, p in enumerate(self.paths) if self.shapes[i].all()}

    def from_file(self, cache, threads, terminal, skip):
        """Maps the file of these images under `cache`, written first where there is none; returns its facts."""
        self.folder = cache / f"images-{self.size}-{self.key()}"
        if not self.folder.is_dir():
            with whole_folder(self.folder) as part, open(part / "pixels", "wb") as f:
                shapes, _, facts = self.read(threads, terminal, skip, f)
                f.flush()
                os.fsync(f.fileno())
                np.save(part / "shapes.npy", shapes)
                (part / "facts.json").write_text(json.dumps(facts))
        try:
            self.shapes = np.load(self.folder / "shapes.npy", allow_pickle=False)
            self.open()
            return read_json(self.folder / "facts.json")
        except (OSError, ValueError) as e:
            raise BadInput(f"--cache {self.folder}: is damaged ({one_line(e)}); remove this folder") from None

    def read(self, threads, terminal, skip, file=None):
        """Decodes all images, a chunk a task: (shapes (n, 2), chunks of pixels, facts), or pixels to `file`.

        The facts: a fingerprint, and [number, reason] of each image that is skipped; its shape is (0, 0).
        """
        chunks, shapes, skipped, digest = [], [], [], hashlib.blake2b(digest_size=8)
        parts = self.by_chunk(self.paths)
        pool, waiting = ThreadPoolExecutor(threads), deque()
        bar = tqdm(
            total=len(self), desc="reading", unit="image", leave=False, file=terminal, disable=not terminal.isatty()
        )
        try:
            while parts or waiting:
                while parts and len(waiting) < 2 * threads:  # no more than this ahead of what is kept
                    waiting.append(pool.submit(decode_all, parts.pop(0), self.size, skip))
                pixels, found, faults = waiting.popleft().result()
                digest.update(pixels)
                skipped += [(len(shapes) + i, reason) for i, reason in faults]
                shapes += found
                chunks.append(file.write(pixels) and None if file else pixels)
                bar.update(len(found))
        finally:
            bar.close()
            pool.shutdown(cancel_futures=True)  # the first file that cannot be read ends it
        if skipped and len(skipped) == len(self):
            raise BadInput(f"{self.paths[0]}: {skipped[0][1]}, and so for every image; repair or remove them")
        digest.update(repr([(name, (*shape, 3)) for name, shape in zip(self.names, shapes)]).encode())
        facts = {"fingerprint": digest.hexdigest(), "skipped": skipped}
        return np.array(shapes, np.int32).reshape(-1, 2), chunks, facts

    def lay_out(self, chunks):
        """Sets where each image lies: in which chunk, and, where shapes differ, from which byte."""
        self.uniform = len(self) > 0 and bool(self.shapes.all() and (self.shapes == self.shapes[0]).all())
        if self.uniform:
            self.chunks = [chunk.reshape(-1, *self.shapes[0], 3) for chunk in chunks]
            return
        self.chunks = chunks
        self.starts = np.zeros(len(self), np.int64)
        sizes = self.shapes.astype(np.int64).prod(1) * 3
        for at in range(0, len(self), CHUNK):
            self.starts[at + 1 : at + CHUNK] = sizes[at : at + CHUNK][:-1].cumsum()

    def open(self):
        pixels = np.memmap(self.folder / "pixels", np.uint8, "r").view(np.ndarray)
        ends = np.cumsum([s.astype(np.int64).prod(1).sum() * 3 for s in self.by_chunk(self.shapes)])
        if self.shapes.shape != (len(self), 2) or ends[-1] != len(pixels):
            raise ValueError("its files do not fit each other")
        self.lay_out(np.split(pixels, ends[:-1]))

    @staticmethod
    def by_chunk(items):
        return [items[at : at + CHUNK] for at in range(0, len(items), CHUNK)]

    def fits(self):
        """Whether all images, at the mean size of some, take no more than MEMORY_SHARE of the memory that is left."""
        left, some = memory_left(), self.paths[:: max(len(self.paths) // 16, 1)]
        share = MEMORY_SHARE / on_this_machine()  # each rank has its own
        if left is None or len(self.paths) * self.size**2 * 3 * 8 < share * left:  # nothing to look at
            return True
        return decode_all(some, self.size, True)[0].size / len(some) * len(self.paths) <= share * left

    def key(self):
        """A hash of what says that files are still the same: names, sizes, times of change."""
        h = hashlib.blake2b(repr((FORMAT, cv2.__version__, PIL.__version__)).encode(), digest_size=8)
        for path in self.paths:
            found = os.stat(path)
            h.update(f"{str(path)!r} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n".encode())
        return h.hexdigest()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if self.uniform:
            return self.chunks[i // CHUNK][i % CHUNK]
        h, w = self.shapes[i]
        start = self.starts[i]
        return self.chunks[i // CHUNK][start : start + 3 * h * w].reshape(h, w, 3)

    def __getstate__(self):
        """Without what a worker process can map for itself."""
        return {k: v for k, v in self.__dict__.items() if k not in ("chunks", "starts") or not hasattr(self, "folder")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if hasattr(self, "folder"):
            self.open()

    def fingerprint(self):
        """A hash of names, shapes and pixels: 16 hexadecimal digits."""
        return self.hash

    def stats(self, ids):
        """Mean and standard deviation a channel, in 0..1, over every pixel of images `ids`: two (3,) float arrays."""
        counts, step = np.zeros((3, 256)), max(STATS_PIXELS // self.size**2, 1)
        for at in range(0, len(ids), step):
            pixels = np.concatenate([self[i].reshape(-1, 3) for i in ids[at : at + step]])
            for c in range(3):
                counts[c] += np.bincount(pixels[:, c], minlength=256)
        share, level = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
        mean = share @ level
        return mean, np.maximum(np.sqrt(np.maximum(share @ level**2 - mean**2, 0)), 1e-3)


def decode_all(paths, size, skip):
    """(pixels, one image after another, shapes (h, w), [(number, reason)] of those that cannot be read) of a chunk."""
    images, faults = [], []
    for i, path in enumerate(paths):
        try:
            images.append(decode(path, size))
        except BadInput as e:
            reason = e.text.removeprefix(printable(f"{path}: ")).rsplit("; ", 1)[0]
            if not skip:
                raise BadInput(f"{path}: {reason}; {REMEDY}") from None
            images.append(np.empty((0, 0, 3), np.uint8))
            faults.append((i, reason))
    return np.concatenate([image.reshape(-1) for image in images]), [image.shape[:2] for image in images], faults


@contextmanager
def quiet():
    """Inside, what image libraries write to stderr, past Python, on damaged files goes nowhere. Gives the true one."""
    sys.stderr.flush()
    with open(os.dup(2), "w") as terminal, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield terminal
        finally:
            os.dup2(terminal.fileno(), 2)


def memory_left():
    """Bytes that this process may still take, of the machine and of its control group (Linux); None: not known."""
    left = []
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        left.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with suppress(OSError, ValueError, IndexError, StopIteration):
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2].lstrip("/")
        for folder in (Path("/sys/fs/cgroup", group), *Path("/sys/fs/cgroup", group).parents):
            with suppress(OSError, ValueError, IndexError, StopIteration):
                most = int((folder / "memory.max").read_text())
                lines = (folder / "memory.stat").read_text().splitlines()
                left.append(most - int(next(line for line in lines if line.startswith("anon ")).split()[1]))
    return max(min(left), 0) if left else None
