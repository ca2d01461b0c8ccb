"""README.md, docs/ and results/: their commands parse, their links lead somewhere, their numbers are in files."""

import contextlib
import csv
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from lib import config
from lib.compare import interval
from tests.benchmarks import lengths

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "results/README.md", ROOT / "results/tried/README.md"]
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
UV = re.compile(r"^uv run((?: --(?:extra|with) \S+)*)(?: torchrun(?: --\S+ \S+)*)? ")

OTHERS = ("--extra", "--help", "--signal")  # of uv and SLURM
GONE = {"docs/changelog.md": ("--small-epochs",), "results/tried/README.md": ("--small-epochs",)}


def ids(path):
    return str(path.relative_to(ROOT))


def commands(text):
    """The command lines in a text: of its blocks without a language, joined where they go on, and of its code spans."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if not language:
            yield from block.replace("\\\n", " ").split("\n")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    yield from re.findall(r"`([^`\n]+)`", prose)


def uv_lines(path):
    """What follows `uv run` in the commands of a page, without what a shell does around it."""
    for line in commands(path.read_text(encoding="utf-8")):
        line = f"uv run {line}" if line.startswith("train_fastai.py") else line  # as in the table of results/README.md
        for found in re.findall(r"uv run ((?:(?! uv run ).)*)", line):
            yield re.split(r"; | [>&|;]|  +", found)[0].strip()


def run_by_uv(path):
    """(program, arguments) of the commands of a page that `uv run` starts."""
    for line in uv_lines(path):
        if UV.match(f"uv run {line} ") and "$" not in line:
            words = shlex.split(UV.sub("", f"uv run {line} "))
            yield words[0], [word for word in words[1:] if word != "…"]


def modules():
    """(page, module, arguments) of each `python -m lib.X` or `python -m tests.benchmarks.X` in the pages."""
    for path in PAGES:
        for line in commands(path.read_text(encoding="utf-8")):
            if found := re.search(r"python -m ((?:lib|tests\.benchmarks)\.\w+)([^>|]*)", line):
                yield ids(path), found[1], found[2]


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_training_command_parses(path):
    for program, arguments in run_by_uv(path):
        if program == "train_fastai.py" and not {"-c", "--resume", "--help"} & {*arguments}:
            assert config.variants(arguments), arguments


def test_there_are_commands_to_check():
    found = [program for path in PAGES for program, _ in run_by_uv(path)]
    assert found.count("train_fastai.py") > 40 and len(list(modules())) > 20


def test_every_module_and_its_options_exist():
    for page, module, arguments in modules():
        text = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", arguments):
            assert f'"{flag}"' in text, f"{page}: {module} has no {flag}"


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_flag_that_a_page_names_exists(path):
    """In code spans that begin with a flag; flags of commands are checked above."""
    ours = "".join(
        file.read_text(encoding="utf-8") for file in (*ROOT.glob("lib/*.py"), *ROOT.glob("tests/benchmarks/*.py"))
    )
    known = {flag for name in config.FIELDS for flag in (config.flag_of(name), f"--no-{config.flag_of(name)[2:]}")}
    for line in commands(path.read_text(encoding="utf-8")):
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", line) if line.startswith("--") else ():
            assert flag in known or f'"{flag}"' in ours or flag in (*OTHERS, *GONE.get(ids(path), ())), flag


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_link_leads_to_a_file(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not re.match(r"[a-z]+:", link):
            name, _, part = link.partition("#")
            target = (path.parent / name) if name else path
            assert target.exists(), link
            if part:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
                assert part in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_folder_of_results_that_a_page_names_exists(path):
    for name in re.findall(r"`(results/[\w./-]+|tried/[\w./-]+)`", path.read_text(encoding="utf-8")):
        folder = ROOT / name if name.startswith("results/") else ROOT / "results" / name
        assert folder.exists(), name


def test_settings_md_is_made_from_the_settings():
    spec = importlib.util.spec_from_file_location("settings", ROOT / ".ci/settings.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.page() == (ROOT / "docs/settings.md").read_text(encoding="utf-8"), "run uv run .ci/settings.py"
    assert all(f"`{config.flag_of(name)}`" in script.page() for name in config.FIELDS)


def test_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 9000


def rows_of(text, header):
    """The rows of the Markdown table whose header begins with `header`, as lists of cells."""
    lines = text[text.index(header) :].split("\n\n")[0].split("\n")
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def summaries(folder):
    """The summaries of a run folder, or of the runs of a comparison."""
    files = (
        [folder / "summary.json"] if (folder / "summary.json").exists() else sorted(folder.glob("*-s*/summary.json"))
    )
    return [json.loads(file.read_text()) for file in files]


def spread(values):
    """'mean ± standard deviation' as README writes it; of one value itself."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


@pytest.mark.parametrize("row", rows_of(README, "| run |"), ids=lambda row: row[0])
def test_the_results_in_readme_are_those_of_the_files(row):
    """Accuracy, number of runs, and minutes, from the run folders that the row links to."""
    run, accuracy, n, minutes, _, _ = row
    found = [s for link in re.findall(r"\]\(([^)]+)\)", run) for s in summaries(ROOT / link)]
    key = "tta_test_acc" if "mirror" in run else "test_acc"
    assert accuracy == spread([s[key] for s in found]) and int(n) == len(found)
    times = [s["train_seconds"] / 60 for s in found]
    known = {f"{t:.0f}" for t in [statistics.mean(times), *times]} | {f"{statistics.mean(times):.1f}"}
    assert {*minutes.split(", ")} <= known


def test_the_speeds_in_the_docs_are_those_of_the_files():
    """Images a second of stock fastai, this project and the ceiling, rounded; README's row too."""
    rows = {row[0]: row[1:] for row in rows_of((ROOT / "docs/speed.md").read_text(encoding="utf-8"), "| | `medium`")}
    files = [re.search(r"\(\.\./(.*)\)", cell)[1] for cell in rows["file"]]
    for i, file in enumerate(files):
        speed = json.loads((ROOT / file).read_text())["images_per_second"]
        for name, key in (("stock fastai", "stock"), ("this project", "ours"), ("the ceiling", "ceiling")):
            assert rows[name][i] == f"{speed[key]:.0f}"
        for name, key in (("ceiling", "ceiling"), ("stock fastai", "stock")):
            rounds = json.loads((ROOT / file).read_text())["rounds"]
            ratios = [a / b for a, b in zip(rounds["ours"], rounds[key])]
            told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            assert rows[f"this project / {name}, median (range of the rounds)"][i] == told
    speed = json.loads((ROOT / "results/speed.json").read_text())["images_per_second"]
    assert f"| {speed['stock']:.0f}, in float32 as by default | {speed['ours']:.0f}, in bf16 as by default (" in README


def test_the_speeds_without_avx512_are_those_of_the_files():
    text = " ".join((ROOT / "docs/speed.md").read_text(encoding="utf-8").split())
    speed, step = (json.loads((ROOT / f"results/{name}-avx2.json").read_text()) for name in ("speed", "step"))
    told = f"at {speed['images_per_second']['ours']:.0f} images/s: {speed['ratio_to_stock']:.2f} times stock fastai, "
    assert told + f"and {speed['ratio_to_ceiling']:.2f} of the ceiling" in text
    convolutions = sum(share for name, share in step["share of a step"].items() if "convolution" in name)
    assert f"Convolutions take {convolutions:.2f} of a step." in text
    reached = [round(step["operations per second"][what] / 1e9) for what in ("a step", "a matrix product")]
    assert "A step computes {} GFLOP/s. A product of two large matrices reaches {}.".format(*reached) in text
    again = json.loads((ROOT / "results/speed-avx2-again.json").read_text())
    told = f"gave {again['ratio_to_stock']:.2f} times stock fastai and {again['ratio_to_ceiling']:.2f} of the ceiling"
    assert told in text
    cold, warm = ([run["seconds"][f"first step, {of} cache"] for run in (speed, again)] for of in ("cold", "warm"))
    told = "the two took {:.1f} and {:.1f} s if `--cache` held the decoded images, and {:.1f} and {:.1f} s otherwise"
    assert told.format(*warm, *cold) in text


def test_the_speeds_beside_other_programs_are_those_of_the_file():
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    models = json.loads((ROOT / "results/neighbour.json").read_text())["models"].values()
    ways = {"auto": "--threads auto", "2 threads": "--threads 2", "1 thread": "--threads 1"}
    for place, found in next(iter(models))["images_per_second"].items():
        for way in found:
            speeds = [(m["images_per_second"][place][way], m["ratio to 2 threads alone"][place][way]) for m in models]
            cells = " | ".join(f"{speed:,.0f} ({ratio:.2f})" for speed, ratio in speeds)
            assert f"| {place}: `{ways[way]}` | {cells} |" in text


def test_the_other_speeds_in_the_docs_are_those_of_the_files():
    """The second run of the ResNet-9, the loader alone, and the start of a command."""
    text = " ".join((ROOT / "docs/speed.md").read_text(encoding="utf-8").split())
    again, speed = (
        json.loads((ROOT / f"results/{name}.json").read_text()) for name in ("speed-resnet9-again", "speed")
    )
    assert f"gave {again['ratio_to_stock']:.2f} times stock fastai and {again['ratio_to_ceiling']:.2f} of" in text
    assert f"makes {round(speed['images_per_second']['loader'], -3):,.0f} images/s" in text
    start, cold, warm = (speed["seconds"][key] for key in ("help", "first step, cold cache", "first step, warm cache"))
    assert f"takes {start:.2f} s" in text and f"takes {cold:.1f} s, or {warm:.1f} s if" in text


OPTIMIZERS = ROOT / "results/evidence/optimizers-best-rates/comparison.csv"


def differences(path, gap=False):
    """{(variant, key): (mean, half of the 95% interval)}: a comparison.csv's, to its first variant, paired by seed.

    The keys are those of the kept weights and of the last epoch; with `gap`, train minus test after the last.
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    keys = {key: lambda row, key=key: float(row[key]) for key in ("test_acc", "last_test_acc") if key in rows[0]}
    keys = {"gap": lambda row: float(row["last_train_acc"]) - float(row["last_test_acc"])} if gap else keys
    found = {}
    for row in rows:
        for key, value in keys.items():
            found.setdefault((row["variant"], key), {})[row["seed"]] = value(row)
    both = {}
    for (name, key), scores in found.items():
        base = found[rows[0]["variant"], key]
        seeds = sorted(scores.keys() & base)
        if scores is not base and len(seeds) > 1:
            both[name, key] = interval([scores[s] for s in seeds], [base[s] for s in seeds])
    return both


def test_the_differences_in_the_lecture_are_those_of_its_tables():
    """Each '± 95% interval' of docs/lecture.md stands, rounded, in a table of results/{lecture,evidence,lengths}/."""
    gaps = gaps_of_optimizers()
    known = {(round(abs(mean), 4), round(deviation, 4)) for mean, deviation in gaps.values()}  # deviations
    folders = ("lecture", "evidence", "lengths")
    pairs = [differences(file) for name in folders for file in ROOT.glob(f"results/{name}/*/comparison.csv")]
    pairs.append(differences(OPTIMIZERS, gap=True))
    for file in ROOT.glob("results/evidence/*/rates.csv"):
        with open(file, newline="") as rates:
            rows = csv.DictReader(rates)
            pairs.append({row["grid"]: (float(row["gain"]), float(row["half_of_95_interval"])) for row in rows})
    for mean, half in (pair for one in pairs for pair in one.values()):
        known |= {(round(abs(mean), k), round(half, k)) for k in (3, 4)}
    tables = [*ROOT.glob("results/lecture/*/comparison.md"), *ROOT.glob("results/evidence/*/comparison.md")]
    tables += ROOT.glob("results/lengths/*/comparison.md")
    for file in (*tables, ROOT / "results/lengths/lengths.md"):
        for mean, half in re.findall(r"[+-](0\.\d{4}) ± (0\.\d{4})", file.read_text(encoding="utf-8")):
            known |= {(round(float(mean), k), round(float(half), k)) for k in (3, 4)}
    found = re.findall(r"([\d.]+) ± ([\d.]+\d|\d)", (ROOT / "docs/lecture.md").read_text(encoding="utf-8"))
    assert len(found) >= 12
    for mean, half in found:
        assert any(abs(a - float(mean)) < 6e-4 and abs(b - float(half)) < 6e-4 for a, b in known), (mean, half)


def test_the_table_of_lengths_is_that_of_its_runs():
    table = lengths.table(lengths.read(sorted((ROOT / "results/lengths").glob("epochs-*"))))
    told = re.findall(r"^\|.*", (ROOT / "results/lengths/lengths.md").read_text(encoding="utf-8"), re.M)
    assert sorted(table.split("\n")) == sorted(told)


def test_the_gap_of_train_and_test_in_the_lecture_is_that_of_its_runs():
    text = " ".join((ROOT / "docs/lecture.md").read_text(encoding="utf-8").split())
    for name, (mean, deviation) in gaps_of_optimizers().items():
        assert f" {mean:.4f} ± {deviation:.4f} for {name}" in text, (name, mean, deviation)
    apart = differences(OPTIMIZERS, gap=True)
    lower = {name.split(",")[0] for (name, _), (mean, half) in apart.items() if mean < -half}
    assert len(apart) == 4 and lower == set()
    assert not [name for (name, _), (mean, half) in apart.items() if mean > half]


def gaps_of_optimizers():
    """{optimizer: mean and deviation of training minus test accuracy after the last epoch}"""
    with open(OPTIMIZERS, newline="") as file:
        rows = list(csv.DictReader(file))
    gaps = {}
    for r in rows:
        gaps.setdefault(r["variant"].split(",")[0], []).append(float(r["last_train_acc"]) - float(r["last_test_acc"]))
    return {name: (statistics.mean(values), statistics.stdev(values)) for name, values in gaps.items()}


def test_four_of_sixteen_differences_from_plateau_outlast_the_correction():
    """Holm's: the k-th smallest of m p-values must be below 0.05 / (m - k), k from 0, and all before it too."""
    n, found = 5, {}
    for group in ("schedules", "noise", "batches", "optimizers", "momentum"):
        for (name, key), (mean, half) in differences(ROOT / f"results/evidence/{group}/comparison.csv").items():
            if key == "test_acc":
                found[name] = 2 * stats.t.sf(abs(mean) / half * stats.t.ppf(0.975, n - 1), n - 1)
    ranked = sorted(found, key=found.get)
    kept = itertools.takewhile(lambda k: found[ranked[k]] < 0.05 / (len(ranked) - k), range(len(ranked)))
    assert len(ranked) == 16 and {ranked[k] for k in kept} == {"constant", "constant, ema 0.999", "adagrad", "adam"}


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_no_formula_spans_two_lines(path):
    """GitHub takes inline formulas within a line alone."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert [line for line in text.split("\n") if line.count("$") % 2] == []


def test_pages_name_no_path_of_one_machine():
    if not shutil.which("git"):
        pytest.skip("needs git")
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked or pytest.skip("git lists no files here"):
        assert not re.search(r"(?<![\w.~$])/(?:root|home|work|tmp)/", (ROOT / name).read_text(encoding="utf-8")), name


# how a command of README or docs begins, after `uv run` -> why `test_every_command_runs_at_toy_size` leaves it out
NOT_RUN = {
    "--extra timm train_fastai.py": "downloads weights",
    "train_fastai.py --data photos --size 224 -b 16 --epochs 20 --model resnet18 --pretrained": "downloads weights",
    "--extra onnx": "needs packages that the tests go without; .ci/run has a line for it",
    "--extra heif …": "the beginning of a command",
    "--extra timm …": "the beginning of a command",
    "train_fastai.py --schedule $schedule": "a line of a shell script",
    "train_fastai.py --resume runs/both/$name": "a line of a shell script",
    "torchrun --nnodes 2": "needs two machines; test_ranks.py plays them",
    "python -m lib.predict runs/x --serve": "ends with Ctrl-C alone; test_serve.py starts it",
    "python -m lib.predict runs/weighted --serve": "the same",
    "train_fastai.py --log": "needs the package of the log; test_report.py has stand-ins",
    "pytest": "these tests",
    "ruff": "changes this checkout; .ci/run checks it",
    ".ci/": "changes this checkout; .ci/run checks it",
    "python -m tests.benchmarks.rates": "trains 14 tasks at many rates, for hours",
    "python -m tests.benchmarks.growth": "makes 200,000 images, for minutes",
    "python -m tests.benchmarks.gpu --data FOLDER": "9 minutes of a GPU",
    "python -m tests.benchmarks.gpu --rehearse": ".ci/run runs it",
}
# what is added to a command of the docs; of a flag that comes twice the last one counts
TOY_RUN = "--epochs 1 --size 32 --lr-iters 40 --gallery 2 --no-progress".split()
TOY_BENCHMARKS = {
    "tests.benchmarks.evidence": "--data FOLDER --epochs 1 --seeds 0 --groups noise --runs HERE/lecture --out HERE/t",
    "tests.benchmarks.neighbour": "--models small --rounds 1 --seconds 0.5 --out HERE/neighbour.json",
    "tests.benchmarks.networks": "--epochs 1 --only small --data FOLDER --runs HERE/networks --out HERE/networks.json",
    "tests.benchmarks.speed": "--images 320 --rounds 1 --model small --out HERE/speed.json",
    "tests.benchmarks.step": "--model small --rounds 1 --out HERE/step.json",
    "tests.benchmarks.teach": "--epochs 1 --seeds 0 --out HERE/teach",
}
TOLD = [path for path in PAGES if path.parent in (ROOT, ROOT / "docs")]
TOLD_LINES = sorted({line for path in TOLD for line in uv_lines(path)})


def python_of_own_images(word="A.save"):
    """The Python of own-images.md that has this word: by default, what writes a pipeline."""
    text = (ROOT / "docs/own-images.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if word in block)
    return code


def test_the_pipeline_in_the_docs_is_one_that_a_run_takes(tmp_path, monkeypatch):
    from lib.data.augment import from_file

    monkeypatch.chdir(tmp_path)
    exec(python_of_own_images())
    assert len(from_file(tmp_path / "mine.yaml", 64)) == 3


def left_out(line):
    return re.sub(r"^(--with \S+ )+", "", line).startswith(tuple(NOT_RUN))


def test_what_is_left_out_is_in_the_docs():
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in TOLD_LINES), beginning
    assert sum(not left_out(line) for line in TOLD_LINES) > 30


def toy(line, number):
    """The words of a training command, with CIFAR-10 as a small folder, and what makes it short."""
    words = shlex.split(line)
    if "--resume" in words:  # nothing may change
        return words
    data = [] if "--data" in words else ["--data", "FOLDER"]
    seeds = ["--seeds", "0", "1"] if "--seeds" in words else []
    run = [*TOY_RUN[2:], "--minutes", "0.8", "--model", "small"] if "--minutes" in words else TOY_RUN
    run = [*run, "--lr-iters", "100"] if "linear" in words else run  # 40 equal steps up to 2 begin too high
    return [*words, *run, *data, *seeds, "--out", f"out/{number}"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with all that the commands of the docs name: images, run folders, and a folder like CIFAR-10's."""
    import numpy as np

    from tests.conftest import picture, save
    from train_fastai import main

    here, rng = tmp_path_factory.mktemp("here"), np.random.default_rng(0)
    wanted = {"FOLDER/train": (4, 80), "FOLDER/test": (4, 10), "photos": (2, 30), "path/to/images": (2, 30)}
    for name, (classes, n) in {**wanted, "new": (1, 2), "folder": (1, 2)}.items():
        for k in range(classes):
            for i in range(n):
                save(here / name / f"class {k}" / f"{i:02}.png", picture(rng, k))
    save(here / "photo.jpg", picture(rng, 0))
    with contextlib.chdir(here):
        exec(python_of_own_images())  # writes mine.yaml
        Path("made").mkdir()
        Path("make.py").write_text("import os; os.chdir('made')\n" + python_of_own_images("load_sample_images"))
    for name, schedule in (("a", "plateau"), ("b", "one_cycle")):
        options = ["--data", str(here / "photos"), "--schedule", schedule, "--out", str(here / "runs"), "--name", name]
        assert main([*options, *TOY_RUN, "--model", "small", "--lr", "0.05"]) == 0
    for source, copy in (("a", "x"), ("a", "weighted"), ("a", "both/plateau-s0"), ("b", "both/one_cycle-s0")):
        shutil.copytree(here / "runs" / source, here / "runs" / copy)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in TOLD_LINES if not left_out(line)])
def test_every_command_runs_at_toy_size(line, here):
    """Training as `toy` says; a benchmark with its row of TOY_BENCHMARKS; anything else as it stands."""
    program, *words = shlex.split(line)
    if "train_fastai.py" in (program, *words):
        program, *words = toy(line, TOLD_LINES.index(line))
    elif toys := [TOY_BENCHMARKS[word] for word in words if word in TOY_BENCHMARKS]:
        words += toys[0].replace("HERE", str(here)).split()
    launch = {"train_fastai.py": [str(ROOT / program)], "torchrun": ["-m", "torch.distributed.run"], "python": []}
    cifar10 = str(here / "FOLDER")
    place = {"train_fastai.py": str(ROOT / "train_fastai.py"), "FOLDER": cifar10, "~/.fastai/data/cifar10": cifar10}
    argv = [sys.executable, *launch[program], *(place.get(word, word) for word in words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FASTAI_HOME": str(here)}
    done = subprocess.run(argv, cwd=here, env=env, capture_output=True, text=True, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and not re.search(r"exit status [1-9]|Traceback", said), f"{argv}\n{said[-3000:]}"


PYTHON = [
    (path.name, i, code)
    for path in TOLD
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
    if path.name != "contributing.md"  # a part of lib/train/schedules.py
]


@pytest.mark.slow
@pytest.mark.parametrize("code", [pytest.param(code, id=f"{name}-{i}") for name, i, code in PYTHON])
def test_every_piece_of_python_runs(code, here, tmp_path):
    shutil.copytree(here / "runs/x", tmp_path / "runs/x")
    for name in ("cat.jpg", "dog.jpg", "image.png"):
        shutil.copyfile(here / "photo.jpg", tmp_path / name)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=600)


@pytest.mark.slow
def test_the_schedule_of_contributing_md_trains(here, tmp_path):
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    shutil.copyfile(ROOT / "train_fastai.py", tmp_path / "train_fastai.py")
    added = {
        "lib/train/schedules.py": ("\nSCHEDULES = {\n", f'\n{code}\n\nSCHEDULES = {{\n    "linear": linear,\n'),
        "lib/config.py": ("\nSCHEDULES = (", '\nSCHEDULES = ("linear", '),
    }
    for name, (before, after) in added.items():
        source = (tmp_path / name).read_text(encoding="utf-8")
        assert source.count(before) == 1
        (tmp_path / name).write_text(source.replace(before, after), encoding="utf-8")
    words = [*TOY_RUN, "--epochs", 4, "--model", "small", "--lr", 0.04, "--schedule", "linear", "--name", "linear"]
    argv = [sys.executable, "train_fastai.py", "--data", here / "photos", *words]
    subprocess.run([*map(str, argv)], cwd=tmp_path, check=True, timeout=600)
    with open(tmp_path / "runs/linear/results.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert len(rates) == 4 and all(a > b > 0 for a, b in itertools.pairwise(rates)) and rates[-1] < 0.02


NUMBER = re.compile(r"(?<![\w.#^/-])[+-]?(?:0?\.\d{3,4}|1\.0000)(?![\w.])")  # an accuracy, or a difference of two
SETTINGS = re.compile(r"--[a-z-]+(?: [\d.]+(?:e-\d)?)+")  # a flag and its values, which no run has produced
# part of a paragraph with numbers that are in no file here -> where they come from
NO_FILE = {
    "Training minus test accuracy after": "test_the_gap_of_train_and_test_in_the_lecture_is_that_of_its_runs",
    "no network of ours reaches 0.915": "a target",
    "The command above reached 0.9000": "one run of the folder that the page makes; it is not kept",
    "one image is 0.033 of accuracy": "a thirtieth",
    "comes with `--threshold 0.04`": "settings",
    "is 0.999 in Adam and 0.99 in RMSProp": "settings of torch",
}


def numbers_in(path):
    """All numbers in a file of results, or in a folder of runs; of lists of numbers, mean and deviation too."""
    if path.is_dir():
        kept = ("*.md", "*.csv", "*.jsonl", "summary.json", "env.json", "*-s*/summary.json", "*-s*/env.json")
        dense = ("mistakes.csv", "lr_find.csv", "calibration.csv")  # any number is near one of theirs
        files = {file for pattern in kept for file in path.glob(pattern) if file.name not in dense}
        return set().union(*map(numbers_in, files))
    if path.suffix not in (".json", ".jsonl", ".csv") and path.name not in ("comparison.md", "lengths.md"):
        return set()
    text = path.read_text(encoding="utf-8")
    found = {float(n) for n in re.findall(r"\d+\.\d+(?:e[-+]\d+)?", text)}
    if path.name == "comparison.csv":
        found |= {abs(x) for pair in differences(path).values() for x in pair}
    for values in re.findall(r"\[([\d\s.,e+-]+)\]", text) if path.suffix == ".json" else ():
        values = [float(v) for v in values.split(",")]
        if 1 < len(values) < 20:
            found |= {statistics.mean(values), statistics.stdev(values)}
    if path.name.startswith("networks-120s"):
        runs = [[run["valid_acc"] for run in row["runs"].values()] for row in json.loads(text)["rows"].values()]
        found |= {f(accs) for accs in runs for f in (statistics.mean, statistics.stdev)}
        found |= {abs(x) for a in runs for b in runs if a is not b for x in interval(a, b)}
    return found


def means_of(files):
    """Mean and deviation of the accuracies of all runs in several files or folders."""
    found = [s for file in files if file.is_dir() for s in summaries(file)]
    values = [[s[key] for s in found if s.get(key) is not None] for key in ("test_acc", "valid_acc", "tta_test_acc")]
    return {f(v) for v in values if len(v) > 1 for f in (statistics.mean, statistics.stdev)}


def claims(text):
    """(row, paragraph or item of a list; its links) of a page. Without links it has those around it."""
    links = lambda part: [link for link in re.findall(r"\]\(([^)#]+)\)", part) if not re.match(r"[a-z]+:", link)]
    for section in re.split(r"^#+ ", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M):
        for part in section.split("\n\n"):
            for one in part.split("\n") if part.startswith("|") else re.split(r"\n(?=- )", part):
                named = (
                    links(part.split("\n")[0]) if part.startswith("|") else []
                )  # a column's heading names a file too
                yield one, links(one) + named or links(part) or links(section)


@pytest.mark.parametrize(
    "path", [path for path in (*TOLD, ROOT / "results/README.md") if path.name != "settings.md"], ids=ids
)
def test_every_accuracy_is_in_the_file_that_is_named_with_it(path):
    """Accuracies, their differences and deviations, to three places or more, of README, docs and results/README.md."""
    for one, links in claims(path.read_text(encoding="utf-8")):
        plain = " ".join(one.split())
        numbers = NUMBER.findall(SETTINGS.sub("", plain))
        if not numbers or any(known in plain for known in NO_FILE):
            continue
        files = [path.parent / link for link in links]
        known = set().union(means_of(files), *map(numbers_in, files))
        for number in numbers:
            near = 0.5 * 10 ** -len(number.split(".")[1]) + 1e-9
            assert any(abs(value - abs(float(number))) <= near for value in known), f"{number} in: {plain[:200]}"


def test_what_is_in_no_file_is_in_the_docs():
    text = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in (*TOLD, ROOT / "results/README.md"))
    assert all(known in text for known in NO_FILE)


def test_the_drawings_of_the_lecture_are_those_of_their_file():
    """Steps of the valley, and the range of the test accuracies at each rate; the paths are drawn anew."""
    from tests.benchmarks.teach import BOWL, FACTORS, descend

    taught = json.loads((ROOT / "results/teach/teach.json").read_text())
    steps = taught["bowl"].pop("steps_to_1_percent")
    assert taught["bowl"] == BOWL and FACTORS == {"too small": 0.01, "right": 1, "too large": 10}
    for name in steps:
        heights = descend(name, **BOWL)[1]
        assert heights[steps[name] - 1] >= heights[0] / 100 > heights[steps[name] :].max()
    text = " ".join((ROOT / "docs/lecture.md").read_text(encoding="utf-8").split())
    assert f"first loss after {steps['sgd']} steps, Nesterov after {steps['nesterov']}" in text
    ends = [[run["test_acc"] for run in taught["rates"][name]] for name in ("right", "too small", "too large")]
    right, small, large = (f"{min(accs):.2f} to {max(accs):.2f}" for accs in ends)
    assert f"{right} with the right rate, {small} with the small one, and {large} with the large one" in text
    assert f"After {taught['epochs']} epochs" in text and {len(accs) for accs in ends} == {3}


def test_the_names_of_the_assignment_are_in_the_code():
    """docs/assignment.md: what stands after the link to a file is a name that the file defines."""
    text, found = (ROOT / "docs/assignment.md").read_text(encoding="utf-8"), 0
    for file, names in re.findall(r"\]\(\.\./([\w/]+\.py)\): ((?:`\w+`(?:, )?)+)", text):
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            found += 1
            assert re.search(rf"^ *(?:def|class) {name}\b|^{name} = ", code, re.M), f"{file} has no {name}"
    assert found > 30
