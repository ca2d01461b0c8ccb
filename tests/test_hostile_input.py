"""Hostile archives, checkpoints and settings: refused whole, in one line; no code of theirs runs."""

import ast
import gzip
import io
import json
import lzma
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lib import compare, predict, runs
from lib import config as settings
from lib.cli import BadInput
from lib.config import Config
from lib.data import archive, loader
from lib.models import zoo
from lib.train import checkpoint
from tests.conftest import SMALL, good, picture
from train_fastai import main

ROOT = Path(__file__).parent.parent
IMAGE = Image.fromarray(picture(np.random.default_rng(0), 1, 40, 40))


def encoded(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


# --- archives --------------------------------------------------------------------------------------------------------

PICTURE = encoded(IMAGE, "png")
half = lambda content: content[: len(content) // 2]
changed = lambda content, at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]  # one bit
header_of = lambda i: i * (512 + -(-len(PICTURE) // 512) * 512)  # where that of image i of `tar_of` begins


def tar_of(*extra, mode="w:gz", cut=None):
    """A tar with ten good images and then `extra`: (TarInfo, content) pairs."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for i in range(10):
            t.addfile(member(f"pack/{'ab'[i % 2]}/{i}.png", len(PICTURE)), io.BytesIO(PICTURE))
        for info, content in extra:
            t.addfile(info, content and io.BytesIO(content))
    return out.getvalue()


def member(name, size=0, kind=tarfile.REGTYPE, **more):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def zip_of(*extra, patch=lambda content: content):
    """A zip with ten good images and then `extra`: (name or ZipInfo, content) pairs."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        warnings.simplefilter("ignore")  # of a duplicate
        for i in range(10):
            z.writestr(f"pack/{'ab'[i % 2]}/{i}.png", PICTURE)
        for name, content in extra:
            z.writestr(name, content)
    return patch(out.getvalue())


def zip_mode(name, mode):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def declared(name, change):
    """A zip whose last member declares another size than it has."""
    content = bytearray(zip_of((name, bytes(range(256)) * 4000)))
    at = content.rfind(b"PK\x01\x02")
    size = struct.unpack_from("<I", content, at + 24)[0]
    struct.pack_into("<I", content, at + 24, change(size))
    return bytes(content)


def encrypted():
    content = bytearray(zip_of())
    for sign, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(sign) + flags] |= 1
    return bytes(content)


def long_name(pack=lambda content: gzip.compress(content, 1)):
    """A packed tar whose member has a name of 64 MB, which tarfile would read into memory."""
    head = member("x", 1 << 26, tarfile.GNUTYPE_LONGNAME).tobuf()
    return pack(head + bytes(1 << 26))


def sparse():
    """A tar with a sparse file of a terabyte, in GNU's old form."""
    block = bytearray(member("pack/a/sparse.png", 0, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % 2**33
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(1024)


EVIL = {  # name of the archive: (content, words of the line)
    "up.tgz": (tar_of((member("../escaped", 3), b"out")), "points outside"),
    "inner up.tar.gz": (tar_of((member("pack/a/../../../escaped", 3), b"out")), "points outside"),
    "absolute.tar": (tar_of((member("/tmp/escaped", 3), b"out"), mode="w"), "points outside"),
    "symlink.tgz": (tar_of((member("pack/a/l", kind=tarfile.SYMTYPE, linkname="/etc"), None)), "no plain file"),
    "inner symlink.tgz": (tar_of((member("pack/a/l", kind=tarfile.SYMTYPE, linkname="0.png"), None)), "no plain file"),
    "hard link.tgz": (tar_of((member("pack/a/l", kind=tarfile.LNKTYPE, linkname="/etc/passwd"), None)), "no plain"),
    "pipe.tgz": (tar_of((member("pack/a/p.png", kind=tarfile.FIFOTYPE), None)), "no plain file"),
    "device.tgz": (tar_of((member("pack/a/z.png", kind=tarfile.CHRTYPE, devmajor=1, devminor=5), None)), "no plain"),
    "disk.tgz": (tar_of((member("pack/a/d", kind=tarfile.BLKTYPE, devmajor=8), None)), "no plain file"),
    "sparse.tar": (sparse(), "no plain file"),
    "twice.tgz": (tar_of((member("pack/a/0.png", 3), b"two")), "is there twice"),
    "twice, written otherwise.tgz": (tar_of((member("./pack//a/./0.png", 3), b"two")), "is there twice"),
    "file and folder.tgz": (tar_of((member("pack/a/0.png/x", 3), b"two")), "cannot be unpacked"),
    "deep.tgz": (tar_of((member("d/" * 2000 + "x.png", 3), b"two")), "folders deep"),
    "bomb.tgz": (tar_of((member("pack/a/x.png", 20 << 20), bytes(20 << 20))), "its size (100 times)"),
    "name bomb.tgz": (long_name(), "name or header"),
    "codes.tgz": (tar_of((member("../\x1b[31m\n", 3), b"out")), r"\x1b[31m\n"),
    "up by a header.tgz": (tar_of((member("x", 3, pax_headers={"path": "../escaped"}), b"out")), "points outside"),
    "bomb.tar.xz": (tar_of((member("pack/a/x.png", 20 << 20), bytes(20 << 20)), mode="w:xz"), "its size (100 times)"),
    "bomb.tar.bz2": (tar_of((member("pack/a/x.png", 20 << 20), bytes(20 << 20)), mode="w:bz2"), "its size (100 times)"),
    "name bomb.tar.xz": (long_name(lzma.compress), "name or header"),
    "cut.tar.xz": (half(tar_of(mode="w:xz")), "cannot be unpacked"),
    "cut.tar.bz2": (half(tar_of(mode="w:bz2")), "cannot be unpacked"),
    "cut.tgz": (half(tar_of()), "cannot be unpacked"),
    "cut.tar": (half(tar_of(mode="w")), "cannot be unpacked"),
    "header.tar": (changed(tar_of(mode="w"), header_of(4) + 20), "damaged or missing"),
    "between members.tar": (tar_of(mode="w")[: header_of(4)], "damaged or missing"),
    "within a header.tar": (tar_of(mode="w")[: header_of(4) + 99], "damaged or missing"),
    "stored.tgz": (changed(gzip.compress(tar_of(mode="w"), 0), header_of(4) + 900), "CRC"),
    "endless.tar": (tar_of(mode="w") + bytes(9 << 20), "goes on for long"),
    "text.tgz": (b"no archive" * 99, "cannot be unpacked"),
    "empty.tar.gz": (b"", "cannot be unpacked"),
    "up.zip": (zip_of(("../escaped", b"out")), "points outside"),
    "absolute.zip": (zip_of(("/tmp/escaped", b"out")), "points outside"),
    "backslash.zip": (zip_of((r"pack\..\..\escaped", b"out")), "points outside"),
    "drive.zip": (zip_of(("C:/escaped", b"out")), "points outside"),
    "symlink.zip": (zip_of((zip_mode("pack/a/l", 0o120777), "/etc/passwd")), "no plain file"),
    "device.zip": (zip_of((zip_mode("pack/a/d", 0o020666), "")), "no plain file"),
    "twice.zip": (zip_of(("pack/a/0.png", b"two")), "is there twice"),
    "encrypted.zip": (encrypted(), "is encrypted"),
    "bomb.zip": (zip_of(("pack/a/x.png", bytes(20 << 20))), "its size (100 times)"),
    "declared.zip": (declared("pack/a/x.png", lambda size: 2**32 - 2), "its size (100 times)"),
    "less declared.zip": (declared("pack/a/x.png", lambda size: size // 2), "cannot be unpacked"),
    "more declared.zip": (declared("pack/a/x.png", lambda size: size + 9), "cannot be unpacked"),
    "cut.zip": (half(zip_of()), "cannot be unpacked"),
    "method.zip": (zip_of(patch=lambda c: c.replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x63\0")), "cannot be unpacked"),
}  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_an_archive_with_an_evil_member_is_refused_whole(name, tmp_path, refused, monkeypatch):
    content, words = EVIL[name]
    monkeypatch.setattr(archive, "SMALL", 1 << 23)
    (tmp_path / name).write_bytes(content)
    line = refused("--data", tmp_path / name, "--cache", tmp_path / "cache")
    assert words in line and name in line
    assert list((tmp_path / "cache").iterdir()) == [] and not Path("/tmp/escaped").exists()


def test_an_archive_of_very_many_members_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 9)
    for name, content in (("x.zip", zip_of()), ("x.tgz", tar_of())):
        (tmp_path / name).write_bytes(content)
        line = refused("--data", tmp_path / name, "--cache", tmp_path / "cache")
        assert "is one of more than 9" in line and list((tmp_path / "cache").iterdir()) == []


def test_an_archive_larger_than_the_disk_is_refused_before_it_fills_it(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5000}))
    (tmp_path / "x.zip").write_bytes(zip_of())
    assert "or the disk, allows" in refused("--data", tmp_path / "x.zip", "--cache", tmp_path / "cache")


def from_windows():
    """A zip whose names have backslashes, with entries for folders."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name in ("pack\\", "pack\\a\\", "pack\\b\\", *(f"pack\\{'ab'[i % 2]}\\{i}.png" for i in range(10))):
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name, 0
            z.writestr(info, b"" if name.endswith("\\") else PICTURE)
    return out.getvalue()


GOOD = {"x.zip": zip_of(), "windows.zip": from_windows(), "x.tgz": tar_of(), "x.tar": tar_of(mode="w")}
GOOD |= {"x.tar.xz": tar_of(mode="w:xz"), "x.tar.bz2": tar_of(mode="w:bz2")}


@pytest.mark.parametrize("name, content", GOOD.items())
def test_a_good_archive_is_unpacked_with_plain_modes(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    archive.unpack(tmp_path / name, tmp_path / "out")
    files = sorted((tmp_path / "out").rglob("*.png"))
    assert len(files) == 10 and all(p.read_bytes() == PICTURE for p in files)
    assert {p.stat().st_mode & 0o7000 for p in files} == {0}


def renamed(name, encoded):
    """A zip with three images in a folder whose name is `encoded`, without the flag that says UTF-8."""
    out, plain = io.BytesIO(), "x" * len(encoded)
    with zipfile.ZipFile(out, "w") as z:
        for i in range(3):
            z.writestr(f"{plain}/{i}.png", PICTURE)
    return out.getvalue().replace(plain.encode() + b"/", encoded + b"/")


@pytest.mark.parametrize("name", ["K\u00e4tzchen", "\u732b", "\u043a\u043e\u0442", "cat"])
def test_names_of_a_zip_are_utf8_where_they_can_be(name, tmp_path, capsys):
    (tmp_path / "x.zip").write_bytes(renamed(name, name.encode()))
    archive.unpack(tmp_path / "x.zip", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_dir()] == [name]
    assert len(list((tmp_path / "out" / name).glob("*.png"))) == 3 and capsys.readouterr().out == ""
    assert next(iter(archive.members(tmp_path / "x.zip")))[0] == f"{name}/0.png"


def test_names_of_a_zip_in_an_unknown_encoding_are_said(tmp_path, capsys):
    (tmp_path / "x.zip").write_bytes(renamed("Hündchen", "Hündchen".encode("cp1252")))
    archive.unpack(tmp_path / "x.zip", tmp_path / "out")
    assert "3 names, such as H" in (out := capsys.readouterr().out) and "do not say their encoding" in out


def test_drawings_that_pack_well_are_no_bomb(tmp_path, capsys):
    """24 pictures of nearly one colour, as BMP: a thousandth of their size in a zip."""
    drawing = Image.new("RGB", (600, 600), "white")
    drawing.paste("black", (10, 10, 60, 60))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(24):
            z.writestr(f"{'ab'[i % 2]}/{i}.bmp", encoded(drawing, "bmp"))
    archive.unpack(tmp_path / "x.zip", tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*.bmp"))) == 24


# --- what a stranger's run folder holds ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one epoch."""
    out = tmp_path_factory.mktemp("finished")
    argv = ["--data", good(out / "photos", "ab"), "--out", out, "--name", "run", *SMALL]
    assert main([*map(str, argv)]) == 0
    return out / "run"


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def in_zip(payload):
    """A file as torch.save writes it, its pickle replaced by `payload`."""
    source, out = io.BytesIO(), io.BytesIO()
    torch.save({"format": 1}, source)
    with zipfile.ZipFile(source) as z, zipfile.ZipFile(out, "w") as to:
        for m in z.infolist():
            to.writestr(m.filename, payload if m.filename.endswith("data.pkl") else z.read(m))
    return out.getvalue()


def saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def scripted():
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), out)
    return out.getvalue()


def legacy(value):
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


TOUCH = "open({!r}, 'w').close()"
PICKLES = {  # function from a path to the bytes that would make a file there
    "os.system": lambda p: pickle.dumps(Calls(os.system, f"touch {p}")),
    "posix.system by hand": lambda p: b"cposix\nsystem\n(S'touch " + p.encode() + b"'\ntR.",
    "builtins.exec": lambda p: pickle.dumps(Calls(exec, TOUCH.format(p)), 2),
    "builtins.eval, protocol 5": lambda p: pickle.dumps(Calls(eval, TOUCH.format(p)), 5),
    "subprocess": lambda p: pickle.dumps({"model": Calls(subprocess.call, ["touch", p])}),
    "in torch's zip": lambda p: in_zip(pickle.dumps(Calls(os.system, f"touch {p}"), 2)),
    "deep in a state dict": lambda p: saved({"model": {"x": [torch.ones(2), Calls(os.system, f"touch {p}")]}}),
    "in torch's older form": lambda p: legacy({"format": 1, "model": Calls(os.system, f"touch {p}")}),
    "a script beside it": lambda p: pickle.dumps(Calls(runpy.run_path, f"{p}.py")),
}  # fmt: skip
FOREIGN = {
    "a whole module": lambda: saved(torch.nn.Linear(1, 1)),
    "a script": scripted,
    "weights alone": lambda: saved(torch.nn.Linear(1, 1).state_dict()),
    "a list": lambda: saved([1, 2]),
    "a text": lambda: b"weights",
    "an empty file": lambda: b"",
    "a zip of nothing": lambda: zip_of(),
    "codes in a name": lambda: b"c\x1b]0;x\x07os\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_checkpoint_that_would_run_code_runs_none(name, copied, tmp_path, capfd):
    canary = tmp_path / "canary"
    Path(f"{canary}.py").write_text(TOUCH.format(str(canary)))
    content = PICKLES[name](str(canary))
    try:  # armed?
        torch.load(io.BytesIO(content), weights_only=False)
    except Exception:
        pass
    assert canary.exists()
    canary.unlink()
    for file in ("last.pt", "last.pt.before", "best.safetensors"):
        (copied / "weights" / file).write_bytes(content)
    assert main(["--resume", str(copied), "--epochs", "2"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "last.pt" in err and ("start" in err or "anew" in err)
    assert not canary.exists()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_checkpoint_is_one_line(name, copied, capfd):
    for file in ("last.pt", "last.pt.before"):
        (copied / "weights" / file).write_bytes(FOREIGN[name]())
    assert main(["--resume", str(copied), "--epochs", "2"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "last.pt" in err and err[:-1].isprintable()


def test_a_checkpoint_of_right_form_and_wrong_content_is_one_line(copied, capfd):

    state = checkpoint.load(copied / "weights/last.pt")
    for key, wrong in [(k, w) for k in state for w in (None, 5, {"x": 1})]:
        if state[key] == wrong or key == "epochs_trained" and wrong == 5 or key == "scaler":
            continue
        checkpoint.save(copied / "weights/last.pt", {**state, key: wrong})
        assert main(["--resume", str(copied), "--epochs", "2"]) == 2, (key, wrong)
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "last.pt" in err
    plateau = next(of for of in state["callbacks"].values() if "plateau" in of)
    for wrong in ({}, {"x": 1}, {"step": 5}):
        plateau["plateau"] = wrong
        checkpoint.save(copied / "weights/last.pt", state)
        assert main(["--resume", str(copied), "--epochs", "2"]) == 2, wrong
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "last.pt" in err


YAML = {
    "apply": lambda p: f"data: !!python/object/apply:os.system ['touch {p}']",
    "new": lambda p: f"epochs: !!python/object/new:subprocess.call [['touch', '{p}']]",
    "in a key": lambda p: f"? !!python/object/apply:os.system ['touch {p}']\n: 3",
    "eval in a list": lambda p: f"seeds: [1, !!python/object/apply:builtins.eval [\"open('{p}', 'w')\"]]",
}


@pytest.mark.parametrize("name", YAML)
def test_settings_that_would_run_code_run_none(name, copied, tmp_path, refused):
    canary = tmp_path / "canary"
    text = YAML[name](canary)
    try:  # armed?
        yaml.unsafe_load(text)
    except Exception:
        pass
    assert canary.exists()
    canary.unlink()
    (copied / "args.yaml").write_text(text)
    assert "cannot be read" in refused("-c", copied / "args.yaml")
    assert "cannot be read" in refused("--resume", copied)
    with pytest.raises(BadInput):
        compare.load(copied)
    assert not canary.exists()


STEPS = [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]  # each three times the one before
NESTED = "\n".join(["a0: &a0 [x, x]", *STEPS, "seeds: *a39"])
PAIRS = f"seeds: !!pairs [a: [&b0 [x], {', '.join(f'&b{i} [*b{i - 1}, *b{i - 1}]' for i in range(1, 40))}]]"


@pytest.mark.parametrize(
    "text",
    [
        NESTED, NESTED.replace("a0:", "data:", 1), "seeds: &x [*x]", PAIRS, "[" * 2000, "epochs: !!int ''",
        "flip: !!bool maybe", "name: !!timestamp x", "lr: " + "9:" * 400 + "9.5", "? [a, b]\n: 3", "\x1b[31m: 3",
        "epochs: " + "9" * 5000,
        "epochs: 0x" + "f" * 9999, "data: !!binary aGk=", "data: 2026-01-01", "a: 1\n---\nb: 2",
        "x" * 10**6, "model: {a: b}",
    ],
    ids=range(18),
)  # fmt: skip
def test_odd_settings_are_refused_at_once(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    start = time.perf_counter()
    with pytest.raises(BadInput) as e:
        settings.variants(["-c", str(tmp_path / "x.yaml")])
    assert time.perf_counter() - start < 3 and str(e.value).isprintable() and len(str(e.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", "null", "[" * 10**5, '{"size": NaN}', b"\xff\xfe",
        '{"threads": 1, "precision": "x", "size": 16}', {"lr": None}, {"lr": "fast"}, {"lr": 10**400}, {"resumed": 3},
        {"size": [16]}, {"threads": "all"}, {"precision": {}}, {"data_fingerprint": None},
    ],
    ids=range(16),
)  # fmt: skip
def test_a_damaged_env_json_is_one_line(content, copied, refused):
    env = copied / "env.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(env.read_text()), **content})
    env.write_bytes(content.encode() if isinstance(content, str) else content)
    refused("--resume", copied, "--epochs", 2, "--out", copied.parent)


def test_what_is_lost_from_env_json_comes_from_the_data_again(copied, capfd):
    env = copied / "env.json"
    known = json.loads(env.read_text())
    env.write_text(json.dumps({k: known[k] for k in ("threads", "precision", "size", "data_fingerprint")}))
    assert main(["--resume", str(copied), "--epochs", "2"]) == 2
    assert "has lost the lr" in capfd.readouterr().err
    wrong = {"images": 3, "chosen_on": [], "params": "x", "classes": None}
    env.write_text(json.dumps({**known, **wrong}))
    assert main(["--resume", str(copied), "--epochs", "2"]) == 0
    assert {name: json.loads(env.read_text())[name] for name in wrong} == {name: known[name] for name in wrong}


OURS = {"n_classes": 2, "stem": 8, "widths": [8, 8, 8]}


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "os.system"}, {"architecture": "torchvision.os.system"}, {"architecture": "torch.hub.load"},
        {"architecture": "../evil.SmallResNet"}, {"architecture": "nn.Module"}, {"architecture": ""},
        {"architecture": None}, {"args": None}, {"args": {}}, {"args": OURS | {"n_classes": "2"}},
        {"args": OURS | {"n_classes": True}}, {"args": OURS | {"evil": 1}}, {"args": OURS | {"stem": 10**9}},
        {"args": {"n_classes": 2, "stem": 60_000, "widths": [60_000, 60_000, 60_000]}},
        {"args": OURS | {"widths": [8] * 1000, "depths": [1] * 1000}},
        {"args": {"n_classes": 2, "stem": 8, "widths": [8, 8, 8], "depths": [1, 1]}},
        {"args": {"n_classes": 2, "stem": 8, "widths": [8, 8, 8], "depths": [1, 1, 64]}},
        {"args": {"n_classes": 2, "stem": 8, "widths": [8, 8, 8], "squeeze": 0}},
        {"args": {"n_classes": 2, "stem": 8, "widths": [8, 8, 8], "squeeze": [True]}},
        {"architecture": "torchvision.resnet18", "args": {"weights": 1}},
    ],
    ids=range(20),
)  # fmt: skip
def test_a_model_json_that_names_anything_else_is_refused(change, copied):
    card = json.loads((copied / "weights/model.json").read_text())
    zoo.rebuild(card), zoo.rebuild({**card, "args": OURS})  # so the others are refused for their fault alone
    with pytest.raises(BadInput):
        zoo.rebuild({**card, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"classes": None}, {"classes": [1, 2]}, {"classes": ["a"]}, {"size": 10**9}, {"size": "16"}, {"mean": [1]},
        {"std": ["x", 1, 1]}, {"std": [10**400, 1, 1]}, {"args": {}},
    ],
    ids=range(9),
)  # fmt: skip
def test_a_model_json_of_wrong_values_is_one_line(change, copied, photos, capfd):
    file = copied / "weights/model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert predict.main([str(copied), str(photos)]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and str(file) in err


@pytest.mark.parametrize(
    "file, content",
    [
        ("summary.json", "[]"), ("summary.json", '{"test_acc": "<b>"}'), ("env.json", "[" * 10**5),
        ("results.csv", "a\nb\n"), ("results.csv", ""), ("args.yaml", "seeds: !!python/name:os.system"),
    ],
    ids=range(6),
)  # fmt: skip
def test_a_comparison_with_a_damaged_run_is_one_line(file, content, copied, finished, capfd):
    (copied / file).write_text(content)
    assert compare.main([str(finished), str(copied), "--out", str(copied.parent / "both")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and str(copied) in err


def test_a_pickled_file_of_decoded_images_runs_nothing(photos, tmp_path, refused):
    cache, canary = tmp_path / "cache", tmp_path / "canary"
    loader.get_dls(Config(data=str(photos), size=16, cache=str(cache)))
    (folder,) = cache.iterdir()
    np.save(folder / "shapes.npy", np.array([Calls(os.system, f"touch {canary}")], dtype=object), allow_pickle=True)
    assert "is damaged" in refused("--data", photos, "--cache", cache)
    assert not canary.exists()


PICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
BANNED = {"system", "popen", "load_learner", "load_model", "untar_data", "extractall", "unpack_archive", "read_pickle",
          "Unpickler", "run_path", "run_module"}  # fmt: skip
LOADERS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load"}


def test_a_link_that_lies_in_wait_is_not_written_through(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("years of work")
    (tmp_path / "run").mkdir()
    for link in ("args.yaml", f".args.yaml.{os.getpid()}"):
        (tmp_path / "run" / link).symlink_to(mine)
    runs.write(tmp_path / "run/args.yaml", "new")
    assert mine.read_text() == "years of work" and (tmp_path / "run/args.yaml").read_text() == "new"


def test_no_code_is_read_from_files_anywhere():
    """No unpickling, no YAML but the safe kind, no eval: what could run code that a file brings."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "lib").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                allowed = {"joblib"} if names == ["cpu_count", "joblib"] else set()
                assert not {n.split(".")[0] for n in names} & PICKLERS - allowed, path
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}:{node.lineno} {call}"
            assert call.split(".")[-1] not in BANNED and call not in LOADERS, where
            assert given.get("shell") is None and given.get("allow_pickle", "False") == "False", where
            assert call != "np.load" or len(node.args) < 3, where  # the third is allow_pickle
            if call == "torch.load":
                assert given.get("weights_only") == "True", where
