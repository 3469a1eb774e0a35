"""`verify` refuses models that are wrong on purpose: a suite that cannot fail proves nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import random_tree
from torch import nn

from wavenet_conv import fold_batch_norm, from_tree, verify


class Wrong(nn.Module):
    """A slid model whose pass over `(batch, channel, time)` some function gets wrong."""

    def __init__(self, conv, run):
        super().__init__()
        self.conv, self.run, self.context = conv, run, conv.context

    def forward(self, tokens):
        return self.run(self.conv, tokens)


def through_levels(conv, tokens, level_pass):
    x = conv.embedding(tokens).transpose(1, 2)
    for index, level in enumerate(conv.levels):
        x = level_pass(index, level, x)
    return conv.head(x).transpose(1, 2)


def right(conv):
    return Wrong(conv, lambda conv, tokens: through_levels(conv, tokens, lambda _, level, x: level(x)))


def swapped_taps(conv):
    conv.levels[1].conv.weight.data = conv.levels[1].conv.weight.data.flip(2)
    return conv


def wrong_dilation(conv):
    """The last level's taps 2 apart in place of 4, over the nodes where a right one would start."""

    def level_pass(index, level, x):
        if index < 2:
            return level(x)
        h = F.conv1d(x[..., 2:], level.conv.weight, dilation=2)
        return torch.tanh(level.norm(h))[..., : x.shape[2] - 4]

    return Wrong(conv, lambda conv, tokens: through_levels(conv, tokens, level_pass))


def zero_padded(conv):
    """Zeros before every level's activations, as most causal convolutions have them, and no padding tokens."""

    def run(conv, tokens):
        after_padding = tokens[:, conv.context - 1 :]
        return through_levels(conv, after_padding, lambda _, level, x: level(F.pad(x, (level.dilation, 0))))

    return Wrong(conv, run)


def unfolded_shift(conv):
    folded = fold_batch_norm(conv)
    folded.levels[0].conv.bias.data += conv.levels[0].norm.running_mean
    return folded


def dropped_beta(conv):
    conv.levels[2].norm.bias.data.zero_()
    return conv


def off_by_one(conv):
    return Wrong(conv, lambda conv, tokens: conv(F.pad(tokens, (1, 0)))[:, :-1])


def one_weight_moved_a_little(conv):
    conv.levels[0].conv.weight.data[0, 0, 0] += 1e-6
    return conv


WRONG = [
    swapped_taps,
    wrong_dilation,
    zero_padded,
    unfolded_shift,
    dropped_beta,
    off_by_one,
    one_weight_moved_a_little,
]


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_a_wrong_model_is_refused(names, vocab, spoil):
    tree = random_tree(n_embd=8, n_hidden=16)
    conv = from_tree(tree)
    assert verify(tree, right(copy.deepcopy(conv)).eval(), names[::50], vocab).equal  # the harness itself is right
    report = verify(tree, spoil(conv).eval(), names[::50], vocab)
    assert not report.equal and not report
    assert report.max_abs_diff > report.tolerance
    assert str(report).startswith("NOT EQUAL")


def test_nan_is_not_equal(names, vocab):
    tree = random_tree(n_embd=8, n_hidden=16)
    conv = from_tree(tree)
    conv.head.bias.data[3] = torch.nan
    assert not verify(tree, conv, names[:10], vocab).equal
