"""Names from every kind of array and column are packed as the same names in a list."""

import random
import sys

import numpy as np
import pytest
import torch
from engine.cases import ABC, random_conv, rejects

from wavenet_conv import Scorer, Vocabulary, packing
from wavenet_conv.chunks import Codes
from wavenet_conv.packing import packed

NAMES = ["emma", "", "zoé", "a", "ßé", "maximiliano", "", "o" * 30]
EMOJI = ["\U0001f600a", "é", "", "a\U0001f600", "\u4e00"]
VOCABS = {
    "latin": Vocabulary("abcdefghijklmnopqrstuvwxyzßé"),
    "end not 0": Vocabulary.from_mapping([*"zéßo.abcdefghijklmnpqrstuvwxy"]),
    "dot is a character": Vocabulary.from_mapping(["\n", *".éßabcdefghijklmnopqrstuvwxyz"], end="\n"),
    "300": Vocabulary([*map(chr, range(1, 46)), *map(chr, range(47, 301))]),
    "padding not ASCII": Vocabulary.from_mapping([*map(chr, range(128)), "<E>", *"ßé"], end="<E>"),
}
CONTEXT = 3


def columns(names):
    """Every kind of array and column with these names, by its kind. None is a missing value."""
    pa, pd, pl = (pytest.importorskip(module) for module in ("pyarrow", "pandas", "polars"))
    strings = pa.array(names, pa.string())
    encoded = pa.array([name if name is None else name.encode() for name in names], pa.binary())
    twice = pa.array([*names, "x", None, *names], pa.string())
    arrow = {
        "sliced": twice.slice(len(names) + 2),
        "chunked": pa.chunked_array([strings[:1], strings[:0], strings[1:]]),
        "dictionaries": pa.chunked_array([strings[:2].dictionary_encode(), strings[2:].dictionary_encode()]),
        "nulls in a dictionary": pa.DictionaryArray.from_arrays(pa.array(range(len(names))), strings),
    }
    for kind in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        arrow[kind] = (encoded if "binary" in kind else strings).cast(getattr(pa, kind)())
    for dtype in (object, "str", "string[python]", "string[pyarrow]", "category", pd.ArrowDtype(pa.large_string())):
        arrow[f"pandas {dtype}"] = series = pd.Series(names, dtype=dtype, index=range(9, 9 - len(names), -1))
        arrow[f"pandas Index {dtype}"], arrow[f"pandas array {dtype}"] = pd.Index(series), series.array
    categories = pl.Enum(list(dict.fromkeys(name for name in names if name is not None)))
    for kind in (pl.String, pl.Categorical, categories):
        arrow[f"polars {kind}"] = pl.Series(names, dtype=kind)
    return arrow | {"object": np.array(names, dtype=object), "generator": (name for name in names)}


def arrays(names):
    """Every kind of NumPy array for names that are all there."""
    array = np.array(names)
    found = {"U": array, "other byte order": array.astype(array.dtype.newbyteorder()), "tuple": tuple(names)}
    found |= {"strided": np.repeat(array, 2)[::2], "S": np.array([name.encode() for name in names])}
    if hasattr(np.dtypes, "StringDType"):
        found["StringDType"] = np.array(names, dtype=np.dtypes.StringDType())
    return found


def joined(names, vocab, chunk=2**17, unknown="nan", context=CONTEXT, as_codes=False):
    """The names as `packed` gives them, end to end, and its chunks."""
    parts = [tokens_of(part, vocab) for part in packed(names, vocab, context, chunk, unknown, as_codes=as_codes)]
    tokens = torch.cat([part[0][:-context] for part in parts])
    return tokens, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts]), parts


def tokens_of(chunk, vocab):
    """A chunk as tokens. Of codes, those have the codes' numbers, unless one is unknown."""
    if not isinstance(chunk, Codes):
        return chunk
    packed_names = chunk.pack()
    assert len(chunk.codes) == chunk.lengths.sum() and not (packed_names.known & ~chunk.known).any()
    numbers = vocab.latin1[chunk.codes.long()]
    if numbers.all():
        assert torch.equal(packed_names.tokens[packed_names.tokens != 0].int(), numbers)
        assert torch.equal(packed_names.known, chunk.known)
    return packed_names


def assert_packed_the_same(kinds, names, vocab):
    expected = joined(names, vocab)[:3]
    assert expected[0].dtype == (torch.uint8 if len(vocab) <= 256 else torch.int64) and expected[1].dtype == torch.int64
    for kind, column in kinds.items():
        chunk = random.Random(kind).choice([1, 3, 2**17])
        for as_codes in (False, True) if kind != "generator" and vocab.latin1 is not None else (False,):
            *found, parts = joined(column, vocab, chunk, as_codes=as_codes)
            for part, same in zip(found, expected):
                assert part.dtype == same.dtype and torch.equal(part, same), kind
            assert all(len(known) <= chunk and not tokens[-CONTEXT:].any() for tokens, _, known in parts), kind


@pytest.mark.parametrize("vocab", VOCABS.values(), ids=VOCABS)
@pytest.mark.parametrize("names", [NAMES, EMOJI, ["emma", "a"], ["", "Q.", "emma"], [""]], ids=lambda names: names[0])
def test_every_column_is_packed_as_a_list(names, vocab):
    assert_packed_the_same(columns(names) | arrays(names), names, vocab)


def test_a_missing_value_is_an_unknown_name_or_an_error_with_its_row():
    vocab, names = VOCABS["latin"], ["emma", None, "zoé", "a7", None, "", "a"]
    tokens, lengths, known, _ = joined(names, vocab)
    assert known.tolist() == [True, False, True, False, False, True, True] and lengths.tolist() == [4, 0, 3, 0, 0, 0, 1]
    assert torch.equal(tokens, joined(["emma", "", "zoé", "", "", "", "a"], vocab)[0])
    assert_packed_the_same(columns(names), names, vocab)
    pa, pd = pytest.importorskip("pyarrow"), pytest.importorskip("pandas")
    others = {
        kind: ["emma", value, *names[2:]] for kind, value in zip("abcd", (np.nan, np.float32("nan"), pd.NA, pd.NaT))
    }
    others["masked"] = np.ma.masked_array(["emma", "ab", "zoé", "a7", "", "", "a"], [0, 1, 0, 0, 1, 0, 0])
    assert_packed_the_same(others, names, vocab)
    for column in (*columns(names).values(), *others.values()):
        with pytest.raises(
            ValueError, match="name 1 is missing; leave it out, or get NaN with unknown='nan'"
        ) as raised:
            joined(column, vocab, unknown="error")
        assert raised.value.index == 1
    for nothing in (pa.nulls(3), pa.nulls(3).dictionary_encode(), pytest.importorskip("polars").Series([None] * 3)):
        assert joined(nothing, vocab)[2].tolist() == [False] * 3


@pytest.mark.parametrize("chunk", [1, 3, 2**17])
def test_an_unknown_character_has_row_position_and_character(chunk):
    names = ["emma", "", "zoé", "ava", "é7a", "7"]
    for kind, column in (columns(names) | arrays(names)).items():
        with pytest.raises(ValueError, match=r"name 4 \('é7a'\): character '7' at position 1 is not in the") as raised:
            joined(column, VOCABS["latin"], chunk, "error")
        assert (raised.value.index, raised.value.position, raised.value.character) == (4, 1, "7"), kind


@pytest.mark.parametrize("as_codes", [False, True])
def test_the_first_name_that_is_wrong_is_named(as_codes):
    for wrong, message in (("B", "character 'B'"), ("\u4e00", "character"), (None, "is missing")):
        assert rejects(f"name 1 .*{message}", joined, ["a", wrong, None], ABC, unknown="error", as_codes=as_codes)


def test_half_of_a_surrogate_pair_is_an_unknown_character():
    for names in (["a", "b\ud800"], np.array(["a", "b\ud800"])):
        assert joined(names, ABC)[2].tolist() == [True, False]


def test_chunks_end_early_where_names_are_long(monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 40)
    for kind, column in (columns(NAMES * 2) | arrays(NAMES * 2)).items():
        *found, parts = joined(column, VOCABS["latin"])
        assert torch.equal(found[0], joined(NAMES * 2, VOCABS["latin"])[0]), kind
        assert all(len(tokens) <= 40 + CONTEXT for tokens, _, _ in parts), kind
        assert len(parts) <= 5 or kind in ("U", "S", "strided", "other byte order")  # there, the width counts


def test_one_long_name_does_not_make_small_chunks_of_encoded_ones(monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 40)
    names = ["ab"] * 20 + ["o" * 37] + ["ab"] * 20
    *found, parts = joined(ABC.encode(names, context=CONTEXT), ABC)
    assert torch.equal(found[0], joined(names, ABC)[0]) and torch.equal(found[1], joined(names, ABC)[1])
    assert [len(lengths) for _, lengths, _ in parts] == [8, 8, 4, 1, 8, 8, 4]
    assert [len(part[1]) for part in joined(ABC.encode(names, context=CONTEXT), ABC, chunk=30)[3]] == [
        8,
        8,
        4,
        1,
        8,
        1,
        8,
        3,
    ]


def test_rows_of_later_chunks_are_counted_from_the_start(monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 10)
    names = ["a" * 9, "b", None, "c" * 9]
    for column in columns(names).values():
        assert rejects("name 2 is missing", joined, column, ABC, unknown="error")
    assert_packed_the_same(columns(names), names, ABC)
    assert joined(names, ABC)[2].tolist() == [True, True, False, True]
    halves = pytest.importorskip("pyarrow").array([b"ab" * 9, b"a", b"c" * 9, b"\xff"])
    for column in (halves, np.array(halves.to_pylist())):
        assert rejects("name 3 has bytes that are not UTF-8", joined, column, ABC)
    for wrong in (3, b"d"):
        assert rejects(f"name 3 is {wrong!r}, of type", joined, ["a", "b" * 9, "c", wrong], ABC, chunk=2)


def test_a_scorer_takes_columns_everywhere_with_equal_bits(names):
    pa = pytest.importorskip("pyarrow")
    scorer = Scorer(random_conv(dtype=torch.float32), ABC, quantiles=torch.tensor([1.0, 5.0, 9.0]))
    names = [*names[::99], None]
    for column in (pa.array(names), pa.chunked_array([names[:9], names[9:]]).dictionary_encode()):
        for call in (scorer.score, scorer.bits_per_character, scorer.percentile, scorer.position_log_probs):
            found, expected = call(column, unknown="nan"), call(names, unknown="nan")
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert [len(part) for part in scorer.stream(column[:7], chunk=3)] == [3, 3, 1]
        assert torch.equal(scorer.logits(column[:7])[0], scorer.logits(names[:7])[0])
        assert scorer.score(column[:0]).shape == scorer.bits_per_character(np.array([])).shape == (0,)


def test_what_is_no_column_of_strings_is_rejected(monkeypatch):
    pa, pd, pl = (pytest.importorskip(module) for module in ("pyarrow", "pandas", "polars"))
    score, frame = Scorer(random_conv(), ABC).score, pd.DataFrame({"name": ["a"]})
    tables = [frame, pl.DataFrame(frame), pa.table({"name": ["a"]}), pa.record_batch({"name": ["a"]}), {"name": ["a"]}]
    for table in tables:
        assert rejects(r"names is a table \(\w+\); pass one of its columns, such as table\['name'\]", score, table)
    assert score(pd.Series(["a", "b"], index=["columns", "dtype"])).shape == (2,)
    assert rejects("a column of type struct", score, pa.table({"name": ["a"]}).to_reader())
    for numbers in (
        pa.array([1]),
        pl.Series([1.5]),
        pa.array([1]).dictionary_encode(),
        pd.Series([1], dtype="int64[pyarrow]"),
    ):
        assert rejects("names is a column of type (int64|double); pass a column of strings", score, numbers)
    for wrong in (pd.Series([1]), pd.Series([1, None], dtype="Int64"), np.array("emma"), np.array([["a"]]), np.ones(1)):
        assert rejects(r"names is an array of shape \(.*\) and dtype .*; pass strings in one dimension", score, wrong)
    assert rejects(r"name 1 is b'a', of type bytes; names are strings", score, ["a", b"a"])
    assert rejects(r"name 2 is 3, of type int", score, np.array(["a", None, 3], dtype=object), unknown="nan")
    for halves in ([b"a", b"\xc3", b"\xa9"], [b"ab", b"a\xff", b""]):  # the first are one character together
        for column in (pa.array(halves), pa.chunked_array([halves[:1], halves[1:]]), np.array(halves)):
            assert rejects("name 1 has bytes that are not UTF-8; decode or drop it first", score, column)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert rejects(
        r"names of type Series are read with pyarrow: pip install 'wavenet-conv\[arrow\]'", score, pl.Series(["a"])
    )


@pytest.mark.parametrize("chunk", [0, -1, 2.0, "3", None])
def test_a_chunk_that_is_no_count_is_rejected_at_the_call(chunk):
    assert rejects(
        "chunk is .*; it must be an integer of at least 1", Scorer(random_conv(), ABC).stream, ["a"], chunk=chunk
    )


def test_encoded_pairs_keep_their_numbers_and_nonsense_is_rejected():
    scorer, names = Scorer(random_conv(), ABC), ["emma", "", "olivia"]
    tokens, lengths = ABC.encode(names, context=8)
    for pair in ((tokens, lengths), (tokens.byte(), lengths.byte()), (tokens.int(), lengths.short())):
        assert torch.equal(scorer.score(pair), scorer.score(names))
        assert [len(part) for part in scorer.stream(pair, chunk=2)] == [2, 1]
        assert joined(pair, ABC, context=8)[0].dtype == torch.uint8
    wrong = [
        (tokens, -lengths),
        (tokens, lengths + 1),
        (tokens, lengths[:2]),
        (tokens, lengths.float()),
        (tokens[0], lengths),
    ]
    wrong += [
        (tokens, lengths[:, None]),
        (tokens.double(), lengths),
        (tokens[:, :7], lengths * 0),
        (tokens > 0, lengths),
    ]
    wrong += [(tokens, torch.tensor(3)), (torch.tensor(3), torch.tensor(3)), (tokens, (lengths + 250).byte())]
    wrong += [ABC.encode(names, context=9), (tokens.roll(-1, 1), lengths)]
    for pair in wrong:
        assert rejects("not what vocab.encode", scorer.score, pair)


@pytest.mark.parametrize("as_codes", [False, True])
@pytest.mark.parametrize("names", [["emma", "b!", None], ["emma", "ava\u4e00"], ["emma", "", "ava"]], ids=str)
def test_names_stay_on_the_host_where_another_device_is_the_default(names, as_codes):
    expected = joined(names, ABC, as_codes=as_codes)[:3]
    with torch.device("meta"):
        vocab = Vocabulary.from_mapping(["a", ".", *ABC.characters[1:]])
        assert all(map(torch.equal, joined(names, Vocabulary(ABC.characters), as_codes=as_codes)[:3], expected))
        tokens, lengths = vocab.encode(["emma", ""], context=CONTEXT)
        assert joined((tokens, lengths), vocab)[0].tolist() == [0, 0, 0, 5, 13, 13, 1, 0, 0, 0]
        assert vocab.decode(tokens) == vocab.decode(tokens.tolist()) == ["emma", ""]


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_lists_and_arrays_need_no_table_library(library, monkeypatch):
    for module in ("pandas", "polars", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    assert joined(np.array(["ab"]), ABC)[0].tolist() == joined(["ab"], ABC)[0].tolist() == [0, 0, 0, 1, 2]
