"""What comes next: probabilities of characters, and the likeliest whole names, against brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from engine.cases import SHAPES, random_conv, rejects

from wavenet_conv import Scorer, Vocabulary
from wavenet_conv import continuing as module
from wavenet_conv.continuing import complete, next_characters

MAPPED = Vocabulary.from_mapping(["b", "<E>", "a", "."], end="<E>")
VOCABULARIES = pytest.mark.parametrize("vocab", [Vocabulary("abc"), MAPPED], ids=["standard", "mapped"])
PREFIXES = ["", "ab", "a", "bbbbbbbbbb", "ab"]
LONGEST = 6


def scorer_of(vocab, kernel_sizes=(2, 2), dtype=torch.float32, **shape):
    return Scorer(random_conv(kernel_sizes, vocab_size=len(vocab), **shape), vocab, dtype=dtype)


@pytest.fixture
def brute_force():
    """All names of up to LONGEST characters that begin with a prefix, the likeliest first, and their scores."""

    def found(scorer, prefix):
        characters, lengths = scorer.vocab.characters, range(LONGEST + 1 - len(prefix))
        names = [prefix + "".join(rest) for length in lengths for rest in product(characters, repeat=length)]
        scores, order = scorer.score(names).sort(descending=True)
        return list(zip([names[place] for place in order], scores.tolist()))

    return found


@VOCABULARIES
@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[-1:], ids=str)
def test_next_characters_have_the_probabilities_of_the_scores(vocab, shape):
    scorer = scorer_of(vocab, **shape)
    for prefix, found in zip(PREFIXES, next_characters(scorer, iter(PREFIXES)), strict=True):
        values = [value for _, value in found]
        assert len(found) == len(vocab) and values == sorted(values, reverse=True) and abs(sum(values) - 1) < 1e-6
        for character, value in found:
            names = [prefix + (character or "")]
            assert value == pytest.approx(scorer.position_log_probs(names)[0][len(prefix)].exp().item(), rel=1e-5)
        assert next_characters(scorer, [prefix], 2) == [found[:2]]


@VOCABULARIES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [1, 7, 2000])
def test_a_wide_beam_finds_the_likeliest_names(vocab, gated, top_k, brute_force):
    """Also with more names asked for than there are, in chunks of prefixes, and of prefixes that are given twice."""
    scorer, prefixes = scorer_of(vocab, gated=gated), ["", "ab", "a", "b" * LONGEST, "ab"]
    for prefix, found in zip(prefixes, complete(scorer, prefixes, top_k, width=2000, max_length=LONGEST), strict=True):
        expected = brute_force(scorer, prefix)[:top_k]
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
        assert dict(found).keys() == dict(expected).keys()


def test_scores_are_those_of_the_scorer_and_prefixes_do_not_change_each_other(monkeypatch):
    scorer = Scorer.load("default")
    found = complete(scorer, PREFIXES, 20)
    for prefix, pairs in zip(PREFIXES, found, strict=True):
        names, scores = zip(*pairs)
        assert len({*names}) == 20 and all(name.startswith(prefix) for name in names)
        assert list(scores) == scorer.score(names).tolist() == sorted(scores, reverse=True)
        assert complete(scorer, [prefix], 20) == [pairs]
    monkeypatch.setattr(module, "NUMBERS", 1)
    assert complete(scorer, PREFIXES, 20) == found and complete(scorer, []) == next_characters(scorer, []) == []


def test_a_narrow_beam_is_a_beam(brute_force):
    """Width 1 follows the likeliest character, and keeps every name that ends on the way."""
    scorer = scorer_of(Vocabulary("abc"))
    (found,), name, on_the_way = complete(scorer, [""], 100, width=1, max_length=LONGEST), "", [""]
    while len(name) < LONGEST:
        name += next(character for character, _ in next_characters(scorer, [name])[0] if character)
        on_the_way.append(name)
    assert {name for name, _ in found} == {*on_the_way}
    assert found != brute_force(scorer, "")[: len(found)]


def test_the_search_stops_when_no_beginning_can_win(monkeypatch):
    scorer, steps = Scorer.load("default"), []
    compute = scorer.nodes.window_logits
    monkeypatch.setattr(scorer.nodes, "window_logits", lambda w: steps.append(len(w)) or compute(w))
    (pairs,) = complete(scorer, ["emm"], 1)
    assert pairs[0][0] == "emma" and len(steps) < 6 and max(steps) < 9  # what is less likely than "emma" is dropped


def test_other_arguments_are_rejected():
    scorer = scorer_of(Vocabulary("abc"))
    assert rejects("top_k is 0; it must be an integer of at least 1", next_characters, scorer, ["a"], 0)
    assert rejects("width is 1.5; it must be an integer of at", complete, scorer, ["a"], width=1.5)
    assert rejects(
        "the prefix 'abca' has 4 characters and max_length is 3", complete, scorer, ["", "abca"], max_length=3
    )
    for call in (next_characters, complete):
        assert rejects("names is one string, 'ab'; pass a list", call, scorer, "ab")
        assert rejects(r"name 1 \('aXb'\): character 'X' at position 1 is not in", call, scorer, ["a", "aXb"])
    model = random_conv((2,), vocab_size=4)
    model.head.bias.data[1] = torch.inf
    assert rejects("the model's logits are NaN or infinite", complete, Scorer(model, Vocabulary("abc")), ["a"])
