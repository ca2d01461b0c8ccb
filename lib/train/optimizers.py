"""Optimizers: torch's own behind fastai's face, in layer groups, with weight decay on weights alone."""

from functools import partial

import torch
from fastai.optimizer import OptimWrapper, detuplify_pg, set_item_pg
from fastcore.foundation import L

from lib.config import MOMENTUM

OPTIMIZERS = {
    "sgd": lambda params, lr, mom: torch.optim.SGD(params, lr, mom),
    "nesterov": lambda params, lr, mom: torch.optim.SGD(params, lr, mom, nesterov=mom > 0),
    "rmsprop": lambda params, lr, mom: torch.optim.RMSprop(params, lr),
    "adagrad": lambda params, lr, mom: torch.optim.Adagrad(params, lr),
    "adam": lambda params, lr, mom: torch.optim.Adam(params, lr, (mom, 0.999)),
}  # name -> function(parameter groups, learning rate, momentum)
EMBEDDINGS = ("class_token", "cls_token", "pos_embed", "pos_embedding", "relative_position_bias_table")


def undecayed(model):
    """The parameters that weight decay spares: biases, norms, and the tokens and positions of transformers.

    Networks of timm name some of their own in `no_weight_decay`.
    """
    named = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    spared = lambda name, p: p.ndim <= 1 or name in named or name.split(".")[-1] in EMBEDDINGS
    return [p for name, p in model.named_parameters() if spared(name, p)]


def maker(name, mom):
    """fastai's `opt_func` for the optimizer `name` of OPTIMIZERS: (lists of parameters, lr) -> GroupedOptimizer."""
    return partial(GroupedOptimizer, opt=partial(OPTIMIZERS[name], mom=mom), has_momentum=name in MOMENTUM)


class GroupHypers(dict):
    """The hyperparameters of one layer group. What is written into it reaches the optimizer.

    fastai's own wrapper returns copies, so its ReduceLROnPlateau changes nothing there (fastai issue 4046).
    """

    def __init__(self, optimizer, group, values):
        super().__init__(values)
        self.optimizer, self.group = optimizer, group

    def __setitem__(self, name, value):
        """Sets a hyperparameter: weight decay where it acts, momentum where there is one."""
        optimizer = self.optimizer
        if name == "mom" and not optimizer.has_momentum:
            return
        value = value.item() if hasattr(value, "item") else value  # numpy's numbers could not be loaded again
        super().__setitem__(name, value)
        decaying, spared = optimizer.opt.param_groups[2 * self.group : 2 * self.group + 2]
        set_item_pg(decaying, optimizer.bwd_map[name], value)
        set_item_pg(spared, optimizer.bwd_map[name], 0.0 if name == "wd" else value)


class GroupedOptimizer(OptimWrapper):
    """A torch optimizer as fastai sees one: a group for each group of layers, so slices and `freeze` mean layers.

    Inside, torch has two groups for each of them: the parameters that decay, and those with `do_wd` False in `state`.
    """

    param_lists = None  # a plain attribute, not OptimWrapper's property: lists of layer groups, not of torch's groups

    def __init__(
        self,
        params,  # lists of parameters, a list for each group of layers
        lr,  # learning rate
        opt,  # function(parameter groups, lr) -> torch optimizer
        has_momentum=True,  # False: its momentum is 0, whatever a schedule sets
        **options,  # of the torch optimizer; `hp_map` as fastai's OptimWrapper
    ):
        super().__init__([list(group) for group in params], opt, lr=lr, **options)
        self.has_momentum = has_momentum and "mom" in self.bwd_map
        self.param_lists = L(list(group["params"]) for group in self.opt.param_groups)

    def split_by_decay(self):
        """Splits each group of layers in two. Call it once, when `state` says which parameters do not decay."""
        groups = []
        for group in self.opt.param_groups:
            for decays in (True, False):
                params = [p for p in group["params"] if self.state[p].get("do_wd", True) is decays]
                groups.append({**group, "params": params})
        self.opt.param_groups[:] = groups

    @property
    def hypers(self):
        groups = map(detuplify_pg, self.opt.param_groups[::2])
        named = [{self.fwd_map.get(k, k): v for k, v in group.items() if v is not None} for group in groups]
        none = {} if self.has_momentum else {"mom": 0.0}
        return L(GroupHypers(self, i, {**values, **none}) for i, values in enumerate(named))

    def _set_hyper(self, name, values):
        for i, value in enumerate(values):
            GroupHypers(self, i, {})[name] = value  # `hypers` would read all of them, in every step
