"""Archives, unpacked whole or refused."""

import shutil
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import PurePosixPath

from lib.cli import BadInput, printable, refused
from lib.data.folders import enter
from lib.runs import whole_folder

MAX_MEMBERS, MAX_DEPTH = 2_000_000, 32  # members of an archive; folders inside each other
MAX_UNPACKED = 500_000_000_000  # bytes
MAX_RATIO, SMALL = 100, 1 << 30  # unpacked, at most so many times the size, or SMALL bytes: drawings pack well
MAX_HEADER = 1 << 22  # bytes of a long name, which tarfile reads whole
SPECIAL = "is no plain file or folder"


def unpack(archive, folder):
    """Unpacks `archive` into the new `folder`.

    Raises BadInput, with nothing left behind, on a damaged archive or where `fault_of` finds one in a member.
    """
    with whole_folder(folder, enter) as part:
        most = min(max(MAX_RATIO * archive.stat().st_size, SMALL), MAX_UNPACKED, shutil.disk_usage(part).free)
        total, remedy = 0, "is the file whole, and the disk not full?"
        with refused(f"--data {archive}: cannot be unpacked", remedy):  # tarfile, zlib, the disk … raise their own
            for number, (name, size, fault, opener) in enumerate(members(archive), 1):
                total += size + 512  # a name is not free either
                where = PurePosixPath(name.replace("\\", "/"))
                target = part / where
                fault = fault or fault_of(where, number, total, most)
                if fault or (opener and target.exists()):
                    fault = fault or "is there twice"
                    raise BadInput(f"--data {archive}: member {name!r} {fault}; the whole archive is refused")
                (target.parent if opener else target).mkdir(parents=True, exist_ok=True)
                if opener:
                    with opener() as source, open(target, "xb") as file:
                        shutil.copyfileobj(source, file)
                    if target.stat().st_size != size:
                        raise ValueError(f"a member is not of the {size:,} bytes that it declares")


def members(archive):
    """Yields (name, bytes, fault or "", function that opens it or None for a folder) for each member of an archive."""
    with open(archive, "rb") as file:
        start = file.read(4)
    if start.startswith((b"PK\3\4", b"PK\5\6")) or (archive.suffix.lower() == ".zip" and zipfile.is_zipfile(archive)):
        try:
            z = zipfile.ZipFile(archive, metadata_encoding="utf-8")  # of names whose flag does not say so
        except UnicodeDecodeError:
            z = zipfile.ZipFile(archive)
            unclear = [m.filename for m in z.infolist() if not (m.flag_bits & 0x800 or m.filename.isascii())]
            text = f"{len(unclear):,} names, such as {unclear[0]}, do not say their encoding; read as cp437"
            print(printable(f"{archive}: {text}; pack it anew with UTF-8 names if they look wrong"), flush=True)
        with z:
            for m in z.infolist():
                plain = (m.external_attr >> 16) & 0o170000 in (0, 0o100000, 0o040000)
                fault = "is encrypted" if m.flag_bits & 1 else "" if plain else SPECIAL
                yield m.filename, m.file_size, fault, None if m.filename.endswith(("/", "\\")) else partial(z.open, m)
        return
    with tarfile.open(archive, tarinfo=Header) as t:
        for m in t:
            plain = m.isdir() or (m.isreg() and not m.issparse())
            yield m.name, m.size, "" if plain else SPECIAL, None if m.isdir() else partial(t.extractfile, m)
        for _ in range(SMALL // MAX_HEADER):  # read on to the end: only there the checksum is compared
            if not t.fileobj.read(MAX_HEADER):
                return
        raise ValueError("it goes on for long after its last member")


class Header(tarfile.TarInfo):
    """A tar header that raises if it is damaged or missing. For tarfile only the first does; others end the archive."""

    @classmethod
    def fromtarfile(cls, file):
        try:
            return super().fromtarfile(file)
        except tarfile.EOFHeaderError:  # zeros, which end a whole archive
            raise
        except tarfile.HeaderError as error:
            raise ValueError(f"a member or the end is damaged or missing ({error})") from None

    @classmethod
    def frombuf(cls, *args):
        header = super().frombuf(*args)
        if header.size > MAX_HEADER and not header.isreg():
            raise ValueError(f"a name or header of {header.size:,} bytes")
        return header


def fault_of(where, number, total, most):
    """What is wrong with a member's path `where`, its `number`, or the `total` bytes up to it; "" if nothing is."""
    drive = ":" in (str(where) if sys.platform == "win32" else str(where)[1:2])
    if where.is_absolute() or ".." in where.parts or drive:
        return "points outside"
    if len(where.parts) > MAX_DEPTH:
        return f"lies more than {MAX_DEPTH} folders deep"
    if number > MAX_MEMBERS:
        return f"is one of more than {MAX_MEMBERS:,}"
    if total > most:
        return f"makes it {total:,} bytes; {most:,} are what its size ({MAX_RATIO} times), or the disk, allows"
    return ""
