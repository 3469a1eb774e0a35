"""`verify` reports what it compared and where the models differ most, and rejects what cannot be compared."""

import pytest
import torch
from helpers import ALPHABET, random_tree

from wavenet_conv import Vocabulary, WaveNetConvError, fold_batch_norm, from_tree, verify

VOCAB = Vocabulary(ALPHABET)
NAMES = ["olivia", "emma", "", "a"]
SMALL = dict(n_embd=6, n_hidden=10)


def with_one_logit_moved(conv, by):
    """The model, with one logit of "emma" moved at position 2."""

    def move(module, inputs, logits):
        logits[[name == "emma" for name in VOCAB.decode(inputs[0])], 2, 5] += by

    conv.register_forward_hook(move)
    return conv


@pytest.mark.parametrize("fold", [False, True], ids=["conv", "folded"])
def test_report_of_equal_models_is_true(fold):
    tree = random_tree(**SMALL)
    conv = fold_batch_norm(from_tree(tree)) if fold else from_tree(tree)
    done, gradients = [], []
    layers = [*tree.layers, lambda logits: gradients.append(logits.requires_grad) or logits]
    report = verify(layers, conv, NAMES, VOCAB, on_progress=done.append)
    assert not any(gradients) and not hasattr(tree.layers[0], "out")  # nothing is left behind
    assert report.equal and report and sum(done) == report.names == 4
    assert report.positions == 7 + 5 + 1 + 2 and report.argmax_differences == 0
    assert report.max_abs_diff < 1e-12 == report.tolerance
    expected = "equal: 15 positions of 4 names, float64, tolerance 1e-12 (times the logit where that is above 1)\nlarg"
    assert str(report).startswith(expected)


@pytest.mark.parametrize("by", [100.0, -1e-9, torch.nan, torch.inf])
def test_report_of_different_models_names_the_worst_position(by):
    tree = random_tree(**SMALL)
    report = verify(tree, with_one_logit_moved(from_tree(tree), by), NAMES, VOCAB)
    assert not report.equal and not report and report.worst == ("emma", 2)
    assert report.max_abs_diff == (pytest.approx(abs(by)) if by == by else torch.inf)
    assert by != 100 or report.argmax_differences == 1
    assert str(report).startswith("NOT EQUAL") and "in 'emma' at position 2" in str(report)


def test_tie_is_no_argmax_difference():
    tree = random_tree(**SMALL)
    head = tree.layers[-1]
    head.weight.data[:, 1], head.bias.data[1] = head.weight.data[:, 0], head.bias.data[0]
    head.bias.data[:2] += 1000
    conv = from_tree(tree)
    conv.head.bias.data[1] += 1e-12
    report = verify(tree, conv, NAMES, VOCAB)
    assert report.equal and report.argmax_differences == 0
    conv.head.bias.data[1] += 1e-3
    assert verify(tree, conv, NAMES, VOCAB).argmax_differences == report.positions


def test_logits_that_are_nan_in_both_models_are_not_equal():
    tree = random_tree(**SMALL)
    conv = from_tree(tree)
    tree.layers[-1].bias.data[3] = conv.head.bias.data[3] = torch.nan
    report = verify(tree, conv, NAMES, VOCAB)
    assert not report.equal and report.max_abs_diff == torch.inf


def test_models_run_in_evaluation_mode_and_stay_as_they_were():
    tree = random_tree(**SMALL)
    conv = from_tree(tree)
    before = {name: tensor.clone() for name, tensor in conv.state_dict().items()}
    assert verify(tree.train(), conv.train(), NAMES, VOCAB).equal
    assert conv.training and conv.layers[0].norm.training and tree.layers[3].training
    for state in (conv.state_dict(), from_tree(tree).state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tree: lambda x: (tree(x), None),
        lambda tree: lambda x: {"loss": tree(x).mean(), "logits": tree(x)[:, None]},
        lambda tree: tree.layers,
        lambda tree: lambda x: tree(x).squeeze(),
    ],
    ids=["tuple", "dict", "list", "squeezed"],
)
def test_every_callable_with_logits_in_what_it_returns_is_compared(wrap):
    tree = random_tree(**SMALL)
    assert verify(wrap(tree), from_tree(tree), [""], VOCAB).positions == 1  # one window
    assert verify(wrap(tree), from_tree(tree), NAMES, VOCAB).equal


def with_other_logits(conv):
    conv.register_forward_hook(lambda module, inputs, logits: logits[..., 1:])
    return conv


def compare(other=from_tree, names=NAMES, vocab=VOCAB, tree=None):
    found = random_tree(**SMALL)
    return verify(tree or found, other(found), names, vocab)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare(names=[]), "no names to compare; give at least one"),
        (lambda: compare(lambda tree: from_tree(tree).float()), "float64 and the convolutional model torch.float32"),
        (
            lambda: compare(lambda tree: from_tree(random_tree(**SMALL, vocab_size=30))),
            "the vocabulary has 27 tokens and the model 30; use the vocabulary",
        ),
        (
            lambda: compare(lambda tree: with_other_logits(from_tree(tree))),
            r"logits of shape \(15, 27\) from the tree for 15 windows and \(4, 7, 26\)",
        ),
        (lambda: compare(lambda tree: from_tree(tree), tree=lambda x: x), r"the model returns \[\(15, 8\)\] for 15"),
        (lambda: compare(lambda tree: tree), "the second model is a Sequential; call verify.tree, conv"),
        (lambda: compare(lambda tree: from_tree(random_tree((3, 2), **SMALL))), r"windows of shape \(15, 6\): Flatten"),
        (lambda: compare(names=["olivia", "andé"]), "name 1 .*character 'é' at position 3"),
        (
            lambda: compare(names=["|"], vocab=Vocabulary(ALPHABET + "{|")),
            "the vocabulary has 29 tokens and the model 27",
        ),
    ],
)
def test_what_cannot_be_compared_is_rejected(call, message):
    with pytest.raises(WaveNetConvError, match=message):
        call()
