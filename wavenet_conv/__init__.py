"""The explicit WaveNet tree of the makemore lecture, slid over whole names as dilated causal convolutions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, save_checkpoint
    from .config import WaveNetConfig
    from .engine.slide import FoldedWaveNet, fold_batch_norm
    from .engine.stream import Stream
    from .equivalence import verify
    from .errors import WaveNetConvError
    from .mapping import from_tree
    from .model import ConvWaveNet
    from .precision import exact_float32
    from .sampling import sample, sample_stream
    from .scoring import Scorer
    from .vocabulary import Vocabulary

__version__ = "0.1.0"

__all__ = [
    "ConvWaveNet",
    "FoldedWaveNet",
    "Scorer",
    "Stream",
    "Vocabulary",
    "WaveNetConfig",
    "WaveNetConvError",
    "__version__",
    "exact_float32",
    "fold_batch_norm",
    "from_tree",
    "load_checkpoint",
    "sample",
    "sample_stream",
    "save_checkpoint",
    "verify",
]

# PyTorch is imported with the first public name that is used, so that commands start fast.
_NAMES = {
    "checkpoint": ("load_checkpoint", "save_checkpoint"),
    "config": ("WaveNetConfig",),
    "engine.slide": ("FoldedWaveNet", "fold_batch_norm"),
    "engine.stream": ("Stream",),
    "equivalence": ("verify",),
    "errors": ("WaveNetConvError",),
    "mapping": ("from_tree",),
    "model": ("ConvWaveNet",),
    "precision": ("exact_float32",),
    "sampling": ("sample", "sample_stream"),
    "scoring": ("Scorer",),
    "vocabulary": ("Vocabulary",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
