"""Threads that leave the cores alone which other programs keep busy."""

import time

import torch
from fastai.callback.core import Callback

from lib.machine import busy_seconds

WINDOW = 1.0  # seconds between looks
AGREE = 2  # looks in a row that must say the same


class ShareCores(Callback):
    """Has as many threads as there are cores that no other program uses, and never more than torch had at first.

    Threads wait for each other in every operation. So two threads, one of whose cores is busy, are several times slower
    than one (tests.benchmarks.neighbour). `other_load` is the mean number of cores that other programs used in the fit.
    It has no effect where the system does not say what is busy.
    """

    order = -90  # before the work of a batch

    def __init__(
        self,
        adapt=True,  # whether the threads change; else the load is noted alone
    ):
        self.adapt, self.most, self.told = adapt, torch.get_num_threads(), []

    def before_fit(self):
        self.first = self.last = (time.perf_counter(), busy_seconds())
        self.wishes, self.other_load = [], None

    def before_batch(self):
        now = time.perf_counter()
        if self.last[1] is None or now - self.last[0] < WINDOW:
            return
        before, self.last = self.last, (now, busy_seconds())
        self.other_load = max(others(self.first, self.last), 0.0)
        if not self.adapt:
            return
        wish = min(max(self.most - round(others(before, self.last)), 1), self.most)
        self.wishes = [*self.wishes, wish][-AGREE:]
        if self.wishes == [wish] * AGREE and wish != torch.get_num_threads():
            torch.set_num_threads(wish)
            if not self.told:  # a list, so that the range test's copy of this callback has told it too
                self.told.append(wish)
                print(f"other programs are busy: {wish} of {self.most} threads, until they are not", flush=True)

    def after_fit(self):
        if self.adapt:
            torch.set_num_threads(self.most)


def others(before, after):
    """The mean number of cores that other programs used between two (time, busy_seconds)."""
    seconds, (all_then, own_then), (all_now, own_now) = after[0] - before[0], before[1], after[1]
    return (all_now - all_then - (own_now - own_then)) / seconds
