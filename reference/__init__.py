"""The explicit tree, written as the lecture writes it, and its per-example loop: what the slid model must equal.

Imports torch and einops, and nothing of `wavenet_conv`.
"""

from .conversion import from_conv
from .layers import BatchNorm1d, Embedding, FlattenConsecutive, Linear, Sequential, Tanh
from .networks import NETWORKS, build, lecture_network
from .running import context_of, loop_logits, window_logits, windows

__all__ = [
    "NETWORKS",
    "BatchNorm1d",
    "Embedding",
    "FlattenConsecutive",
    "Linear",
    "Sequential",
    "Tanh",
    "build",
    "context_of",
    "from_conv",
    "lecture_network",
    "loop_logits",
    "window_logits",
    "windows",
]
