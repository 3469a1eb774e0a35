"""Names are those of the lecture's loop for the same uniform numbers, in any batch, prefix by prefix or streamed."""

from itertools import islice

import hypothesis.strategies as st
import pytest
import torch
from engine.cases import ABC, GATED, WIDE, rejects
from helpers import LAYER_NORM, MIXED, random_tree
from hypothesis import given, settings

import reference
from wavenet_conv import Vocabulary, from_tree, sample, sample_stream, sampling
from wavenet_conv.sampling import tokens_at, uniform

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.2, 3) | st.just(0),
        "top_k": st.integers(1, 30),
        "top_p": st.floats(0.05, 1),
        "prefix": st.text("abc", max_size=10),
        "max_length": st.integers(10, 30),
    },
)

CHOICES = [{"temperature": 0}, {"temperature": 0.5}, {"temperature": 2.5}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}]
CHOICES += [{"top_k": 4, "top_p": 0.6, "temperature": 1.5}, {"top_k": 100, "top_p": 1.0}, {"top_p": 1e-9}]
OTHER = {"kernel_sizes": (2, 2), "n_hidden": (40, 9)} | LAYER_NORM | {"head_kernel_size": 2}
MODELS = [({}, characters) for characters in ("é-ß😀z", "\0a", "".join(chr(0x4E00 + i) for i in range(300)))]
for sizes in (
    {"gated": True},
    {"end": -torch.inf},
    {"end": 1e4},
    *[{"kernel_sizes": k} for k in ((8,), (3, 2), (2,) * 8)],
    LAYER_NORM,
    {"kernel_sizes": (3, 1)} | MIXED,
):
    MODELS.append((sizes, ABC.characters))


@pytest.fixture(params=["prefix by prefix", "streamed"])
def way(request, monkeypatch):
    """Both ways to draw, for models of any context."""
    monkeypatch.setattr(sampling, "LONG", 0 if request.param == "streamed" else sampling.LONG)


def short_tree(dtype=torch.float64, end=1.0, **sizes):
    """A random tree that ends a name after some five characters, or earlier if `end` is larger."""
    tree = random_tree(**{"n_embd": 6, "n_hidden": 16} | sizes, dtype=dtype)
    last, name = tree.layers[-1], "bias" if hasattr(tree.layers[-1], "bias") else "beta"
    setattr(last, name, getattr(last, name).clone())
    getattr(last, name)[0] += end
    return tree


CONVS = [from_tree(short_tree(torch.float32, **kind)) for kind in ({}, {"gated": True}, LAYER_NORM, MIXED)]


def chosen(probs, temperature=1.0, top_k=1000, top_p=1.0):
    """The options in as many words: probabilities `(1, vocab)` without those of the tokens that are left out."""
    scaled = torch.softmax(probs[0].log() / (temperature or 1), 0)
    ranked = scaled.argsort(descending=True)
    before = [0.0, *scaled[ranked].cumsum(0).tolist()]  # the probability of what is more likely
    kept = [t for rank, t in enumerate(ranked) if rank < (top_k if temperature else 1) and before[rank] < top_p]
    least = probs[0, kept].min().log() - 1e-9  # equally likely tokens stay together
    return torch.where(probs.log() >= least, scaled, 0.0)


def names_of_the_loop(tree, vocab, count, seed=42, prefix="", max_length=100, **options):
    """Names of the lecture's loop, one after the other, with the uniform numbers that `sample` draws with."""
    rows = uniform(seed, torch.arange(count)[:, None], torch.arange(100)).tolist()
    draw = reference.inverse_cdf(lambda name, position: rows[name][position])
    start = vocab.encode([prefix], context=1)[0][0, 1:].tolist()
    drawn = lambda probs, name, position: draw(chosen(probs, **options), name, position)
    with torch.no_grad():
        names = reference.sample_loop(tree, count, drawn, prefix=start, max_length=max_length)
    alphabet = "." + vocab.characters
    return ["".join(alphabet[token] for token in name) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("sizes, count", [(WIDE, 10_000), (GATED, 3000)], ids=["wide", "gated"])
def test_10_000_names_are_those_of_the_lectures_loop(monkeypatch, sizes, count):
    tree = short_tree(**sizes, end=1.5)
    expected = names_of_the_loop(tree, ABC, count)
    assert sample(from_tree(tree), ABC, count) == expected
    monkeypatch.setattr(sampling, "LONG", 0)
    assert sample(from_tree(tree), ABC, count) == expected


@pytest.mark.parametrize("sizes, characters", MODELS, ids=lambda value: str(value if value else len(value)))
@pytest.mark.parametrize("length, max_length", [(0, 25), (19, 25), (19, 19), (0, 1)])
def test_names_are_those_of_the_lectures_loop(device, way, sizes, characters, length, max_length):
    """After a prefix, cut, without end and without characters."""
    vocab = Vocabulary(characters)
    options = {"seed": 7, "max_length": max_length, "prefix": (characters[:4] * 19)[:length]}
    tree = short_tree(**sizes, vocab_size=len(vocab))
    conv, expected = from_tree(tree), names_of_the_loop(tree, vocab, 16, **options)
    assert sample(conv, vocab, 16, **options, device=device) == expected
    assert list(islice(sample_stream(conv, vocab, **options, device=device, batch_size=9), 16)) == expected


@pytest.mark.parametrize("tied", [[0], [3, 7, 20]], ids=["distinct", "tied"])
@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_names_with_options_are_those_of_the_lectures_loop(way, options, tied):
    """Equally likely characters stay together: their logits may differ in the last bits."""
    tree = short_tree()
    with torch.no_grad():
        for part in (tree.layers[-1].weight, tree.layers[-1].bias[None]):
            part[:, tied] = part[:, tied[0], None].clone()
        tree.layers[-1].bias[tied] += 2 * (len(tied) > 1)
    names = sample(from_tree(tree), ABC, 30, max_length=12, **options)
    assert names == names_of_the_loop(tree, ABC, 30, max_length=12, **options)
    assert len(tied) == 1 or {"c", "g", "t"} <= set("".join(names))


@settings(max_examples=25)
@given(
    batch_size=st.integers(1, 40) | st.sampled_from([127, 128, 129, 257, 2**17]),
    seed=st.integers(0, 2**63 - 1),
    options=OPTIONS,
    conv=st.sampled_from(CONVS),
    long=st.sampled_from([sampling.LONG, 0]),
)
def test_batch_size_and_count_do_not_change_names(batch_size, seed, options, conv, long):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "LONG", long)
        expected = sample(conv, ABC, 300, seed=seed, **options)
        count = 300 if batch_size > 40 else 3 * batch_size
        assert sample(conv, ABC, count, seed=seed, batch_size=batch_size, **options) == expected[:count]
        assert sample(conv, ABC, 7, seed=seed, **options) == expected[:7]


@pytest.mark.parametrize("sizes", [WIDE, GATED | {"n_hidden": (7, 40, 9)}, OTHER], ids=["wide", "gated", "other"])
def test_distributions_have_the_same_bits_in_any_batch(way, monkeypatch, threads, sizes):
    """So a draw cannot depend on the batch, however close its number is to the border between two tokens."""
    conv, calls = from_tree(short_tree(torch.float32, **sizes, end=2.0)), []
    monkeypatch.setattr(sampling, "uniform", lambda *args: [calls.append(args[1:]), uniform(*args)][1])
    monkeypatch.setattr(sampling, "tokens_at", lambda *args: [calls.append(args[0]), tokens_at(*args)][1])
    found = []
    for batch_size in (1, 60, 300):
        calls.clear()
        sample(conv, ABC, 300 if batch_size > 1 else 60, batch_size=batch_size)
        keys = [zip(names.tolist(), positions.expand_as(names).tolist()) for names, positions in calls[::2]]
        found.append({key: row for part, rows in zip(keys, calls[1::2]) for key, row in zip(part, rows)})
    alone = {key: row for key, row in found[0].items() if key[0] < 60}
    assert len(alone) > 200
    assert all(torch.equal(part[key], row) for part in found for key, row in alone.items())


@settings(max_examples=200)
@given(
    st.lists(st.floats(0, 1, width=32) | st.just(0.0), min_size=1, max_size=8).filter(sum),
    st.sampled_from([0.0, 5e-324, 1 - 2.0**-53, 1 - 2.0**-24, 1 - 2.0**-25]) | st.floats(0, 1, exclude_max=True),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_a_token_without_probability_is_never_drawn(weights, number, dtype):
    summed = torch.tensor([weights], dtype=dtype).cumsum(1)
    token = int(tokens_at(summed, torch.tensor([number], dtype=torch.float64)))
    assert 0 <= token < len(weights) and summed[0, token] > (summed[0, token - 1] if token else 0)


def test_uniform_numbers_are_splitmix64():
    """SplitMix64's mixing function in Python's integers."""

    def mixed(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    assert mixed(0) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 with seed 0
    for seed, name, position in ((0, 0, 0), (42, 1, 2), (2**63 - 1, 2**40, 99)):
        expected = (mixed((mixed((mixed(seed) + name) % 2**64) + position) % 2**64) >> 11) / 2**53
        assert uniform(seed, torch.tensor(name), torch.tensor(position)).item() == expected
    assert uniform(42, torch.arange(2000)[:, None], torch.arange(50)).unique().numel() == 100_000


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error_of_names_that_are_asked_for(way, value):
    conv = from_tree(short_tree(torch.float32))
    expected = sample(conv, ABC, 300)
    firsts = {c: next(i for i, name in enumerate([*expected, c + "."]) if c in name[:-1]) for c in ABC.characters}
    first, letter = max((index, c) for c, index in firsts.items() if index < 40)
    conv.embedding.weight.data[1 + ABC.characters.index(letter)] = value
    assert first > 1 and sample(conv, ABC, first) == expected[:first]
    assert rejects(f"the logits after '[a-z]*{letter}' are NaN or infinite", sample, conv, ABC, first + 1)


def test_half_precision_is_drawn_from_in_float32(way):
    for dtype in (torch.float16, torch.bfloat16):
        conv = from_tree(short_tree(torch.float32)).to(dtype)
        assert sample(conv, ABC, 100) == sample(conv.float(), ABC, 100)
    assert sample(conv, ABC, 9, temperature=1e-42) == sample(conv, ABC, 9, temperature=0)


def test_wrong_options_are_rejected_at_the_call():
    for options, message in (
        ({"temperature": -1}, "temperature is -1; it must be 0, or a number from 1e-100"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.01}, "top_p is 1.01; it must be above 0 and at most 1"),
        ({"max_length": 0}, "max_length is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"prefix": "ann", "max_length": 2}, "the prefix 'ann' has 3 characters and max_length is 2"),
        ({"prefix": "an7a"}, "'an7a'.*character '7' at position 2 is not in the vocabulary"),
        ({"n": 1.5}, "n is 1.5"),
        ({"vocab": Vocabulary("ab")}, "the vocabulary has 3 tokens and the model 27"),
    ):
        assert rejects(message, sample_stream, CONVS[0], **{"vocab": ABC, "n": 3} | options)
    assert rejects("n is None; give the number of names", sample, CONVS[0], ABC, None)


def test_sampling_leaves_the_model_and_the_random_state_as_they_were(way):
    conv = from_tree(short_tree()).train()
    state = torch.random.get_rng_state()
    assert sample(conv, ABC, 0) == [] and sample(conv, ABC, 30, seed=1) != sample(conv, ABC, 30, seed=2)
    assert list(islice(sample_stream(conv, ABC, 10**30, max_length=10**30), 3)) == sample(conv, ABC, 3)
    assert conv.training and torch.equal(torch.random.get_rng_state(), state)
