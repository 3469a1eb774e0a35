"""The same loss through both models gives the same gradients, and training mode the tree's batch statistics."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import parts_of, random_tree
from einops import rearrange
from hypothesis import given, settings

import reference
from wavenet_conv import Vocabulary, WaveNetConvError, fold_batch_norm, from_tree

VOCAB = Vocabulary("abcdefghijklmnopqrstuvwxyz")
NAMES = ["", "a", "emma", "olivia", "maximiliano", "xzqjkwvxzqjkwvxzqjkwv"]


def losses(tree, conv, names):
    """Mean cross-entropy of the next token over all real positions, through the tree's windows and the convolutional pass."""
    context = conv.context
    tokens, lengths = VOCAB.encode(names, context=context)
    inside = torch.arange(tokens.shape[1] - context + 1) <= lengths[:, None]
    targets = torch.cat([tokens[:, context:], tokens.new_zeros(len(names), 1)], dim=1)[inside]
    device = conv.head.weight.device
    tokens, lengths, inside, targets = tokens.to(device), lengths.to(device), inside.to(device), targets.to(device)
    windows = reference.windows(tokens, context)[inside]
    return F.cross_entropy(tree(windows), targets), F.cross_entropy(conv(tokens, lengths)[inside], targets)


def assert_same_gradients(tree, conv):
    linears = [layer for layer in parts_of(tree) if isinstance(layer, reference.Linear)]
    norms = [layer for layer in tree.layers if isinstance(layer, reference.BatchNorm1d)]
    convs = [of for layer in conv.layers for of in layer.convs()] + [conv.hidden, conv.head][conv.hidden is None :]
    pairs = [(conv.embedding.weight.grad, tree.layers[0].weight.grad)]
    assert len(convs) == len(linears)
    for of, linear in zip(convs, linears):
        pairs.append((of.weight.grad, rearrange(linear.weight.grad, "(j c) o -> o c j", j=of.kernel_size[0])))
        if of.bias is not None:
            pairs.append((of.bias.grad, linear.bias.grad))
    for layer, norm in zip(conv.layers, norms):
        pairs += [(layer.norm.weight.grad, norm.gamma.grad), (layer.norm.bias.grad, norm.beta.grad)]
    for found, expected in pairs:
        assert (found - expected).abs().max() < 1e-10  # float64: about 1e-15 a sum, magnified by small variances
    assert sum(float(expected.abs().sum()) for _, expected in pairs) > 0.1


@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3,), (3, 1, 2)])
@pytest.mark.parametrize("kind", [{"batch_norm": True}, {"batch_norm": False}, {"gated": True}], ids=str)
def test_gradients_in_evaluation_mode(device, kernel_sizes, kind):
    tree = random_tree(kernel_sizes, n_embd=6, n_hidden=10, **kind, device=device)
    conv = from_tree(tree)
    expected, found = losses(tree, conv, NAMES)
    assert abs(expected - found) < 1e-12
    expected.backward()
    found.backward()
    assert_same_gradients(tree, conv)


@settings(max_examples=40)
@given(
    kernel_sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    names=st.lists(st.text("abcxyz", max_size=12), min_size=2, max_size=6),
    seed=st.integers(0, 99),
    gated=st.booleans(),
)
def test_training_mode_is_the_trees(kernel_sizes, names, seed, gated):
    """Loss, gradients and running statistics, on ragged batches: a node counts once for each window that uses it."""
    tree = random_tree(kernel_sizes, n_embd=5, n_hidden=7, seed=seed, gated=gated)
    conv = from_tree(tree).train()
    tree.train()
    expected, found = losses(tree, conv, [*names, "abcxyz"])  # one name with a variance of its own
    assert abs(expected - found) < 1e-10
    expected.backward()
    found.backward()
    assert_same_gradients(tree, conv)
    norms = [layer for layer in tree.layers if isinstance(layer, reference.BatchNorm1d)]
    for layer, norm in zip(conv.layers, norms):
        assert (layer.norm.running_mean - norm.running_mean.flatten()).abs().max() < 1e-12
        assert (layer.norm.running_var - norm.running_var.flatten()).abs().max() < 1e-12


@pytest.mark.parametrize("gated", [False, True])
def test_training_mode_through_conv1d_is_the_same(gated):
    conv = from_tree(random_tree(n_embd=5, n_hidden=7, gated=gated)).train()
    tokens, lengths = VOCAB.encode(NAMES, context=8)
    assert (conv(tokens, lengths) - conv.forward_conv1d(tokens, lengths)).abs().max() < 1e-12


def test_one_window_has_no_batch_statistics():
    conv = from_tree(random_tree(n_embd=5, n_hidden=7)).train()
    with pytest.raises(WaveNetConvError, match="one single value a channel.*more than one window"):
        conv(torch.zeros(1, 8, dtype=torch.int64))


def test_training_the_copy_leaves_the_tree_alone():
    tree = random_tree(n_embd=5, n_hidden=7)
    before = [p.detach().clone() for p in tree.parameters()]
    conv = from_tree(tree)
    folded = fold_batch_norm(conv)
    conv.train()
    conv(VOCAB.encode(NAMES, context=8)[0]).square().mean().backward()
    for parameter in conv.parameters():
        parameter.data -= 0.1 * parameter.grad
    assert all(torch.equal(p, q) for p, q in zip(tree.parameters(), before))
    again = fold_batch_norm(from_tree(tree))
    assert all(torch.equal(p, q) for p, q in zip(folded.parameters(), again.parameters()))
    tree.layers[0].weight.data.zero_()
    assert conv.embedding.weight.abs().min() > 0
