"""Names are drawn with the probabilities of the model, from any step, and their facts are those counted by hand."""

from itertools import product
from math import sqrt

import pytest
import torch

import reference
from benchmarks import drawing
from benchmarks.drawing import draw_names, facts_of, ngram_drawer, window_step
from reference.ngram import KneserNey
from wavenet_conv import Vocabulary

COUNT = 20_000
VOCAB = Vocabulary("ab")
# Row t: of the end, a and b after token t when the name has an even length so far, and when it has an odd one.
EVEN = torch.tensor([[0.1, 0.5, 0.4], [0.5, 0.2, 0.3], [0.2, 0.6, 0.2]], dtype=torch.float64)
ODD = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.1, 0.6], [0.6, 0.3, 0.1]], dtype=torch.float64)


def step_of_parity(tokens, state):
    """Its state, the length so far, differs from that of the other names once some of them were dropped."""
    read = state[0][:, 0] + 1 if state else torch.zeros_like(tokens)
    probs = torch.where((read % 2 == 0)[:, None], EVEN[tokens], ODD[tokens])
    return probs.log(), (read[:, None],)


def prob_of_parity(context, token):
    probs = ODD if len(context) % 2 == 0 else EVEN  # `.` is in the context, and not in the name
    return float(probs[".ab".index(context[-1]), ".ab".index(token)])


def exact(prob, longest):
    """The probability of each name of at most `longest` characters; names of so many are cut, and have no end."""
    found = {}
    for length in range(longest + 1):
        for characters in product("ab", repeat=length):
            sequence, likelihood = "." + "".join(characters) + "." * (length < longest), 1.0
            for place in range(1, len(sequence)):
                likelihood *= prob(sequence[:place], sequence[place])
            found["".join(characters)] = likelihood
    return found


def assert_frequencies(drawn, probs):
    """Each frequency is within six standard deviations, which a fair draw leaves once in some hundred million times."""
    assert len(drawn) == COUNT and sum(probs.values()) == pytest.approx(1) and set(drawn) <= set(probs)
    for name, prob in probs.items():
        assert abs(drawn.count(name) / COUNT - prob) <= 6 * sqrt(prob * (1 - prob) / COUNT), name


@pytest.mark.parametrize("batch_size", [COUNT, 3001])
def test_names_are_as_frequent_as_the_model_says(batch_size, monkeypatch):
    monkeypatch.setattr(drawing, "LONGEST", 4)
    drawn = draw_names(step_of_parity, VOCAB, COUNT, torch.Generator().manual_seed(1), batch_size)
    assert_frequencies(drawn, exact(prob_of_parity, 4))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_n_grams_are_drawn_as_often_as_they_say(order, monkeypatch):
    monkeypatch.setattr(drawing, "LONGEST", 4)
    model = KneserNey(["ab", "abba", "b", "ba", "bab", "aab"], "ab", order)
    draw = ngram_drawer(model)
    assert_frequencies(drawn := draw(COUNT, 1), exact(model.prob, 4))
    assert drawn == draw(COUNT, 1) != draw(COUNT, 2)


def test_names_end_at_the_longest():
    always_a = lambda tokens, state: (torch.tensor([[-1e9, 0.0, -1e9]]).expand(len(tokens), 3), ())
    drawn = draw_names(always_a, VOCAB, 3, torch.Generator().manual_seed(1), 2)
    assert drawn == ["a" * drawing.LONGEST] * 3


def test_the_state_goes_with_its_name():
    """Names that end at different places: each is its own number, which only the state knows."""

    def step(tokens, state):
        (left,) = state or (torch.arange(len(tokens))[:, None],)
        logits = torch.full((len(tokens), 3), -1e9)
        logits[torch.arange(len(tokens)), (left[:, 0] > 0).long()] = 0.0
        return logits, (left - 1,)

    shuffled = lambda tokens, state: step(tokens, state or (torch.tensor([[3], [0], [5], [1]]),))
    assert draw_names(step, VOCAB, 4, torch.Generator(), 4) == ["", "a", "aa", "aaa"]
    assert draw_names(shuffled, VOCAB, 4, torch.Generator(), 4) == ["aaa", "", "aaaaa", "a"]


def test_a_step_of_windows_gives_the_logits_of_the_tree():
    tree = reference.build((2, 2), vocab_size=3, n_embd=3, n_hidden=4).eval()
    tokens = torch.tensor([[0, 1, 2, 2, 1, 1], [0, 2, 1, 2, 2, 1]])
    step, found, state = window_step(tree, 4), [], ()
    for column in tokens.unbind(1):
        logits, state = step(column, state)
        found.append(logits)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), tokens], 1)
    torch.testing.assert_close(torch.stack(found, 1), reference.window_logits(tree, padded))


def test_facts_by_hand():
    facts = facts_of(["ann", "bob", "bob", "eve", "xy"], train=["bob", "bob", "ann"], held_out=["eve", "ann"])
    assert facts == {"in_training": 3 / 5, "in_held_out": 1 / 2, "distinct": 4 / 5, "mean_length": 14 / 5}
    assert facts_of(["bob"], ["bob"], ["eve"])["in_held_out"] is None
    assert set(facts_of([], ["bob"], []).values()) == {None}
