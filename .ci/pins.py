"""Keeps the pins of pyproject.toml and environment.yml together.

uv run .ci/pins.py             writes environment.yml from the pins of pyproject.toml
uv run .ci/pins.py --check     exits with 1 where the two differ
uv run .ci/pins.py --update    first resolves what the direct packages need, and writes its versions into pyproject.toml
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(constraint-dependencies = \[\n)[^\]]*(?=\]\n\n)")


def pins(pyproject):
    """{package: requirement} of every pinned package, direct ones included, in alphabetical order; a package may have
    several pins with markers, joined by newlines."""
    found = {}
    for line in pyproject["project"]["dependencies"] + pyproject["tool"]["uv"]["constraint-dependencies"]:
        name = re.match(r"[A-Za-z0-9._-]+", line)[0].lower()
        if line not in found.setdefault(name, []):
            found[name].append(line)
    return {name: "\n".join(lines) for name, lines in sorted(found.items())}


def environment(pyproject):
    """The text of environment.yml."""
    lines = [line for block in pins(pyproject).values() for line in block.split("\n")]
    quoted = "\n".join(f'      - "{line}"' if ";" in line else f"      - {line}" for line in lines)
    return f"""# made by: uv run .ci/pins.py   (from the pins of pyproject.toml; do not edit)
name: train-fastai
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.11
  - pip
  - pip:
{quoted}
"""


def update():
    """Resolves without the constraints and writes what came out as constraints."""
    path = ROOT / "pyproject.toml"
    before = path.read_text()
    path.write_text(BLOCK.sub(r"\1", before))
    (ROOT / "uv.lock").unlink(missing_ok=True)
    command = "uv export --all-groups --no-hashes --no-annotate --no-header --format requirements.txt".split()
    try:
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except BaseException:  # without a network, for instance
        path.write_text(before)
        raise
    direct = {re.match(r"[\w.-]+", d)[0] for d in tomllib.loads(path.read_text())["project"]["dependencies"]}
    lines = [
        " ".join(line.split())
        for line in text.splitlines()
        if "==" in line and re.match(r"[\w.-]+", line)[0] not in direct
    ]
    block = "".join(f'  "{line}",\n' for line in lines)
    path.write_text(BLOCK.sub(lambda m: m[1] + block, path.read_text()))


if __name__ == "__main__":
    if "--update" in sys.argv:
        update()
    made = environment(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    target = ROOT / "environment.yml"
    if "--check" in sys.argv:
        same = target.read_text() == made
        print(f"environment.yml {'holds' if same else 'differs from'} the pins of pyproject.toml")
        sys.exit(0 if same else 1)
    target.write_text(made)
    print(f"environment.yml: {made.count(chr(10)) - 10} pins")
