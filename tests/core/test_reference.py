"""The reference is the lecture's: layers, parameter counts, batch norm and its bug, recipe, split and examples."""

import pytest
import torch
import torch.nn.functional as F
from helpers import KINDS, norms_of, random_tree

import reference
from reference import NETWORKS, BatchNorm1d, FlattenConsecutive
from wavenet_conv import from_tree

NAMES = [a + b + c for a in "abcde" for b in "aeiou" for c in ("n", "lla", "mo")]
CHARACTERS = "".join(sorted(set("".join(NAMES))))


@pytest.mark.parametrize(("name", "count"), [(name, count) for name, (_, count) in NETWORKS.items()])
def test_network_has_the_lectures_parameters(name, count):
    tree = reference.lecture_network(name)
    assert sum(p.numel() for p in tree.parameters() if p.requires_grad) == count
    logits = tree(torch.randint(27, (4, reference.context_of(tree))))
    assert tree.layers[-1].out is logits and logits.shape == (4, 27)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)])
def test_batch_norm_uses_the_unbiased_variance_and_keeps_statistics(shape):
    norm, x = BatchNorm1d(5), torch.randn(shape, dtype=torch.float64) * 3 + 1
    rows = x.reshape(-1, 5)
    mean, var = rows.mean(0), rows.var(0, unbiased=True)
    assert torch.allclose(norm(x), (x - mean) / torch.sqrt(var + 1e-5), atol=1e-12)
    assert torch.allclose(norm.running_mean.flatten(), 0.1 * mean, atol=1e-12)
    assert torch.allclose(norm.running_var.flatten(), 0.9 + 0.1 * var, atol=1e-12)
    norm.training = False
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    assert torch.allclose(norm(x), (x - mean) / torch.sqrt(var + 1e-5), atol=1e-12)
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var) and mean.numel() == 5


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)])
def test_layer_norm_and_activations_are_those_of_torch(shape):
    norm, x = reference.LayerNorm(5, eps=1e-3), torch.randn(shape, dtype=torch.float64) * 3 + 1
    norm.gamma, norm.beta = torch.rand(2, 5, dtype=torch.float64)
    assert torch.allclose(norm(x), F.layer_norm(x, (5,), norm.gamma, norm.beta, 1e-3), rtol=0, atol=1e-12)
    for layer, function in ((reference.GELU, F.gelu), (reference.SiLU, F.silu), (reference.Sigmoid, torch.sigmoid)):
        assert torch.allclose(layer()(x), function(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_tree_comes_back_from_its_convolutional_model(kind):
    tree = random_tree((3, 2), n_embd=4, n_hidden=(5, 6), **kind)
    for norm in (layer for layer in tree.layers if hasattr(layer, "eps")):
        norm.eps = 1e-3
    back, tokens = reference.from_conv(from_tree(tree)), torch.randint(27, (3, 16))
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in tree.layers]
    assert torch.equal(reference.window_logits(back, tokens), reference.window_logits(tree, tokens))
    assert reference.context_of(back) == 6 * kind.get("head_kernel_size", 1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_folded_tree_is_equal_and_has_no_batch_norm(kind):
    tree = random_tree((3, 2), n_embd=4, n_hidden=(5, 6), **kind)
    for before, layer in zip(tree.layers, tree.layers[1:]):
        if isinstance(layer, BatchNorm1d):  # a bias before batch norm is folded too
            before.bias = torch.randn_like(layer.beta)
    tokens = torch.randint(27, (3, 16))
    expected = reference.window_logits(tree, tokens)
    folded = reference.fold_batch_norm(tree)
    assert not norms_of(folded) and all(p.requires_grad and p.is_leaf for p in folded.parameters())
    assert (reference.window_logits(folded, tokens) - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference.build((2, 0)), r"kernel sizes \(2, 0\).*give integers of at least 1"),
        (lambda: reference.build((2, 2), n_hidden=[3]), r"widths \[3\]: give .* one of each per layer"),
        (lambda: reference.build(gated=True, norm="batch"), "a gated tree has no norm.*leave"),
        (lambda: BatchNorm1d(5)(torch.ones(1, 1, 5)), "one value per channel has no variance; give it more"),
        (lambda: BatchNorm1d(5, per_position=True)(torch.ones(1, 4, 5)), "no variance"),
        (lambda: FlattenConsecutive(3)(torch.ones(2, 4, 3)), r"FlattenConsecutive\(3\) got 4 nodes"),
        (lambda: reference.train(None, "abc", "ab", generator=None), "3 examples and 2 targets"),
    ],
)
def test_impossible_arguments_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lectures_split_has_the_lectures_examples(lecture_list):
    parts = reference.split_names(lecture_list)
    characters = "".join(sorted(set("".join(lecture_list))))
    examples = [reference.examples(part, characters, 3) for part in parts]
    assert [len(X) for X, _ in examples] == [len(Y) for _, Y in examples] == [182_625, 22_655, 22_866]


def test_examples_are_windows_and_the_next_token():
    X, Y = reference.examples(["ab", "", "b"], "ab", 3)
    assert X.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 0, 0], [0, 0, 0], [0, 0, 2]]
    assert Y.tolist() == [1, 2, 0, 0, 2, 0]


@pytest.mark.parametrize("options", [{}, {"norm": "none"}, {"per_position": True}])
def test_three_steps_are_those_written_by_hand_to_the_bit(options):
    def small_tree():
        generator = torch.Generator().manual_seed(0)
        sizes = dict(vocab_size=len(CHARACTERS) + 1, n_embd=4, n_hidden=8)
        return reference.build((2, 2), **sizes, **options, generator=generator), generator

    X, Y = reference.examples(NAMES, CHARACTERS, 4)
    (tree, generator), seen = small_tree(), []
    recipe = dict(steps=3, batch_size=5, lr=0.2, drop_at=2)
    reference.train(tree, X, Y, **recipe, generator=generator, on_step=lambda *step: seen.append(step))
    by_hand, generator = small_tree()
    for step, lr in enumerate((0.2, 0.2, 0.02)):
        drawn = torch.randint(0, len(X), (5,), generator=generator)
        loss = F.cross_entropy(by_hand(X[drawn]), Y[drawn])
        assert seen[step][0] == step + 1 and torch.equal(seen[step][1], loss) and not seen[step][1].requires_grad
        loss.backward()
        for parameter in by_hand.parameters():
            parameter.data += -lr * parameter.grad
            parameter.grad = None
    for layer, expected in zip(tree.layers, by_hand.layers):
        for name, value in vars(expected).items():
            if isinstance(value, torch.Tensor) and name != "out":
                assert torch.equal(getattr(layer, name), value), (type(layer).__name__, name)
    for norm in norms_of(tree)[:1]:
        norm.training = False
    loss = reference.evaluate(tree, X, Y, batch_size=7)
    assert [norm.training for norm in norms_of(tree)] == [False, True][: len(norms_of(tree))]  # restores every mode
    assert loss == pytest.approx(F.cross_entropy(tree.eval()(X), Y).item(), abs=1e-5)
