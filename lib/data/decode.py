"""Image files to pixels: upright, RGB, 8 bits, the shorter side at its size."""

import os
import stat
import struct
import threading
import zlib
from contextlib import nullcontext
from io import BytesIO

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lib.cli import BadInput, one_line

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


MAX_PIXELS = 89_000_000  # an image of more is refused from its header, before it takes memory


MANY_PIXELS = 2**24  # images of more are decoded one at a time


MAX_BYTES = 8 * MAX_PIXELS  # of a file


MAX_ASPECT = 100  # longer side / shorter side


KINDS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by content; of others, Pillow hands EPS to Ghostscript


RESIZE_RULE = (
    "JPEG decoded at 1/2, 1/4 or 1/8 where that is not under `size` (Pillow's draft); upright (EXIF), RGB, shorter "
    "side to `size` (bicubic), central `size` x `size` pixels, / 255, - mean, / std"
)


PNG_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"sRGB"}  # those that change no pixel


locks = {}  # made where it is used, so that what refers to it can be pickled


def decode(path, size):
    """The image at `path` as (h, w, 3) uint8, its shorter side `size` pixels, upright (EXIF), 16 bits scaled to 8.

    Raises BadInput naming the file where it cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as f:
            facts = os.fstat(f.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_BYTES:
                raise ValueError(f"no plain file, or more than {MAX_BYTES:,} bytes")
            content = f.read()
        image = quick(content, size)
        return by_pillow(content, size) if image is None else fit(image, size)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its text has an address in memory
        raise BadInput(f"{path}: is no whole {', '.join(KINDS)} by its content; repair or remove it") from None
    except Exception as e:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, …
        raise BadInput(f"{path}: cannot be read as an image ({one_line(e)}); repair or remove it") from None


def by_pillow(content, size):
    with Image.open(BytesIO(content), formats=KINDS) as image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        image.draft("RGB", (size, size))  # lets JPEG decode at a fraction of its size, never below `size`
        with locks.setdefault("large", threading.Lock()) if pixels > MANY_PIXELS else nullcontext():
            return fit(upright_rgb(image), size)


def fit(image, size):
    """`image`, (h, w, 3) uint8, with its shorter side `size` pixels (bicubic)."""
    h, w = image.shape[:2]
    if max(h, w) > MAX_ASPECT * min(h, w):
        raise ValueError(f"{w} x {h} pixels: one side more than {MAX_ASPECT} times the other")
    if min(h, w) == size:
        return image
    to = [max(round(side * size / min(h, w)), size) for side in (w, h)]
    return np.asarray(Image.fromarray(image).resize(to, Image.Resampling.BICUBIC))


def upright_rgb(image):
    """A PIL image as (h, w, 3) uint8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = from_deep(np.asarray(image), image.mode)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def centre(image, size):
    """The central size x size pixels of `image`."""
    y, x = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[y : y + size, x : x + size]


def batch_size(size):
    """Images of `size` pixels that are evaluated at a time."""
    return max(1, min(500, 500 * 64**2 // size**2))


def quick(content, size):
    """A small plain JPEG or PNG by OpenCV: the pixels that Pillow gives, in a fifth of its time. None: another kind.

    Plain is 8 bits, grey or RGB, whole, nothing that says how to turn it or what is transparent in it.
    """
    if content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9"):
        bits, h, w, channels = jpeg_frame(content)
        plain = channels in (1, 3) and min(h, w) < 2 * size  # Pillow decodes larger ones at a fraction
        plain = plain and not any(name in content for name in (b"Exif", b"Adobe", b"ns.adobe.com", b"ICC_PROFILE"))
    elif content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 33:
        w, h, bits, kind = struct.unpack_from(">IIBB", content, 16)
        plain = kind in (0, 2) and png_chunks(content) <= PNG_CHUNKS
    else:
        return None
    if not plain or bits != 8 or not 0 < h * w <= MAX_PIXELS:
        return None
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)


def jpeg_frame(content):
    """(bits, height, width, channels) from the frame header of a JPEG; zeros where there is none."""
    at = 2
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # these have no length: what follows is no segment
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack_from(">BHHB", content, at + 4)
        at += 2 + struct.unpack_from(">H", content, at + 2)[0]
    return 0, 0, 0, 0


def png_chunks(content):
    """The kinds of chunks in a PNG; with b"damaged" among them where one is not whole, which OpenCV may not mind."""
    kinds, at = set(), 8
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        body = memoryview(content)[at + 4 : at + 8 + length]
        if content[at + 8 + length : at + 12 + length] != zlib.crc32(body).to_bytes(4, "big"):
            break
        kinds.add(kind)
        at += 12 + length
        if kind == b"IEND":
            return kinds
    return kinds | {b"damaged"}


def from_deep(a, mode):
    """16-bit and float grey levels as 8-bit. 16-bit modes say so; of others, levels up to 1 are shares of white."""
    a = a.astype(np.float64)
    if not np.isfinite(a).all():
        raise ValueError("some of its pixels are not numbers")
    top = 65535 if mode.startswith("I;16") or a.max() > 255 else 255 if a.max() > 1 else 1
    return Image.fromarray((a.clip(0, top) * (255 / top)).round().astype(np.uint8))
