"""Characters to tokens and back, and clear words for names that have none."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from wavenet_conv import Vocabulary, WaveNetConvError

ABC = Vocabulary("abcdefghijklmnopqrstuvwxyz")


def test_the_end_is_0_and_characters_are_sorted_from_1():
    vocab = Vocabulary.from_names(["emma", "ava"])
    assert len(vocab) == 5 and vocab.characters == "aemv"
    tokens, lengths = vocab.encode(["ava", "", "m"], context=2)
    assert tokens.dtype == lengths.dtype == torch.int64
    assert tokens.tolist() == [[0, 0, 1, 4, 1], [0, 0, 0, 0, 0], [0, 0, 3, 0, 0]]
    assert lengths.tolist() == [3, 0, 1]


def test_an_empty_list_is_an_empty_batch():
    tokens, lengths = ABC.encode([], context=8)
    assert tokens.shape == (0, 8) and lengths.shape == (0,)


characters = st.characters(exclude_characters=".", exclude_categories=[])


@given(st.lists(st.text(characters, max_size=9), min_size=1), st.integers(1, 9))
def test_decoding_undoes_encoding(names, context):
    if not any(names):
        names = [*names, "a"]
    vocab = Vocabulary.from_names(names)
    tokens, lengths = vocab.encode(iter(names), context=context)
    assert tokens.shape == (len(names), context + max(map(len, names)))
    assert lengths.tolist() == [len(name) for name in names]
    expected = [[0] * context + [1 + vocab.characters.index(c) for c in name] for name in names]
    assert [row[: len(e)] for row, e in zip(tokens.tolist(), expected)] == expected
    assert int(tokens.count_nonzero()) == sum(map(len, names))
    assert vocab.decode(tokens) == names
    assert [vocab.decode(row) for row in tokens] == names


def test_decoding_stops_at_the_first_end():
    assert ABC.decode([0, 0, 5, 13, 13, 1, 0, 7, 0]) == "emma"
    assert ABC.decode([]) == "" and ABC.decode([[0], [2]]) == ["", "b"]


def test_what_has_no_token_is_named():
    with pytest.raises(WaveNetConvError, match=r"name 1 \('an7a'\): character '7' at position 2 is not in the voc"):
        ABC.encode(["ana", "an7a", "8"], context=8)
    with pytest.raises(WaveNetConvError, match=r"name 2 \('\U0001f600'\): character '\U0001f600' at position 0"):
        ABC.encode(["", "ana", "\U0001f600"], context=8)
    with pytest.raises(WaveNetConvError, match=r"name 0 \('a.b'\): character '.' at position 1 is not in"):
        ABC.encode(["a.b"], context=8)
    with pytest.raises(WaveNetConvError, match=r"name 0 \('a{37}...'\): character 'Z' at position 50"):
        ABC.encode(["a" * 50 + "Z"], context=8)


def test_the_end_cannot_be_inside_a_name():
    with pytest.raises(WaveNetConvError, match=r"name 1 \('a.b'\): character '.' at position 1 marks the end"):
        Vocabulary.from_names(["ab", "a.b"])
    with pytest.raises(WaveNetConvError, match="cannot be one of its characters"):
        Vocabulary("ab.")


@pytest.mark.parametrize("names", [[], [""]])
def test_a_vocabulary_of_nothing(names):
    with pytest.raises(WaveNetConvError, match="at least one character"):
        Vocabulary.from_names(names)


def test_what_is_not_a_list_of_names():
    with pytest.raises(WaveNetConvError, match="names is one string, 'emma'; pass a list"):
        ABC.encode("emma", context=8)
    with pytest.raises(WaveNetConvError, match="name 1 is 3, of type int"):
        ABC.encode(["emma", 3], context=8)
    with pytest.raises(WaveNetConvError, match="names is None; pass a list of strings"):
        ABC.encode(None, context=8)
    for context in (0, -1, "8"):
        with pytest.raises(WaveNetConvError, match=f"context is {context!r}; it must be an integer of at least 1"):
            ABC.encode(["emma"], context=context)


def test_tokens_that_cannot_be_decoded():
    with pytest.raises(IndexError, match=r"token 27 at \[0, 1\] is outside the vocabulary of 27"):
        ABC.decode([[1, 27]])
    with pytest.raises(WaveNetConvError, match=r"not torch.float32 of shape \(2,\)"):
        ABC.decode(torch.ones(2))


def test_equal_vocabularies_are_equal():
    assert Vocabulary("ba") == Vocabulary("ab") != Vocabulary("abc")
    assert len({Vocabulary("ba"), Vocabulary("ab")}) == 1 and repr(Vocabulary("ba")) == "Vocabulary('ab')"
