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


def through_layers(conv, tokens, layer_pass):
    x = conv.embedding(tokens).transpose(1, 2)
    for index, layer in enumerate(conv.layers):
        x = layer_pass(index, layer, x)
    return conv.head(x).transpose(1, 2)


def right(conv):
    return Wrong(conv, lambda conv, tokens: through_layers(conv, tokens, lambda _, layer, x: layer(x)))


def swapped_taps(conv):
    conv.layers[1].conv.weight.data = conv.layers[1].conv.weight.data.flip(2)
    return conv


def wrong_dilation(conv):
    """The last layer's taps 2 apart in place of 4, over the nodes where a right one would start."""

    def layer_pass(index, layer, x):
        if index < 2:
            return layer(x)
        h = F.conv1d(x[..., 2:], layer.conv.weight, dilation=2)
        return torch.tanh(layer.norm(h))[..., : x.shape[2] - 4]

    return Wrong(conv, lambda conv, tokens: through_layers(conv, tokens, layer_pass))


def zero_padded(conv):
    """Zeros before every layer's activations, as most causal convolutions have them, and no padding tokens."""

    def run(conv, tokens):
        after_padding = tokens[:, conv.context - 1 :]
        return through_layers(conv, after_padding, lambda _, layer, x: layer(F.pad(x, (layer.dilation, 0))))

    return Wrong(conv, run)


def unfolded_shift(conv):
    folded = fold_batch_norm(conv)
    folded.layers[0].conv.bias.data += conv.layers[0].norm.running_mean
    return folded


def dropped_beta(conv):
    conv.layers[2].norm.bias.data.zero_()
    return conv


def off_by_one(conv):
    return Wrong(conv, lambda conv, tokens: conv(F.pad(tokens, (1, 0)))[:, :-1])


def one_weight_moved_a_little(conv):
    conv.layers[0].conv.weight.data[0, 0, 0] += 1e-6
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


def gated_pass(conv, tokens, layer_pass):
    """A gated model's pass, where `layer_pass` gives the gate, the h and the s that a layer keeps of those below."""
    h = conv.embedding(tokens).transpose(1, 2)
    s = torch.zeros_like(h)
    for index, layer in enumerate(conv.layers):
        z, h, s = layer_pass(index, layer, h, s)
        h = h if layer.residual is None else layer.residual(z) + h
        s = layer.skip(z) + s
    return conv.head(F.relu(conv.hidden(F.relu(s)))).transpose(1, 2)


def gate(layer, h):
    f, g = layer.conv(h).chunk(2, 1)
    return torch.tanh(f) * torch.sigmoid(g)


def rightmost(layer, x):
    return x[..., (layer.kernel_size - 1) * layer.dilation :]


def leftmost(layer, x):
    return x[..., : x.shape[-1] - (layer.kernel_size - 1) * layer.dilation]


def gated(layer_pass):
    return lambda conv: Wrong(conv, lambda conv, tokens: gated_pass(conv, tokens, layer_pass))


def right_gates(conv):
    return gated(lambda _, layer, h, s: (gate(layer, h), rightmost(layer, h), rightmost(layer, s)))(conv)


def swapped_filter_and_gate(conv):
    def layer_pass(index, layer, h, s):
        g, f = layer.conv(h).chunk(2, 1)
        return torch.tanh(f) * torch.sigmoid(g), rightmost(layer, h), rightmost(layer, s)

    return gated(layer_pass)(conv)


def residual_of_the_leftmost_child(conv):
    return gated(lambda _, layer, h, s: (gate(layer, h), leftmost(layer, h), rightmost(layer, s)))(conv)


def skip_of_the_leftmost_child(conv):
    return gated(lambda _, layer, h, s: (gate(layer, h), rightmost(layer, h), leftmost(layer, s)))(conv)


def no_residual(conv):
    return gated(lambda _, layer, h, s: (gate(layer, h), 0 * rightmost(layer, h), rightmost(layer, s)))(conv)


def dropped_last_skip(conv):
    conv.layers[-1].skip.weight.data.zero_()
    conv.layers[-1].skip.bias.data.zero_()
    return conv


def no_hidden_layer(conv):
    conv.hidden.weight.data = torch.eye(8, dtype=torch.float64)[..., None]
    conv.hidden.bias.data.zero_()
    return conv


def one_skip_moved_a_little(conv):
    conv.layers[0].skip.weight.data[0, 0, 0] += 1e-6
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
