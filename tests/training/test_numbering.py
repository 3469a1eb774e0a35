"""Training a model with a notebook's own numbers is the training of the same model with the standard ones."""

import pytest
import torch
from helpers import ALPHABET, KINDS, numberings, random_tree, renumbered
from hypothesis import given, settings
from hypothesis import strategies as st

from wavenet_conv import Vocabulary, from_tree
from wavenet_conv.training import Corpus, Recipe, Trainer, evaluate, fit, predictions, total_loss


def pair(numbering, **kind):
    """Models with the notebook's numbers and with the standard ones, and the standard vocabulary."""
    vocab, order, _, _ = numbering
    tree = random_tree((2, 1, 2), n_embd=5, n_hidden=7, **kind, vocab_size=len(vocab))
    models = (from_tree(renumbered(tree, order)), from_tree(tree))
    return *models, Vocabulary(ALPHABET[: len(order) - 1])


def assert_close(found, expected, order, tolerance):
    """Tensors of two models by name, where the rows of the embedding and of the head are in another order."""
    for name, tensor in expected.items():
        tensor = tensor[order] if name.startswith(("embedding", "head")) else tensor
        assert (found[name] - tensor).abs().max() < tolerance, name


@settings(max_examples=40)
@given(numberings(), st.sampled_from(KINDS))
def test_loss_gradients_and_predictions_are_those_of_the_standard_numbers(numbering, kind):
    vocab, order, names, standard = numbering
    conv, same, letters = pair(numbering, **kind)
    names, standard = [*names, vocab.characters[0] * 3], [*standard, standard_letter(order, vocab) * 3]
    own, other = Corpus(names, vocab, conv), Corpus(standard, letters, same)
    assert (predictions(conv, own) - predictions(same, other)[:, order]).abs().max() < 1e-12
    assert abs(evaluate(conv, own) - evaluate(same, other)) < 1e-12
    losses, gradients = [], []
    for model, corpus in ((conv.train(), own), (same.train(), other)):
        losses.append(total_loss(model, corpus.batch(torch.arange(len(names)))) / len(corpus.windows))
        losses[-1].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert abs(losses[0] - losses[1]) < 1e-12
    assert_close(*gradients, order, 1e-11)  # small variances magnify what sums round
    assert_close(conv.state_dict(), same.state_dict(), order, 1e-12)


def standard_letter(order, vocab):
    """The letter that stands for the notebook's first character in `numberings`."""
    return ALPHABET[order[1 if vocab.end == 0 else 0] - 1]


@pytest.mark.parametrize("teachers", [0, 1])
def test_a_fit_leaves_the_same_model(names, teachers):
    order = [3, 1, 0, *range(26, 3, -1), 2]
    keys = [".", *ALPHABET]
    vocab, letters = Vocabulary.from_mapping([keys[token] for token in order]), Vocabulary(ALPHABET)
    trees = [random_tree(n_embd=6, n_hidden=16, seed=seed) for seed in range(1 + teachers)]
    recipe = Recipe(
        steps=10, batch_size=32, eval_every=5, optimizer="sgd", schedule="constant", lr=0.1, weight_decay=0.0
    )
    trained: list[Trainer] = []
    for number, v in ((lambda tree: renumbered(tree, order), vocab), (lambda tree: tree, letters)):
        model, *others = (from_tree(number(tree)) for tree in trees)
        trained.append(fit(model, v, names[:300], names[300:350], recipe, teachers=others))
    assert vocab.end == 2 and (torch.stack(trained[0].losses) - torch.stack(trained[1].losses)).abs().max() < 1e-10
    assert abs(trained[0].best_loss - trained[1].best_loss) < 1e-10
    assert_close(trained[0].model.state_dict(), trained[1].model.state_dict(), order, 1e-9)
