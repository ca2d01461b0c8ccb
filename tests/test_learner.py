import math
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.interpret import ClassificationInterpretation
from torch.nn import functional as F

from lib import machine
from lib.models import zoo
from lib.train import averaging, recorder
from lib.train.recorder import Diverged
from tests.conftest import fingerprint, logits_of, state_of

ROOT = Path(__file__).parent.parent


def test_the_first_loss_is_near_ln_of_the_classes(make):
    for name in zoo.MODELS:
        _, learn = make("--model", name)
        assert abs(learn.validate()[0] - math.log(4)) < 0.35


def test_it_overfits_one_batch(make):
    _, learn = make("--cutout", 0, "--crop-padding", 0, "--no-flip")
    dl = learn.dls.train
    dl.get_idxs, dl.n = lambda: list(range(16)), 16
    learn.fit(40, 0.1)
    assert learn.recorder.rows[-1]["train_loss"] < 0.05 and learn.recorder.rows[-1]["train_acc"] == 1


def test_two_equal_runs_are_equal_to_the_bit(make):
    def run(*argv):
        config, learn = make(*argv)
        learn.fit(2, 0.1)
        return fingerprint(learn.model.state_dict(), [{**r, "seconds": 0} for r in learn.recorder.rows])

    assert run() == run() != run("--seeds", 1)


def test_a_step_is_plain_sgd_with_momentum_and_l2(make):
    """v = mom v + g + wd w; w -= lr v; weights of norms and biases without wd."""
    _, learn = make("--momentum", 0.8, "--weight-decay", 0.01)
    model = learn.twin().model
    with torch.no_grad():
        weights = {n: p.clone() for n, p in model.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in weights.items()}
    spared = {n for n in weights if n.endswith("bias") or weights[n].ndim == 1}
    batches = [[t.as_subclass(torch.Tensor) for t in b] for b in learn.dls.train.new()]
    model.train()
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]  # the stem stays
        grads = torch.autograd.grad(loss, [p for _, p in learning])
        with torch.no_grad():
            for (n, p), g in zip(learning, grads):
                velocity[n] = 0.8 * velocity[n] + g + (0 if n in spared else 0.01) * p
                p -= 0.05 * velocity[n]
    learn.fit(1, 0.05)
    for (n, p), q in zip(model.named_parameters(), learn.model.parameters()):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6), n
    groups = learn.opt.opt.param_groups
    assert [g["weight_decay"] for g in groups] == [0.01, 0.0] * 2 and {g["momentum"] for g in groups} == {0.8}
    undecayed = groups[1]["params"] + groups[3]["params"]
    assert len(undecayed) == sum(n in spared for n, _ in learning)
    assert sum(len(g["params"]) for g in groups) == len(learning)


def test_the_training_loss_is_the_mean_over_images(make):
    """Trap 11: fastai's is a moving average. The last batch is smaller, and counts less."""
    _, learn = make("-b", 25)
    seen = []

    class Spy(Callback):
        def after_batch(self):
            if self.training:
                per_image = F.cross_entropy(self.pred, self.y, reduction="none")
                seen.extend(zip(per_image.tolist(), (self.pred.argmax(1) == self.y).tolist()))

    learn.fit(2, 0.05, cbs=Spy())
    n = len(learn.dls.train.ids)
    assert len(seen) == 2 * n
    for e, row in enumerate(learn.recorder.rows):
        losses, right = zip(*seen[e * n : (e + 1) * n])
        assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert row["train_acc"] == np.mean(right)


def test_the_average_is_what_is_evaluated_and_kept_and_training_is_as_without_it(make):
    """a <- d a + (1 - d) w behind each step, d = min(decay, (1 + t) / (10 + t)), BatchNorm's statistics along."""
    expected, evaluated, t = {}, [], 0

    class Reference(Callback):
        order = averaging.EMA.order - 1

        def before_fit(self):
            expected.update({k: v.double().clone() for k, v in self.learn.model.state_dict().items()})

        def after_step(self):
            nonlocal t
            d = min(0.3, (1 + t) / (10 + t))
            t += 1
            for k, v in self.learn.model.state_dict().items():
                expected[k] = d * expected[k] + (1 - d) * v.double()

        def after_epoch(self):
            model = self.learn.twin().model
            model.load_state_dict(expected)
            model.eval()
            x, y = zip(*[[t.as_subclass(torch.Tensor) for t in b] for b in self.dls.test])
            with torch.no_grad():
                evaluated.append(F.cross_entropy(model(torch.cat(x)), torch.cat(y)).item())

    best = averaging.KeepBest()
    _, learn = make("--ema", 0.3, "--accumulate", 2, cbs=[Reference(), best])
    _, plain = make("--accumulate", 2)
    learn.fit(3, 0.1), plain.fit(3, 0.1)
    assert t == 3 * math.ceil(len(learn.dls.train) / 2) > 5  # from step 3 on d is 0.3
    assert [row["test_loss"] for row in learn.recorder.rows] == pytest.approx(evaluated, rel=1e-4)
    for name in ("train_loss", "train_acc"):
        assert [row[name] for row in learn.recorder.rows] == [row[name] for row in plain.recorder.rows]
    assert learn.recorder.rows[-1]["test_loss"] != pytest.approx(plain.recorder.rows[-1]["test_loss"], rel=1e-2)
    for name, kept in learn.model.state_dict().items():
        if kept.is_floating_point():
            assert torch.allclose(kept.double(), expected[name], rtol=1e-4, atol=1e-6), name
    assert learn.ema.average is None and learn.validate(2)[0] == pytest.approx(evaluated[-1], rel=1e-4)
    last = best.epoch_number == 3
    assert last == all(torch.equal(best.state[k], v) for k, v in learn.model.state_dict().items())


def test_evaluation_equals_plain_torch_and_changes_nothing(make):
    _, learn = make()
    learn.fit(1, 0.05)
    before = state_of(learn)
    evaluation = learn.evaluate(learn.dls.test)
    loss, acc = evaluation.values[0], evaluation.accuracy
    z, y = logits_of(learn, learn.dls.test)
    learn.get_preds()
    ours = learn.validate(0)
    theirs = ClassificationInterpretation.from_learner(learn, dl=learn.dls.test).top_losses()[0]
    assert state_of(learn) == before
    assert ours == learn.validate(0) and theirs.mean().item() == pytest.approx(loss, rel=1e-5)
    assert loss == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    assert acc == (z.argmax(1) == y).double().mean().item() == pytest.approx(learn.recorder.rows[-1]["test_acc"])


def test_a_fit_with_looks_equals_a_fit_without(make):
    class Looks(Callback):
        order = 90

        def after_epoch(self):
            self.learn.validate(0), self.learn.validate(1), self.learn.get_preds(), list(self.dls.train)
            self.learn.get_preds(with_loss=True), self.learn.lr_find(num_it=20)

    def run(cbs):
        _, learn = make()
        learn.fit(3, 0.05, cbs=cbs)
        return fingerprint(learn.model.state_dict(), [{**r, "seconds": 0} for r in learn.recorder.rows])

    assert run([Looks()]) == run([])


@pytest.mark.parametrize("at", [1, 4])
def test_a_loss_that_is_not_finite_stops_loudly(make, at):
    _, learn = make()

    class Poison(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == at - 1:
                self.learn.xb = (self.xb[0] * math.nan,)

    kept = []
    with pytest.raises(Diverged, match=f"nan at epoch 2, batch {at}, lr 0.05"):
        learn.fit(3, 0.05, cbs=[Poison(), averaging.KeepBest(kept.append)])
    assert len(learn.recorder.rows) == len(kept) == 1


def test_a_last_step_that_spoils_the_weights_keeps_nothing(make):
    """One batch an epoch: its loss is fine, the weights after its step are not."""
    _, learn = make("-b", 500)
    kept = []
    with pytest.raises(Diverged, match="_loss is (nan|inf) after epoch 1"):
        learn.fit(1, 1e30, cbs=averaging.KeepBest(kept.append))
    assert kept == []


def test_weight_decay_given_to_fit_spares_norms_and_biases(make):
    _, learn = make()
    learn.fit(1, 0.01, 0.3)
    assert [g["weight_decay"] for g in learn.opt.opt.param_groups] == [0.3, 0.0] * 2


def test_long_epochs_are_checked_on_the_way(make, monkeypatch):
    monkeypatch.setattr(recorder, "CHECK_EVERY", 2)
    _, learn = make()
    steps = []

    class Count(Callback):
        def after_batch(self):
            steps.append(1)

    with pytest.raises(Diverged, match="epoch 1, batch 2"):
        learn.fit(1, 1e30, cbs=Count())
    assert len(steps) <= 3


def test_the_best_weights_are_those_of_the_best_valid_accuracy():
    keep, model = averaging.KeepBest(), torch.nn.Linear(1, 1)
    keep.learn = learn = SimpleNamespace(model=model, recorder=SimpleNamespace(rows=[]))
    scores = [(0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (0.7, 0.85), (0.6, 0.1)]
    for epoch, (acc, loss) in enumerate(scores, 1):
        torch.nn.init.constant_(model.weight, epoch)
        learn.recorder.rows.append(dict(epoch=epoch, valid_acc=acc, valid_loss=loss))
        keep.after_epoch()
    assert keep.epoch_number == 3 and keep.state["weight"].item() == 3


def test_bf16_trains_on_a_cpu_and_float32_evaluates(make):
    _, learn = make(precision="bf16")
    kinds = []
    learn.model.stem[0].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    learn.fit(2, 0.05)
    assert set(kinds) == {torch.bfloat16} and next(learn.model.parameters()).dtype == torch.float32
    kinds.clear()
    logits_of(learn, learn.dls.test)
    assert set(kinds) == {torch.float32}
    assert learn.recorder.rows[1]["train_loss"] < learn.recorder.rows[0]["train_loss"]


def test_precision_auto_is_what_the_chip_has(parse, monkeypatch):
    device = torch.device("cpu")
    arm = ({"bf16": True}, "bf16"), ({"neon": True}, "float32")
    intel = ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "float32")
    for chip, expected in (*arm, *intel):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda chip=chip: chip)
        assert machine.pick_precision(parse(), device) == expected


def test_images_and_weights_are_channels_last(make):
    _, learn = make()
    assert learn.dls.train.one_batch()[0].is_contiguous(memory_format=torch.channels_last)
    assert learn.model.stages[0][0][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_kept_and_not_cleared_anew():
    """The same 64 MiB, taken and freed eight times, cost page faults each time; kept, none at all.

    The first may still. An aligned block leaves small pieces beside it, and glibc puts the first seven of a size aside
    (its tcache): while they lie there, they hold the freed blocks apart from each other.
    """
    script = """if 1:
    import resource, torch
    from lib import machine
    def faults(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults(8))
    machine.keep_memory()
    faults(32)
    print(faults(8))
    """
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    given_back, kept = map(int, out.split())
    pages = 2**26 // 4096  # of one tensor; of huge pages, which the system gives where it can, there are fewer
    assert kept < pages / 50 and kept < given_back / 2


HUGE = Path("/sys/kernel/mm/transparent_hugepage")
ASKED_FOR = HUGE.exists() and "[madvise]" in (HUGE / "enabled").read_text()  # with "always" all tensors have them


@pytest.mark.skipif(not ASKED_FOR, reason="the system gives no huge pages, or gives them unasked")
@pytest.mark.skipif(HUGE.exists() and int((HUGE / "hpage_pmd_size").read_text()) > 2**21, reason="they are too huge")
def test_large_tensors_lie_in_huge_pages():
    script = """if 1:
    import torch
    from lib import machine
    machine.keep_memory()
    kept = torch.ones(2**24)
    line = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
    print(line.split()[1])
    """
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert int(out) > 2**15  # kB; half of the tensor, as the system may not have as many at hand


def test_label_smoothing_is_of_the_training_loss_alone(make):
    config, learn = make("--label-smoothing", 0.2)
    assert learn.loss_func.func.label_smoothing == 0.2
    z, y = logits_of(learn, learn.dls.valid)
    assert learn.validate()[0] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    at_first = learn.twin().model.train()  # with a rate of 0 all of the epoch is trained on the first weights
    batches = [[t.as_subclass(torch.Tensor) for t in b] for b in learn.dls.train.new()]
    losses = [F.cross_entropy(at_first(x), y, reduction="sum", label_smoothing=0.2) for x, y in batches]
    learn.fit(1, 0.0)
    expected = sum(losses).item() / sum(len(y) for _, y in batches)
    assert learn.recorder.rows[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
