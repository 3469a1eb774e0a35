"""Training on shared nodes. A module is imported when one of its names is used; `recipe` needs no PyTorch."""

# ruff: noqa: F401
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .corpus import Batch, Corpus
    from .fitting import fit, fit_preset, new_model, run
    from .loss import evaluate, predictions, shared_logits, total_loss
    from .recipe import PRESETS, TEACHERS, Recipe, split_names, teachers_of
    from .trainer import Trainer

_NAMES = {
    "corpus": ("Batch", "Corpus"),
    "fitting": ("fit", "fit_preset", "new_model", "run"),
    "loss": ("evaluate", "predictions", "shared_logits", "total_loss"),
    "recipe": ("PRESETS", "TEACHERS", "Recipe", "split_names", "teachers_of"),
    "trainer": ("Trainer",),
}
__all__ = [name for names in _NAMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
