"""Compiled loops: distinct nodes are found and evaluated as PyTorch and the convolutional pass have them."""

import random

import pytest
import torch
from engine.cases import ABC, DTYPES, outputs_of, random_conv, rejects
from helpers import HAS_NUMBA
from hypothesis import given
from hypothesis import strategies as st

from wavenet_conv import Scorer, Vocabulary

np = pytest.importorskip("numpy")
if not HAS_NUMBA:
    pytest.skip("needs Numba: pip install 'wavenet-conv[fast]'", allow_module_level=True)

from wavenet_conv.engine import compiled, distinct, jit, tile  # noqa: E402

SHAPES = [(2, 2, 2), (8,), (1,), (3, 2, 2), (1, 4, 2), (2, 4, 1), (2, 2, 2, 1), (2, 3)]
KEYS = st.lists(st.integers(0, 2**62 - 1) | st.integers(0, 30), max_size=300)


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_sizes", SHAPES, ids=str)
@pytest.mark.parametrize("tabulated", [True, False], ids=["tables", "no tables"])
def test_log_probs_are_those_of_the_convolutional_pass(
    names, monkeypatch, threads, kernel_sizes, dtype, tolerance, tabulated
):
    monkeypatch.setattr("wavenet_conv.engine.shared.TABULATED", 4096 if tabulated else 0)
    monkeypatch.setattr(compiled, "MANY", 500)
    conv, some = random_conv(kernel_sizes, n_hidden=18, dtype=dtype), [*names[::97], "", "a" * 50]
    logits, targets = outputs_of(conv, some, ABC)
    expected = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    scorer = Scorer(conv, ABC, compiled=True)
    for part in ((values := scorer.position_log_probs(some)[0]), scorer.position_log_probs(some[::-1])[0].flip(0)):
        assert (part.sort().values - expected.sort().values).abs().max() < tolerance
    assert (values - expected).abs().max() < tolerance
    assert (scorer.score(some) - Scorer(conv, ABC, compiled=False).score(some)).abs().max() < 30 * tolerance


def test_equal_nodes_are_evaluated_once(names, monkeypatch):
    evaluated, original, some = [], distinct.evaluate, names[::50]

    def evaluate(readable, children, first, count, *rest):
        evaluated.append(count - first)
        return original(readable, children, first, count, *rest)

    monkeypatch.setattr(distinct, "evaluate", evaluate)
    scorer = Scorer(random_conv(dtype=torch.float32), ABC, compiled=True, remember=True)
    scorer.score(some)
    padded = ["." * 8 + name for name in some]
    windows = {name[i : i + 8] for name in padded for i in range(len(name) - 7)}
    halves = [{window[:4] for window in windows}, {window[4:] for window in windows}]
    assert sum(evaluated) == sum(map(len, (windows, *halves)))
    scorer.score(some[::-1])
    assert sum(evaluated) == sum(map(len, (windows, *halves)))  # all are remembered


@pytest.mark.parametrize("kept", [compiled.KEPT, 2000], ids=["kept", "forgotten"])
@pytest.mark.parametrize("remember", [False, True])
def test_memory_from_chunk_to_chunk_and_from_call_to_call_changes_no_bits(names, monkeypatch, threads, kept, remember):
    monkeypatch.setattr(compiled, "KEPT", kept)
    monkeypatch.setattr(compiled, "SPARSE", 2)
    monkeypatch.setattr(compiled, "MANY", 200)
    conv = random_conv(dtype=torch.float32)
    some, scorer = random.Random(0).sample(names, 3000), Scorer(conv, ABC, compiled=True, remember=remember)
    expected = Scorer(conv, ABC, compiled=True).score(some)
    for chunk in (50, 700, 3000):
        assert torch.equal(torch.cat(list(scorer.stream(some, chunk=chunk))), expected)
    torch.set_num_threads(3)
    assert torch.equal(scorer.score(some), expected)


@given(st.lists(KEYS, min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([1, 27, 2**31]))
def test_equal_keys_get_one_row_and_new_ones_the_children_that_are_their_digits(calls, parts, kinds):
    slots, counts, rows_of = [np.zeros((2, 2), np.uint64) for _ in range(parts)], [0] * parts, {}
    for keys in calls:
        rows, before = np.zeros(len(keys), np.uint64), list(counts)
        children = [np.zeros((2, len(keys)), np.uint64) for _ in range(parts)]
        for part in range(parts):
            state = (slots[part], counts[part], before[part], children[part], rows)
            found = distinct.number(np.array(keys, np.uint64), np.uint64(kinds), part, parts, *state)
            slots[part], counts[part] = found
        for key, row in zip(keys, rows.tolist()):
            if rows_of.setdefault(key, row) == row and row // parts >= before[row % parts]:
                digits = children[row % parts][:, row // parts - before[row % parts]]
                assert digits.tolist() == list(divmod(key, kinds))
            assert rows_of[key] == row
    assert len(set(rows_of.values())) == len(rows_of) == sum(counts)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("inputs, outputs", [(16, 16), (48, 32), (128, 128)])
def test_blocks_of_a_product_are_exact_on_integers(dtype, inputs, outputs):
    generator = np.random.default_rng(0)
    x, weights = (generator.integers(-9, 10, s).astype(dtype) for s in ((2 * tile.ROWS, inputs), (inputs, outputs)))
    bias, out = generator.integers(-9, 10, outputs).astype(dtype), np.full((4 * tile.ROWS, outputs), 7, dtype)
    for block in (0, 1):  # of each the odd or the even rows of `out`
        multiply(np.ascontiguousarray(x[block * tile.ROWS :][: tile.ROWS]), weights, bias, out, block, 2)
    expected = np.full_like(out, 7)
    expected[0 : 2 * tile.ROWS : 2], expected[1 : 2 * tile.ROWS : 2] = np.split(x @ weights + bias, 2)
    assert (out == expected).all()


@jit.compiled
def multiply(x, weights, bias, out, row, step):
    for column in range(0, len(bias), tile.WIDTH // x.itemsize):
        tile.multiply_block(x, weights, bias, column, out, row, step)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 5e-7), (np.float64, 3e-15)], ids=str)
def test_tanh_and_exponential_are_close_everywhere(dtype, tolerance):
    x = np.concatenate([np.linspace(-40, 0, 10_001), [-1e-30, -0.0]]).astype(dtype)
    exponentials, tangents = x.copy(), np.concatenate([x, -x, [-np.inf, np.inf]]).astype(dtype)
    expected = np.tanh(tangents)
    jit.expm1(exponentials)
    jit.tanh(tangents)
    assert abs(exponentials - np.expm1(x)).max() < tolerance and abs(tangents - expected).max() < tolerance


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gated": True}, "layers that are a linear map and tanh"),
        ({"activation": "relu"}, "layers that are a linear map and tanh"),
        ({"dtype": torch.bfloat16}, "float32 or float64"),
        ({"kernel_sizes": (2, 2, 2, 2)}, "at most 256 tokens"),
    ],
    ids=str,
)
def test_what_the_loops_do_not_know_is_scored_by_pytorch(options, message):
    conv = random_conv(**options)
    assert rejects(message, Scorer, conv, ABC, compiled=True)
    scorer = Scorer(conv, ABC)
    assert not scorer.compiled and scorer.score(["emma"]).isfinite().all()


def test_weights_that_are_nan_give_scores_that_are_nan():
    conv = random_conv()
    with torch.no_grad():
        conv.layers[1].conv.weight[0, 0, 0] = torch.nan
    assert rejects("finite", Scorer, conv, ABC, compiled=True) and Scorer(conv, ABC).score(["emma"]).isnan().all()


@pytest.mark.parametrize("biased", [12.0, 30.0])
def test_log_probabilities_near_zero_keep_their_digits(biased):
    """With a large vocabulary, terms that are 1e-7 off would add up."""
    vocab = Vocabulary(map(chr, range(1000, 1255)))
    conv = random_conv((2, 2), vocab_size=256)
    with torch.no_grad():
        conv.head.bias[5] += biased
    name = vocab.characters[4] * 9
    exact, _ = Scorer(conv, vocab, compiled=True).position_log_probs([name])
    found, _ = Scorer(conv, vocab, compiled=True, dtype=torch.float32).position_log_probs([name])
    assert abs(found[:-1] - exact[:-1]).max() < 5e-7 and exact[:-1].max() < 0


def test_keys_that_differ_in_high_bits_only_do_not_collide():
    keys = np.arange(1000, dtype=np.uint64) << np.uint64(40)
    slots = np.zeros((4096, 2), np.uint64)
    first = {int(distinct.first_slot(slots, np.uint64(distinct.hash_of(key)))) for key in keys}
    assert len(first) > 800  # of 1,000 at random in 4,096 slots, about 890 differ


def test_logits_of_any_size_and_a_vocabulary_of_one_character():
    vocab = Vocabulary("a")
    conv = random_conv(vocab_size=2)
    with torch.no_grad():
        conv.head.weight.mul_(1e4)
    logits, targets = outputs_of(conv, ["a", "aaaa", ""], vocab)
    expected = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    values, _ = Scorer(conv, vocab, compiled=True).position_log_probs(["a", "aaaa", ""])
    assert torch.allclose(values, expected, rtol=1e-12, atol=1e-12)
