"""report.html. The folders are made here, of invented numbers, so that few of these tests need a training."""

import base64
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lib import advice, compare, config, report, runs
from lib.cli import BadInput
from lib.config import Config
from lib.explain import evaluate, plots
from lib.runs import write_csv, write_table
from lib.train import progress, recorder
from tests.browser import CHROMIUM, Browser
from train_fastai import main

EVIL = [
    "</script><script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "a\n&amp; 🐸 \u2028<!--",
    "__proto__",
]


def rows_of(n, best=0.9):
    """n rows of results.csv; halfway the rate falls."""
    rise = lambda i: best * (1 - 0.5 ** (i + 1))
    return [
        dict(epoch=i + 1, seconds=2.5 * (i + 1), lr=0.1 if i < n / 2 else 0.03, momentum=0.9, batch_size=64)
        | {f"{s}_{w}": v for s in ("train", "valid", "test") for w, v in (("loss", 2 / (i + 1)), ("acc", rise(i)))}
        for i in range(n)
    ]


def run_folder(path, classes=("cat", "dog", "frog"), epochs=6, finished=True, side=32, mistakes=12, seed=0, **settings):
    """A run folder as a run leaves it; what is taken for what goes round among the classes."""
    path.mkdir(parents=True)
    n, rng = len(classes), np.random.default_rng(seed)
    args = {**Config(epochs=6, seeds=(seed,), **settings).to_dict(), "resume": ""}
    (path / "args.yaml").write_text(yaml.safe_dump(args, sort_keys=False))
    env = dict(python="3.11", gpus=[], command="train_fastai.py --data <b>", commit="0123456789abcdef+", device="cpu")
    env |= dict(device_name="a chip", precision="float32", threads=2, size=side, images=dict(train=9, valid=1, test=90))
    env |= dict(classes=list(classes), chosen_on="valid", params=1234, data_fingerprint="f", lr=0.1)
    env["lr_suggestions"] = dict(sixth=0.1, valley=0.01, steep=0.1, minimum=0.2, slide=0.3)
    (path / "env.json").write_text(json.dumps(env))
    lrs = np.geomspace(1e-5, 10, 50)
    losses = 2.3 - np.exp(-(np.log10(lrs) ** 2)) + np.where(lrs > 5, np.inf, 0)
    write_table(path / "lr_find.csv", ["lr", "loss", "smooth_loss"], zip(lrs, losses, np.minimum(losses, 9)))
    if epochs:
        write_csv(path / "results.csv", rows_of(epochs, 0.8 + 0.01 * seed))
    if not finished:
        return path
    wrong, counts = [], 25 * np.eye(n, dtype=int)
    for i in range(mistakes):
        truth, taken = i % n, (i + 1 + i // n % (n - 1)) % n
        counts[truth, taken] += 1
        row = dict(rank=i + 1, file=f"{classes[truth]}/{i}.png", truth=classes[truth], prediction=classes[taken])
        wrong.append(row | dict(loss=9 - i / 99, p_prediction=0.9, p_truth=1e-4 * (i + 1)))
    table = [[name, *row] for name, row in zip(classes, counts.tolist())]
    write_table(path / "confusion_matrix.csv", ["truth", *classes], table)
    write_csv(path / "mistakes.csv", wrong, evaluate.MISTAKE_COLUMNS)
    shown = evaluate.pictured(wrong, 25)
    pictures = rng.integers(0, 256, (len(shown), side, side, 3), np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 1, side, dtype=np.float32), (len(shown), side, side))
    evaluate.save_gallery(path, shown, pictures, ramp, 1 - ramp)
    summary = dict(test_acc=0.8, valid_acc=0.85, last_test_acc=0.8, chosen_on="valid", best_epoch=5, mistakes=mistakes)
    summary |= dict(lr=0.1, epochs=epochs, target=0.88, epochs_to_target=4, seconds_to_target=10.0, train_seconds=15.0)
    summary |= dict(images_per_second=99.0, optimizer_state_bytes=1, params=1234)
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def data_of(page):
    """The data in a page."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_is_of_the_folder_alone(tmp_path):
    run = run_folder(tmp_path / "run")
    page = report.write(run)
    before = page.read_bytes()
    page.unlink()
    (tmp_path / "elsewhere").mkdir()
    assert report.write(run.rename(tmp_path / "elsewhere/run")).read_bytes() == before
    run = tmp_path / "elsewhere/run"
    data = data_of(run / "report.html")
    right = "78 of 90 images right; 95% interval 0.7059 to 0.8696"
    assert data["headline"][0] == ["test accuracy", "0.8000", right] and data["kept"] == 5
    assert right.endswith(data["interval"])
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "tta_test_acc": 0.8123}))
    data = data_of(report.write(run))
    assert data["headline"][0][2] == right + "; 0.8123 with mirror images (tta)"
    assert data["rows"]["test_acc"] == pytest.approx([row["test_acc"] for row in rows_of(6, 0.8)], rel=1e-5)
    assert data["cuts"] == [3.5] and data["range"]["loss"][-1] is None
    assert data["confusion"] == [[25, 2, 2], [2, 25, 2], [2, 2, 25]]
    assert [m["file"] for m in data["mistakes"]] == [row["file"] for row in csv.DictReader(open(run / "mistakes.csv"))]
    assert {(data["classes"][m["truth"]], data["classes"][m["prediction"]]) for m in data["mistakes"][:3]} == {
        ("cat", "dog"), ("dog", "frog"), ("frog", "cat")
    }  # fmt: skip
    assert data["commit"] == "0123456789ab, with changes" and "gpus" not in data["env"]


def test_pictures_and_maps_are_those_of_the_mistakes(tmp_path):
    rows = [dict(rank=i, file=f"{i}.png") for i in range(2)]
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    maps = np.random.default_rng(1).random((2, 2, 32, 32), np.float32)
    evaluate.save_gallery(tmp_path, rows, images, *maps)
    found = json.loads((tmp_path / "gallery.json").read_text())
    for i, file in enumerate(["0.png", "1.png"]):
        with Image.open(io.BytesIO(base64.b64decode(found[file]["image"].split(",")[1]))) as image:
            assert (np.asarray(image) == images[i]).all()
        for k, name in enumerate(("why", "where")):
            got = np.frombuffer(base64.b64decode(found[file][name]), np.uint8).reshape(32, 32)
            assert np.abs(got / 255 - maps[k, i]).max() < 0.5 / 255 + 1e-6


def test_of_the_kept_weights_there_is_one_number(tmp_path):
    """Curves are in the run's precision, the summary is in float32."""
    run = run_folder(tmp_path / "run")
    exact = data_of(report.write(run))
    env, summary = (json.loads((run / name).read_text()) for name in ("env.json", "summary.json"))
    assert not exact["exact"] and exact["rows"]["test_acc"][4] == pytest.approx(rows_of(6, 0.8)[4]["test_acc"])
    (run / "env.json").write_text(json.dumps({**env, "precision": "bf16"}))
    data = data_of(report.write(run))
    assert data["exact"] and data["rows"]["test_acc"][4] == summary["test_acc"] == 0.8
    assert data["rows"]["valid_acc"][4] == summary["valid_acc"] and f"{summary['test_acc']:.4f}" in data["headline"][0]
    for name in ("test_acc", "valid_acc"):
        exact["rows"][name][4] = data["rows"][name][4]
    assert data["rows"] == exact["rows"]  # nothing else is touched


def test_the_first_images_are_in_the_page_in_few_bytes(tmp_path):
    run, noise = run_folder(tmp_path / "run"), np.random.default_rng(0)
    assert data_of(report.write(run))["batch"] is None  # a run of an earlier version
    decoded = lambda: base64.b64decode(data_of(report.write(run))["batch"].split(",")[1])
    Image.fromarray(np.zeros((100, 200, 3), np.uint8)).save(run / "train_batch.png")
    assert decoded() == (run / "train_batch.png").read_bytes()
    blocks = noise.integers(0, 256, (95, 161, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    Image.fromarray(np.clip(blocks + noise.integers(-9, 9, blocks.shape), 0, 255).astype(np.uint8)).save(
        run / "train_batch.png"
    )
    assert (run / "train_batch.png").stat().st_size > report.BATCH > len(decoded())
    with Image.open(io.BytesIO(decoded())) as image:
        assert image.format == "JPEG" and max(image.size) == 1000
    Image.fromarray(noise.integers(0, 256, (1000, 1000, 3), np.uint8)).save(run / "train_batch.png")
    assert data_of(report.write(run))["batch"] is None  # even as JPEG too large
    (tmp_path / "secret").write_bytes((run / "train_batch.png").read_bytes()[:1000])
    for content in (b"a key", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + b"%" * 500_000):
        (run / "train_batch.png").write_bytes(content)  # a stranger's folder: it is no picture
        assert data_of(report.write(run))["batch"] is None
    (run / "train_batch.png").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    (run / "train_batch.png").symlink_to(tmp_path / "other.png")  # and a link may lead to any file
    assert data_of(report.write(run))["batch"] is None


def test_maps_have_the_words_of_their_figure():
    image, cam = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16, 16), np.float32)
    row = dict(rank=1, file="a", truth="x", prediction="y", p_truth=0.1, p_prediction=0.7)
    axes = plots.gradcam(image, cam, cam, [row], "title").axes
    label, page = axes[-1].get_xlabel(), report.TEMPLATE.read_text(encoding="utf-8")
    start, end = re.fullmatch(r"m(ap of .*) (to .* image) \(line.*\)", label).groups()
    assert f'"A m{start} "' in page and f'" {end}."' in page
    empty = next(text.get_text() for text in axes[0].texts if text.get_text().startswith("empty"))
    assert all(f'"{line}"' in page for line in empty.split("\n"))


def test_every_confusion_has_a_picture_before_one_has_its_fourth():
    rng = np.random.default_rng(0)
    rows = [
        dict(rank=i + 1, truth=int(t), prediction="x")
        for i, t in enumerate(rng.choice(30, 500, p=np.arange(1, 31) / 465))
    ]
    shown = evaluate.pictured(rows, 25)
    assert len(shown) == 100 and shown[:25] == rows[:25] and shown == sorted(shown, key=lambda row: row["rank"])
    assert {row["truth"] for row in shown} == {row["truth"] for row in rows}
    of = lambda truth: [row for row in rows if row["truth"] == truth]
    for truth in range(30):  # of each confusion the worst
        kept = [row for row in shown if row["truth"] == truth]
        assert kept == of(truth)[: len(kept)]
    assert evaluate.pictured(rows, 0) == [] and evaluate.pictured(rows[:7], 5) == rows[:7]
    assert evaluate.pictured(rows, 100) == rows[:100]


def test_nothing_is_loaded_and_names_are_text(tmp_path):
    run = run_folder(tmp_path / "<b>run & 'co", EVIL, data='a <folder>/of "quotes"')
    page = report.write(run)
    text, data = page.read_text(encoding="utf-8"), data_of(page)
    assert data["classes"] == EVIL and data["mistakes"][0]["file"] == f"{EVIL[0]}/0.png" and data["name"] == run.name
    assert text.count("</script") == text.count("<script") == 2 and "<!--" not in text.split("</style>")[1]
    assert not re.search(r"alert\(1\)</|<img|<b>|<folder|\u2028", text)
    assert "<title>&lt;b&gt;run &amp; &#x27;co</title>" in text
    assert "Content-Security-Policy" in text and "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\((?!#)|<link(?! rel=\"icon\" href=\"data:)|\bsrc=", text.split('id="data"')[0])


def test_large_runs_stay_below_5_megabytes(tmp_path):
    classes = [f"class number {i} of those that there are, each with a rather long name" for i in range(400)]
    run = run_folder(tmp_path / "run", classes, 2000, side=300, mistakes=20_000)
    page = report.write(run)
    data = data_of(page)
    assert 1e6 < page.stat().st_size < 5e6
    assert data["confusion"] is None and len(data["pairs"]) == report.PAIRS and data["wrong"] == 20_000
    assert 1000 < len(data["mistakes"]) < 20_000
    assert sum("picture" in m for m in data["mistakes"]) > 50 and len(data["rows"]["lr"]) == 2000


def test_runs_of_any_state(tmp_path):
    state = lambda path, live=False: [(d := data_of(report.write(path, live)))["state"], d["note"], d["headline"][0]]
    run = run_folder(tmp_path / "a", epochs=3, finished=False)
    goes_on = "Not finished: 3 of 6 epochs. --resume goes on with it."
    assert state(run) == ["stopped", goes_on, ["epoch", "3 of 6", "8 s so far"]]
    assert state(run, True)[0] == "live" and state(run, True)[2] == ["epoch", "3 of 6", "about 8 s left"]
    assert "<title>3 of 6: a</title>" in (run / "report.html").read_text()
    env = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(env | {"ended": "the loss is nan at epoch 4"}))
    assert state(run)[1] == "Not finished: 3 of 6 epochs. The loss is nan at epoch 4."
    write_csv(run / "results.csv", rows_of(6, 0.8))
    assert state(run, True)[1].startswith("Trained; ")
    run = run_folder(tmp_path / "b", epochs=0, finished=False, lr_find_only=True)
    assert state(run)[1] == "Stopped after the range test." and "0 of 6" in state(run, True)[1]
    run = run_folder(tmp_path / "c", mistakes=0)
    (run / "lr_find.csv").unlink()
    (run / "gallery.json").unlink()
    assert state(run, True)[:2] == ["done", ""] and data_of(run / "report.html")["mistakes"] == []
    assert data_of(run / "report.html")["range"] == {}
    run = run_folder(tmp_path / "d")
    (run / "gallery.json").unlink()  # as runs of an earlier version
    assert state(run)[0] == "done" and not any("picture" in m for m in data_of(run / "report.html")["mistakes"])
    (run / "summary.json").unlink()  # as --resume does: what the end wrote is of other weights
    assert state(run)[0] == "stopped" and data_of(run / "report.html")["classes"] == []


def test_a_live_page_costs_little_and_needs_no_torch(tmp_path):
    run = run_folder(tmp_path / "run", epochs=50, finished=False)
    code = f"""
import sys, time
from lib import report
report.write({str(run)!r}, live=True)
start = time.process_time()
for i in range(5):
    report.write({str(run)!r}, live=True)
print((time.process_time() - start) / 5)
assert not {{"torch", "matplotlib", "numpy", "fastai"}} & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--data digits --epochs 3 --seeds 4",
        "--data 'my photos/a b' --schedule one_cycle --flip --lr 0.05 --valid-pct 0 --lr-scale linear --size 64",
        "--data digits --no-flip --optimizer adam --momentum 0.8 --balanced-batches -b 32 --out elsewhere --open",
    ],
)
def test_the_command_gives_the_same_settings(argv):
    c = config.parse(shlex.split(argv))
    line = shlex.split(report.command_line(c.to_dict(), {}))
    assert line[:3] == ["uv", "run", "train_fastai.py"]
    again = config.parse(line[3:]).to_dict()
    assert {k: v for k, v in again.items() if k not in report.NO_EFFECT} == {
        k: v for k, v in c.to_dict().items() if k not in report.NO_EFFECT
    }
    assert report.command_line({"unknown": 1}, {"command": "train_fastai.py -b 8"}) == "uv run train_fastai.py -b 8"


def test_the_command_leaves_out_what_is_usual():
    assert report.command_line(config.Config().to_dict(), {}) == "uv run train_fastai.py"
    for argv in (
        "--data digits --schedule one_cycle --lr-scale linear",
        "--epochs 8",
        "--ema 0.0",
        "--monitor valid_acc",
    ):
        assert report.command_line(config.parse(argv.split()).to_dict(), {}) == f"uv run train_fastai.py {argv}"


def comparison_folder(path, name="one_cycle"):
    """Two variants with two seeds each, compared."""
    for seed in (0, 1):
        run_folder(path / f"plateau-s{seed}", seed=seed)
        run_folder(path / f"{name}-s{seed}", seed=seed, schedule="one_cycle", epochs=5 + seed)
    compare.report(sorted(path.iterdir(), reverse=True), path)
    return path


def test_a_target_that_was_not_reached_is_above_what_was_measured(tmp_path):
    """In training the kept epoch was just below it; in float32 its weights are just above it."""
    folder = run_folder(tmp_path / "x")
    summary, env = (json.loads((folder / name).read_text()) for name in ("summary.json", "env.json"))
    summary |= dict(test_acc=0.8801, target=0.88, epochs_to_target=None, seconds_to_target=None)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "env.json").write_text(json.dumps(env | {"precision": "bf16"}))
    most = max(row["test_acc"] for row in rows_of(6, 0.8))
    assert f"the most was {most:.4f}" in str(data_of(report.write(folder))["headline"]) and most < 0.88


def test_a_comparison_has_its_table_curves_and_links(tmp_path, capsys):
    folder = comparison_folder(tmp_path / "both")
    report.write(folder / "plateau-s0")
    data = data_of(report.write(folder))
    assert data["kind"] == "comparison" and data["table"][1][:3] == ["plateau", "2", "0.8000 ± 0.0000"]
    assert all(len(row) == len(data["table"][0]) for row in data["table"])
    assert any("one_cycle equals plateau" in note for note in data["notes"])
    assert [curve["name"] for curve in data["curves"]] == ["plateau", "one_cycle"]
    two = [rows_of(n, best)[4]["test_acc"] for n, best in ((5, 0.8), (6, 0.81))]
    mean, deviation = np.mean(two), np.std(two, ddof=1)
    assert data["curves"][1]["test_acc"][4] == pytest.approx([mean, mean - deviation, mean + deviation], rel=1e-4)
    assert len(data["curves"][1]["lr"]) == 5  # of 5 and 6 epochs: they end with the run that ends first
    rates = report.band([{"lr": [0.1, 0.1]}, {"lr": [0.001, 0.0]}], "lr")  # 0 has no place on the axis
    spread = 10 ** np.std([-1, -3], ddof=1)
    assert rates == [pytest.approx([0.01, 0.01 / spread, 0.01 * spread], rel=1e-5), [0.1] * 3]
    assert report.band([{"lr": [0.1, 0.0, 0.2]}], "lr") == [[0.1] * 3, [None] * 3, [0.2] * 3]  # each in its epoch
    head, *lines = report.read_table(folder / "comparison.csv")
    loads = [{"plateau-s0": 0.3, "plateau-s1": 0.2}.get(line[head.index("folder")], "") for line in lines]
    column = head.index("other_load")
    write_table(
        folder / "comparison.csv", head, [line[:column] + [x] + line[column + 1 :] for line, x in zip(lines, loads)]
    )
    assert [row["folder"] for row in data_of(report.write(folder))["runs"] if row["disturbed"]] == ["plateau-s0"]
    links = {row["folder"]: row["link"] for row in data["runs"]}
    assert links["plateau-s0"] == "plateau-s0/report.html" and links["one_cycle-s1"] is None

    other = tmp_path / "other"  # runs that lie elsewhere are found from there
    assert compare.main([*(str(folder / f"plateau-s{s}") for s in (0, 1)), "--out", str(other)]) == 0
    data = data_of(other / "report.html")
    assert data["runs"][0]["link"] == "../both/plateau-s0/report.html" and len(data["curves"][0]["lr"]) == 6
    shutil.rmtree(folder)
    assert data_of(report.write(other))["curves"][0]["lr"] == []


def test_the_command_line(tmp_path, capsys, monkeypatch):
    run, shown = run_folder(tmp_path / "run"), []
    monkeypatch.setattr(report.webbrowser, "open", shown.append)
    assert report.main([str(run)]) == 0 and shown == [] and (run / "report.html").exists()
    assert report.main([str(run), "--open"]) == 0 and shown == [(run / "report.html").resolve().as_uri()]
    capsys.readouterr()
    (run / "summary.json").write_text("{")
    for bad in ([str(tmp_path)], [str(tmp_path / "nowhere")], [str(run)], [], ["--nonsense"]):
        assert report.main(bad) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        report.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) < 15


@pytest.mark.parametrize("end", ["done", "interrupted", "diverged"])
def test_training_keeps_the_page_up_to_date(bands, tmp_path, cache, monkeypatch, end):
    """Live before the first epoch and after each; still at the end, however it comes."""
    seen, write, shown = [], report.write, []
    monkeypatch.setattr(report, "write", lambda *a, **k: seen.append(data_of(path := write(*a, **k))) or path)
    monkeypatch.setattr(report.webbrowser, "open", shown.append)
    after_train = recorder.EpochRecorder.after_train

    def stop(self):
        if self.epoch == 1 and end != "done":
            raise KeyboardInterrupt if end == "interrupted" else recorder.Diverged("the loss is nan")
        after_train(self)

    monkeypatch.setattr(recorder.EpochRecorder, "after_train", stop)
    argv = ["--data", bands, "--size", 32, "--model", "small", "--epochs", 2, "--lr", 0.05, "-b", 16, "--gallery", 0]
    status = main([*map(str, argv), "--out", str(tmp_path), "--name", "x", "--cache", str(cache), "--open"])
    assert status == {"done": 0, "interrupted": 130, "diverged": 3}[end] and len(shown) == 1
    epochs = [len(data["rows"].get("epoch", [])) for data in seen]
    if end == "done":
        assert [data["state"] for data in seen] == ["live", "live", "live", "done"] and epochs == [0, 1, 2, 2]
    else:
        assert [data["state"] for data in seen] == ["live", "live", "stopped"] and epochs == [0, 1, 1]


def test_the_bar_shows_loss_accuracy_rate_and_time_left(make, monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True

    _, learn = make(cbs=[progress.EpochLines()])
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(recorder, "CHECK_EVERY", 2)
    bar = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **kwargs: bar(**{**kwargs, "mininterval": 0}))
    monkeypatch.setattr(progress.tqdm, "format_interval", bar.format_interval, raising=False)
    learn.fit(2, 0.02)
    text = sys.stderr.getvalue()
    assert re.search(r"epoch 2/2: .*acc=[01]\.\d{3}, left=00:0\d, loss=\d\.\d{3}, lr=0.02", text), text[-500:]


def test_a_log_for_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    assert main(["--data", "digits", "--out", str(tmp_path), "--log", "tensorboard"]) == 2
    err = capsys.readouterr().err
    assert "is not installed" in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []
    told = []

    class SummaryWriter:
        def __init__(self, folder):
            told.append(folder)

        def add_scalar(self, *what):
            told.append(what)

        def flush(self):
            told.append("flush")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    log, rows = runs.logger("tensorboard", tmp_path), rows_of(2)
    log(rows[:1]), log(rows)
    assert told[0] == tmp_path / "tensorboard" and told.count("flush") == 2 and len(told) == 1 + 2 * (len(rows[0]) + 1)
    assert ("test_acc", rows[0]["test_acc"], 1) in told and ("test_acc", rows[1]["test_acc"], 2) in told
    assert runs.logger("none", tmp_path)(rows) is None and len(told) == 1 + 2 * (len(rows[0]) + 1)


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_log_for_others(kind, tmp_path, monkeypatch):
    """Each of the two is told the settings and an epoch a row, and goes on with its run; what it raises is one line."""
    told, (row,) = [], rows_of(1)

    class Package:
        id = run_id = "r1"
        info = property(lambda self: self)

        def __getattr__(self, name):
            return lambda *args, **kwargs: told.append((name, args, kwargs)) or self

    (tmp_path / "args.yaml").write_text("momentum: 0.5")
    monkeypatch.setitem(sys.modules, kind, Package())
    runs.logger(kind, tmp_path)([row])
    assert told[-1][1:] == ((row,), {"step": 1}) and "{'momentum': 0.5}" in str(told[:-1]) and "r1" not in str(told)
    told.clear()
    runs.logger(kind, tmp_path)
    name, parameter = {"wandb": ("init", "id"), "mlflow": ("start_run", "run_id")}[kind]
    assert {name: which[parameter] for name, _, which in told if parameter in which} == {name: "r1"}
    assert "log_params" not in str(told)  # MLflow refuses values that changed
    monkeypatch.setattr(Package, "__getattr__", lambda self, name: 1 / 0)
    with pytest.raises(BadInput, match=f"--log {kind}: cannot be written .ZeroDivisionError.*--log none"):
        runs.logger(kind, tmp_path)


browser = pytest.mark.browser
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: apt-get install chromium)")
VISIBLE = "[...document.querySelectorAll('.card')].filter(card => !card.hidden).length"


@pytest.fixture(scope="module")
def page():
    """A headless Chromium."""
    with Browser() as b:
        yield b


def quiet(b):
    """Whether nothing went wrong since the last look, and nothing was asked for but files that were opened."""
    wrong, asked = b.console[:], [url for url in b.requests if not url.startswith(("file:", "data:"))]
    b.console.clear(), b.requests.clear()
    return not wrong and not asked or (wrong, asked)


@browser
@needs_chromium
def test_cells_and_lists_filter_the_mistakes(page, tmp_path):
    run = run_folder(tmp_path / "run")
    page.open(report.write(run))
    assert page.js(VISIBLE) == 12
    page.mouse("[data-pair='0,1']", click=True)
    assert page.js(VISIBLE) == 2 and "2 mistakes (cat taken for dog)" in page.js(
        "document.querySelector('.count').textContent"
    )
    names = "[...document.querySelectorAll('.card:not([hidden]) .soft .name')].map(name => name.textContent)"
    assert page.js(names) == ["cat/0.png", "cat/6.png"]
    assert page.js("document.querySelectorAll('details tbody tr').length") == 2
    assert page.js("document.querySelector('[data-pair=\"0,1\"]').getAttribute('aria-pressed')") == "true"
    assert page.js("[truth.value, prediction.value]") == ["0", "1"]
    page.mouse("[data-pair='0,1']", click=True)
    assert page.js(VISIBLE) == 12
    page.js("truth.value = '2', truth.dispatchEvent(new Event('change'))")
    assert page.js(VISIBLE) == 4
    # by keyboard: the matrix is one stop, arrows go between its cells, the space bar presses
    page.js("document.querySelector('.matrix button').focus()")
    page.key("ArrowRight")
    assert page.js("document.activeElement.dataset.pair") == "0,2"
    page.key("ArrowDown")
    assert page.js("document.activeElement.dataset.pair") == "1,2"
    page.key(" ")
    assert page.js("[truth.value, prediction.value]") == ["1", "2"] and page.js(VISIBLE) == 2
    assert quiet(page) is True


@browser
@needs_chromium
def test_the_views_toggle(page, tmp_path):
    page.open(report.write(run_folder(tmp_path / "run")))
    shown = "[...document.querySelectorAll('.card canvas')].map(c => c.hidden)"
    red = """(context => {
        context.drawImage(document.querySelector('.card canvas'), 0, 0);
        return [0, 31].map(x => context.getImageData(0, 9, 32, 1).data[4 * x]);
    })(new OffscreenCanvas(32, 32).getContext('2d', {willReadFrequently: true}))"""
    assert set(page.js(shown)) == {True}
    page.mouse("label:has([value=why])", click=True)
    assert set(page.js(shown)) == {False} and page.js(red) == [0, 252]
    page.key("ArrowRight")
    assert page.js("document.querySelector('input[value=where]').checked") and page.js(red) == [252, 0]
    page.mouse(".card button", click=True)  # one alone
    assert page.js(shown)[:2] == [True, False]
    size = page.js(
        "['img', 'canvas'].map(tag => document.querySelectorAll(`.card ${tag}`)[1].getBoundingClientRect().toJSON())"
    )
    assert size[0] == size[1] and size[0]["width"] > 100
    assert quiet(page) is True


@browser
@needs_chromium
def test_curves_are_read_by_pointer_and_by_keys(page, tmp_path):
    page.open(report.write(run_folder(tmp_path / "run")))
    read = "[...document.querySelectorAll('.readout')].map(r => r.textContent)"
    assert [text[:14] for text in page.js(read)[:3]] == ["epoch 5 (kept)"] * 3
    page.mouse(".chart svg", 0.999)
    row = rows_of(6, 0.8)[5]
    assert page.js(read)[0] == "".join(["epoch 6", *(f"{s} {row[f'{s}_acc']:.4f}" for s in ("train", "valid", "test"))])
    assert page.js(read)[1].startswith("epoch 6")  # all curves over epochs together
    page.js("document.querySelector('.chart svg').focus()")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.key(key)
    assert page.js(read)[2].startswith("epoch 3lr 0.1")
    assert page.js("document.activeElement.getAttribute('aria-valuetext')").startswith("epoch 3, train 0.7000")
    assert "sixth 0.1 (used)" in page.js(read)[3] and page.js("document.querySelectorAll('.dot').length") == 6
    page.js("document.querySelectorAll('.chart svg')[3].focus()")
    page.key("End")
    assert "learning rate 10each batch –" in page.js(read)[3]  # where it was infinite
    titles = "[...document.querySelectorAll('.chart figcaption')].slice(0, 3).map(t => t.textContent)"
    more = " (valid and test: averaged weights)"
    averaged = page.js(titles)
    page.open(report.write(run_folder(tmp_path / "plain", ema=0)))
    assert page.js(titles) == [title.removesuffix(more) for title in averaged]
    assert averaged[:2] == [f"Accuracy{more}", f"Loss (cross-entropy){more}"]
    assert quiet(page) is True


@browser
@needs_chromium
def test_a_rate_of_zero_and_numbers_of_many_digits_are_drawn(page, tmp_path):
    """warm_restarts comes to a rate of 0 where rounding puts the end of a cycle just behind a whole number."""
    run, rows = run_folder(tmp_path / "run", schedule="warm_restarts"), rows_of(6, 0.8)
    rows[2]["lr"], rows[3]["batch_size"], rows[4]["momentum"] = 0.0, 1024, 0.9995
    write_csv(run / "results.csv", rows)
    page.open(report.write(run))
    titles = "[...document.querySelectorAll('.chart figcaption')].map(title => title.textContent)"
    assert page.js(titles)[2:5] == ["Learning rate at the epoch's first step", "Momentum", "Batch size"]
    read = "[...document.querySelectorAll('.readout')].map(r => r.textContent)"
    page.js("document.querySelector('.chart svg').focus()")
    page.key("Home")
    for place, wanted in ((2, "lr 0.1"), (2, "lr 0.1"), (2, "lr –"), (4, "batch size 1,024"), (3, "momentum 0.9995")):
        assert page.js(read)[place].endswith(wanted)
        page.key("ArrowRight")
    assert quiet(page) is True


@browser
@needs_chromium
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_pages_fit_phone_and_desktop_in_light_and_dark(page, tmp_path, width, dark):
    many = [f"class {i}" for i in range(30)]
    pages = {
        "run": run_folder(tmp_path / "run"),
        "evil": run_folder(tmp_path / "<i>evil", [name * 5 for name in EVIL], name="", data="a" * 200),
        "many": run_folder(tmp_path / "many", many, mistakes=200),
        "pairs": run_folder(tmp_path / "pairs", [f"c{i}" for i in range(50)], mistakes=200),
        "one epoch": run_folder(tmp_path / "one", epochs=1, finished=False),
        "comparison": comparison_folder(tmp_path / "both", "one_cycle"),
    }
    for name, folder in pages.items():
        page.open(report.write(folder), width, dark=dark)
        page.screenshot(tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            corner = sum(image.convert("RGB").getpixel((2, 2)))
            assert image.width >= width - 20 and (corner < 150 if dark else corner > 700)
        assert page.js("document.documentElement.scrollWidth") <= width, name
        # whatever a name holds is text: as many elements as ours, none of a name's
        assert (
            page.js("document.querySelectorAll('main img[src=x], main b b, main i i, h1 i, main script').length") == 0
        )
        assert page.js("document.querySelectorAll('.chart path').length") >= 3
        assert "[object" not in page.js("document.body.textContent.split('use strict')[0]")
        assert quiet(page) is True, name
    page.open(report.write(pages["evil"]))
    assert page.js("[...document.querySelectorAll('.matrix tbody th')].map(th => th.textContent)") == [
        n * 5 for n in EVIL
    ]
    assert page.js("document.querySelector('h1').textContent") == "<i>evil"


@browser
@needs_chromium
def test_rates_that_spread_over_decades_are_drawn(page, tmp_path):
    folder = comparison_folder(tmp_path / "both")
    rows = [row | {"lr": 1e-4} for row in rows_of(6)]  # the other seed's are some hundred times as large
    write_csv(folder / "plateau-s1/results.csv", rows)
    page.open(report.write(folder))
    shapes = lambda kind, what: page.js(f"[...document.querySelectorAll('.chart {kind}')].map(p => p.{what})")
    paths = shapes("path", "getAttribute('d')")
    assert paths and not any("NaN" in path or "Infinity" in path for path in paths) and quiet(page) is True
    # the line of the rate lies in the middle of its band, at every corner
    corners = lambda text: np.array([[*map(float, pair.split())] for pair in re.split("[ML]", text)[1:]])
    band = np.array([[*map(float, p.split(","))] for p in shapes("polygon", "getAttribute('points')")[-1].split()])
    high, low = band[: len(band) // 2], band[len(band) // 2 :][::-1]
    line = corners(next(p for p in paths[-2:] if len(corners(p)) == len(high)))
    assert np.abs(line - (high + low) / 2).max() < 0.2 and (low[:, 1] - high[:, 1]).min() > 20


@browser
@needs_chromium
def test_the_page_tells_its_story_in_order(page, tmp_path):
    run = run_folder(tmp_path / "run", mistakes=60)
    gallery = json.loads((run / "gallery.json").read_text())
    first = next(csv.DictReader(open(run / "mistakes.csv")))["file"]
    gallery[first]["why"] = base64.b64encode(bytes(32 * 32)).decode()
    (run / "gallery.json").write_text(json.dumps(gallery))
    env = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps({**env, "precision": "bf16"}))
    write_csv(run / "doubts.csv", [dict(doubt="near copies", file="a.png", detail="b.png")])
    Image.new("RGB", (64, 32)).save(run / "train_batch.png")
    page.open(report.write(run))
    texts = lambda what: page.js(f"[...document.querySelectorAll('{what}')].map(node => node.textContent)")
    wanted = ["What was trained", "How well", "Where it fails, and why", "What to try next", "Make it again"]
    assert texts("h2") == wanted
    assert page.js("document.querySelector('.fed img').naturalWidth") == 64
    tile, readout = texts(".tile b")[0], texts(".readout")[0]
    assert readout.startswith("epoch 5 (kept; valid and test in float32)") and f"test {tile}" in readout
    assert "of the same kind: 0.7059 to 0.8696 (Wilson)" in texts("section p")[0]
    rules = page.js("[...document.querySelectorAll('.rules')].map(list => list.children.length)")
    assert (
        "Some images are worth a look." in texts(".rules li")[0] and sum(rules) == len(advice.RULES) and rules[0] >= 1
    )
    assert texts(".rules code") and "`" not in page.js("document.querySelector('main').textContent")
    # 24 pictures at first, all on request; a map of nothing says so
    assert page.js(VISIBLE) == 24
    page.mouse("#mistakes > .controls:last-of-type button", click=True)
    assert page.js(VISIBLE) == 60
    said = "[...document.querySelectorAll('.empty')].map(e => getComputedStyle(e).display != 'none')"
    assert not any(page.js(said))
    page.mouse("label:has([value=why])", click=True)
    assert page.js(said) == [True] + 59 * [False]
    assert quiet(page) is True


@browser
@needs_chromium
def test_a_table_wider_than_a_phone_says_that_it_scrolls(page, tmp_path):
    folder = report.write(comparison_folder(tmp_path / "both"))
    for width, hidden in ((390, False), (1280, True)):
        page.open(folder, width)
        assert page.js("document.querySelector('.wide').hidden") is hidden


@browser
@needs_chromium
def test_a_live_page_renews_itself_and_a_finished_one_does_not(page, tmp_path):
    run = run_folder(tmp_path / "run", epochs=2, finished=False)
    page.open(report.write(run, live=True))
    note = "document.querySelector('.note')?.textContent"
    assert "2 of 6 epochs" in page.js(note)
    write_csv(run / "results.csv", rows_of(3))
    report.write(run, live=True)
    page.wait("Page.loadEventFired")
    assert "3 of 6 epochs" in page.js(note)
    report.write(run_folder(tmp_path / "other"))
    (tmp_path / "other/report.html").replace(run / "report.html")
    page.wait("Page.loadEventFired")
    assert page.js(note) is None
    page.js("window.kept = true")
    time.sleep(6)
    assert page.js("window.kept") is True
    assert quiet(page) is True
