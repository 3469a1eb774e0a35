"""Counts of nodes: by hand, against the multiplicities that training uses, and against the nodes that `Scorer` shares.

`tests/benchmarks/test_harness.py` compares them with what models compute when they run.
"""

from __future__ import annotations

import pytest
import torch
from helpers import random_tree, trees_and_names
from hypothesis import given

from wavenet_conv import ConvWaveNet, WaveNetConfig, from_tree
from wavenet_conv.counts import count_nodes
from wavenet_conv.engine.shared import shared_logits_ref
from wavenet_conv.engine.weights import fold
from wavenet_conv.errors import NamesError

LECTURE = WaveNetConfig()


def test_counts_by_hand():
    emma = count_nodes(["emma"], LECTURE)
    assert emma.loop == (20, 10, 5) and emma.convolution == (11, 9, 5) and emma.reused == (9, 1, 0)
    assert emma.stream == (5, 5, 5) and emma.distinct == (5, 5, 5)  # .. .e em mm ma
    both = count_nodes(["emma", "gemma"], LECTURE)  # they share .. em mm ma; .... emma; the window before both
    assert both.distinct == (5 + 6 - 4, 5 + 6 - 2, 5 + 6 - 1) and sum(both.convolution) == 3 * 9 + 2 * 13
    assert count_nodes(["anana"], LECTURE).distinct == (4, 6, 6)  # .. .a an na, of which two come twice
    empty = count_nodes([""], LECTURE)  # the pass computes nodes that the only window does not have
    assert (empty.loop, empty.convolution, empty.reused) == ((4, 2, 1), (7, 5, 1), (0, 0, 0))
    assert count_nodes([], LECTURE) == ((0, 0, 0),) * 5


def test_any_characters_are_counted():
    """A `.` is no padding, and long contexts take no more memory than the tokens."""
    assert count_nodes([".."], LECTURE).distinct == count_nodes(["aa"], LECTURE).distinct == (3, 3, 3)
    deep = count_nodes(["ab" * 500], WaveNetConfig(kernel_sizes=(2,) * 10))
    assert deep.loop[0] == 512 * 1001 and deep.distinct[:2] == (4, 6) and deep.distinct[-1] == 1001
    with pytest.raises(NamesError, match=r"pass a list of strings, such as \['emma', 'olivia'\]"):
        count_nodes("emma", LECTURE)


def test_the_lectures_list_has_so_many_distinct_nodes(lecture_list):
    assert count_nodes(lecture_list, LECTURE).distinct == (602, 22_135, 58_841)


@given(trees_and_names())
def test_reused_and_distinct_nodes_are_those_of_the_library(case):
    sizes, names, vocab = case
    model = from_tree(random_tree(**sizes))
    counts, layers = count_nodes(names, model.config), len(model.layers)
    reused = torch.zeros(layers)
    for name in names:
        multiplicities = ConvWaveNet.multiplicities(model, vocab.encode([name], context=model.context)[0])
        reused += torch.tensor([float((m - 1).clamp(min=0).sum()) for m in multiplicities[:layers]])
    assert counts.reused == tuple(reused.tolist())
    tokens, lengths = vocab.encode(names, context=model.context)
    inside = torch.arange(tokens.shape[1] - model.context + 1) <= lengths[:, None]
    logits, rows = shared_logits_ref(fold(model), tokens.unfold(1, model.context, 1)[inside])
    assert counts.stream == (len(rows),) * layers
    if model.config.head_kernel_size == 1:
        assert counts.distinct[-1] == len(logits)
