"""The same loss through both models gives the same gradients, and training mode the tree's batch statistics."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import ALPHABET, KINDS, assert_same_gradients, norms_of, random_tree
from hypothesis import given, settings

import reference
from wavenet_conv import Vocabulary, from_tree
from wavenet_conv.model import BatchNorm

VOCAB = Vocabulary(ALPHABET)
NAMES = ["", "a", "emma", "olivia", "maximiliano", "xzqjkwvxzqjkwvxzqjkwv"]


def assert_same_loss_and_gradients(tree, conv, names):
    """Mean cross-entropy of the next token over all outputs, through the windows and through the convolutions."""
    context, device = conv.context, conv.head.weight.device
    tokens, lengths = (t.to(device) for t in VOCAB.encode(names, context=context))
    inside = torch.arange(tokens.shape[1] - context + 1, device=device) <= lengths[:, None]
    targets = F.pad(tokens[:, context:], (0, 1))[inside]
    expected = F.cross_entropy(tree(reference.windows(tokens, context)[inside]), targets)
    found = F.cross_entropy(conv(tokens, lengths)[inside], targets)
    assert abs(expected - found) < 1e-10
    expected.backward()
    found.backward()
    assert_same_gradients(tree, conv)


@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_gradients_are_the_trees(device, kernel_sizes, kind, training):
    tree = random_tree(kernel_sizes, n_embd=6, n_hidden=10, **kind, device=device)
    conv = from_tree(tree).train(training)
    assert_same_loss_and_gradients(tree.train(training), conv, NAMES)


@settings(max_examples=40)
@given(
    kernel_sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    names=st.lists(st.text("abcxyz", max_size=12), min_size=2, max_size=6),
    seed=st.integers(0, 99),
    kind=st.sampled_from(KINDS),
)
def test_training_mode_is_the_trees(kernel_sizes, names, seed, kind):
    """On ragged batches: a node counts once for each window that contains it."""
    tree = random_tree(kernel_sizes, n_embd=5, n_hidden=7, seed=seed, **kind)
    conv = from_tree(tree).train()
    tree.train()
    assert_same_loss_and_gradients(tree, conv, [*names, "abcxyz"])  # one name that has a variance
    found = [module for module in conv.modules() if isinstance(module, BatchNorm)]
    for norm, expected in zip(found, norms_of(tree), strict=True):
        assert (norm.running_mean - expected.running_mean.flatten()).abs().max() < 1e-12
        assert (norm.running_var - expected.running_var.flatten()).abs().max() < 1e-12
