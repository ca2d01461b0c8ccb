"""Images to pixels: upright, RGB, 8 bits, the shorter side at its size."""

import os
import stat
import threading
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lib.cli import BadInput, one_line

HEIF = (".heic", ".heif")  # read where pillow-heif is installed
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm")
EXTENSIONS += HEIF if find_spec("pillow_heif") else ()
KINDS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "AVIF", "TIFF", "PPM")  # by content; Pillow hands EPS to Ghostscript
MAX_PIXELS = 178_956_970  # twice Pillow's limit: Pillow refuses a larger image by its header, before it takes memory
MANY_PIXELS = 2**24  # images that take memory for more are decoded one at a time
MAX_BYTES = 4 * MAX_PIXELS  # of a file
MAX_ASPECT = 100  # longer side / shorter side
RESIZE_RULE = (
    "JPEG decoded at 1/2, 1/4 or 1/8 where that is not under `size` (Pillow's draft); upright (EXIF), RGB, shorter "
    "side to `size` (bicubic), central `size` x `size` pixels, / 255, - mean, / std"
)
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))  # by EXIF's orientation
large = threading.Lock()  # held where an image may take much memory
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # from half of MAX_PIXELS on


def read(image, size, levels=None, seen=None):
    """An image as (h, w, 3) uint8, its shorter side `size` pixels, upright (EXIF), deep levels scaled to 8 bits.

    It is a path, the bytes of a file, a PIL image, or a uint8 array (h, w), (h, w, 3) or (h, w, 4). For `levels` and
    `seen` see `from_deep`. Raises BadInput naming the file, or the array's type and shape.
    """
    name = image if isinstance(image, (str, os.PathLike)) else "an image"
    try:
        if isinstance(image, (str, os.PathLike)):
            image = file_content(image)
        if isinstance(image, bytes):
            return decoded(image, size, levels, seen)
        image = image if isinstance(image, Image.Image) else from_array(image)
        check_sides(image)
        return resized(upright_rgb(image, levels, seen), size)
    except (BadInput, MemoryError):
        raise
    except UnidentifiedImageError as error:  # Pillow's text has an address in memory
        why = error if "HEIC" in str(error) else f"is no whole {', '.join(KINDS)} by its content"
        raise BadInput(f"{name}: {why}; repair or remove it") from None
    except Image.DecompressionBombError:
        why = f"has more than {MAX_PIXELS:,} pixels, perhaps a decompression bomb"
        raise BadInput(f"{name}: {why} (mogrify -resize 50% makes it smaller); repair or remove it") from None
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, …
        raise BadInput(f"{name}: cannot be read as an image ({one_line(error)}); repair or remove it") from None


def file_content(path):
    with open(path, "rb", buffering=0) as f:
        status = os.fstat(f.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise ValueError(f"no plain file, or more than {MAX_BYTES:,} bytes")
        return f.read()


def register_heif():
    """Lets Pillow read HEIC; returns whether it can, which takes pillow-heif."""
    if not find_spec("pillow_heif"):
        return False
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return True


def kinds_of(content):
    """The formats to try on `content`: KINDS, and HEIF if it begins like one and pillow-heif is installed."""
    brand = content[8:12] if content[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        if register_heif():
            return "HEIF", *KINDS
        if brand.startswith(b"h"):
            raise UnidentifiedImageError("is HEIC, which takes pillow-heif (uv run --extra heif …)")
    return KINDS


def decoded(content, size, levels, seen):
    with Image.open(BytesIO(content), formats=kinds_of(content)) as image:
        check_sides(image)
        whole = image.width * image.height
        image.draft("RGB", (size, size))  # lets JPEG decode at a fraction of its size, never below `size`
        saved = 1 if image.info.get("progressive") else 4  # a progressive one takes memory for all its pixels
        with large if max(image.width * image.height, whole / saved) > MANY_PIXELS else nullcontext():
            if image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in image.tile):
                image = deep_colours(content, image, levels, seen)
            return resized(upright_rgb(image, levels, seen), size)


def from_array(image):
    a = np.asarray(image)
    if a.dtype != np.uint8 or a.shape[2:] not in ((), (3,), (4,)) or a.ndim < 2 or not a.size:
        raise BadInput(f"an image must be uint8 (h, w), (h, w, 3) or (h, w, 4), not {a.dtype} {a.shape}")
    return Image.fromarray(a)


def deep_colours(content, image, levels, seen):
    """The content of `image`, whose 16 bits a channel Pillow cuts to 8, as an image of 8 bits by `from_deep`."""
    import cv2

    array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)  # blue, green, red, alpha
    if array is None or array.dtype != np.uint16 or array.shape[:2] != image.size[::-1]:
        raise ValueError("its 16 bits a channel cannot be decoded")
    colours, alpha = from_deep(array[..., 2::-1], "I;16", levels, seen), (array[..., 3:] >> 8).astype(np.uint8)
    deep = Image.fromarray(np.dstack([colours, alpha]))
    return deep if image.format == "TIFF" else upright(deep, image)  # OpenCV has turned a TIFF


def upright(image, original):
    """`image` (of PIL), turned as the EXIF of `original` says; not turned if that cannot be read, as in browsers."""
    original.load()  # Pillow itself turns TIFFs here
    try:
        turn = TURNS.get(original.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # (ImageOps.exif_transpose also writes the EXIF anew, and raises where Pillow cannot)
        turn = None
    return image if turn is None else image.transpose(turn)


def upright_rgb(image, levels, seen):
    """A PIL image as an upright one in RGB; transparency becomes white."""
    image = upright(image, image)
    if image.mode.startswith(("I", "F")):
        array, clear = np.asarray(image), image.info.get("transparency")  # a level, or None
        grey = from_deep(array, image.mode, levels, seen)
        if clear is not None:
            grey[array == clear] = 255
        image = Image.fromarray(grey)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def from_deep(array, mode, levels, seen):
    """Levels of more than 8 bits, or floats, as uint8. `levels` is (black, white).

    Without it black is 0, and white is 65535 for 16-bit modes; for others it is 65535, 255 or 1, by the largest level.
    Appends (least level, most level, white) to the list `seen`.
    """
    least, most = float(array.min()), float(array.max())
    if not np.isfinite([least, most]).all():
        raise ValueError("some of its pixels are not numbers")
    top = 65535 if mode.startswith("I;16") or most > 255 else 255 if most > 1 else 1
    black, white = levels or (0, top)
    if seen is not None:
        seen.append((least, most, white))
    from_table = array.dtype == np.uint16  # scales 65,536 levels once, where a large image has many more pixels
    x = np.arange(2**16) if from_table else array.astype(np.float64)
    x = ((x.clip(black, white) - black) * (255 / (white - black))).round().astype(np.uint8)
    return x[array] if from_table else x


def levels_of(seen):
    """(black, white) for a set of deep images.

    Black is 0, or the least level if that is negative. White is the largest number of as many bits as the levels use; 1
    for floats up to 1.
    """
    least, most = min(low for low, _, _ in seen), max(high for _, high, _ in seen)
    return min(least, 0.0), float(2 ** int(most).bit_length() - 1) if most > 1 else 1.0


def check_sides(image):
    """Raises ValueError if a PIL image, which need not be decoded yet, is a strip."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: one side more than {MAX_ASPECT} times the other")


def resized(image, size):
    """A PIL image as pixels, its shorter side `size` pixels (bicubic)."""
    short = min(image.size)
    if short != size:
        sides = [max(round(side * size / short), size) for side in image.size]
        image = image.resize(sides, Image.Resampling.BICUBIC)
    return np.asarray(image)


def centre(image, size):
    """The central size x size pixels of (h, w, 3) pixels."""
    y, x = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[y : y + size, x : x + size]


def evaluation_batch(size):
    """How many images of `size` pixels are evaluated at a time: 500 up to 64 pixels, then fewer, for the memory."""
    return max(1, min(500, 500 * 64**2 // size**2))
