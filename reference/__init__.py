"""The explicit tree as the lecture writes it, and its loop over examples; imports nothing of `wavenet_conv`."""

# ruff: noqa: F401

from .conversion import fold_batch_norm, from_conv
from .layers import (
    GELU,
    BatchNorm1d,
    Embedding,
    FlattenConsecutive,
    GatedBlock,
    LayerNorm,
    Linear,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    Tanh,
)
from .networks import NETWORKS, build, lecture_network
from .running import context_of, loop_logits, window_logits, windows
from .sampling import inverse_cdf, multinomial, sample_loop
from .training import evaluate, examples, split_names, train
