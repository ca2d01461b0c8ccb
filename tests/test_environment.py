"""The pins of pyproject.toml, environment.yml and what is installed are the same."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PINS = PYPROJECT["project"]["dependencies"] + PYPROJECT["tool"]["uv"]["constraint-dependencies"]
EXTRAS = [line for lines in PYPROJECT["project"]["optional-dependencies"].values() for line in lines]


def pip_section():
    return next(d["pip"] for d in ENVIRONMENT["dependencies"] if isinstance(d, dict))


def test_environment_yml_is_made_from_the_pins():
    spec = importlib.util.spec_from_file_location("pins", ROOT / ".ci/pins.py")
    pins = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pins)
    assert pins.environment(PYPROJECT) == (ROOT / "environment.yml").read_text()


def test_the_two_files_agree_pin_by_pin():
    normal = lambda lines: sorted(str(Requirement(line)).lower() for line in lines)
    assert normal(pip_section()) == normal(PINS) and len(PINS) > 100
    assert all(re.search(r"==\d", line) for line in PINS + EXTRAS)
    assert ENVIRONMENT["channels"] == ["conda-forge", "nodefaults"]
    python = next(d for d in ENVIRONMENT["dependencies"] if str(d).startswith("python"))
    assert python == "python=3.11" and PYPROJECT["project"]["requires-python"] == ">=3.11,<3.12"


def versions(lines):
    """{package: version} of those pins that are for this machine."""
    found = [Requirement(line) for line in lines]
    here = [r for r in found if r.marker is None or r.marker.evaluate()]
    return {re.sub(r"[-_.]+", "-", r.name).lower(): str(r.specifier).removeprefix("==") for r in here}


def test_what_is_installed_is_what_is_pinned():
    pinned, extra = versions(PINS), versions(EXTRAS)
    installed = {
        re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions()
    }
    assert not set(pinned) & set(extra)
    assert {n: v for n, v in installed.items() if n in pinned} == pinned
    assert {n: v for n, v in installed.items() if n in extra} == {n: v for n, v in extra.items() if n in installed}
    assert set(installed) - {*pinned, *extra} <= {"pip", "uv", "wheel", "train-fastai", "setuptools"}


def test_pairs_that_resolvers_do_not_tie_fit():
    import fastai.vision.core  # noqa: F401  (fastai with this fastcore)
    import torchvision

    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2.1], [5, 5, 6, 6]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]


def test_nothing_names_a_download_host():
    if not shutil.which("git"):
        pytest.skip("needs git")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    tracked = listed or pytest.skip("git lists no files here")
    assert "uv.lock" not in tracked
    hosts = re.compile("|".join(("py" + r"pi\.org", "python" + "hosted", "npm" + r"js\.org")))
    assert not [
        f for f in tracked if f.endswith((".toml", ".yml", ".md", ".py")) and hosts.search((ROOT / f).read_text())
    ]


@pytest.mark.slow
def test_the_pip_section_alone_runs_smoke(tmp_path):
    """Exactly what conda would hand to pip, in a bare virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (tmp_path / "requirements.txt").write_text("\n".join(pip_section()))
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", tmp_path / "requirements.txt"], check=True)
    command = [python, "train_fastai.py", "--smoke", "--out", tmp_path / "runs", "--cache", tmp_path / "cache"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
