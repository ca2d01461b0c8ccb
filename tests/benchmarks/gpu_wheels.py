"""The packages that a machine without a network lacks beside torch, as wheels in one folder: `gpu.py` runs with them.

python -m tests.benchmarks.gpu_wheels [--out wheels] [--have opencv-python-headless …]

For CPython 3.12 on x86-64 Linux with torch, torchvision and what BASE names. `--have` names more that is there already.
It needs pip and a network, and no torch. Versions are those of pyproject.toml. Wheels are packed anew with LZMA, which
pip reads as well: that makes them a third smaller. It prints the size of each, and fails above 40 MB in all. There:

python -m pip install --no-index --no-deps --find-links wheels wheels/*.whl
python -m tests.benchmarks.gpu --data FOLDER
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT, MOST = Path(__file__).parents[2], 40e6  # bytes
BASE = "torch torchvision numpy scipy pandas matplotlib scikit-learn pillow pyyaml tqdm requests"  # and what they need
# What the rest imports: of a run of gpu.py, `sys.modules` has files of these and of BASE alone.
LACKED = """albucore albumentations annotated-types anyio beartype cloudpickle fastai fastcore fastdownload fastprogress
fasttransform grad-cam itsdangerous opencv-python-headless plum-dispatch pydantic pydantic-core python-fasthtml
python-multipart rich safetensors simsimd starlette stringzilla ttach typing-inspection"""
SOURCES = ("grad-cam", "ttach")  # without wheels: they are built here, and are Python alone
OLDER = {"opencv-python-headless": "4.11.0.86"}  # that of pyproject.toml is 41 MB by itself, packed anew
TARGET = "--python-version 3.12 --implementation cp --only-binary :all:".split()
TARGET += [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "_2_12", "2010", "1")]


def pins():
    """{package: version} of pyproject.toml, for Python 3.12 on Linux."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["project"]["dependencies"], *project["tool"]["uv"]["constraint-dependencies"]]
    found = [re.fullmatch(r"([\w.-]+)==([^ ;]+) *(;.*)?", line) for line in lines]
    return {m[1]: m[2] for m in found if not (m[3] and re.search(r"< '3\.12'|win32'$", m[3]))} | OLDER


def pip(*words):
    """Runs pip; of a virtual environment without one, that of the system."""
    here = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0
    python = sys.executable if here else shutil.which("python3", path="/usr/local/bin:/usr/bin") or "python3"
    subprocess.run([python, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, words)], check=True)


def pack(wheel, folder):
    """Writes `wheel` to `folder` with LZMA; returns its bytes."""
    packed = folder / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as new:
        for info in old.infolist():
            content = old.read(info)
            info.compress_type = zipfile.ZIP_LZMA
            new.writestr(info, content)
    return packed.stat().st_size


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", default="wheels", help="folder, which is made anew (wheels, which git ignores)")
    p.add_argument("--have", nargs="*", default=[], metavar="PACKAGE", help="packages that the machine has")
    args = p.parse_args()
    unknown = set(args.have) - set(LACKED.split())
    if unknown:
        p.error(f"--have: {' '.join(sorted(unknown))} is not among {' '.join(LACKED.split())}")
    versions, out = pins(), Path(args.out)
    names = [name for name in LACKED.split() if name not in args.have]
    if out.exists() and any(file.suffix != ".whl" for file in out.iterdir()):
        p.error(f"--out {out}: holds more than wheels; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [f"{name}=={versions[name]}" for name in names]
        sources = [w for w in wanted if w.split("==")[0] in SOURCES]
        pip("download", "--no-deps", *TARGET, "-d", folder, *(w for w in wanted if w not in sources))
        if sources:
            pip("wheel", "--no-deps", "-w", folder, *sources)
        sizes = {wheel.name: pack(wheel, out) for wheel in sorted(Path(folder).glob("*.whl"))}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:6.2f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total / 1e6:6.2f} MB  in {len(sizes)} wheels -> {out}")
    if len(sizes) != len(names):
        return f"{len(names)} packages were asked for"
    return f"more than {MOST / 1e6:.0f} MB: --have those that the machine has" if total > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
