"""The explicit WaveNet tree of the makemore lecture, slid over whole names as dilated causal convolutions."""

from .equivalence import verify
from .errors import WaveNetConvError
from .engine.slide import FoldedWaveNet, fold_batch_norm
from .mapping import from_tree
from .model import ConvWaveNet, WaveNetConfig
from .precision import exact_float32
from .sampling import sample, sample_stream
from .scoring import Scorer
from .engine.stream import Stream
from .vocabulary import Vocabulary

__all__ = [
    "ConvWaveNet",
    "FoldedWaveNet",
    "Scorer",
    "Stream",
    "Vocabulary",
    "WaveNetConfig",
    "WaveNetConvError",
    "exact_float32",
    "fold_batch_norm",
    "from_tree",
    "sample",
    "sample_stream",
    "verify",
]
