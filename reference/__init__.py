"""The explicit tree, written as the lecture writes it, and its per-example loop: what the slid model must equal.

Imports torch and einops, and nothing of `wavenet_conv`.
"""

from .conversion import from_conv
from .layers import BatchNorm1d, Embedding, FlattenConsecutive, GatedBlock, Linear, ReLU, Sequential, Tanh
from .networks import NETWORKS, build, lecture_network
from .running import context_of, loop_logits, window_logits, windows
from .training import evaluate, examples, split_names, train

__all__ = [
    "NETWORKS",
    "BatchNorm1d",
    "Embedding",
    "FlattenConsecutive",
    "GatedBlock",
    "Linear",
    "ReLU",
    "Sequential",
    "Tanh",
    "build",
    "context_of",
    "evaluate",
    "examples",
    "from_conv",
    "lecture_network",
    "loop_logits",
    "split_names",
    "train",
    "window_logits",
    "windows",
]
