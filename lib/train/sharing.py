"""Uses fewer threads while other programs keep cores busy."""

import time

import torch
from fastai.callback.core import Callback

from lib.machine import busy_seconds

WINDOW = 1.0  # seconds from one look at the load to the next
AGREE = 2  # looks in a row that must agree before the number of threads changes


class ShareCores(Callback):
    """Sets torch's threads to the number of cores that no other program uses, and never above what torch had at first.

    Threads wait for each other in every operation. So if another program uses one of two cores, two threads are slower
    than one (tests.benchmarks.neighbour). `other_load` is the mean number of cores that other programs used in the fit.
    The callback has no effect if the system does not say how busy the cores are.
    """

    order = -90  # runs before the work of a batch

    def __init__(
        self,
        adapt=True,  # whether the threads change; if not, only the load is noted
        looks=True,  # whether it looks at all; its own loader workers and other ranks would count as other programs
    ):
        self.adapt, self.looks, self.most, self.told = adapt and looks, looks, torch.get_num_threads(), []

    def before_fit(self):
        self.first = self.last = (time.perf_counter(), busy_seconds() if self.looks else None)
        self.wishes, self.other_load = [], None

    def before_batch(self):
        now = time.perf_counter()
        if self.last[1] is None or now - self.last[0] < WINDOW:
            return
        before, self.last = self.last, (now, busy_seconds())
        self.other_load = max(others(self.first, self.last), 0.0)
        if not self.adapt:
            return
        _, cores = self.last[1]
        wish = min(max(round(cores - others(before, self.last)), 1), self.most)
        self.wishes = [*self.wishes, wish][-AGREE:]
        if self.wishes == [wish] * AGREE and wish != torch.get_num_threads():
            torch.set_num_threads(wish)
            if not self.told:  # the range test's copy of this callback shares the list, so the line is printed once
                self.told.append(wish)
                print(f"other programs are busy: {wish} of {self.most} threads, until they are not", flush=True)

    def after_fit(self):
        if self.adapt:
            torch.set_num_threads(self.most)


def others(before, after):
    """The mean number of cores that other programs used between two measurements, each (time, busy_seconds)."""
    (then, (first, _)), (now, (last, _)) = before, after
    return (last - first) / (now - then)
