"""Names are the lecture loop's for the same uniform numbers, drawn as often as the model says, in any batch."""

import builtins
from collections import Counter
from itertools import islice

import hypothesis.strategies as st
import pytest
import torch
from conftest import loops, needs_numba, random_tree
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from wavenet_conv import (
    Scorer,
    Stream,
    Vocabulary,
    WaveNetConvError,
    from_tree,
    sample,
    sample_stream,
    sampling,
    streaming,
)
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.sampling import BATCH, DOUBT, MANY, uniform

ABC = Vocabulary("abcdefghijklmnopqrstuvwxyz")
AB = Vocabulary("ab")
WIDE = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=64)
GATED = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=24, gated=True)
COMPILED = pytest.param({"compiled": True}, marks=needs_numba)
WAYS = [{"batch": 3}, {"batch": 9}, {}, COMPILED]  # few and many by stream, prefix by prefix, in compiled loops


def short_tree(dtype=torch.float64, end=1.0, **sizes):
    """A random tree that ends a name after some five characters, or sooner where `end` is larger."""
    tree = random_tree(**sizes, dtype=dtype)
    tree.layers[-1].bias = tree.layers[-1].bias.clone()
    tree.layers[-1].bias[0] += end
    return tree


def lecture_names(tree, vocab, count, seed=42, **options):
    """The lecture's loop, one name after the other, with the uniform numbers that `sample` draws with."""
    rows = uniform(seed, torch.arange(count)[:, None], torch.arange(100)).tolist()
    draw = reference.inverse_cdf(lambda name, position: rows[name][position])
    with torch.no_grad():
        names = reference.sample_loop(tree, count, draw, **options)
    alphabet = "." + vocab.characters
    return ["".join(alphabet[token] for token in name) for name in names]


@pytest.mark.parametrize(("sizes", "count"), [(WIDE, 10_000), (GATED, 3000)], ids=["wide", "gated"])
def test_10_000_names_of_the_lectures_loop(sizes, count):
    tree = short_tree(**sizes, end=1.5)
    conv = from_tree(tree)
    expected = lecture_names(tree, ABC, count)
    assert len(set(expected)) > count // 4 and max(map(len, expected)) > 8
    assert sample(conv, ABC, count) == expected  # prefix by prefix
    assert sample(conv, ABC, count, batch=64) == expected  # from a stream
    assert sample(conv, ABC, count, dtype=torch.float32) == expected
    assert sample(conv, ABC, 100, batch=1, dtype=torch.float32) == expected[:100]
    if loops is not None:
        assert sample(conv, ABC, count, compiled=True) == expected
        assert sample(conv, ABC, count, compiled=True, dtype=torch.float32) == expected


@pytest.mark.parametrize("kernel_sizes", [(3,), (8,), (3, 2), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("prefix", ["", "an", "maximilianothethird"])
def test_other_shapes_and_prefixes(device, kernel_sizes, prefix):
    tree = short_tree(kernel_sizes=kernel_sizes, n_embd=6, n_hidden=16)
    start = ABC.encode([prefix], context=1)[0][0, 1:].tolist()
    expected = lecture_names(tree, ABC, 100, seed=7, prefix=start, max_length=25)
    assert all(name.startswith(prefix) for name in expected)
    conv = from_tree(tree)
    ways = [{"batch": 1}, {"batch": 9}, {"batch": MANY}, {"batch": 9, "dtype": torch.float32}]
    for options in ways + [{"compiled": True}] * (loops is not None and device.type == "cpu"):
        options = options | {"prefix": prefix, "seed": 7, "max_length": 25, "device": device}
        assert sample(conv, ABC, 100, **options) == expected
        assert list(islice(sample_stream(conv, ABC, **options), 100)) == expected


def distribution(tree, choose, max_length, start=()):
    """The exact probability of every name over `a` and `b` whose characters are drawn from `choose(logits)`."""
    context, chances, open_ends = reference.context_of(tree), {}, {tuple(start): 1.0}
    while open_ends:
        longer = {}
        for name, chance in open_ends.items():
            if len(name) == max_length:
                chances[name] = chance
                continue
            with torch.no_grad():
                probs = choose(tree(torch.tensor([([0] * context + list(name))[-context:]]))[0].double())
            chances[name] = chance * probs[0].item()
            longer |= {(*name, token): chance * probs[token].item() for token in (1, 2)}
        open_ends = longer
    return {"".join("ab"[token - 1] for token in name): chance for name, chance in chances.items() if chance}


def naive(temperature=1.0, top_k=3, top_p=1.0):
    """The options in as many words: one distribution, the unwanted characters taken out of it one by one."""

    def choose(logits):
        probs = torch.softmax(logits / temperature, 0)
        ranked = sorted(range(3), key=lambda token: -probs[token])
        kept = [t for rank, t in enumerate(ranked) if rank < top_k and sum(probs[ranked[:rank]]) < top_p]
        return torch.tensor([probs[token] if token in kept else 0.0 for token in range(3)]) / probs[kept].sum()

    return choose


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["tanh", "gated"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.5}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 2, "top_p": 0.9}],
    ids=str,
)
def test_names_are_as_frequent_as_the_model_says(gated, options, way):
    """Pearson's chi-square over whole names of up to four characters; rare ones are taken together."""
    tree = random_tree((2, 2), n_embd=4, n_hidden=8, vocab_size=3, gated=gated, seed=3)
    chances, count = distribution(tree, naive(**options), 4), 2500 if "batch" in way else 40_000
    assert abs(sum(chances.values()) - 1) < 1e-9
    found = Counter(sample(from_tree(tree), AB, count, max_length=4, dtype=torch.float32, **way, **options))
    assert not set(found) - set(chances)
    common = [name for name, chance in chances.items() if chance * count >= 10]
    assert len(common) > 3
    pairs = [(found[name], chances[name] * count) for name in common]
    pairs.append((count - sum(seen for seen, _ in pairs), count - sum(expected for _, expected in pairs)))
    statistic = sum((seen - expected) ** 2 / max(expected, 1) for seen, expected in pairs)
    # The mean is len(common) and the variance twice that: passed by chance in all but one of a hundred thousand seeds.
    assert statistic < len(common) + 6 * (2 * len(common)) ** 0.5
    wrong = sum((seen - count / len(pairs)) ** 2 / (count / len(pairs)) for seen, _ in pairs)
    assert wrong > len(common) + 6 * (2 * len(common)) ** 0.5  # and it would see another distribution


@settings(max_examples=16)
@given(
    st.integers(1, 40) | st.sampled_from([MANY - 1, MANY, MANY + 1, BATCH]),
    st.integers(0, 2**63 - 1),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.2, 3) | st.just(0),
            "top_k": st.integers(1, 30),
            "top_p": st.floats(0.05, 1),
            "prefix": st.text("abc", max_size=10),
            "max_length": st.integers(10, 30),
        },
    ),
    st.booleans(),
)
def test_the_batch_decides_nothing(batch, seed, options, gated):
    """The names of a float32 stream, of shared float32 prefixes and of float64 are the same ones."""
    conv = CONVS[gated]
    expected = sample(conv, ABC, MANY + 50, seed=seed, dtype=torch.float64, **options)
    assert sample(conv, ABC, MANY + 50, seed=seed, batch=MANY, **options) == expected
    assert sample(conv, ABC, 60, seed=seed, batch=batch, **options) == expected[:60]
    if loops is not None:
        for dtype in (torch.float32, torch.float64):
            assert sample(conv, ABC, 200, seed=seed, compiled=True, dtype=dtype, **options) == expected[:200]


CONVS = {gated: from_tree(short_tree(torch.float32, n_embd=6, n_hidden=16, gated=gated)) for gated in (False, True)}


def test_a_float32_draw_that_is_in_doubt_is_decided_in_float64(monkeypatch):
    conv, decided, exactly = CONVS[False], [], sampling._Sampler.exactly
    expected = sample(conv, ABC, 2000, dtype=torch.float64)
    monkeypatch.setattr(
        sampling._Sampler, "exactly", lambda self, windows, u: [decided.append(len(u)), exactly(self, windows, u)][1]
    )
    for way, n in (({}, 2000), ({"batch": 8}, 600), ({"compiled": True}, 2000)):
        if "compiled" in way and loops is None:
            continue
        decided.clear()
        assert sample(conv, ABC, n, **way) == expected[:n]
        assert 0 < sum(decided) < 0.01 * sum(len(name) + 1 for name in expected[:n])
        with monkeypatch.context() as patch:  # wherever the doubt begins
            patch.setattr(sampling, "DOUBT", 0.1)
            assert sample(conv, ABC, n // 4, **way) == expected[: n // 4]
    monkeypatch.setattr(sampling._Sampler, "exactly", lambda self, windows, u: torch.ones(len(u), dtype=torch.int64))
    assert sample(conv, ABC, 2000) != expected
    assert sample(conv, ABC, 600, batch=8) != expected[:600]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_number_of_threads_decides_nothing(way):
    conv, threads = load_checkpoint("default").model, torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(sample(conv, ABC, MANY, **way))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_rounding_is_far_smaller_than_the_doubt(names, vocab):
    """What float32 changes in summed distributions, by which draws are made: of the default model, and of another."""
    for conv in (load_checkpoint("default").model, from_tree(random_tree())):
        logits = [Scorer(conv, ABC, dtype=dtype).logits(names[::10])[0] for dtype in (torch.float32, torch.float64)]
        sums = [sampling._Draw(1.0, None, None).cumulative(values)[0] for values in logits]
        assert (sums[0] - sums[1]).abs().max() < DOUBT / 2  # 1e-6 on the processors tried


class Unasked(TorchDispatchMode):
    """Refuses what would make the host wait for its device, or hand it a tensor, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"), name
        assert name not in ("index", "index_put_") or all(i is None or i.dtype == torch.int64 for i in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [(1.0, None, None), (0.5, 3, 0.9), (0, None, None)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["tanh", "gated"])
def test_the_device_is_not_asked_once_a_character(options, gated):
    sampler = sampling._Sampler(CONVS[gated], ABC, sampling._Draw(*options), [1, 14], 20, seed=42)
    rows = sampling._Rows(sampler, 5)
    with torch.no_grad(), Unasked():
        rows._steps()
    with pytest.raises(AssertionError, match="nonzero"), Unasked():
        rows.undecided()


def test_uniform_numbers():
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
        assert loops is None or loops.uniform(seed, name, position) == expected
    numbers = uniform(42, torch.arange(2000)[:, None], torch.arange(50))
    assert numbers.dtype == torch.float64 and numbers.unique().numel() == 100_000
    assert 0 <= numbers.min() and numbers.max() < 1
    counts = torch.histc(numbers, 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 6 * 198**0.5
    assert abs(torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]) < 0.02


@pytest.mark.parametrize("batch", [1, 9, BATCH])
def test_the_likeliest_at_temperature_0(batch):
    conv = load_checkpoint("default").model
    name = []
    while True:
        window = ([0] * 8 + name)[-8:]
        token = int(conv(torch.tensor([window]))[0, 0].argmax())
        if not token:
            break
        name.append(token)
    names = sample(conv, ABC, MANY, temperature=0, batch=batch)
    assert set(names) == {ABC.decode(name)}
    assert sample(conv, ABC, MANY, top_k=1, batch=batch) == names
    assert sample(conv, ABC, MANY, top_p=1e-9, batch=batch) == names
    assert sample(conv, ABC, 20, top_k=100, top_p=1.0, batch=batch) == sample(conv, ABC, 20, batch=batch)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_model_that_never_ends_a_name(way):
    tree = random_tree(n_embd=6, n_hidden=16)
    with torch.no_grad():
        tree.layers[-1].bias[0] = -torch.inf
    names = sample(from_tree(tree), ABC, MANY, max_length=11, **way)
    assert {len(name) for name in names} == {11} and len(set(names)) > 100
    assert set(sample(from_tree(tree), ABC, MANY, prefix="abcdefghijk", max_length=11, **way)) == {"abcdefghijk"}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers(way, value):
    conv = from_tree(random_tree(n_embd=6, n_hidden=16, dtype=torch.float32))
    conv.embedding.weight.data[5] = value  # an e, which comes soon
    conv.head.bias.data[5] += 3
    with pytest.raises(WaveNetConvError, match=r"the logits after '[.a-z]{7}e' are NaN or infinite"):
        sample(conv, ABC, MANY, **way)


@pytest.mark.parametrize("options", [{"max_length": 1}, {"prefix": "a", "max_length": 1}, {"end": 1e4}], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_names_that_end_at_once_without_end(options, way):
    """Each is given as it is drawn: no row goes on to the next for ever."""
    options = dict(options)
    conv = from_tree(short_tree(n_embd=6, n_hidden=16, end=options.pop("end", 0)))
    first = list(islice(sample_stream(conv, ABC, **way, **options), 1000))
    assert first == sample(conv, ABC, 1000, **options) and {len(name) for name in first} <= {0, 1}


@pytest.mark.parametrize("tied", [range(27), (3, 7, 20)], ids=["all", "three"])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equally_likely_characters_stay_together(tied, options, dtype):
    """Their logits differ in the last bits, by the shape of the product in which they were computed."""
    conv = from_tree(random_tree(n_embd=6, n_hidden=16))
    for part in (conv.head.weight.data, conv.head.bias.data):
        part[list(tied)] = part[tied[0]].clone()
    conv.head.bias.data[list(tied)] += 4
    options = options | {"max_length": 12, "dtype": dtype}
    names = sample(conv, ABC, MANY, **options)
    assert sample(conv, ABC, 100, batch=9, **options) == names[:100]
    assert sample(conv, ABC, 30, batch=1, **options) == names[:30]
    alike = {("." + ABC.characters)[token] for token in tied} - {"."}
    assert len(alike & set("".join(names))) == len(alike) or "top_p" in options


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_drawn_from_in_float32(dtype):
    conv = from_tree(short_tree(torch.float32, n_embd=6, n_hidden=16))
    conv.head.bias.data[26] = -1e4
    conv = conv.to(dtype)
    names = sample(conv, ABC, MANY)
    assert names == sample(conv, ABC, MANY, dtype=torch.float64) and "z" not in "".join(names)
    assert sample(conv, ABC, 50, batch=1) == sample(conv, ABC, 50, batch=9) == names[:50]
    assert loops is None or sample(conv, ABC, 50, compiled=True) == names[:50]


def test_logits_that_only_float32_cannot_hold():
    likeliest = sample(CONVS[False], ABC, MANY, temperature=0)
    assert sample(CONVS[False], ABC, MANY, temperature=1e-42) == likeliest
    assert sample(CONVS[False], ABC, 20, temperature=1e-42, batch=8) == likeliest[:20]
    assert loops is None or sample(CONVS[False], ABC, 20, temperature=1e-42, compiled=True) == likeliest[:20]


def test_options_that_are_wrong():
    conv = CONVS[False]
    for options, message in (
        ({"temperature": -1}, "temperature is -1; it must be 0, or a number from 1e-100"),
        ({"temperature": 1e-320}, "temperature is 1e-320"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"max_length": 0}, "max_length is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"prefix": "ann", "max_length": 2}, "the prefix 'ann' has 3 characters and max_length is 2"),
        ({"compiled": "yes"}, "compiled is 'yes'; it must be True, False or None"),
        ({"prefix": "an7a"}, "'an7a'.*character '7' at position 2 is not in the vocabulary"),
        ({"prefix": "a.b"}, "character '.' at position 1"),
    ):
        with pytest.raises(WaveNetConvError, match=message):
            sample_stream(conv, ABC, 3, **options)  # at the call, before any name is drawn
    for n in (-1, 1.5, "x"):
        with pytest.raises(WaveNetConvError, match="n is"):
            sample_stream(conv, ABC, n)
    with pytest.raises(WaveNetConvError, match="n is None; give the number of names"):
        sample(conv, ABC, None)
    with pytest.raises(WaveNetConvError, match="the vocabulary has 3 tokens and the model 27"):
        sample(conv, AB, 3)


@pytest.mark.parametrize("broken", [ModuleNotFoundError("No module named 'numba'"), ImportError("Numba needs NumPy")])
def test_without_numba(monkeypatch, broken):
    conv = CONVS[False]
    expected = sample(conv, ABC, 20, max_length=10)

    def import_loops(name, *args, **kwargs):
        if args and args[2:] and args[2] and "loops" in args[2]:
            raise broken
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    streaming._loops.cache_clear()
    monkeypatch.setattr(builtins, "__import__", import_loops)
    try:
        assert not Stream(conv).compiled
        names = sample_stream(conv, ABC, batch=1, max_length=10)
        assert list(islice(names, 20)) == expected
        with pytest.raises(WaveNetConvError, match="need Numba: pip install 'wavenet-conv.fast.'"):
            sample(conv, ABC, 3, compiled=True)
    finally:
        streaming._loops.cache_clear()


@pytest.mark.parametrize("way", [*WAYS, {"batch": 2}], ids=str)
def test_endless_numbers_and_lengths(way):
    """Of both `sample` draws as many as it is asked for and no more than there are."""
    conv, far = CONVS[False], 10**30
    expected = sample(conv, ABC, 3, max_length=1000)
    assert sample(conv, ABC, 3, max_length=far, **way) == expected
    assert list(islice(sample_stream(conv, ABC, far, max_length=1000, **way), 3)) == expected


def test_few_names_none_and_the_model_as_it_was():
    conv = from_tree(short_tree(n_embd=6, n_hidden=16)).train()
    before = {key: tensor.clone() for key, tensor in conv.state_dict().items()}
    assert sample(conv, ABC, 0) == [] == sample(conv, ABC, 0, batch=1)
    assert len(sample(conv, ABC, 1)) == 1
    assert conv.training and all(torch.equal(conv.state_dict()[key], tensor) for key, tensor in before.items())
    state = torch.random.get_rng_state()
    assert sample(conv, ABC, 30, seed=1) != sample(conv, ABC, 30, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_vocabularies_and_long_contexts():
    for characters in ("é-ß😀z", "\0a", "".join(chr(0x4E00 + i) for i in range(300))):
        vocab = Vocabulary(characters)
        tree = short_tree(n_embd=6, n_hidden=16, vocab_size=len(vocab))
        expected = lecture_names(tree, vocab, 40, max_length=20)
        assert sample(from_tree(tree), vocab, 40, max_length=20) == expected
        assert sample(from_tree(tree), vocab, MANY, max_length=20)[:40] == expected
    tree = short_tree(kernel_sizes=(2,) * 8, n_embd=6, n_hidden=16)
    expected = lecture_names(tree, ABC, 20)
    assert sample(from_tree(tree), ABC, MANY)[:20] == expected
    assert loops is None or sample(from_tree(tree), ABC, MANY, compiled=True)[:20] == expected
