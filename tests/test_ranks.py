"""Several processes against one. The ranks are forked from the tests' process, which saves them the imports."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib import config as settings
from lib import machine
from lib.cli import BadInput
from lib.data import loader
from lib.train import checkpoint, learner, ranks, recorder, schedules
from tests.conftest import free_port, on_ranks
from tests.test_checkpoint import ARGS, equal, results, train
from train_fastai import main

ROOT = Path(__file__).parent.parent


class Plain(nn.Module):
    """A network without BatchNorm, in the precision of its weights."""

    def __init__(self, dtype):
        super().__init__()
        layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
        self.layers = nn.Sequential(*layers).to(dtype)
        self.early = [self.layers[0].bias]  # held from the fourth epoch on

    def forward(self, x):
        return self.layers(x.to(self.layers[0].weight.dtype))


def trained(bands, cache, network, epochs, cbs, *more):
    """(weights and buffers as one vector, rows) of `network()`; 88 images in batches of 29 leave a last one of 1."""
    argv = ["--data", bands, "--cache", cache, "--size", 32, "--epochs", epochs, "-b", 29, "--lr", 0.1, *more]
    config = settings.parse(list(map(str, argv)))
    dls = loader.get_dls(config)
    torch.manual_seed(0)
    learn = learner.build(config, dls, network(), cbs=cbs)
    schedules.fit(learn, config, 0.1)
    return torch.cat([t.double().flatten() for t in learn.model.state_dict().values()]), learn.recorder.rows


@pytest.mark.parametrize("n, dtype, within", [(2, torch.float64, 1e-9), (3, torch.float32, 1e-5)])
def test_ranks_end_with_the_weights_and_the_record_of_one_process(n, dtype, within, bands, cache, tmp_path):
    options = (
        "--grad-noise 0.01 --ema 0.9 --accumulate 2 --schedule grow_batch --patience-epochs 0 --threshold 0.9".split()
    )
    network = lambda: Plain(dtype)
    weights, rows = trained(bands, cache, network, 4, [], *options)

    def job(rank):
        with ranks.joined(torch.device("cpu")):
            assert ranks.world() == n
            found, own = trained(bands, cache, network, 4, [ranks.DataParallel()], *options)
            torch.save({"weights": found, "rows": own}, tmp_path / f"{rank}.pt")

    assert on_ranks(n, job, tmp_path) == [0] * n, (tmp_path / "rank0.txt").read_text()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(n)]
    for one in found:
        assert torch.equal(one["weights"], found[0]["weights"])
        assert (one["weights"] - weights).abs().max() <= within * weights.abs().max()
        for row, expected in zip(one["rows"], rows, strict=True):
            assert row["batch_size"] == expected["batch_size"] and row["lr"] == expected["lr"]
            for name in ("train", "valid", "test"):
                assert row[f"{name}_acc"] == expected[f"{name}_acc"]  # every image counts once
                assert row[f"{name}_loss"] == pytest.approx(expected[f"{name}_loss"], rel=1e-5)
    assert rows[0]["batch_size"] != rows[2]["batch_size"]


@pytest.mark.parametrize("ema", [0, 0.9])
def test_ranks_agree_on_the_statistics_of_batchnorm(ema, bands, cache, tmp_path):
    """Each rank's are of its own slices; what is kept is the first one's, in the network and in the average."""
    network = lambda: nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))

    def job(rank):
        with ranks.joined(torch.device("cpu")):
            found, _ = trained(bands, cache, network, 1, [ranks.DataParallel()], "--ema", ema)
            torch.save(found, tmp_path / f"{rank}.pt")

    assert on_ranks(2, job, tmp_path) == [0, 0], said(tmp_path)
    first, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, other)


def test_a_run_on_two_ranks_ends_with_a_report_that_the_first_alone_makes(bands, tmp_path):
    """fastai would gather predictions from all ranks, of which the others have gone home."""
    shutil.copytree(bands, tmp_path / "data/train")
    shutil.copytree(bands / "class 0", tmp_path / "data/new")  # a note says that it is passed over
    argv = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs"), "--name", "run", *ARGS]
    assert on_ranks(2, lambda rank: main(argv), tmp_path) == [0, 0], said(tmp_path)
    assert "passed over" in (tmp_path / "rank0.txt").read_text() and (tmp_path / "rank1.txt").read_text() == ""
    run = tmp_path / "runs/run"
    assert len(results(run)) == 4 and (run / "summary.json").exists() and (run / "mistakes.csv").exists()


def test_a_run_on_two_ranks_is_written_once_and_goes_on_with_one(bands, tmp_path):
    """The whole line with a range test; rank 1 alone is interrupted: both stop, and one process finishes the run."""

    def job(rank):
        if rank == 1:
            stop_at_signal(epoch=1, batch=2)
        argv = [*(a for a in ARGS if a not in ("--lr", "0.05")), "--ema", "0.9"]
        return main(["--data", str(bands), "--out", str(tmp_path / "runs"), "--name", "run", *argv])

    assert on_ranks(2, job, tmp_path) == [130, 130], said(tmp_path)
    run = tmp_path / "runs/run"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run"]
    assert len(results(run)) == 1 and not (run / "summary.json").exists()
    assert "--resume" in (tmp_path / "rank0.txt").read_text() and "--resume" not in (tmp_path / "rank1.txt").read_text()
    assert main(["--resume", str(run)]) == 0
    assert len(results(run)) == 4 and (run / "summary.json").exists()


def test_images_are_decoded_by_one_rank_of_each_machine(tmp_path):
    """Two machines of two ranks: the second machine may have a disk of its own."""

    def job(rank):
        os.environ["LOCAL_RANK"] = str(rank % 2)
        with ranks.joined(torch.device("cpu")), ranks.first_alone():
            print(rank)
            found = sorted(p.name for p in tmp_path.glob("seen*"))
            time.sleep(0.3)
            (tmp_path / f"seen{rank}").write_text(" ".join(found))

    assert on_ranks(4, job, tmp_path) == [0] * 4, said(tmp_path)
    found = [(tmp_path / f"seen{rank}").read_text() for rank in range(4)]
    assert found == ["", "seen0 seen2", "seen0", "seen0 seen2"]
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(4)] == ["0\n", "", "", ""]


def said(path):
    return "\n".join(file.read_text() for file in sorted(path.glob("rank*.txt")))


def stop_at_signal(epoch, batch):
    """From here on this process gets a SIGTERM in that batch of a fit."""
    after_batch = recorder.EpochRecorder.after_batch

    def stop(self):
        if (self.epoch, self.iter) == (epoch, batch):
            os.kill(os.getpid(), signal.SIGTERM)
        after_batch(self)

    recorder.EpochRecorder.after_batch = stop


@pytest.mark.parametrize("fault, status, words", [("nan", [3, 3], "epoch 2, batch"), ("error", [1, 1], "disk on fire")])
def test_what_ends_one_rank_ends_all(fault, status, words, bands, tmp_path):
    def job(rank):
        after_batch = recorder.EpochRecorder.after_batch

        def fail(self):
            if rank == 1 and self.epoch == 1 and self.training:
                if fault == "error":
                    raise OSError("disk on fire")
                self.learn.loss = self.learn.loss * torch.nan
            after_batch(self)

        recorder.EpochRecorder.after_batch = fail
        return main(["--data", str(bands), "--out", str(tmp_path / "runs"), "--name", "run", *ARGS])

    start = time.monotonic()
    assert on_ranks(2, job, tmp_path) == status, said(tmp_path)
    assert time.monotonic() - start < 60
    assert words in said(tmp_path)
    assert checkpoint.load(tmp_path / "runs/run/weights/last.pt")["epochs_trained"] == 1


def test_ranks_with_other_images_end_all(bands, tmp_path):
    other = shutil.copytree(bands, tmp_path / "other")
    min(other.rglob("*.png")).unlink()
    argv = ["--out", str(tmp_path / "runs"), *ARGS]
    status = on_ranks(2, lambda rank: main(["--data", str([bands, other][rank]), *argv]), tmp_path)
    assert status[1] == 2 and 0 not in status, said(tmp_path)
    assert "error: rank 1: the images of --data" in said(tmp_path) and not list((tmp_path / "runs").glob("*/*.csv"))


def test_bad_data_on_ranks_ends_all(tmp_path):
    job = lambda rank: main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "runs")])
    start = time.monotonic()
    first, other = on_ranks(2, job, tmp_path)
    assert first == 2 and other != 0 and time.monotonic() - start < 60
    assert (tmp_path / "rank0.txt").read_text().count("\n") == 1 and "nowhere" in said(tmp_path)


@pytest.mark.parametrize(
    "device, gpus, words",
    [
        ("auto", 1, "1 GPUs for 2 processes on this machine; start 1 (torchrun --nproc-per-node 1)"),
        ("cuda", 1, "1 GPUs for 2 processes"),
        ("cuda", 0, "pass --device cpu"),
        ("cuda:1", 2, "--device cuda:1: 1 GPUs for 2 processes"),
    ],
)
def test_fewer_gpus_than_processes_end_all_ranks_at_once(device, gpus, words, bands, tmp_path):
    def job(rank):
        torch.cuda.device_count = lambda: gpus
        return main(["--data", str(bands), "--out", str(tmp_path / "runs"), *ARGS, "--device", device])

    start = time.monotonic()
    assert on_ranks(2, job, tmp_path) == [2, 2], said(tmp_path)
    assert time.monotonic() - start < 10
    for rank in range(2):
        line = (tmp_path / f"rank{rank}.txt").read_text()
        assert line.count("\n") == 1 and words in line


def test_each_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "fault", {"cuda:1": None, "cpu": None}.get)
    for name, value in zip(machine.TORCHRUN, "121212"):
        monkeypatch.setenv(name, value)
    for device in ("auto", "cuda"):
        assert machine.pick_device(SimpleNamespace(device=device)) == torch.device("cuda", 1)
    assert machine.pick_device(SimpleNamespace(device="cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert machine.pick_device(SimpleNamespace(device="auto")) == torch.device("cpu")


def test_a_rank_whose_gpu_cannot_be_used_says_so(monkeypatch):
    """It does not go on with a CPU: the other ranks have a GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "fault", {"cuda:1": "too old"}.get)
    for name, value in zip(machine.TORCHRUN, "121212"):
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=r"^--device: cuda:1 cannot be used \(too old\)"):
        machine.pick_device(SimpleNamespace(device="auto"))


def test_a_comparison_on_ranks_is_refused(bands, tmp_path, monkeypatch, capsys):
    for name in machine.TORCHRUN:
        monkeypatch.setenv(name, "2")
    assert main(["--data", str(bands), "--seeds", "0", "1", "--out", str(tmp_path)]) == 2
    assert "lib.compare" in capsys.readouterr().err


def test_a_stray_rank_changes_nothing(bands, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert train(bands, tmp_path, "run", "--epochs", "2") == 0
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_torchrun_on_two_nodes(bands, tmp_path):
    """Two nodes of one rank each, on this machine, end as two ranks of one node do."""
    port = free_port()
    args = ["train_fastai.py", "--data", bands, "--out", tmp_path, *ARGS]

    def torchrun(*options):
        command = [sys.executable, "-m", "torch.distributed.run", *options, *args]
        return subprocess.Popen(list(map(str, command)), cwd=ROOT)

    rendezvous = "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint".split() + [f"localhost:{port}"]
    args += ["--threads", 1, "--name", "nodes"]
    nodes = [torchrun(*rendezvous, "--rdzv-id", "x") for _ in range(2)]
    assert [node.wait(300) for node in nodes] == [0, 0]
    args[-1] = "node"
    assert torchrun("--nproc-per-node", 2).wait(300) == 0
    equal(tmp_path / "nodes", tmp_path / "node")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_once_and_ends_all(number, bands, tmp_path):
    """As a terminal does it (Ctrl-C goes to torchrun and to its processes), and as a batch system does."""
    options = [*ARGS, "--epochs", 500, "--threads", 1, "--name", "run"]
    args = ["train_fastai.py", "--data", bands, "--out", tmp_path, *options]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, *args]
    with open(tmp_path / "said.txt", "w") as said:
        torchrun = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=said, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/results.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    if number == signal.SIGINT:
        os.killpg(torchrun.pid, number)
    else:
        torchrun.send_signal(number)
    assert torchrun.wait(60) != 0
    assert "interrupted and saved" in (tmp_path / "said.txt").read_text()
    saved = checkpoint.load(tmp_path / "run/weights/last.pt")
    assert len(results(tmp_path / "run")) == saved["epochs_trained"] < 500
