"""The promise of the project: the tree and the convolutional model give the same logits at every position."""

import pytest
import torch
from helpers import EXACT, MIXED, random_tree, to_exact, trees_and_names
from hypothesis import given, settings

import reference
from wavenet_conv import Vocabulary, fold_batch_norm, from_tree, verify

WIDE = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=128)
GATED = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=32, gated=True)


@pytest.mark.parametrize("sizes", [WIDE, GATED], ids=["wide", "gated"])
@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_position_of_every_name_is_equal(names, vocab, device, dtype, sizes, every):
    names = names[::every]
    tree = random_tree(**sizes, dtype=dtype, device=device)
    conv = from_tree(tree)
    for model, compared in ((conv, names), (fold_batch_norm(conv), names[::10])):
        report = verify(tree, model, compared, vocab)
        # 1e-12 and 1e-5: a sum of 256 products rounds to about 1e-14 and 1e-6 of its size.
        assert report.equal and report.max_abs_diff < {torch.float64: 1e-12, torch.float32: 1e-5}[dtype], report
        assert report.argmax_differences == 0 and report.positions == sum(len(name) + 1 for name in compared)


@pytest.mark.slow
def test_lectures_list_is_equal_at_all_228_146_positions(lecture_list):
    vocab, tree = Vocabulary.from_names(lecture_list), random_tree(**WIDE)
    assert len(lecture_list) == 32_033 and len(vocab) == 27
    report = verify(tree, from_tree(tree), lecture_list, vocab)
    assert report.equal and report.positions == 228_146, report


@pytest.mark.parametrize("kind", [{}, {"gated": True}, EXACT], ids=["tanh", "gated", "mixed"])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3,), (3, 2), (2, 3, 2), (1, 4, 1, 2)], ids=str)
def test_exact_arithmetic_is_equal_to_the_bit(names, vocab, device, clamp_for_tanh, kernel_sizes, kind):
    tree = to_exact(random_tree(kernel_sizes, n_embd=6, n_hidden=16, **kind)).to(device)
    conv = from_tree(tree)
    clamp_for_tanh()
    tokens, lengths = (t.to(device) for t in vocab.encode(names[::40], context=conv.context))
    inside = torch.arange(tokens.shape[1] - conv.context + 1, device=device) <= lengths[:, None]
    with torch.no_grad():
        expected = reference.window_logits(tree, tokens)
        assert expected[inside].unique().numel() > 100  # the logits vary
        # Few enough bits that no sum rounds: each gated layer squares the finest step, and there are up to four.
        assert torch.equal(expected * 2**30, (expected * 2**30).round()) and expected.abs().max() < 2**15
        for model in (conv, fold_batch_norm(conv)):
            assert torch.equal(model(tokens)[inside], expected[inside])
            assert torch.equal(model(tokens[:, : conv.context]), expected[:, :1])  # one window alone
        assert torch.equal(reference.loop_logits(tree, tokens[:20]), expected[:20])


@settings(max_examples=100)
@given(trees_and_names())
def test_any_tree_is_equal_on_any_names(problem):
    sizes, names, vocab = problem
    tree = random_tree(**sizes)
    conv = from_tree(tree)
    for model in (conv, fold_batch_norm(conv)):
        report = verify(tree, model, names, vocab)
        assert report.equal and report.positions == sum(len(name) + 1 for name in names), report
    tokens, _ = vocab.encode(names, context=conv.context)
    with torch.no_grad():
        together = conv(tokens)
        for row, name in enumerate(names):  # a ragged batch, in the order given, is its names one by one
            alone = conv(vocab.encode([name], context=conv.context)[0])[0]
            assert (together[row, : len(name) + 1] - alone).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [{}, {"gated": True}, MIXED], ids=["tanh", "gated", "mixed"])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (3,), (4, 1, 3)], ids=str)
def test_receptive_field_is_the_context(device, kernel_sizes, kind):
    """Changing one token changes exactly the outputs whose window contains it."""
    conv, time = from_tree(random_tree(kernel_sizes, n_embd=24, n_hidden=12, **kind, device=device)), 40
    tokens = torch.randint(1, 27, (1, time), generator=torch.Generator().manual_seed(0)).to(device)
    outputs = torch.arange(time - conv.context + 1, device=device)
    for model in (conv, fold_batch_norm(conv)):
        with torch.no_grad():
            before = model(tokens)[0]
            for position in range(time):
                changed = tokens.clone()
                changed[0, position] = tokens[0, position] % 26 + 1
                moved = (model(changed)[0] != before).any(1)
                assert torch.equal(moved, (outputs <= position) & (position < outputs + conv.context))
