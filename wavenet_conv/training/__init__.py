"""Training on shared nodes."""

# ruff: noqa: F401
from ..recipe import PRESETS, TEACHERS, Recipe, split_names, teachers_of
from .corpus import Batch, Corpus
from .fitting import fit, fit_preset, new_model, run
from .loss import evaluate, predictions, shared_logits, total_loss
from .trainer import Trainer
