"""Characters to tokens and back, and errors that say which character of which name is wrong."""

import pickle

import hypothesis.strategies as st
import pytest
import torch
from helpers import ALPHABET
from hypothesis import given

from wavenet_conv import Vocabulary, WaveNetConvError
from wavenet_conv.errors import NamesError

ABC = Vocabulary(ALPHABET)


def test_end_is_0_and_characters_are_sorted_from_1():
    vocab = Vocabulary.from_names(["emma", "ava"])
    assert len(vocab) == 5 and vocab.characters == "aemv"
    tokens, lengths = vocab.encode(["ava", "", "m"], context=2)
    assert tokens.dtype == lengths.dtype == torch.int64 and lengths.tolist() == [3, 0, 1]
    assert tokens.tolist() == [[0, 0, 1, 4, 1], [0, 0, 0, 0, 0], [0, 0, 3, 0, 0]]
    assert vocab.encode([], context=8)[0].shape == (0, 8)
    assert vocab.decode([0, 0, 2, 3, 3, 1, 0, 4, 0]) == "emma" and vocab.decode([]) == ""


characters = st.characters(exclude_characters=".", exclude_categories=[])


@given(st.lists(st.text(characters, max_size=9), min_size=1), st.integers(1, 9))
def test_decode_is_the_inverse_of_encode(names, context):
    names = [*names, "a"]
    vocab = Vocabulary.from_names(names)
    tokens, lengths = vocab.encode(iter(names), context=context)
    assert tokens.shape == (len(names), context + lengths.max()) and not tokens[:, :context].any()
    assert lengths.tolist() == [len(name) for name in names]
    assert vocab.decode(tokens) == names
    assert [vocab.decode(row) for row in tokens] == names


def test_pack_puts_names_end_to_end_and_unknown_ones_as_empty():
    tokens, lengths, known = ABC.pack(["ab", "", "a7"], context=2)
    assert tokens.tolist() == [0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
    assert lengths.tolist() == [2, 0, 0] and known.tolist() == [True, True, False]
    assert Vocabulary("aé").pack(["é"], context=1)[0].tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("names", "index", "position", "character", "shown"),
    [
        (["", "an7a", "8"], 1, 2, "7", "'an7a'"),
        (["a.b"], 0, 1, ".", "'a.b'"),
        (["a" * 50 + "\U0001f600"], 0, 50, "\U0001f600", f"'{'a' * 37}...'"),
    ],
)
def test_unknown_character_error_says_where(names, index, position, character, shown):
    with pytest.raises(NamesError) as raised:
        ABC.encode(names, context=8)
    for error in (raised.value, ABC.unknown_character_error(names), pickle.loads(pickle.dumps(raised.value))):
        assert (error.index, error.position, error.character) == (index, position, character)
        assert str(error).startswith(
            f"name {index} ({shown}): character {character!r} at position {position} is not in the vocabulary 'abc"
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Vocabulary("ab."), "cannot be one of its characters"),
        (lambda: Vocabulary.from_names(["ab", "a.b"]), r"name 1 \('a.b'\): character '.' at position 1 marks the end"),
        (lambda: Vocabulary.from_names([]), "at least one character"),
        (lambda: ABC.encode("emma", context=8), "names is one string, 'emma'; pass a list"),
        (lambda: ABC.encode(["emma", 3], context=8), "name 1 is 3, of type int"),
        (lambda: ABC.encode(["emma"], context=0), "context is 0; it must be an integer of at least 1"),
        (lambda: ABC.decode([[1, 27]]), r"token 27 at \[0, 1\] is outside the vocabulary of 27"),
        (lambda: ABC.decode(torch.ones(2)), r"not torch.float32 of shape \(2,\)"),
    ],
)
def test_other_arguments_are_rejected(call, message):
    with pytest.raises((WaveNetConvError, ValueError), match=message):
        call()


def test_vocabularies_with_equal_characters_are_equal():
    assert Vocabulary("ba") == Vocabulary("ab") != Vocabulary("abc")
    assert len({Vocabulary("ba"), Vocabulary("ab")}) == 1 and repr(Vocabulary("ba")) == "Vocabulary('ab')"
