"""The lecture's training recipe: its split and its examples to the number, its arithmetic to the bit."""

import random
from math import log

import pytest
import torch
import torch.nn.functional as F

import reference

NAMES = [a + b + c for a in "abcde" for b in "aeiou" for c in ("n", "lla", "mo")]
CHARACTERS = "".join(sorted(set("".join(NAMES))))


def small_tree(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(vocab_size=len(CHARACTERS) + 1, n_embd=4, n_hidden=8)
    return reference.build((2, 2), **sizes, **options, generator=generator), generator


def trained(steps, **options):
    tree, generator = small_tree(**options)
    X, Y = reference.examples(NAMES, CHARACTERS, 4)
    reference.train(tree, X, Y, steps=steps, drop_at=steps * 3 // 4, generator=generator)
    return tree, X, Y


@pytest.mark.parametrize("context", [3, 8])
def test_the_lectures_split_has_the_lectures_sizes(lecture_list, context):
    characters = "".join(sorted(set("".join(lecture_list))))
    parts = reference.split_names(lecture_list)
    sizes = [[len(tensor) for tensor in reference.examples(part, characters, context)] for part in parts]
    assert sizes == [[182_625] * 2, [22_655] * 2, [22_866] * 2]


def test_the_split_is_the_global_shuffles_and_leaves_everything_else_alone():
    names, before = list(NAMES), random.getstate()
    parts = reference.split_names(names)
    assert names == NAMES and random.getstate() == before
    random.seed(42)
    random.shuffle(names)
    random.setstate(before)
    assert parts == (names[:60], names[60:67], names[67:])
    assert reference.split_names(NAMES, seed=1) != parts


def test_examples_are_the_windows_and_what_follows_them():
    X, Y = reference.examples(["ab", "", "b"], "ab", 3)
    assert X.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 0, 0], [0, 0, 0], [0, 0, 2]]
    assert Y.tolist() == [1, 2, 0, 0, 2, 0]
    assert X.dtype == Y.dtype == torch.int64
    X, Y = reference.examples([], "ab", 3)
    assert X.shape == (0, 3) and Y.shape == (0,) and X.dtype == torch.int64


def test_an_unknown_character_is_named():
    with pytest.raises(ValueError, match="name 'axb' has 'x', which is not among the characters 'ab'"):
        reference.examples(["ab", "axb"], "ab", 3)


@pytest.mark.parametrize("options", [{}, {"batch_norm": False}, {"per_position": True}])
def test_three_steps_are_those_written_by_hand_to_the_bit(options):
    X, Y = reference.examples(NAMES, CHARACTERS, 4)
    tree, generator = small_tree(**options)
    reference.train(tree, X, Y, steps=3, batch=5, lr=0.2, drop_at=2, generator=generator)
    by_hand, generator = small_tree(**options)
    for lr in (0.2, 0.2, 0.02):
        drawn = torch.randint(0, len(X), (5,), generator=generator)
        loss = F.cross_entropy(by_hand(X[drawn]), Y[drawn])
        for parameter in by_hand.parameters():
            parameter.grad = None
        loss.backward()
        for parameter in by_hand.parameters():
            parameter.data += -lr * parameter.grad
    for layer, expected in zip(tree.layers, by_hand.layers):
        for name, value in vars(expected).items():
            if isinstance(value, torch.Tensor) and name != "out":
                assert torch.equal(getattr(layer, name), value), (type(layer).__name__, name)


def test_the_loss_falls():
    tree, X, Y = trained(0)
    before = reference.evaluate(tree, X, Y)
    assert before == pytest.approx(log(len(CHARACTERS) + 1), abs=0.1)  # the head's small weights: nearly uniform
    tree, X, Y = trained(400)
    assert reference.evaluate(tree, X, Y) < before - 0.5


def test_one_seed_gives_the_same_bits_and_another_does_not():
    first, again, other = (trained(20, seed=seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.layers[-1].weight, other.layers[-1].weight)


def test_every_step_is_reported_with_its_loss():
    tree, generator = small_tree()
    X, Y = reference.examples(NAMES, CHARACTERS, 4)
    seen = []
    reference.train(tree, X, Y, steps=4, generator=generator, on_step=lambda *step: seen.append(step))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(loss.shape == () and not loss.requires_grad and 0 < loss < 5 for _, loss in seen)


def test_training_is_in_training_mode_and_evaluation_puts_every_mode_back():
    tree, X, Y = trained(3)
    norms = [layer for layer in tree.layers if isinstance(layer, reference.BatchNorm1d)]
    assert all(norm.training and norm.running_mean.abs().sum() > 0 for norm in norms)
    norms[0].training = False
    statistics = [norm.running_mean.clone() for norm in norms]
    loss = reference.evaluate(tree, X, Y, batch=7)
    assert [norm.training for norm in norms] == [False, True]
    assert all(torch.equal(norm.running_mean, before) for norm, before in zip(norms, statistics))
    with torch.no_grad():
        expected = F.cross_entropy(tree.eval()(X), Y).item()
    assert type(loss) is float and loss == pytest.approx(expected, abs=1e-6)  # float32 sums of 7 against one of all


@pytest.mark.parametrize(("inputs", "targets"), [(0, 0), (3, 2)])
def test_no_examples_or_too_few_targets_are_refused(inputs, targets):
    tree, generator = small_tree()
    X, Y = torch.zeros(inputs, 4, dtype=torch.int64), torch.zeros(targets, dtype=torch.int64)
    message = f"{inputs} examples and {targets} targets; give at least one"
    with pytest.raises(ValueError, match=message):
        reference.train(tree, X, Y, generator=generator)
    with pytest.raises(ValueError, match=message):
        reference.evaluate(tree, X, Y)
