"""Training: learner, schedules, range test, checkpoints."""

from lib.train.learner import SGDLearner, build
from lib.train.plateau import Plateau, ReduceLROnPlateau
from lib.train.schedules import fit, trace

__all__ = ["Plateau", "ReduceLROnPlateau", "SGDLearner", "build", "fit", "trace"]
