"""Kneser-Ney: sums of 1, cases by hand, the definition written out, KenLM, and the lecture's list."""

from itertools import product
from math import exp, log

import hypothesis.strategies as st
import pytest
from helpers import ALPHABET
from hypothesis import given

from reference.ngram import FALLBACK, KneserNey, adjusted_counts, discounts_of
from wavenet_conv.recipe import split_names

LISTS = st.lists(st.text("ab", max_size=6), min_size=1, max_size=30)
ORDERS = st.integers(1, 9)


def contexts_of(characters, longest):
    """All strings of these characters, within a name and at its start."""
    parts = ["".join(part) for length in range(longest + 1) for part in product(characters, repeat=length)]
    return parts + ["." + part for part in parts]


@given(LISTS, ORDERS)
def test_probabilities_sum_to_one_after_every_context(names, order):
    model = KneserNey(names, "abc", order)  # no name has a c
    for context in contexts_of("abc", 4):
        probs = [model.prob(context, token) for token in ".abc"]
        assert sum(probs) == pytest.approx(1, abs=1e-12) and min(probs) > 0


@given(LISTS, ORDERS)
def test_probabilities_are_those_of_the_definition(names, order):
    places = [(f".{name}.", end) for name in names for end in range(1, len(name) + 2)]  # of each token but the start

    def adjusted(gram):
        """The count of an n-gram that is of the highest order or at a start, else of the tokens before it."""
        ends = [(s, end + 1) for s, end in places if s[: end + 1].endswith(gram)]
        if len(gram) == order or (len(gram) > 1 and gram[0] == "."):
            return len(ends)
        return len({s[end - len(gram) - 1] for s, end in ends})

    def prob(context, token):
        lower = prob(context[1:], token) if context else 1 / 3
        counts = {other: adjusted(context + other) for other in ".ab"}
        if not any(counts.values()):
            return lower
        grams = {s[end - len(context) : end + 1] for s, end in places if end >= len(context)}
        discounts = discounts_of([adjusted(gram) for gram in grams])
        taken = {other: discounts[min(3, count)] for other, count in counts.items()}
        return (counts[token] - taken[token] + sum(taken.values()) * lower) / sum(counts.values())

    model = KneserNey(names, "ab", order)
    for context, token in product(contexts_of("ab", 2), ".ab"):
        assert model.prob(context, token) == pytest.approx(prob(context[max(0, len(context) - order + 1) :], token))


def test_two_names_by_hand():
    model = KneserNey(["ab", "aa"], "ab", order=2)
    # No count is 3, so discounts are 0.5 and 1. Two different tokens stand before a and the end, and one before b.
    a, b = 1 / 5 + 1 / 2 / 3, 0.5 / 5 + 1 / 2 / 3
    assert model.discounts == [(0.0, 0.5, 1.0, 1.5)] * 2 == [FALLBACK] * 2
    assert [model.prob("", token) for token in ".ab"] == pytest.approx([a, a, b])
    assert [model.prob(".", token) for token in ".ab"] == pytest.approx([a / 2, 1 / 2 + a / 2, b / 2])
    assert [model.prob("a", token) for token in ".ab"] == pytest.approx([0.5 / 3 + p / 2 for p in (a, a, b)])
    expected = [1 / 2 + a / 2, 0.5 / 3 + b / 2, 1 / 2 + a / 2]
    assert [exp(p) for p in model.log_probs("ab")] == pytest.approx(expected)
    assert model.log_prob("ab") == pytest.approx(sum(map(log, expected)))


def test_counts_below_the_highest_order_are_of_the_tokens_before_an_n_gram():
    unigrams, bigrams, trigrams = adjusted_counts([".ab.", ".ab.", ".bb."], 3)
    assert trigrams == {".ab": 2, "ab.": 2, ".bb": 1, "bb.": 1}
    assert bigrams == {".a": 2, ".b": 1, "ab": 1, "bb": 1, "b.": 2}  # at a start: how often
    assert unigrams == {"a": 1, "b": 3, ".": 1}


def test_the_three_discounts_come_from_counts_of_counts():
    counts = [1] * 4 + [2] * 2 + [3] + [4] + [5] * 9
    assert discounts_of([0, *counts]) == (0, 1 - 2 / 2 * 2 / 4, 2 - 3 / 2 * 1 / 2, 3 - 4 / 2 * 1 / 1)
    for count in (1, 2, 3):  # a division by zero
        assert discounts_of([other for other in counts if other != count]) == FALLBACK
    assert discounts_of([*counts, 3, 4, 4]) == FALLBACK  # 3 - 4 / 2 * 3 / 2 leaves nothing for unseen tokens
    assert discounts_of([1, 2, 3]) == pytest.approx((0, 1 / 3, 1, 3))  # no count of 4


def test_one_empty_name_of_no_characters_ends_at_once():
    model = KneserNey([""], "", order=3)
    assert model.prob(".", ".") == 1 and model.log_prob("") == 0


def test_one_name_of_one_character():
    model = KneserNey(["a"], "a", order=2)  # unigrams: half of each count of 1, half uniform
    assert model.prob(".", "a") == model.prob("a", ".") == 0.75
    assert KneserNey(["a"], "ab", order=2).prob("", "b") == pytest.approx(1 / 2 / 3)


def test_order_1_counts_tokens_and_reads_no_context():
    model = KneserNey(["aab", "a"], "ab", order=1)  # a three times, b once, the end twice: discounts 3, 1/3, 1
    discounted = {"a": 0, "b": 2 / 3, ".": 1}
    for context, (token, count) in product(("", ".", "b", ".ab"), discounted.items()):
        assert model.prob(context, token) == pytest.approx((count + (3 + 1 / 3 + 1) / 3) / 6)


def test_orders_above_the_longest_name_change_nothing():
    names = ["anna", "ann", "hannah"]
    at_length, above = (KneserNey(names, "ahn", order) for order in (len(".hannah."), 20))
    assert above.probs == at_length.probs != KneserNey(names, "ahn", 4).probs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], "ab"), "0 names and order 6; give at least one name"),
        ((["a"], "ab", 0), "1 names and order 0; .*an order of at least 1"),
        ((["a", "ac"], "ab"), "name 'ac': character 'c' is not in 'ab'"),
        ((["a.a"], ".a"), "name 'a.a': character '.' is not in 'a'"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        KneserNey(*arguments)
    for token in ("e", "ab", ""):
        with pytest.raises(ValueError, match=f"token '{token}' is neither '.' nor one of 'ab'"):
            KneserNey(["ab"], "ab", 3).prob(".", token)
    with pytest.raises(ValueError, match="name 'axe': character 'e' is not in 'ab'"):
        KneserNey(["a"], "ab").log_prob("axe")


@pytest.mark.parametrize("character", [" ", "\t", "\u00a0", "\0"])
def test_a_character_that_separates_words_is_rejected_by_name(character, tmp_path):
    path = tmp_path / "names.arpa"
    path.write_text("what was there")
    with pytest.raises(ValueError, match="character .* separates words in an ARPA file"):
        KneserNey([f"a{character}b"], "ab" + character).write_arpa(path)
    assert path.read_text() == "what was there" and len(list(tmp_path.iterdir())) == 1


def test_an_arpa_file_is_the_same_for_any_order_of_the_characters(tmp_path):
    files = [tmp_path / "one.arpa", tmp_path / "two.arpa"]
    for path, characters in zip(files, ("abc", "cba")):
        KneserNey(["ab", "cab"], characters, order=2).write_arpa(path)
    assert files[0].read_bytes() == files[1].read_bytes()
    text = files[0].read_text()
    assert "</s>\t" not in text  # the end is no context
    assert text.startswith("\\data\\\nngram 1=6\nngram 2=5\n\n\\1-grams:\n-99\t<unk>\n-99\t<s>\t-0.30")


LONGER = ["anna-é", "ann", "ß", "", "😀", "annannanna", "hannah", "é" * 12]


@pytest.mark.parametrize("order", range(2, 7))
@pytest.mark.parametrize("few", [True, False])
def test_kenlm_gives_the_same_scores(order, few, tmp_path, names):
    kenlm = pytest.importorskip("kenlm", reason="needs KenLM: pip install 'wavenet-conv[bench]'")
    used, characters = (LONGER, "ahné-ß😀z") if few else (names[::20], ALPHABET)
    model, path = KneserNey(used[::2], characters, order), tmp_path / "names.arpa"
    model.write_arpa(path)
    options = kenlm.Config()
    options.show_progress = False
    other = kenlm.Model(str(path), options)
    for name in used:
        found = other.score(" ".join(name), bos=True, eos=True) * log(10)
        # KenLM adds float32 numbers of one sign: at most `order` per character, then those of all characters.
        assert found == pytest.approx(model.log_prob(name), rel=(order + len(name) + 2) * 2**-24, abs=0)


def test_losses_of_the_lectures_list(lecture_list):
    train, validation, _ = split_names(lecture_list)
    positions = sum(len(name) + 1 for name in validation)
    for order, expected in ((2, 2.453), (4, 2.056), (5, 1.984), (6, 1.9746), (8, 1.978)):
        model = KneserNey(train, ALPHABET, order)
        assert -sum(map(model.log_prob, validation)) / positions == pytest.approx(expected, abs=5e-4)
