"""Tables of lower layers, and text numbered on the device: the log-probabilities are those of the tree's windows."""

import pickle
import random

import pytest
import torch
from engine.cases import ABC, DTYPES, outputs_of, random_conv, rejects
from helpers import LAYER_NORM, LINEAR, MIXED

from wavenet_conv import Scorer, Vocabulary, packing
from wavenet_conv.engine import kernel, tabulated
from wavenet_conv.engine.shared import SharedNodes
from wavenet_conv.engine.tabulated import TabulatedNodes
from wavenet_conv.engine.weights import fold

NAMES = ["emma", "", "olivia", "a", "xqzvkj", "maximiliano", "emma", "q" * 40, ""]
SHAPES = [(2, 2, 2), (8,), (1,), (3, 2, 2), (1, 4, 2), (2, 2, 2, 2), (2, 1, 1, 2)]
CASES = [(sizes, kind) for sizes in SHAPES for kind in ({}, {"gated": True})]
CASES += [((2, 2, 2), LAYER_NORM), ((1, 4, 2), MIXED), ((8,), LINEAR), ((3, 2, 2), LAYER_NORM | MIXED)]
ROOMS = [0, 10**6, 10**8]  # bytes: no tables but those of `SharedNodes`, and larger ones


def packed_on(device, names=NAMES, context=8):
    tokens, lengths, _ = ABC.pack(names, context=context)
    return tokens.to(device), lengths.to(device)


def codes_of(names):
    return torch.tensor([*"".join(names).encode("latin-1")], dtype=torch.uint8), torch.tensor([*map(len, names)])


@pytest.mark.parametrize("kernel_sizes, kind", CASES, ids=str)
@pytest.mark.parametrize("room", ROOMS)
def test_log_probs_are_the_trees(device, kernel_sizes, kind, room):
    for dtype, tolerance in DTYPES:
        conv = random_conv(kernel_sizes, vocab_size=27, **kind, dtype=dtype, device=device)
        nodes = TabulatedNodes(SharedNodes(fold(conv)), room=room)
        logits, targets = outputs_of(conv, NAMES, ABC, device)
        expected = logits.log_softmax(1).gather(1, targets.to(device)[:, None])[:, 0].detach()
        tokens, lengths = packed_on(device, context=conv.context)
        found, sums = nodes.log_probs(tokens, lengths)
        assert found.dtype == dtype and (found - expected).abs().max() < tolerance
        parts = [part.double().sum() for part in found.split((lengths + 1).tolist())]
        assert (sums - torch.stack(parts)).abs().max() < 1e-12


def test_more_room_is_more_tables():
    shared = SharedNodes(fold(random_conv((2, 2, 2), dtype=torch.float32)))
    assert [TabulatedNodes(shared, room=room).tabulated for room in ROOMS] == [1, 1, 2]
    least = 2 * (27**4 + shared.tile) * 16 * 4  # two taps of 16 float32 channels
    assert [TabulatedNodes(shared, room=room).tabulated for room in (least, least - 1)] == [2, 1]
    assert TabulatedNodes(SharedNodes(fold(random_conv((2, 2, 2, 2)))), room=2**40).tabulated == 2  # 27^8 is too many


def test_tables_hold_the_bits_of_nodes_that_are_evaluated(device):
    """In tiles of the same size, a node in a table is the node that is evaluated where there is none."""
    conv = random_conv((2, 2, 2), n_embd=24, n_hidden=40, dtype=torch.float32, device=device)
    shared = SharedNodes(fold(conv))
    few, many = TabulatedNodes(shared, room=0), TabulatedNodes(shared, room=10**9)
    tokens, lengths = packed_on(device)
    assert (few.tabulated, many.tabulated) == (1, 2)
    assert torch.equal(few.log_probs(tokens, lengths)[0], many.log_probs(tokens, lengths)[0])


def test_codes_are_numbered_on_the_device(device):
    nodes = TabulatedNodes(SharedNodes(fold(random_conv(device=device))), room=0)
    numbers = ABC.latin1.to(device)
    for names in (NAMES, [""], ["abc"], ["", "", "z"]):
        codes, lengths = codes_of(names)
        *found, known = nodes.log_probs_of_codes(codes.to(device), lengths.to(device), numbers)
        assert known.tolist() == [*map(len, names)]
        for part, expected in zip(found, nodes.log_probs(*packed_on(device, names))):
            assert torch.equal(part, expected)


@pytest.mark.parametrize("names", [["emma", "o!a"], ["a.b", "c"], ["...", "x"], ["é", "."], ["\x00" * 5]], ids=str)
def test_unknown_codes_are_counted(device, names):
    nodes = TabulatedNodes(SharedNodes(fold(random_conv(device=device))), room=0)
    codes, lengths = codes_of(names)
    *_, known = nodes.log_probs_of_codes(codes.to(device), lengths.to(device), ABC.latin1.to(device))
    assert known.tolist() == [sum(c in ABC.characters for c in name) for name in names]


@pytest.mark.parametrize(
    "kind, used",
    [
        ({}, 1),
        ({"gated": True}, 0),
        ({"activation": ("relu", "gelu", "tanh"), "norm": ("layer", "none", "batch"), "head_norm": "batch"}, 1),
        ({"activation": ("tanh", "tanh", "silu")}, 0),
        ({"norm": "layer"}, 0),
        ({"head_kernel_size": 2}, 0),
        ({"head_norm": "layer"}, 0),
    ],
    ids=str,
)
def test_the_kernel_is_used_where_it_runs_and_the_last_layer_is_a_tanh(monkeypatch, kind, used):
    conv, calls = random_conv(**kind, dtype=torch.float32), []
    shared, names = SharedNodes(fold(conv)), packed_on("cpu", context=conv.context)
    expected, _ = TabulatedNodes(shared, room=10**6).log_probs(*names)
    monkeypatch.setattr(kernel, "why_not", lambda *_: "")
    monkeypatch.setattr(kernel, "last_layer", lambda *args: [calls.append(1), kernel.last_layer_ref(*args)][1])
    nodes = TabulatedNodes(shared, room=10**6)
    calls.clear()
    found, _ = nodes.log_probs(*names)
    assert (found - expected).abs().max() < 1e-5 and len(calls) == used


def test_a_kernel_that_cannot_be_compiled_is_not_used(monkeypatch):
    shared, names = SharedNodes(fold(random_conv(dtype=torch.float32))), packed_on("cpu")
    expected, _ = TabulatedNodes(shared, room=0).log_probs(*names)
    monkeypatch.setattr(kernel, "why_not", lambda *_: "")
    monkeypatch.setattr(kernel, "last_layer", lambda *_: (_ for _ in ()).throw(RuntimeError("no C compiler")))
    with pytest.warns(RuntimeWarning, match="Triton cannot run the kernel: no C compiler; .* plain PyTorch"):
        nodes = TabulatedNodes(shared, room=0)
    assert torch.equal(nodes.log_probs(*names)[0], expected)


def test_the_whole_table_of_the_lectures_network_is_the_definition():
    """All four-grams of the lecture's network, as a GPU holds them."""
    nodes = TabulatedNodes(SharedNodes(fold(random_conv(n_embd=24, n_hidden=128, dtype=torch.float32))), room=2**30)
    weights, (table, _) = nodes.nodes, nodes.table
    assert nodes.tabulated == 2 and 2 * 27**4 * 128 * 4 == 544_195_584 <= table.numel() * 4
    chosen = torch.randint(27, (200, 4), generator=torch.Generator().manual_seed(0))
    h = weights.embedding.double()[chosen]
    for layer in (0, 1):
        taps, bias = weights.taps[layer].double(), weights.biases[layer].double()
        h = torch.tanh(h[:, 0::2] @ taps[0] + h[:, 1::2] @ taps[1] + bias)
    keys = chosen @ torch.tensor([27**3, 27**2, 27, 1])
    for tap, bias in ((0, weights.biases[2].double()), (1, 0.0)):
        expected = h[:, 0] @ weights.taps[2][tap].double() + bias
        assert (table[tap, keys] - expected).abs().max() < 1e-5


WIDTHS = [dict(n_embd=24, n_hidden=128), *[dict(n_embd=width, n_hidden=width) for width in (17, 24, 50)]]
WIDTHS += [dict(n_embd=24, n_hidden=40, gated=True), dict(n_embd=21, n_hidden=17, dtype=torch.float64)]
WIDTHS += [dict(n_embd=24, n_hidden=(128, 90, 7), **LAYER_NORM)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_a_name_has_the_same_bits_in_any_batch_on_any_device(names, device, widths):
    scorer, order = Scorer(random_conv(**{"dtype": torch.float32} | widths), ABC, device=device), random.Random(0)
    names = [*names[::200], *NAMES]
    scores = scorer.score(names)
    for size in (1, 1, 1, 2, 7, 64, len(names)):
        chosen = order.sample(range(len(names)), size)
        assert torch.equal(scorer.score([names[i] for i in chosen]), scores[chosen]), size
    assert torch.equal(torch.cat(list(scorer.stream(names, chunk=99))), scores)
    assert torch.equal(scorer.score(ABC.encode(names, context=8)), scores)


@pytest.mark.parametrize(
    "vocab", [ABC, Vocabulary("abé"), Vocabulary("ab日"), Vocabulary.from_mapping([*"ab.c"])], ids=str
)
def test_chunks_on_any_device_have_the_scores_of_float64(device, monkeypatch, vocab):
    """Chunks of codes and of tokens, and known and unknown names in turn."""
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 20)
    characters = [*vocab.characters, "!", vocab.padding, "é", "日", "\ud800", "\0"]
    draw = random.Random(0)
    names = ["".join(draw.choices(characters[: draw.choice([3, 3, 3, 40])], k=draw.randrange(9))) for _ in range(40)]
    names[7] = names[20] = None
    conv = random_conv(vocab_size=len(vocab))
    scores, expected = (Scorer(conv, vocab, device=d).score(names, unknown="nan") for d in (device, "cpu"))
    assert scores.isnan().any() and torch.equal(scores.isnan(), expected.isnan()) and scores.isfinite().sum() > 9
    assert (scores - expected).nan_to_num().abs().max() < 1e-11
    values = Scorer(conv, vocab, device=device).position_log_probs(names, unknown="nan")
    for found, same in zip(values, Scorer(conv, vocab).position_log_probs(names, unknown="nan")):
        assert found.device.type == "cpu" and torch.allclose(found, same, rtol=0, atol=1e-12, equal_nan=True)


def test_the_first_name_that_is_wrong_is_named_on_any_device(device, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 4)  # one or two names in a chunk
    scorer = Scorer(random_conv(), ABC, device=device)
    for place in range(8):
        names = ["emma"] * place + ["o!a", "x?", None, "é日"] + ["emma"] * 5
        message = rf"name {place} \('o!a'\): character '!' at position 1 is not in the vocabulary"
        assert rejects(message, scorer.score, names)
        names[place] = None
        assert rejects(f"name {place} is missing", scorer.score, names)
        wrong = ["emma"] * place + ["o!a", "x?", "emma", "?", "emma"]
        assert rejects(message, scorer.score, wrong)  # several of them in chunks that the device works on
    stream = scorer.stream(["emma"] * 2 + ["!"], chunk=1)
    assert len(next(stream)) == len(next(stream)) == 1
    assert rejects("name 2", next, stream)


def test_an_error_while_a_chunk_starts_leaves_the_scorer_usable(device, monkeypatch):
    scorer, names = Scorer(random_conv(), ABC, device=device, compiled=False), [*NAMES, *NAMES]
    expected = scorer.score(names)
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "segment_reduce", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            scorer.score(names)
    chunks = scorer.stream(names, chunk=1)
    next(chunks)
    chunks.close()
    assert torch.equal(scorer.score(names), expected)


def test_scores_are_equal_on_another_stream_than_the_scorer_was_made_on(device):
    if device.type == "cpu":
        pytest.skip("needs a CUDA device")
    conv = random_conv(vocab_size=300)
    vocab = Vocabulary(map(chr, range(256, 555)))
    names = ["".join(random.Random(i).choices(vocab.characters, k=i % 7)) for i in range(50)]
    scorer = Scorer(conv, vocab, device=device)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = scorer.score(names)
        made = Scorer(conv, vocab, device=device)
    expected = Scorer(conv, vocab).score(names)
    for scores in (found, made.score(names)):
        assert (scores - expected).abs().max() < 1e-11


def test_a_stream_on_any_device_reads_no_chunk_ahead(device):
    """So that a caller who waits for each answer before the next question gets it."""
    scorer, asked = Scorer(random_conv(), ABC, device=device), []

    def questions():
        for name in NAMES:
            asked.append(name)
            yield name

    for count, part in enumerate(scorer.stream(questions(), chunk=1), 1):
        assert len(part) == 1 and len(asked) == count


def test_a_deep_model_on_any_device_takes_chunks_that_fit(device, monkeypatch):
    monkeypatch.setattr(tabulated, "TABLES", 10**5)
    conv = random_conv((2, 2, 2, 2), dtype=torch.float32)
    scorer, expected = Scorer(conv, ABC, device=device), Scorer(conv, ABC).score(NAMES)
    assert (scorer.score(NAMES) - expected).abs().max() < 1e-4
    nodes = TabulatedNodes(SharedNodes(fold(conv)), room=10**5)
    assert nodes.chunk_tokens == 10**5 // (2 * 2 * 16 * 4)  # two taps of 16 float32 channels, twice
    assert TabulatedNodes(SharedNodes(fold(random_conv((2, 2)))), room=0).chunk_tokens is None


def test_copies_of_a_scorer_give_the_same_scores():
    scorer = Scorer(random_conv(dtype=torch.float32), ABC, compiled=False)
    assert torch.equal(pickle.loads(pickle.dumps(scorer)).score(NAMES), scorer.score(NAMES))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tables_on_cuda_are_made_in_ieee_arithmetic():
    """Of few characters, so that there is a table beside those of `SharedNodes`."""
    vocab = Vocabulary("abcdefgh")
    conv, before = random_conv(n_hidden=128, vocab_size=9, dtype=torch.float32), torch.get_float32_matmul_precision()
    found = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found.append(Scorer(conv, vocab, device="cuda").score(["abba", "", "hagebhadecfa"]))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(*found)
