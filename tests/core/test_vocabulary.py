"""Characters to tokens and back, and errors that say which character of which name is wrong."""

import pickle
import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers import ALPHABET, numberings
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


def test_a_mapping_keeps_the_notebooks_tokens():
    stoi = {"c": 0, "<E>": 2, ".": 1, "é": 3}
    vocab = Vocabulary.from_mapping(stoi, end="<E>")
    assert (vocab.characters, vocab.end, len(vocab), vocab.padding) == ("c.é", 2, 4, "\0")
    tokens, lengths = vocab.encode(["é.", "", "c"], context=2)
    assert tokens.tolist() == [[2, 2, 3, 1], [2, 2, 2, 2], [2, 2, 0, 2]] and lengths.tolist() == [2, 0, 1]
    assert vocab.decode([2, 2, 0, 0, 1, 2, 3, 2]) == "cc." and vocab.decode(tokens) == ["é.", "", "c"]
    assert vocab.pack(["é.", "\0", "c"], context=2)[0].tolist() == [0, 0, 3, 2, 0, 0, 0, 0, 1, 0, 0]
    assert repr(vocab) == "Vocabulary.from_mapping(list('c.\\x00é'), end='\\x00')"
    itos = {np.int64(token): key for key, token in stoi.items()}
    for same in (itos, ["c", ".", "<E>", "é"], ("c", ".", "<E>", "é"), {key: np.int32(t) for key, t in stoi.items()}):
        assert Vocabulary.from_mapping(same, end="<E>") == vocab
    assert Vocabulary.from_mapping([*"abc."]) != Vocabulary("abc") != Vocabulary.from_mapping([*".acb"])
    assert Vocabulary.from_mapping([*".abc"]) == Vocabulary("abc")


@given(numberings())
def test_a_vocabulary_of_any_numbers_behaves_as_the_standard_one(numbering):
    vocab, order, names, standard = numbering
    same = Vocabulary(ALPHABET[: len(order) - 1])
    tokens, lengths = vocab.encode(names, context=3)
    expected, others = same.encode(standard, context=3)
    assert torch.equal(torch.tensor(order)[tokens], expected) and torch.equal(lengths, others)
    assert vocab.decode(tokens) == names and (tokens[:, :3] == vocab.end).all()
    packed, lengths, known = vocab.pack(names, context=3)
    assert known.all() and torch.equal(lengths, others) and len(packed) == 3 + sum(lengths + 3)
    assert torch.equal(packed == 0, same.pack(standard, context=3)[0] == 0)
    for unknown in (vocab.padding, "Q", "\u4e00"):
        assert vocab.pack([*names, unknown], context=3)[2].tolist() == [True] * len(names) + [False]
        with pytest.raises(NamesError, match="at position 0 is not in the vocabulary"):
            vocab.encode([*names, unknown], context=3)
    for copied in (eval(repr(vocab)), pickle.loads(pickle.dumps(vocab))):
        assert copied == vocab and hash(copied) == hash(vocab) and repr(copied) == repr(vocab)
        assert torch.equal(copied.encode(names, context=3)[0], tokens)


@pytest.mark.parametrize(
    ("mapping", "end", "message"),
    [
        ({"a": 1, "b": 2}, ".", "no '.' in the mapping; add the token that ends a name, or say its key with end=..."),
        ([*".ab"], "<E>", "no '<E>' in the mapping; add the token that ends"),
        ([".", "ab"], ".", "the key 'ab' is not a single character; only the end, '.', may be longer"),
        (["<S>", "<E>", "a"], "<E>", "the key '<S>' is not a single character; only the end, '<E>', may be"),
        (["", ".", "a"], ".", "the key '' is not a single character"),
        (
            {".": 0, "a": 2},
            ".",
            "the key 'a' has the token 2 where 1 is expected; the tokens of 2 keys are 0 to 1, each",
        ),
        ({".": 1, "a": 2}, ".", "the key '.' has the token 1 where 0 is expected"),
        ({".": 0, "a": -1}, ".", "the key 'a' has the token -1 where 0 is expected"),
        ({".": 0, "a": 1, "b": 1}, ".", "the key 'b' has the token 1 where 2 is expected"),
        ({0: ".", 1: "a", 2: "a"}, ".", "the key 'a' has the tokens 1 and 2; give each key one token"),
        ({".": False, "a": 1}, ".", "the key '.' has the token False; keys are strings and tokens are integers"),
        ({".": 0, "a": 1.0}, ".", "the key 'a' has the token 1.0"),
        ({".": 0, "a": np.bool_(True)}, ".", "keys are strings and tokens are integers"),
        ({".": 0, 1: "a"}, ".", "the key 0 has the token '.'"),
        ([".", 5], ".", "the key 5 has the token 1; keys are strings"),
        ([*".a", None], ".", "the key None has the token 2"),
        ({}, ".", "no '.' in the mapping"),
        ({".": 0}, ".", "a vocabulary needs at least one character"),
        (".abc", ".", "the mapping is a str, '.abc'; pass the notebook's stoi or itos, such as {'.': 0, 'a': 1}"),
        ({".", "a"}, ".", "the mapping is a set"),
        ({".": 0, "a": 1}, 0, "no 0 in the mapping; add the token"),
    ],
)
def test_wrong_mappings_are_rejected(mapping, end, message):
    with pytest.raises(NamesError, match=re.escape(message)):
        Vocabulary.from_mapping(mapping, end=end)


def test_vocabularies_with_equal_characters_are_equal():
    assert Vocabulary("ba") == Vocabulary("ab") != Vocabulary("abc")
    assert len({Vocabulary("ba"), Vocabulary("ab")}) == 1 and repr(Vocabulary("ba")) == "Vocabulary('ab')"
