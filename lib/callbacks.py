"""Callbacks: the record of a fit, plateau, the best weights, and what is printed while it runs."""

import copy
import math
import time

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from safetensors.torch import save as to_safetensors
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from lib import ranks
from lib.config import OneLine
from lib.schedules import Plateau, grown

CHECK_EVERY = 50  # batches between looks at the losses: each look waits for the device


def mixed(*numbers):
    """One seed of 32 bits (torch's CPU generator takes no more) from several whole numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Diverged(OneLine):
    """The training loss is not finite any more (exit status 3); names the epoch, batch and rate where it began."""


class EpochRecorder(Callback):
    """The record of a fit, and its guard against a loss that is not finite.

    `rows` has a dict an epoch: the columns of results.csv. `train_loss` is the mean over the epoch's images, each with
    the loss it had when it was trained on (fastai's is a moving average); `train_acc` is of the same augmented batches.
    Nothing waits for the device inside the batch loop but the look at the losses, every 50 batches and at the end.
    """

    name, order = "recorder", 50

    def __init__(self):
        self.reset()

    def reset(self):
        self.rows, self.start, self.pending = [], time.perf_counter(), []

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = list(state["rows"])
        self.start = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0)

    def partial(self):
        """The record of the epoch that is under way, as plain values."""
        self.check()
        seconds = time.perf_counter() - self.start
        return {"now": self.now, "sums": [self.loss_sum, self.correct, self.n], "seconds": seconds}

    def go_on(self, partial):
        """Takes up the record of an epoch where `partial` left it; call it behind `before_train`."""
        self.now, (self.loss_sum, self.correct, self.n) = dict(partial["now"]), partial["sums"]
        self.start = time.perf_counter() - partial["seconds"]

    def before_train(self):
        hypers = self.opt.hypers[0]
        self.dl.epoch = self.learn.epochs_trained
        self.now = {
            "epoch": self.epoch + 1,
            "seconds": None,
            "lr": hypers["lr"],
            "momentum": hypers.get("mom", 0.0),
            "batch_size": getattr(self.dl, "bs", None) or self.dl.batch_size,
        }
        self.loss_sum, self.correct, self.n, self.n_batches = 0.0, 0, 0, len(self.dl)

    def before_batch(self):
        learn = self.learn
        if learn.training:  # the schedule has set what this step is made with; behind it a warm-up takes its part back
            vars(self)["rate"] = learn.opt.opt.param_groups[0]["lr"]
            if learn.iter == 0:
                self.now |= {"lr": self.rate, "momentum": learn.opt.hypers[0].get("mom", 0.0)}

    def after_batch(self):
        learn = self.learn
        if not learn.training:
            return
        n = learn.dl.own(learn.iter) if learn.parallel else len(learn.yb[0])
        correct = (learn.pred.detach().argmax(-1) == learn.yb[0]).sum()
        self.pending.append((learn.iter, self.rate, n, learn.loss, correct))
        if len(self.pending) >= CHECK_EVERY:
            self.check()

    def check(self):
        """Adds up the batches since the last look. Raises Diverged naming the first whose loss is not finite."""
        if not self.pending:
            return
        batches, lrs, sizes, losses, correct = zip(*self.pending)
        sizes, losses = torch.tensor(sizes, dtype=torch.float64), torch.stack(losses).cpu().double()
        sums = torch.stack([losses * sizes, torch.stack(correct).cpu() * (sizes > 0), sizes])
        if self.learn.parallel:
            ranks.total(sums)
        losses = sums[0] / sums[2]
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            i = int(bad[0])
            raise Diverged(
                f"the loss is {losses[i].item()} at epoch {self.epoch + 1}, batch {batches[i] + 1}, lr {lrs[i]:.3g}; "
                f"try a smaller --lr, such as {lrs[i] / 10:.1g}"
            )
        self.loss_sum += sums[0].sum().item()
        self.correct += int(sums[1].sum())
        self.n += int(sums[2].sum())
        self.latest, self.pending = {"loss": losses.mean().item(), "acc": (sums[1].sum() / sums[2].sum()).item()}, []

    def after_train(self):
        self.check()
        if self.n:
            self.now |= {"train_loss": self.loss_sum / self.n, "train_acc": self.correct / self.n}
        self.learn.epochs_trained += 1

    def record_evaluation(self, name, loss, acc):
        self.now |= {f"{name}_loss": loss, f"{name}_acc": acc}

    def after_epoch(self):
        for name, value in self.now.items():
            if name.endswith("_loss") and not math.isfinite(value):  # what the epoch's last step did
                raise Diverged(
                    f"{name} is {value} after epoch {self.epoch + 1}, batch {self.n_batches}, lr {self.now['lr']:.3g}; "
                    f"try a smaller --lr, such as {self.now['lr'] / 10:.1g}"
                )
        self.now["seconds"] = time.perf_counter() - self.start
        self.rows.append(self.now)

    @property
    def metric_names(self):
        """As fastai's Recorder has it: the names of `values`, behind 'epoch'."""
        return ["epoch", *self.values_of(self.rows[-1] if self.rows else {}), "time"]

    @property
    def values(self):
        """As fastai's Recorder has it: a list of numbers an epoch."""
        return [list(self.values_of(row).values()) for row in self.rows]

    @staticmethod
    def values_of(row):
        return {k: v for k, v in row.items() if k.endswith(("_loss", "_acc"))}


def check_sole_owner(learn):
    """Raises ValueError where two callbacks of `learn` set the learning rate."""
    owners = [cb for cb in learn.cbs if isinstance(cb, (ParamScheduler, Scheduled, ReduceLROnPlateau))]
    if len(owners) > 1:
        raise ValueError("two owners of the learning rate: " + " and ".join(type(cb).__name__ for cb in owners))


class Scheduled(Callback):
    """Sets learning rate and momentum before each batch. What it sets is a function of the epochs done: no state."""

    order = 40  # ahead of the record, which writes down the first step of an epoch

    def __init__(
        self,
        at,  # function: epochs done (with fraction) -> {"lr": …} or {"lr": …, "mom": …}
    ):
        self.at = at

    def before_fit(self):
        check_sole_owner(self.learn)

    def before_batch(self):
        learn = self.learn
        if learn.training:
            hypers = self.at(learn.epoch + learn.iter / learn.n_iter)
            if not learn.has_momentum:
                hypers.pop("mom", None)
            learn.opt.set_hypers(**hypers)


class WarmUp(Callback):
    """Holds the learning rate back in the first epochs: times a factor that rises from 1/4 to 1, straight.

    Gradual warm-up: Goyal et al., arXiv 1706.02677. Between batches the rate is what its owner set.
    """

    order, start = 45, 0.25

    def __init__(
        self,
        epochs,  # until the factor is 1; may have a fraction
    ):
        self.epochs, self.kept = epochs, None

    def before_batch(self):
        learn = self.learn
        done = (learn.epoch + learn.iter / learn.n_iter) / self.epochs
        if learn.training and done < 1:
            self.kept = [h["lr"] for h in learn.opt.hypers]
            factor = self.start + (1 - self.start) * done
            learn.opt.set_hypers(lr=[lr * factor for lr in self.kept])

    def after_batch(self):
        if self.kept:
            self.learn.opt.set_hypers(lr=self.kept)
            self.kept = None


class ReduceLROnPlateau(Callback):
    """Multiplies the learning rate by `factor` where `Plateau` sees one. Same rates as torch's scheduler of that name.

    torch.optim.lr_scheduler.ReduceLROnPlateau is the reference, bad-epoch count and all: with patience 2 the third bad
    epoch reduces. It is the only owner of the learning rate: raises ValueError beside fastai's schedulers.
    """

    order = 60

    def __init__(
        self,
        monitor="valid_loss",  # a metric of the record
        mode="min",  # min: lower is better; max
        factor=0.1,  # below 1
        patience=10,  # bad epochs forgiven
        threshold=1e-4,  # change that counts as better
        threshold_mode="rel",  # rel: share of the best; abs
        cooldown=0,  # epochs after a reduction that are not counted
        min_lr=0.0,  # the rate does not go below
        eps=1e-8,  # a smaller change is not made
    ):
        if factor >= 1:
            raise ValueError(f"factor must be below 1, not {factor}")
        self.monitor, self.factor, self.min_lr, self.eps = monitor, factor, min_lr, eps
        self.options = dict(
            mode=mode, threshold=threshold, threshold_mode=threshold_mode, patience=patience, cooldown=cooldown
        )
        self.plateau = Plateau(**self.options)

    def before_fit(self):
        self.run = not hasattr(self, "lr_finder") and not hasattr(self, "gather_preds")  # as fastai's trackers
        if not self.run:
            return
        check_sole_owner(self.learn)
        self.plateau, self.reductions = Plateau(**self.options), []

    def after_epoch(self):
        recorder = self.learn.recorder
        found = dict(zip(recorder.metric_names[1:], recorder.values[-1]))
        if self.monitor not in found:
            raise ValueError(f"monitor {self.monitor!r} is not among {', '.join(found)}")
        if self.plateau.step(found[self.monitor]):
            self.reduce()

    def reduce(self, factor=None):
        old = [h["lr"] for h in self.opt.hypers]
        new = [max(lr * (factor or self.factor), self.min_lr) for lr in old]
        new = [n if o - n > self.eps else o for o, n in zip(old, new)]
        self.opt.set_hypers(lr=new)
        if new != old:
            self.old_lr = old[0]
            self.reductions.append((self.epoch + 1, new[0]))

    def state_dict(self):
        return {"plateau": self.plateau.state_dict(), "reductions": list(self.reductions)}

    def load_state_dict(self, state):
        self.plateau.load_state_dict(state["plateau"])
        self.reductions = [tuple(r) for r in state["reductions"]]


class GrowBatchOnPlateau(ReduceLROnPlateau):
    """On a plateau the training batch grows by 1 / factor, up to a largest; what is left shrinks the learning rate.

    "Don't decay the learning rate, increase the batch size" (Smith et al., arXiv 1711.00489): lr / batch size falls as
    under ReduceLROnPlateau. `growths` lists (epoch, batch size). The loader has its own batch size back after the fit.
    """

    def __init__(
        self,
        max_batch_size,  # images
        monitor="valid_loss",  # as ReduceLROnPlateau
        **options,  # as ReduceLROnPlateau
    ):
        super().__init__(monitor, **options)
        self.max_batch_size, self.growths = max_batch_size, []

    def before_fit(self):
        super().before_fit()
        self.first, self.growths = self.learn.dls.train.bs, []

    def reduce(self):
        dl = self.learn.dls.train
        old, new = dl.bs, grown(dl.bs, self.factor, self.max_batch_size)
        if new > old:
            dl.bs = new
            self.growths.append((self.epoch + 1, new))
        if new >= self.max_batch_size:
            super().reduce(min(self.factor * new / old, 1.0))

    def after_fit(self):
        self.learn.dls.train.bs = self.first

    def state_dict(self):
        return {**super().state_dict(), "growths": list(self.growths)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.growths = [tuple(g) for g in state["growths"]]
        if self.growths:
            self.learn.dls.train.bs = self.growths[-1][1]


class Hold(Callback):
    """In some epochs `parameters` stay: without a gradient no optimizer touches them, their decay or their state.

    What stays is a function of the epochs trained, as fits that are resumed need it. One learning rate drives all.
    """

    order = 61  # ahead of gradient noise, which is of what has a gradient

    def __init__(
        self,
        parameters,  # those that stay
        epochs,  # in which they do, counted over all fits: a range
    ):
        self.parameters, self.epochs = [p for p in parameters if p.requires_grad], epochs

    def before_train(self):
        self.held = self.learn.epochs_trained in self.epochs
        if not self.learn.parallel:  # which waits for all the gradients that it has seen at its start
            self.learning(not self.held)

    def before_step(self):
        if self.held:
            for p in self.parameters:
                p.grad = None

    def after_fit(self):
        self.learning(True)

    def learning(self, on):
        for p in self.parameters:
            p.requires_grad_(on)


class SmallImages(Callback):
    """In the first epochs images are smaller, in training, range test and evaluation: progressive resizing.

    What an image of 3/4 of the side costs is about 9/16, and the rate is high meanwhile, when much is learned that
    needs no detail (Howard & Gugger, Deep Learning for Coders, ch. 7; Touvron et al., arXiv 1906.06423, on why
    evaluation goes along). A function of the epochs trained. Behind the fit images are as they are.
    """

    order = -1  # ahead of what looks at the images

    def __init__(
        self,
        epochs,  # so long, counted over all fits
        side,  # pixels
    ):
        self.epochs, self.small = epochs, side

    def after_create(self):
        self.learn.side = self.small if self.learn.epochs_trained < self.epochs else None

    before_train = after_create

    def after_fit(self):
        self.learn.side = None


class GradNoise(Callback):
    """Adds Gaussian noise to the gradient, of variance eta / (1 + t)^0.55 at step t (Neelakantan et al., 1511.06807).

    The noise is a function of (seed, step). With `plateau` it is added only in the epoch behind each plateau.
    """

    order, decay = 62, 0.55  # behind the record

    def __init__(
        self,
        eta,  # variance at the first step
        seed=0,  # whole number, 0 to 2**32 - 1
        monitor="valid_loss",  # with plateau: a metric of the record
        plateau=None,  # a Plateau that says when
    ):
        self.eta, self.seed, self.monitor, self.plateau = eta, seed, monitor, plateau
        self.steps, self.on = 0, plateau is None

    def before_step(self):
        step, self.steps = self.steps, self.steps + 1
        if not self.on:
            return
        learn = self.learn
        if learn.scaler:
            learn.scaler.unscale_(learn.opt.opt)
        sigma = math.sqrt(self.eta / (1 + step) ** self.decay)
        parameters = [p for p in learn.model.parameters() if p.grad is not None]
        generator = torch.Generator(parameters[0].device).manual_seed(mixed(self.seed, step))
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            p.grad.add_(noise, alpha=sigma)

    def after_epoch(self):
        if self.plateau:
            self.on = self.plateau.step(self.recorder.rows[-1][self.monitor])
            if self.on:
                print(f"plateau: {self.monitor} stands still; the next epoch's gradients are perturbed", flush=True)

    def state_dict(self):
        return {"steps": self.steps, "on": self.on, "plateau": self.plateau and self.plateau.state_dict()}

    def load_state_dict(self, state):
        self.steps, self.on = state["steps"], state["on"]
        if self.plateau:
            self.plateau.load_state_dict(state["plateau"])


class EMA(Callback):
    """Evaluates and keeps an exponential moving average a of the weights w: a <- d a + (1 - d) w behind each step.

    An average has less of the noise that a large rate leaves in the weights (Polyak & Juditsky, SIAM J. Control Optim.
    30, 1992). d is `decay`, at first (1 + t) / (10 + t) at step t, so that the start is soon forgotten. BatchNorm's
    statistics are averaged along. Training is as without it; behind the fit the model has the averaged weights.
    """

    order = 63  # ahead of what keeps or evaluates

    def __init__(
        self,
        decay,  # below 1; 1 / (1 - decay) is about the number of steps that count
    ):
        self.decay, self.steps = decay, 0

    def before_fit(self):
        self.learn.average, self.steps = copy.deepcopy(self.learn.model).requires_grad_(False), 0
        of = lambda model: [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self.tensors = of(self.learn.average), of(self.learn.model)  # they stay where they are until the fit's end

    def after_step(self):
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(*self.tensors, self.steps)
        self.steps += 1

    def after_fit(self):
        if self.learn.average is not None:
            self.learn.model.load_state_dict(self.learn.average.state_dict())
            self.learn.average = self.tensors = None

    def state_dict(self):
        return {"steps": self.steps, "average": self.learn.average.state_dict()}

    def load_state_dict(self, state):
        self.steps = int(state["steps"])
        self.learn.average.load_state_dict(state["average"])


class KeepBest(Callback):
    """Keeps the weights of the epoch with the best valid accuracy (ties: lower valid loss), in memory and as a file.

    An epoch on images of their own size is better than any on smaller ones.
    """

    order = 70

    def __init__(
        self,
        save=None,  # called with the safetensors bytes of each new best
    ):
        self.save, self.best, self.epoch_number, self.state = save, (), None, None

    def after_epoch(self):
        row = self.recorder.rows[-1]
        score = (self.learn.side is None, row["valid_acc"], -row["valid_loss"])
        if score > self.best:
            self.best, self.epoch_number = score, row["epoch"]
            self.state = {k: v.detach().cpu().clone().contiguous() for k, v in self.evaluated.state_dict().items()}
            if self.save:
                self.save(to_safetensors(self.state))

    def state_dict(self):
        return {"best": self.best, "epoch_number": self.epoch_number, "state": self.state}

    def load_state_dict(self, state):
        self.best, self.epoch_number, self.state = tuple(state["best"]), state["epoch_number"], state["state"]


class Progress(Callback):
    """A line an epoch; on a terminal a bar over its batches as well."""

    order = 65

    def __init__(
        self,
        bar=True,  # whether a bar may be drawn; it is where stderr is a terminal
        on_epoch=None,  # called with the rows so far after each epoch
    ):
        self.bar, self.on_epoch = bar, on_epoch

    def before_train(self):
        desc = f"epoch {self.epoch + 1}/{self.n_epoch}"
        options = dict(unit="batch", leave=False, mininterval=0.2, disable=None if self.bar else True)
        self.tqdm = tqdm(total=len(self.dls.train), initial=self.learn.first_batch, desc=desc, **options)

    def after_batch(self):
        if self.training:
            self.tqdm.update()
            record = self.recorder
            if not record.pending:
                done = (self.epoch + (self.iter + 1) / self.n_iter) / self.n_epoch
                left = tqdm.format_interval((time.perf_counter() - record.start) * (1 - done) / done)  # of all epochs
                latest = {name: f"{value:.3f}" for name, value in record.latest.items()}
                self.tqdm.set_postfix(**latest, lr=f"{record.rate:.3g}", left=left)

    def after_train(self):
        self.close()

    def close(self):
        """Takes the bar off the screen."""
        if hasattr(self, "tqdm"):
            self.tqdm.close()

    def after_epoch(self):
        rows = self.recorder.rows
        print(epoch_line(rows[-1], self.n_epoch), flush=True)
        owner = next((cb for cb in self.learn.cbs if isinstance(cb, ReduceLROnPlateau)), None)
        for name, changes in (("lr", owner.reductions), ("batch_size", getattr(owner, "growths", []))) if owner else ():
            if changes and changes[-1][0] == rows[-1]["epoch"]:
                old = owner.old_lr if name == "lr" else rows[-1][name]
                change = f"{name.replace('_', ' ')} {old:.4g} -> {changes[-1][1]:.4g}"
                print(f"plateau: {owner.monitor} stands still; {change}", flush=True)
        if self.on_epoch:
            self.on_epoch(rows)


def epoch_line(row, n_epoch):
    parts = [f"epoch {row['epoch']:>{len(str(n_epoch))}}/{n_epoch}  lr {row['lr']:.3g}"]
    for name in ("train", "valid", "test"):
        if f"{name}_acc" in row:
            parts.append(f"{name} loss {row[f'{name}_loss']:.4f} acc {row[f'{name}_acc']:.4f}")
    return "  ".join([*parts, f"{row['seconds']:.0f} s"])
