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


def gated_pass(conv, tokens, level_pass):
    """A gated model's pass, where `level_pass` gives the gate, the h and the s that a level keeps of those below."""
    h = conv.embedding(tokens).transpose(1, 2)
    s = torch.zeros_like(h)
    for index, level in enumerate(conv.levels):
        z, h, s = level_pass(index, level, h, s)
        h = h if level.residual is None else level.residual(z) + h
        s = level.skip(z) + s
    return conv.head(F.relu(conv.hidden(F.relu(s)))).transpose(1, 2)


def gate(level, h):
    f, g = level.conv(h).chunk(2, 1)
    return torch.tanh(f) * torch.sigmoid(g)


def rightmost(level, x):
    return x[..., (level.fan_in - 1) * level.dilation :]


def leftmost(level, x):
    return x[..., : x.shape[-1] - (level.fan_in - 1) * level.dilation]


def gated(level_pass):
    return lambda conv: Wrong(conv, lambda conv, tokens: gated_pass(conv, tokens, level_pass))


def right_gates(conv):
    return gated(lambda _, level, h, s: (gate(level, h), rightmost(level, h), rightmost(level, s)))(conv)


def swapped_filter_and_gate(conv):
    def level_pass(index, level, h, s):
        g, f = level.conv(h).chunk(2, 1)
        return torch.tanh(f) * torch.sigmoid(g), rightmost(level, h), rightmost(level, s)

    return gated(level_pass)(conv)


def residual_of_the_leftmost_child(conv):
    return gated(lambda _, level, h, s: (gate(level, h), leftmost(level, h), rightmost(level, s)))(conv)


def skip_of_the_leftmost_child(conv):
    return gated(lambda _, level, h, s: (gate(level, h), rightmost(level, h), leftmost(level, s)))(conv)


def no_residual(conv):
    return gated(lambda _, level, h, s: (gate(level, h), 0 * rightmost(level, h), rightmost(level, s)))(conv)


def dropped_last_skip(conv):
    conv.levels[-1].skip.weight.data.zero_()
    conv.levels[-1].skip.bias.data.zero_()
    return conv


def no_hidden_layer(conv):
    conv.hidden.weight.data = torch.eye(8, dtype=torch.float64)[..., None]
    conv.hidden.bias.data.zero_()
    return conv


def one_skip_moved_a_little(conv):
    conv.levels[0].skip.weight.data[0, 0, 0] += 1e-6
    return conv


WRONG_GATES = [
    swapped_filter_and_gate,
    residual_of_the_leftmost_child,
    skip_of_the_leftmost_child,
    no_residual,
    dropped_last_skip,
    no_hidden_layer,
    swapped_taps,
    one_skip_moved_a_little,
]


@pytest.mark.parametrize(
    ("spoil", "gates"),
    [*((spoil, False) for spoil in WRONG), *((spoil, True) for spoil in WRONG_GATES)],
    ids=lambda value: getattr(value, "__name__", "gated" if value else "plain"),
)
def test_a_wrong_model_is_refused(names, vocab, spoil, gates):
    tree = random_tree(n_embd=8, n_hidden=16, gated=gates)
    conv = from_tree(tree)
    harness = (right_gates if gates else right)(copy.deepcopy(conv))
    assert verify(tree, harness.eval(), names[::50], vocab).equal  # the harness itself is right
    report = verify(tree, spoil(conv).eval(), names[::50], vocab)
    assert not report.equal and not report
    assert report.max_abs_diff > report.tolerance
    assert str(report).startswith("NOT EQUAL")


def test_nan_is_not_equal(names, vocab):
    tree = random_tree(n_embd=8, n_hidden=16)
    conv = from_tree(tree)
    conv.head.bias.data[3] = torch.nan
    assert not verify(tree, conv, names[:10], vocab).equal
