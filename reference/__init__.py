"""The explicit tree as the lecture writes it, and its loop over examples; imports nothing of `wavenet_conv`."""

from .conversion import fold_batch_norm, from_conv
from .layers import BatchNorm1d, Embedding, FlattenConsecutive, GatedBlock, Linear, ReLU, Sequential, Tanh
from .networks import NETWORKS, build, lecture_network
from .running import context_of, loop_logits, window_logits, windows
from .sampling import inverse_cdf, multinomial, sample_loop
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
    "fold_batch_norm",
    "from_conv",
    "inverse_cdf",
    "lecture_network",
    "loop_logits",
    "multinomial",
    "sample_loop",
    "split_names",
    "train",
    "window_logits",
    "windows",
]
