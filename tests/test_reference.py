"""The tree is the lecture's: its layers, its parameter counts, its batch norm and the bug in it."""

import pytest
import torch
from conftest import random_tree

import reference
from reference import NETWORKS, BatchNorm1d, Embedding, FlattenConsecutive, GatedBlock, Linear, Sequential, Tanh


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_counts(name):
    counts = (3_481, 10_281, 11_897, 12_097, 22_097, 170_897, 22_397, 76_579, 227_931)
    expected = dict(zip(NETWORKS, counts, strict=True))[name]
    tree = reference.lecture_network(name)
    assert sum(p.numel() for p in tree.parameters()) == NETWORKS[name][1] == expected
    assert all(p.requires_grad for p in tree.parameters())
    assert reference.context_of(tree) == {"mlp": 3, "gated": 16}.get(name.partition("-")[0], 8)


def test_layers_keep_their_output_and_the_tree_its_shapes():
    tree = reference.lecture_network("wide")
    tokens = torch.randint(27, (4, 8))
    logits = tree(tokens)
    shapes = {type(layer).__name__: tuple(layer.out.shape) for layer in tree.layers[:5]}
    assert shapes == {
        "Embedding": (4, 8, 24),
        "FlattenConsecutive": (4, 4, 48),
        "Linear": (4, 4, 128),
        "BatchNorm1d": (4, 4, 128),
        "Tanh": (4, 4, 128),
    }
    assert tree.out is logits and logits.shape == (4, 27)
    assert tree.layers[2].weight.shape == (48, 128) and tree.layers[2].bias is None


def test_linear_and_embedding_compute_what_they_say():
    linear, embedding = Linear(3, 2), Embedding(5, 4)
    x = torch.randn(7, 3)
    linear.bias.normal_()
    assert torch.allclose(linear(x), x @ linear.weight + linear.bias)
    assert torch.equal(embedding(torch.tensor([[4, 0]])), embedding.weight[[4, 0]][None])
    assert torch.equal(Tanh()(x), x.tanh())


def test_a_gated_block_on_one_node_is_the_papers_formula():
    """By hand for two children of one channel, the gate one wide, in the middle and at the top."""
    x, s = torch.tensor([[[0.5], [-1.0]]]), torch.tensor([[[2.0], [3.0]]])
    for last in (False, True):
        block = GatedBlock(2, 1, 1, last=last)
        for linear, (weight, bias) in zip(
            (block.linear, block.skip, block.residual),
            (([[1.0, 2.0], [3.0, -1.0]], [0.1, 0.2]), ([[4.0]], [5.0]), ([[6.0]], [7.0])),
        ):
            if linear is not None:
                linear.weight, linear.bias = torch.tensor(weight), torch.tensor(bias)
        z = torch.tensor(0.5 * 1 - 1.0 * 3 + 0.1).tanh() * torch.tensor(0.5 * 2 + 1.0 * 1 + 0.2).sigmoid()
        out = block((x, s))
        assert torch.allclose(out if last else out[1], 4 * z + 5 + 3.0)
        assert last or torch.allclose(out[0], 6 * z + 7 - 1.0)
        alone = block(x)
        assert torch.allclose(alone if last else alone[1], 4 * z + 5)
        assert len(block.parameters()) == (4 if last else 6)
    with pytest.raises(ValueError, match=r"FlattenConsecutive\(2\) got 3 nodes"):
        block(torch.ones(1, 3, 1))


def test_flatten_consecutive_puts_neighbours_side_by_side():
    x = torch.arange(2 * 4 * 3).view(2, 4, 3)
    assert torch.equal(FlattenConsecutive(2)(x), torch.cat([x[:, ::2], x[:, 1::2]], dim=2))
    assert FlattenConsecutive(4)(x).shape == (2, 12)
    assert FlattenConsecutive(1)(torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"FlattenConsecutive\(3\) got 4 nodes"):
        FlattenConsecutive(3)(x)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)])
def test_batch_norm_in_training(shape):
    norm, x = BatchNorm1d(5), torch.randn(shape, dtype=torch.float64) * 3 + 1
    rows = x.reshape(-1, 5)
    mean, var = rows.mean(0), rows.var(0, unbiased=True)
    expected = (x - mean) / torch.sqrt(var + 1e-5)
    assert torch.allclose(norm(x), expected, atol=1e-12)
    assert torch.allclose(norm.running_mean.flatten(), 0.1 * mean, atol=1e-12)
    assert torch.allclose(norm.running_var.flatten(), 0.9 + 0.1 * var, atol=1e-12)
    assert norm.running_mean.numel() == 5
    norm.training = False
    running = norm.running_mean.clone(), norm.running_var.clone()
    assert torch.allclose(norm(x), (x - running[0]) / torch.sqrt(running[1] + 1e-5), atol=1e-12)
    assert torch.equal(norm.running_mean, running[0]) and torch.equal(norm.running_var, running[1])


def test_the_lectures_bug_keeps_statistics_per_position():
    tree = reference.lecture_network("tree-68", per_position=True)
    tree(torch.randint(27, (32, 8)))
    norms = [layer for layer in tree.layers if isinstance(layer, BatchNorm1d)]
    assert [tuple(norm.running_mean.shape) for norm in norms] == [(1, 4, 68), (1, 2, 68), (1, 68)]
    mended = reference.lecture_network("tree-68")
    mended(torch.randint(27, (32, 8)))
    norms = [layer for layer in mended.layers if isinstance(layer, BatchNorm1d)]
    assert [tuple(norm.running_mean.shape) for norm in norms] == [(1, 1, 68), (1, 1, 68), (1, 68)]


@pytest.mark.parametrize(
    ("per_position", "shape"), [(False, (1, 5)), (False, (1, 1, 5)), (True, (1, 4, 5)), (True, (1, 5))]
)
def test_a_variance_of_one_number_is_an_error(per_position, shape):
    norm = BatchNorm1d(5, per_position=per_position)
    with pytest.raises(ValueError, match="no variance; give it more than one example"):
        norm(torch.randn(shape))
    assert torch.equal(norm.running_mean, torch.zeros(5))
    norm.training = False
    assert norm(torch.randn(shape)).isfinite().all()


def test_one_example_in_training_is_refused_through_the_whole_tree():
    tree = reference.lecture_network("wide")
    with pytest.raises(ValueError, match="one value a channel"):
        tree(torch.randint(27, (1, 8)))


def test_the_two_ways_to_run_a_tree_agree():
    tree = random_tree((3, 2), n_embd=4, n_hidden=(5, 6))
    tokens = torch.randint(27, (3, 11))
    windowed, looped = reference.window_logits(tree, tokens), reference.loop_logits(tree, tokens)
    assert windowed.shape == looped.shape == (3, 6, 27)
    assert (windowed - looped).abs().max() < 1e-12
    assert (windowed[1, 2] - tree(tokens[1:2, 2:8])[0]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="5 tokens has no window of 6; put 6 zeros"):
        reference.window_logits(tree, tokens[:, :5])


def test_the_same_generator_gives_the_same_tree():
    first, second = (reference.build(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kernel_sizes=(2, 0)), "a kernel size of 0; it must be an integer of at least 1"),
        (dict(kernel_sizes=()), r"kernel_sizes is \(\); give at least one"),
        (dict(kernel_sizes=8), "kernel_sizes is 8; give at least one"),
        (dict(kernel_sizes=(2.0,)), "a kernel size of 2.0"),
        (dict(kernel_sizes=(2, 2), n_hidden=[3]), "2 kernel sizes and 1 widths"),
        (dict(n_hidden=0), "at least 1"),
        (dict(gated=True, batch_norm=True), "a gated tree has no batch norm"),
        (dict(gated=True, per_position=True), "a gated tree has no batch norm"),
    ],
)
def test_impossible_trees_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        reference.build(**arguments)


def test_an_unknown_network_is_named():
    with pytest.raises(ValueError, match="'huge'.*wide"):
        reference.lecture_network("huge")


def test_to_keeps_what_is_trained():
    for name in ("gated-96", "wide"):
        tree = reference.lecture_network(name).to(dtype=torch.float64)
        assert (
            isinstance(tree, Sequential)
            and tree(torch.zeros(2, 16 if name == "gated-96" else 8).long()).isfinite().all()
        )
    assert {p.dtype for p in tree.parameters()} == {torch.float64}
    assert all(p.requires_grad and p.is_leaf for p in tree.parameters())
    assert tree.layers[3].running_mean.dtype == torch.float64 and not tree.layers[3].running_mean.requires_grad
