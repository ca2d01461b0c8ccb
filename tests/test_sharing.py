"""Threads beside other programs."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback

from lib import machine
from lib.config import Config
from lib.train import sharing
from lib.train.sharing import ShareCores, others

ROOT = Path(__file__).parent.parent

linux = pytest.mark.skipif(machine.busy_seconds() is None, reason="the system does not say what is busy")


@pytest.fixture
def follow(monkeypatch):
    """follow(most, loads) -> threads after each look, where so many cores of other programs are busy in turn."""

    def follow(most, loads, **options):
        torch.set_num_threads(most)
        share, seconds, work, found = ShareCores(**options), 0.0, 0.0, []
        monkeypatch.setattr(sharing, "WINDOW", 1.0)
        monkeypatch.setattr(sharing, "time", SimpleNamespace(perf_counter=lambda: seconds))
        busy = lambda: (100 + work, most)
        monkeypatch.setattr(sharing, "busy_seconds", busy)
        share.before_fit()
        for load in loads:
            seconds, work = seconds + 1, work + load
            share.before_batch()
            found.append(torch.get_num_threads())
        return share, found

    return follow


def test_threads_leave_busy_cores_after_two_looks_that_agree(follow, capsys):
    share, found = follow(4, [0, 1, 1, 0, 1, 1.2, 2, 2, 3.9, 4, 6, 6, 0.4, 0.4])
    assert found == [4, 4, 3, 3, 3, 3, 3, 2, 2, 1, 1, 1, 1, 4]
    assert capsys.readouterr().out.count("other programs are busy: 3 of 4 threads") == 1
    assert share.other_load == pytest.approx(sum([0, 1, 1, 0, 1, 1.2, 2, 2, 3.9, 4, 6, 6, 0.4, 0.4]) / 14)
    share.after_fit()
    assert torch.get_num_threads() == 4


def test_a_number_that_was_asked_for_stays(follow):
    share, found = follow(4, [3, 3, 3], adapt=False)
    assert found == [4, 4, 4] and share.other_load == pytest.approx(3)


@linux
def test_a_busy_program_is_seen_and_this_one_is_not():
    def used(program):
        fields = Path(f"/proc/{program.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # seconds, in user and system mode

    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        before, its, ours = (time.perf_counter(), machine.busy_seconds()), used(busy), time.process_time()
        while time.perf_counter() < before[0] + 1:
            pass
        after, its, ours = (time.perf_counter(), machine.busy_seconds()), used(busy) - its, time.process_time() - ours
    finally:
        busy.kill()
        busy.wait()
    seconds, most = after[0] - before[0], after[1][1]  # whose work was counted; a quota allows fewer
    error, seen = 0.05 * most, others(before, after) * seconds  # the system counts in hundredths, for each core
    assert its - error < seen < most * seconds - ours + error and its > 0.1


@linux
def test_only_cores_that_the_process_may_use_count():
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from lib import machine;"
    program += "from lib.config import Config; print(machine.cores(), machine.set_threads(Config()))"
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("processes, expected", [(0, 2), (2, 1), (8, 1)])
def test_threads_are_as_many_as_the_cores_of_a_process(processes, expected, monkeypatch):
    """torch would have 8, as it does not know the quota; under torchrun it has 1."""
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "torchs_threads", lambda: 1 if processes else 8)
    for name in machine.TORCHRUN if processes else ():
        monkeypatch.setenv(name, str(processes))
    assert machine.set_threads(Config()) == torch.get_num_threads() == expected


def test_a_run_adapts_on_a_cpu_unless_the_number_is_given(make):
    assert make("--threads", "auto")[1].share_cores.adapt and not make("--threads", "1")[1].share_cores.adapt


def test_its_own_workers_are_no_other_programs(make):
    _, learn = make("--threads", "auto", "-j", "1", "--lr", "0.01")
    learn.fit(1, 0.01)
    assert not learn.share_cores.adapt and learn.share_cores.other_load is None


@linux
def test_the_range_test_and_the_fit_look_while_they_train(make, monkeypatch):
    class Watch(Callback):
        def after_batch(self):
            seen.append(torch.get_num_threads())

    monkeypatch.setattr(sharing, "WINDOW", 0.0)
    monkeypatch.setattr(sharing, "busy_seconds", lambda: (2 * time.perf_counter(), 2))
    torch.set_num_threads(2)
    _, learn = make("--lr", "0.01")
    seen = []
    learn.add_cb(Watch())
    learn.lr_find(num_it=10, show_plot=False, suggest_funcs=None, stop_div=False)
    assert seen[0] == 2 and seen[-1] == 1 and torch.get_num_threads() == 2
    seen.clear()
    learn.fit(1, 0.01)
    assert seen[0] == 2 and seen[-1] == 1 and torch.get_num_threads() == 2
