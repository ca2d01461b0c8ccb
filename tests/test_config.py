import subprocess
import sys
import time

import pytest
import yaml

from lib import cli, config
from lib.data import sources
from lib.models import zoo
from lib.train import lr_range, recorder, schedules
from train_fastai import main


def test_no_option_is_the_assignment():
    c = config.parse([])
    assert (c.data, c.epochs, c.schedule, c.lr, c.momentum, c.gallery) == ("cifar10", 50, "plateau", "find", 0.9, 25)


def test_help_needs_no_torch_and_is_quick():
    code = (
        "import sys, train_fastai\n"
        "try: train_fastai.main(['--help'])\n"
        "finally: assert not {'torch', 'fastai', 'numpy', 'yaml'} & set(sys.modules)"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "--patience-epochs" in done.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1, not '0'"),
        (["--epochs", "2.5"], "--epochs"),
        (["--epochs", "two"], "--epochs"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--valid-pct", "1"], "--valid-pct"),
        (["--model", "smal"], "did you mean small?"),
        (["--schedule", "platau"], "did you mean plateau?"),
        (["--monitor", "val_loss"], "did you mean valid_loss?"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--seeds", "-1"], "--seeds"),
        (["--factor", "1"], "--factor"),
        (["--workers", "many"], "--workers"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--data", "no/such/folder"], "no/such/folder: not found"),
        (["--config", "no-such.yaml"], "no-such.yaml"),
        (["--name", "../x", "--data", "digits"], "--name"),
        (["--device", "abacus", "--data", "digits"], "--device"),
        (["--precision", "fp16", "--device", "cpu", "--data", "digits"], "--precision"),
    ],
)
def test_bad_setting_is_one_line_and_status_2(argv, words, capsys, cache, tmp_path):
    assert main([*argv, "--cache", str(cache), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("epochs, patience", [(1, 1), (19, 1), (20, 2), (50, 5), (200, 20)])
def test_patience_is_a_tenth_of_the_epochs(epochs, patience):
    assert config.Config(epochs=epochs).patience_epochs == patience
    assert config.Config(epochs=epochs, patience_epochs=0).patience_epochs == 0
    longer = config.Config(epochs=epochs).to_dict() | {"epochs": 300}  # as --resume has it
    assert config.Config(**longer).patience_epochs == patience


def test_not_all_epochs_have_small_images():
    assert config.Config(epochs=5, small_epochs=4).small_epochs == 4
    with pytest.raises(cli.BadInput, match="--small-epochs: must be fewer than the 5 epochs, not 5"):
        config.Config(epochs=5, small_epochs=5)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "args.yaml"
    file.write_text("data: digits\nepochs: 7\nmomentum: 0.5\n")
    c = config.parse(["-c", str(file), "--epochs", "9"])
    assert (c.data, c.epochs, c.momentum, c.model, c.flip) == ("digits", 9, 0.5, "small", False)


@pytest.mark.parametrize(
    "text", ["epocs: 3", "epochs: true", "epochs: [3]", "- 3", "lr: {}", "a: b: c", "flip: 1", "seeds: []"]
)
def test_bad_file_is_refused(tmp_path, text):
    file = tmp_path / "args.yaml"
    file.write_text(text)
    with pytest.raises(cli.BadInput):
        config.parse(["-c", str(file)])


def test_what_is_saved_parses_to_itself(tmp_path):
    c = config.parse(["--data", "digits", "--seeds", "3", "4", "--lr", "0.05", "--size", "24"])
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(c.to_dict()))
    assert config.parse(["-c", str(tmp_path / "args.yaml")]) == c


def test_choices_are_the_registries():
    assert set(config.MODELS) == set(zoo.MODELS)
    assert set(config.SCHEDULES) == set(schedules.SCHEDULES)
    assert set(config.SOURCES) == set(sources.SOURCES)
    assert set(config.SUGGESTIONS) <= set(lr_range.RangeTest.__annotations__)
    columns = {*recorder.EpochRecorder.values_of({f"{s}_{m}": 0 for s in ("train", "valid") for m in ("loss", "acc")})}
    assert set(config.MONITORS) == columns
