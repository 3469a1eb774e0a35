"""`verify` rejects models that are wrong on purpose: a suite that cannot fail proves nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import random_tree
from torch import nn

from wavenet_conv import fold_batch_norm, from_tree, verify


class Wrong(nn.Module):
    """A model whose pass is `run(conv, tokens)`."""

    def __init__(self, conv, run):
        super().__init__()
        self.conv, self.run, self.context = conv, run, conv.context
        self.eval()

    def forward(self, tokens):
        return self.run(self.conv, tokens)


def plain(layer_pass=lambda layer, x: layer(x)):
    """Builds a model that runs `layer_pass(layer, x)` per layer, on x `(batch, channel, time)`."""

    def run(conv, tokens):
        x = conv.embedding(tokens).transpose(1, 2)
        for layer in conv.layers:
            x = layer_pass(layer, x)
        return conv.head(x).transpose(1, 2)

    return lambda conv: Wrong(conv, run)


def edited(name, change):
    """Builds the model with one tensor changed in place."""

    def spoil(conv):
        change(conv.state_dict()[name])
        return conv

    return spoil


def wrong_dilation(conv):
    """The last layer's taps are 2 apart instead of 4, from the same first node on."""

    def layer_pass(layer, x):
        if layer.dilation < 4:
            return layer(x)
        h = F.conv1d(x[..., 2:], layer.conv.weight, dilation=2)
        return torch.tanh(layer.norm(h))[..., : x.shape[2] - 4]

    return plain(layer_pass)(conv)


def zero_padded(conv):
    """Zeros before the activations of every layer, as most causal convolutions have them, and no padding tokens."""
    padded = plain(lambda layer, x: layer(F.pad(x, (layer.dilation, 0))))(conv)
    return Wrong(conv, lambda conv, tokens: padded(tokens[:, conv.context - 1 :]))


zero = torch.Tensor.zero_
WRONG = {
    "swapped_taps": edited("layers.1.conv.weight", lambda weight: weight.copy_(weight.flip(2))),
    "wrong_dilation": wrong_dilation,
    "zero_padded": zero_padded,
    "fold_without_mean": lambda conv: fold_batch_norm(edited("layers.0.norm.running_mean", zero)(conv)),
    "off_by_one": lambda conv: Wrong(conv, lambda conv, tokens: conv(F.pad(tokens, (1, 0)))[:, :-1]),
    "one_weight_moved_a_little": edited("layers.0.conv.weight", lambda weight: weight[0, 0, 0].add_(1e-6)),
}


def right(layer, h):
    return h[..., (layer.kernel_size - 1) * layer.dilation :]


def left(layer, h):
    return h[..., : h.shape[-1] - (layer.kernel_size - 1) * layer.dilation]


def gated(swap=False, h_child=right, s_child=right):
    """Builds a gated model, whose h and s add those of these children; `swap` exchanges filter and gate."""

    def run(conv, tokens):
        h = conv.embedding(tokens).transpose(1, 2)
        s = torch.zeros_like(h)
        for layer in conv.layers:
            f, g = layer.conv(h).chunk(2, 1)[:: -1 if swap else 1]
            z = torch.tanh(f) * torch.sigmoid(g)
            h = z if layer.residual is None else layer.residual(z) + h_child(layer, h)
            s = layer.skip(z) + s_child(layer, s)
        return conv.head(F.relu(conv.hidden(F.relu(s)))).transpose(1, 2)

    return lambda conv: Wrong(conv, run)


WRONG_GATES = {
    "swapped_filter_and_gate": gated(swap=True),
    "residual_of_the_leftmost_child": gated(h_child=left),
    "skip_of_the_leftmost_child": gated(s_child=left),
    "one_skip_moved_a_little": edited("layers.0.skip.weight", lambda weight: weight[0, 0, 0].add_(1e-6)),
}
CASES = {name: (spoil, plain(), False) for name, spoil in WRONG.items()}
CASES |= {f"gated: {name}": (spoil, gated(), True) for name, spoil in WRONG_GATES.items()}


@pytest.mark.parametrize(("spoil", "harness", "is_gated"), list(CASES.values()), ids=CASES)
def test_wrong_model_is_not_equal(names, vocab, spoil, harness, is_gated):
    tree = random_tree(n_embd=8, n_hidden=16, gated=is_gated)
    conv = from_tree(tree)
    assert verify(tree, harness(copy.deepcopy(conv)), names[::200], vocab).equal  # the harness itself is right
    report = verify(tree, spoil(conv), names[::200], vocab)
    assert not report.equal and report.max_abs_diff > report.tolerance
