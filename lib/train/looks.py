"""Looks at a learner that change nothing: evaluation, predictions, summary, range test."""

import copy
import warnings
from collections import namedtuple
from contextlib import ExitStack, contextmanager

import torch
from fastai.callback.core import TrainEvalCallback
from fastai.callback.hook import HookCallback
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler, SuggestionMethod
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.learner import CastToTensor, Learner, Recorder, replacing_yield
from fastcore.basics import noop, tuplify
from fastcore.foundation import L
from fastcore.xtras import ContextManagers

from lib.cli import BadInput
from lib.train import lr_range, ranks
from lib.train.randomness import preserved_generators
from lib.train.recorder import Evaluation

STEERING = (TrackerCallback, ParamScheduler, CSVLogger, ShowGraphCallback, Recorder)  # steer training, or record it
OF_FITS = (HookCallback, ProgressCallback, ranks.DataParallel)  # take part in looks, but not in a range test
NEEDED = (TrainEvalCallback, CastToTensor, ranks.DataParallel)  # every look needs them
PLACE = "epoch", "rng"  # what a pass moves on in a loader: in ours, and in fastai's
LOOP = "training epoch iter n_iter dl xb yb pred loss loss_grad pct_train train_iter n_epoch smooth_loss".split()


def looks_too(cb):
    """Whether a callback takes part in looks: all do but those that steer training or keep its record."""
    return not getattr(cb, "train_only", False) and not isinstance(cb, STEERING)


class Looks(Learner):
    """The evaluating part of SGDLearner. fastai's own methods announce a fit to all callbacks, and erase the record."""

    fitting = False  # whether a fit is under way

    @contextmanager
    def undisturbed(self, takes_part=looks_too):
        """Inside, only callbacks that `takes_part` admits are called. Afterwards loop, modes and loaders are as before.

        In the middle of a fit the global random generators are restored as well.
        """
        loop, cbs = {name: vars(self)[name] for name in LOOP if name in vars(self)}, self.cbs
        modes = [(m, m.training) for m in self.model.modules()]
        places = [(dl, {k: copy.copy(v) for k, v in vars(dl).items() if k in PLACE}) for dl in self.dls.loaders]
        self.cbs = L(cb for cb in cbs if takes_part(cb))
        try:
            with preserved_generators(self.device) if self.fitting else ExitStack():
                yield self
        finally:
            self.cbs = cbs
            vars(self).update(loop)
            for m, training in modes:
                m.training = training
            for dl, place in places:
                vars(dl).update(place)

    def __enter__(self):
        """As fastai's, undisturbed. In the middle of a fit, callbacks are not told that one begins."""
        with ExitStack() as look:
            look.enter_context(self.undisturbed())
            if not self.fitting:
                super().__enter__()
            self._looks = [*getattr(self, "_looks", []), look.pop_all()]
        return self

    def __exit__(self, *exception):
        *self._looks, look = self._looks
        with look:
            if not self.fitting:
                super().__exit__(*exception)

    def validation_context(self, cbs=None, inner=False):
        context = super().validation_context(cbs, inner)
        return ContextManagers([*context.default, self.undisturbed()]) if inner else context

    def _do_epoch_validate(self, ds_idx=1, dl=None):
        dl = self.dls[ds_idx] if dl is None else dl
        if getattr(getattr(dl, "dataset", None), "split_idx", None) == 0:
            dl.epoch = self.epoch  # each pass of `tta` is augmented anew
        super()._do_epoch_validate(ds_idx, dl)

    def evaluate(self, dl):
        """One pass over a loader, or a list of batches, without the user's callbacks: an Evaluation."""
        evaluation = Evaluation([])
        with self.added_cbs(evaluation), self.undisturbed(lambda cb: cb is evaluation or isinstance(cb, NEEDED)):
            self._do_epoch_validate(dl=dl)
        return evaluation

    def validate(self, ds_idx=1, dl=None, cbs=None):
        """[loss, metrics …] on a loader, by default valid, as fastai's. It touches no record."""
        evaluation = Evaluation(copy.copy(metric) if self.fitting else metric for metric in self.metrics)
        with self.validation_context(L(cbs) + evaluation):
            self._do_epoch_validate(ds_idx, dl)
        self.final_record = evaluation.values
        return self.final_record

    def to_detach(self, b, cpu=True, gather=True):
        """As fastai's, but nothing is gathered from other ranks: `DataParallel` has done so, where they take part."""
        return super().to_detach(b, cpu, gather=False)

    def tta(self, *args, **kwargs):
        """As fastai's, undisturbed."""
        takes_part = (lambda cb: isinstance(cb, NEEDED)) if self.fitting else looks_too
        with self.no_logging(), self.undisturbed(takes_part):
            return super().tta(*args, **kwargs)

    @contextmanager
    def in_float32(self):
        """A context in which forward passes compute in float32."""
        return replacing_yield(self, "dtype", torch.float32)

    def load(self, file, device=None, with_opt=True, strict=True, weights_only=True):
        """As fastai's, but an optimizer state that does not fit raises, and no code in the file is ever run.

        SaveModelCallback loads nothing where the fit has saved nothing: the file would be another run's.
        """
        savers = [cb for cb in self.cbs if isinstance(cb, SaveModelCallback) and str(cb.fname) == file]
        if self.fitting and savers and savers[0].last_saved_path is None:
            text = f"{file}: this fit was never better than before, so nothing was saved and nothing is loaded"
            warnings.warn(text, stacklevel=2)
            return self
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Could not load the optimizer state")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            return super().load(file, device=device, with_opt=with_opt, strict=strict)

    def twin(self):
        """A learner that trains a copy of the model with an optimizer of its own.

        Callbacks that act on batches alone (mixup, clipping, the user's own) are copied. Those that act on epochs are
        left out: the test has no real epochs.
        """
        twin = copy.copy(self)
        twin.model, twin.opt, twin.cbs, twin.parallel = copy.deepcopy(self.model), None, L(), None
        twin.compiled = None
        twin.fitting, twin._looks, twin.logger, twin.create_mbar = False, [], noop, False
        twin.scaler = torch.amp.GradScaler("cuda") if self.scaler else None
        for cb in self.cbs:
            if looks_too(cb) and not isinstance(cb, OF_FITS) and not hasattr(type(cb), "after_epoch"):
                twin.add_cb(copy.copy(cb))
        return twin

    def lr_find(
        self,
        start_lr=1e-7,  # first rate; a list where layer groups differ
        end_lr=10,  # last rate
        num_it=100,  # updates
        stop_div=True,  # whether it ends where the loss diverges
        show_plot=True,  # whether the curve is drawn
        suggest_funcs=(SuggestionMethod.Valley),  # fastai's rules, or functions like them; None: no suggestion
    ):
        """The LR range test with fastai's arguments and its named tuple, on a copy: see `lr_range.find`.

        `recorder.lrs` and `recorder.losses` have the curve, smoothed without delay. Warns if the loss never falls.
        Raises BadInput if it diverges at once.
        """
        rules = {getattr(f, "func", f).__name__: f for f in tuplify(suggest_funcs or ())}
        test = lr_range.run(self, lr_range.rates(start_lr, end_lr, num_it), stop_div)
        if len(test.lrs) < 10:  # no rule reads so short a curve
            lr_range.check_fall(test)
        suggestions = [lr_range.suggest(rule, test) for rule in rules.values()]
        if not self.fitting:
            self.recorder.lrs, self.recorder.losses = test.lrs.tolist(), test.smooth_losses.tolist()
            if show_plot:
                self.recorder.plot_lr_find(skip_end=0, suggestions=[point for _, point in suggestions], nms=[*rules])
        try:
            lr_range.check_fall(test)
        except BadInput as e:
            warnings.warn(f"{e}; a suggestion says little", stacklevel=2)
        if rules:
            return namedtuple("SuggestedLRs", rules)(*(lr for lr, _ in suggestions))
