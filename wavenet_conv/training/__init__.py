"""Training on shared nodes."""

from ..recipe import PRESETS, TEACHERS, Recipe, split_names, teachers_of
from .corpus import Batch, Corpus
from .fitting import fit, fit_preset, new_model, run
from .loss import evaluate, predictions, shared_logits, total_loss
from .trainer import Trainer

__all__ = [
    "PRESETS",
    "TEACHERS",
    "Batch",
    "Corpus",
    "Recipe",
    "Trainer",
    "evaluate",
    "fit",
    "fit_preset",
    "new_model",
    "predictions",
    "run",
    "shared_logits",
    "split_names",
    "teachers_of",
    "total_loss",
]
