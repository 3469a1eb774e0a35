"""The report says what was compared, and where it was worst."""

import pytest
import torch
from conftest import random_tree
from torch import nn

import reference
from wavenet_conv import Vocabulary, WaveNetConvError, from_tree, verify

VOCAB = Vocabulary("abcdefghijklmnopqrstuvwxyz")
NAMES = ["olivia", "emma", "", "a"]


class OneLogitMoved(nn.Module):
    """The slid model with one logit of "emma" moved, at position 2."""

    def __init__(self, conv, by):
        super().__init__()
        self.conv, self.context, self.by = conv, conv.context, by

    def forward(self, tokens):
        logits = self.conv(tokens)
        rows = [row for row, name in enumerate(VOCAB.decode(tokens)) if name == "emma"]
        logits[rows, 2, 5] += self.by
        return logits


def test_the_report_of_equal_models():
    tree = random_tree(n_embd=6, n_hidden=10)
    done = []
    report = verify(tree, from_tree(tree), NAMES, VOCAB, on_progress=done.append)
    assert report.equal and report and sum(done) == report.names == 4
    assert report.positions == 7 + 5 + 1 + 2 and report.argmax_differences == 0
    assert report.max_abs_diff < 1e-12 == report.tolerance
    assert str(report).startswith(
        "equal: 15 positions of 4 names, float64, tolerance 1e-12 (of a logit's size above 1)\nlarg"
    )


@pytest.mark.parametrize("by", [100.0, -1e-9, torch.nan, torch.inf])
def test_the_worst_position_is_named(by):
    tree = random_tree(n_embd=6, n_hidden=10)
    report = verify(tree, OneLogitMoved(from_tree(tree), by).eval(), NAMES, VOCAB)
    assert not report.equal and report.worst == ("emma", 2)
    assert report.max_abs_diff == (pytest.approx(abs(by)) if by == by else torch.inf)
    if by == 100:
        assert report.argmax_differences == 1
    assert "in 'emma' at position 2" in str(report)


def test_a_tie_is_no_argmax_difference():
    tree = random_tree(n_embd=6, n_hidden=10)
    head = tree.layers[-1]
    head.weight.data[:, 1], head.bias.data[1] = head.weight.data[:, 0], head.bias.data[0]
    head.bias.data[:2] += 1000
    conv = from_tree(tree)
    conv.head.bias.data[1] += 1e-12
    report = verify(tree, conv, NAMES, VOCAB)
    assert report.equal and report.argmax_differences == 0
    conv.head.bias.data[1] += 1e-3
    assert verify(tree, conv, NAMES, VOCAB).argmax_differences == report.positions


@pytest.mark.parametrize("side", ["tree", "conv"])
def test_training_mode_is_refused(side):
    tree = random_tree(n_embd=6, n_hidden=10)
    conv = from_tree(tree)
    (tree if side == "tree" else conv).train()
    with pytest.raises(WaveNetConvError, match=f"{side} is in training mode.*call .eval"):
        verify(tree, conv, NAMES, VOCAB)


def test_what_cannot_be_compared():
    tree = random_tree(n_embd=6, n_hidden=10)
    conv = from_tree(tree)
    with pytest.raises(WaveNetConvError, match="no names to compare"):
        verify(tree, conv, [], VOCAB)
    with pytest.raises(WaveNetConvError, match="names is one string"):
        verify(tree, conv, "emma", VOCAB)
    with pytest.raises(WaveNetConvError, match="character 'é' at position 3"):
        verify(tree, conv, ["andré".replace("r", "")], VOCAB)
    with pytest.raises(WaveNetConvError, match="float64 and the slid model torch.float32"):
        verify(tree, from_tree(tree).float(), NAMES, VOCAB)
    with pytest.raises(WaveNetConvError, match=r"logits of shape \(15, 27\)"):
        verify(tree, from_tree(random_tree(n_embd=6, n_hidden=10, vocab_size=30)), NAMES, VOCAB)
    with pytest.raises(WaveNetConvError, match="the second model is a Sequential; verify.tree, conv"):
        verify(conv, tree, NAMES, VOCAB)
    with pytest.raises(WaveNetConvError, match=r"cannot run windows of shape \(15, 6\): FlattenConsecutive\(2\) got 3"):
        verify(tree, from_tree(random_tree((3, 2), n_embd=6, n_hidden=10)), NAMES, VOCAB)
    with pytest.raises(IndexError, match="token 28 at .* outside the vocabulary of 27"):
        verify(tree, conv, ["a|"], Vocabulary(VOCAB.characters + "{|"))


def test_infinite_logits_are_not_equal():
    tree = random_tree(n_embd=6, n_hidden=10)
    conv = from_tree(tree)
    tree.layers[-1].bias.data[3] = torch.inf
    report = verify(tree, conv, NAMES, VOCAB)
    assert not report.equal and report.max_abs_diff == torch.inf


def test_training_mode_is_found_in_plain_layers_inside_a_module():
    class Model(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

    tree = random_tree(n_embd=6, n_hidden=10)
    conv = from_tree(tree)
    model = Model(tree.layers).eval()
    tree.layers[3].training = True
    with pytest.raises(WaveNetConvError, match="tree is in training mode .BatchNorm1d"):
        verify(model, conv, NAMES, VOCAB)


def test_a_list_of_layers_is_a_tree():
    tree = random_tree(n_embd=6, n_hidden=10)
    assert verify(tree.layers, from_tree(tree.layers), NAMES, VOCAB).equal


def test_no_gradients_are_left_behind():
    tree = reference.build(n_embd=6, n_hidden=10).eval()
    conv = from_tree(tree)
    verify(tree, conv, NAMES, VOCAB)
    assert not tree.layers[-1].out.requires_grad and all(p.grad is None for p in conv.parameters())
