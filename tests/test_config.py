import os
import resource
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from fastai.callback import schedule as fastai_schedule

from lib import cli, config, machine
from lib.cli import BadInput
from lib.config import Config
from lib.data import sources
from lib.models import zoo
from lib.train import lr_range, schedules
from train_fastai import main

ROOT = Path(__file__).parent.parent


def test_no_option_is_the_assignment():
    c = config.parse([])
    assert (c.data, c.epochs, c.schedule, c.lr, c.momentum, c.gallery) == ("cifar10", 50, "plateau", "find", 0.9, 25)


def test_help_needs_no_torch_and_is_quick():
    code = (
        "import sys, train_fastai\n"
        "try: train_fastai.main(['--help'])\n"
        "finally: assert not {'torch', 'fastai', 'numpy', 'yaml'} & set(sys.modules)"
    )
    cpu, times = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), []
    for _ in range(3):
        start = cpu()  # seconds of work: other tests keep the cores busy
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        times.append(cpu() - start)
        assert done.returncode == 0 and "--patience-epochs" in done.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1 or auto, not '0'"),
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
        (["--epoch", "3"], "unrecognized arguments: --epoch 3 (did you mean --epochs?)"),
        (["--patience", "3"], "did you mean --patience-epochs?"),
        (["--bs=64"], "did you mean --batch-size?"),
        (["--imgsz", "64"], "did you mean --size?"),
        (["--weight_decay", "0"], "did you mean --weight-decay?"),
        (["--data", "https://a.b/c.zip"], "--data https://a.b/c.zip: is a web address; fetch it"),
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


def test_defaults_that_depend_on_each_other_fit():
    """CIFAR-10's threshold is for the loss of averaged weights, which creeps on."""
    threshold = lambda *argv: config.parse(list(argv)).threshold
    assert threshold() == threshold("--ema", "0.99") == 0.04
    assert (
        threshold("--monitor", "valid_acc") == threshold("--monitor", "train_loss") == threshold("--ema", "0") == 1e-4
    )
    assert threshold("--ema", "0", "--threshold", "0.01") == 0.01 and threshold("--data", "digits") == 1e-4


def test_flags_of_others_are_none_of_ours_and_name_ours():
    ours, others = config.parser()._option_string_actions, " ".join(cli.OTHER_NAMES.values()).split()
    assert set(cli.OTHER_NAMES) <= set(ours) and not {f"--{other}" for other in others} & set(ours)
    assert len(set(others)) == len(others)


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


def test_a_run_keeps_the_augmentation_that_it_was_made_with(tmp_path):
    (tmp_path / "args.yaml").write_text("data: digits\naugment: mine.yaml\n")
    (tmp_path / "env.json").write_text("{}")
    parse = lambda *argv: config.parse([*map(str, argv)]).augment
    assert parse("-c", tmp_path / "args.yaml") == parse("--resume", tmp_path) == "mine.yaml"
    copy = tmp_path / "augment.yaml"
    copy.write_text("")
    assert parse("-c", tmp_path / "args.yaml") == parse("--resume", tmp_path) == str(copy)
    assert parse("-c", tmp_path / "args.yaml", "--augment", "none") == "none"
    (tmp_path / "args.yaml").rename(tmp_path / "mine.yaml")  # settings of one's own, which lie beside it by chance
    assert parse("-c", tmp_path / "mine.yaml") == "mine.yaml"
    (tmp_path / "args.yaml").write_text("data: digits\naugment: photo\n")
    assert parse("-c", tmp_path / "args.yaml") == "photo" and parse() == "standard"
    with pytest.raises(cli.BadInput, match="--augment: ~nobody-here/x is the home of nobody"):
        config.Config(augment="~nobody-here/x")


def test_annotations_say_what_is_allowed():
    assert config.kind_and_words(config.FIELDS["lr"].type) == (float, ["find"])
    assert config.kind_and_words(config.FIELDS["seeds"].type) == (int, [])
    assert config.kind_and_words(config.FIELDS["schedule"].type) == (None, list(config.SCHEDULES))
    for field in config.FIELDS.values():
        kind, words = config.kind_and_words(field.type)
        assert kind in (int, float, bool, str) or words, field.name
        assert (field.metadata["low"] is not None) == (kind in (int, float)), field.name


def test_a_gpu_that_torch_cannot_use_is_left_out(monkeypatch, capsys):
    """A driver that is too old is counted, and fails at the first number."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: (_ for _ in ()).throw(RuntimeError("The driver is too old")))
    assert machine.pick_device(Config()) == torch.device("cpu")
    assert "warning: cuda:0 is not used (RuntimeError: The driver is too old)" in capsys.readouterr().err
    assert machine.environment()["gpus"] == []


def test_a_gpu_that_torch_can_use_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "fault", {"cuda:0": None}.get)
    assert machine.pick_device(Config()) == machine.pick_device(Config(device="cuda")) == torch.device("cuda:0")


def test_a_gpu_that_is_busy_is_no_reason_to_train_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    busy = RuntimeError("CUDA-capable device(s) is/are busy or unavailable")
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: (_ for _ in ()).throw(busy))
    with pytest.raises(BadInput, match="^--device: cuda:0 cannot be used .*busy.*; pass another one, or --device cpu"):
        machine.pick_device(Config())


def test_the_chosen_gpu_is_the_current_one(monkeypatch):
    """Else torch would open the first card too, for its random generator and for pinned memory."""
    chosen = []
    monkeypatch.setattr(machine, "fault", {"cuda:1": None}.get)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(machine, "pick_precision", lambda config, device: "float32")
    assert machine.prepare(Config(device="cuda:1"))[0] == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]


def test_a_range_test_is_ten_times_as_long_as_the_memory_of_the_momentum():
    """Else the loss at a rate shows the steps of rates long before it."""
    for momentum, wanted in ((0.0, 100), (0.9, 100), (0.95, 200), (0.99, 1000), (0.9999, 2000)):
        assert Config(momentum=momentum).lr_iters == wanted
    assert Config(momentum=0.99, lr_iters=50).lr_iters == 50
    assert [c.lr_iters for c in config.variants(["--momentum", "0.9", "0.99"])] == [100, 1000]


def test_a_run_in_fp16_goes_on_where_there_is_a_gpu():
    with pytest.raises(BadInput, match="resume where there is one"):
        machine.pick_precision(Config(precision="fp16", resume="runs/x"), torch.device("cpu"))


@pytest.mark.parametrize("schedule", config.SCHEDULES)
def test_more_epochs_are_for_schedules_that_need_no_number_of_them(schedule, tmp_path):
    (tmp_path / "args.yaml").write_text(f"data: digits\nepochs: 3\nschedule: {schedule}\n")
    (tmp_path / "env.json").write_text("{}")
    resume = lambda epochs: config.parse(["--resume", str(tmp_path), "--epochs", epochs]).epochs
    assert resume("3") == 3
    with nullcontext() if schedule in config.ENDLESS else pytest.raises(cli.BadInput, match="may have more"):
        assert resume("9") == 9
    with pytest.raises(cli.BadInput, match="none fewer"):
        resume("2")


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm")
@pytest.mark.parametrize("free, workers", [(64, 4), (1000, 8), (10, 0), (0, 0)])
def test_as_many_workers_as_their_shared_memory_holds(free, workers, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 16)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free * 10**6))
    assert machine.useful_workers(torch.device("cuda"), 128 * 3 * 128**2) == workers
    assert machine.useful_workers(torch.device("cpu"), 128 * 3 * 128**2) == 0


def test_the_machine_is_made_as_the_settings_say(monkeypatch):
    asked = config.Config(data="digits", seeds=7, threads=2, device="cpu", precision="bf16")
    with monkeypatch.context() as m:
        kept = []
        m.setattr(machine, "keep_memory", lambda: kept.append("memory"))
        found = machine.prepare(asked)
    assert (str(found[0]), *found[1:], kept) == ("cpu", "bf16", 2, ["memory"])
    first = torch.rand(2)
    torch.manual_seed(7)
    assert torch.get_num_threads() == 2 and torch.equal(first, torch.rand(2))
    with pytest.raises(cli.BadInput, match="--precision: fp16 needs"):
        machine.prepare(config.Config(data="digits", device="cpu", precision="fp16"))


@pytest.mark.parametrize("asked", ["--monitor", "--keep"])
def test_what_can_be_monitored_or_chosen_by_is_in_the_record(make, asked):
    _, learn = make("--epochs", 1, asked, "macro_f1")
    learn.fit(1, 0.01)
    assert {*config.MONITORS, *config.KEEP} <= set(learn.recorder.rows[0]) & set(learn.recorder.metric_names)


def test_choices_are_the_registries():
    assert set(config.MODELS) == set(zoo.MODELS)
    assert set(config.SCHEDULES) == set(schedules.SCHEDULES)
    assert set(config.SOURCES) == set(sources.SOURCES)
    assert set(config.SUGGESTIONS) == set(lr_range.RULES)
    theirs = {name for name, rule in lr_range.RULES.items() if rule is getattr(fastai_schedule, name, None)}
    assert theirs == {"valley", "steep", "minimum", "slide"}


def test_the_command_in_env_json_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/train_fastai.py", "--data", "my photos"])
    assert machine.environment()["command"] == "train_fastai.py --data 'my photos'"
