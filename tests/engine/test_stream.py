"""A stream that reads a name gives the tree's logits at every position, in every row and by both backends."""

import copy
import io
import pickle
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine.cases import ABC, BACKENDS, DEEP, GATED, OTHERS, SHAPES, WIDE, random_conv, rejects, streamed
from helpers import LAYER_NORM, needs_numba, random_tree
from hypothesis import given, settings

import reference
from wavenet_conv import Stream, from_tree
from wavenet_conv.engine.stream import FEW_ROWS

backends = pytest.mark.parametrize("batch_size, compiled", BACKENDS)


def assert_gives_the_trees_logits(tree, names, tolerance, batch_size, compiled=None):
    stream = Stream(from_tree(tree), batch_size, compiled=compiled)
    for start in range(0, len(names), batch_size):
        start = min(start, len(names) - batch_size)
        tokens, lengths = ABC.encode(names[start : start + batch_size], context=stream.context)
        stream.reset()
        logits = streamed(stream, tokens[:, stream.context - 1 :])
        with torch.no_grad():
            expected = reference.window_logits(tree, tokens)
        inside = torch.arange(logits.shape[1]) <= lengths[:, None]
        assert logits.dtype == expected.dtype and (logits - expected)[inside].abs().max() < tolerance


@backends
@pytest.mark.parametrize("sizes", [WIDE, GATED, *SHAPES], ids=str)
def test_logits_are_the_trees(names, sizes, batch_size, compiled):
    some = names[:: 1200 if batch_size > 1 else 6000]
    assert_gives_the_trees_logits(random_tree(**sizes), some, 1e-12, batch_size, compiled)
    assert_gives_the_trees_logits(random_tree(**sizes, dtype=torch.float32), some[-20:], 1e-5, batch_size, compiled)


@pytest.mark.parametrize("batch_size", [3, 20])
@pytest.mark.parametrize("sizes", OTHERS, ids=str)
def test_logits_of_other_kinds_are_the_trees_by_pytorch(names, sizes, batch_size):
    tree, message = random_tree(**sizes), "no other activation, no layer norm.*leave out compiled=True"
    assert_gives_the_trees_logits(tree, names[::1200], 1e-12, batch_size)
    assert_gives_the_trees_logits(random_tree(**sizes, dtype=torch.float32), names[:20], 1e-5, batch_size)
    assert not Stream(from_tree(tree)).compiled and rejects(message, Stream, from_tree(tree), compiled=True)


@backends
@pytest.mark.parametrize("kernel_sizes", [(3, 2), (4,) * 5], ids=str)
def test_logits_far_behind_the_context_are_those_of_the_convolutional_pass(kernel_sizes, batch_size, compiled):
    """Rings are written many times over; a context of 1,024 has dilations up to 256."""
    conv = random_conv(kernel_sizes, n_hidden=6)
    tokens = torch.randint(27, (batch_size, 2 * conv.context + 30), generator=torch.Generator().manual_seed(0))
    tokens[:, : conv.context] = 0
    stream = Stream(conv, batch_size, compiled=compiled)
    assert (streamed(stream, tokens[:, conv.context - 1 :]) - conv(tokens)).abs().max() < 1e-12


@needs_numba
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 3e-6), (np.float64, 1e-14)])
def test_compiled_tanh_is_accurate_relative_to_its_size(dtype, tolerance):
    from wavenet_conv.engine import loops

    x = np.concatenate([sign * np.logspace(-30, 2, 30_000) for sign in (1, -1)] + [[0, np.inf, -np.inf, np.nan]])
    x = x.astype(dtype)
    expected, y = np.tanh(x.astype(np.float64)), x.copy()
    loops.tanh(y)
    assert (np.abs(y - expected) <= tolerance * np.abs(expected))[:-1].all() and np.isnan(y[-1])


@pytest.mark.parametrize("sizes, end", [(WIDE, 0), (WIDE, 5), (GATED, 0), (DEEP, 0), (OTHERS[1], 3)], ids=str)
def test_a_step_as_one_graph_has_the_same_bits(cuda, sizes, end):
    """Also after rows were reset, a state was loaded and prefixes were pushed."""
    conv = from_tree(random_tree(**sizes, device=cuda))
    streams = [Stream(conv, 3, graph=graph, end=end) for graph in (True, False)]
    tokens = torch.randint(27, (3, 40), generator=torch.Generator().manual_seed(0))

    def assert_same(read):
        one, other = (read(stream) for stream in streams)
        assert torch.equal(one, other)

    assert_same(lambda stream: streamed(stream, tokens[:, :23]))
    first, other = (stream.step(tokens[:, 0]) for stream in streams)
    state = streams[1].state()
    assert_same(lambda stream: stream.reset([1]) or streamed(stream, tokens[:, 23:]))
    assert_same(lambda stream: stream.load_state(state) or streamed(stream, tokens[:, :7]))
    prefixes = torch.full((3, 9), end).masked_scatter(torch.arange(9) > 0, tokens)
    assert_same(lambda stream: stream.push(prefixes, torch.tensor([8, 8, 8])))
    assert torch.equal(first, other)  # no later step has overwritten what was returned
    for one, other in zip(*(stream.state().values() for stream in streams)):
        assert torch.equal(one, other)


@settings(max_examples=25)
@given(st.data())
def test_reset_rows_do_not_change_the_others(data):
    """Any rows, at any step, again and again, by either backend."""
    sizes = data.draw(st.sampled_from([GATED, DEEP, *SHAPES, *OTHERS]))
    batch_size = data.draw(st.sampled_from([1, 2, FEW_ROWS + 1]))
    tree = random_tree(**sizes, vocab_size=5)
    stream = Stream(from_tree(tree), batch_size)
    read = [[0] * stream.context for _ in range(batch_size)]
    for _ in range(20):
        tokens = data.draw(st.lists(st.integers(0, 4), min_size=batch_size, max_size=batch_size))
        logits = stream.step(torch.tensor(tokens))
        for row, token in zip(read, tokens):
            row.append(token)
        with torch.no_grad():
            expected = tree(torch.tensor([row[-stream.context :] for row in read]))
        assert (logits - expected).abs().max() < 1e-12
        rows = data.draw(st.lists(st.integers(0, batch_size - 1), max_size=batch_size))
        mask = torch.tensor([row in rows for row in range(batch_size)])
        stream.reset(data.draw(st.sampled_from([rows, torch.tensor(rows, dtype=torch.int64), mask])))
        for row in rows:
            read[row] = [0] * stream.context


@pytest.mark.parametrize("sizes", [WIDE, GATED, *SHAPES, *OTHERS], ids=str)
def test_push_gives_the_logits_after_each_prefix(sizes, device):
    """Of any lengths, with one `.` or a whole context before them; the stream continues from there."""
    prefixes = ["", "a", "maximiliano", "x" * 40, "emma"]
    tree = random_tree(**sizes, device=device)
    stream = Stream(from_tree(tree), len(prefixes))
    stream.step(torch.arange(5, device=device))  # push forgets this
    for context in (1, stream.context):
        pushed = stream.push(*ABC.encode(prefixes, context=context))
        stepped = stream.step(torch.tensor([1, 2, 3, 4, 5], device=device))
        for row, prefix in enumerate(prefixes):
            for name, logits in ((prefix, pushed[row]), (prefix + ABC.characters[row], stepped[row])):
                window = torch.tensor([([0] * stream.context + [ABC.characters.index(c) + 1 for c in name])])
                with torch.no_grad():
                    expected = tree(window[:, -stream.context :].to(device))[0]
                assert (logits - expected).abs().max() < 1e-12


def test_a_prefix_is_checked_once_and_not_at_each_step(device, monkeypatch):
    checked = []
    monkeypatch.setattr("wavenet_conv.engine.stream.check_tokens", lambda *arguments: checked.append(arguments))
    rows = FEW_ROWS + 1
    Stream(random_conv(device=device), rows).push(*ABC.encode(["emma"] * rows, context=8))
    assert len(checked) == 1


@pytest.mark.parametrize("end", [0, 5])
@pytest.mark.parametrize("sizes", [WIDE, GATED, DEEP], ids=["wide", "gated", "deep"])
def test_a_step_does_not_wait_for_the_device(cuda, sizes, end):
    """A CUDA graph refuses what waits. Tokens of the host and of the device give the same logits."""
    conv, tokens = from_tree(random_tree(**sizes, device=cuda)), torch.tensor([1, 2, 3])
    streams = [Stream(conv, 3, end=end) for _ in range(2)]
    for _ in range(5):
        assert torch.equal(streams[0].step(tokens), streams[1].step(tokens.to(cuda)))
    on_device = tokens.to(cuda)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        streams[1].step(on_device)


@pytest.mark.parametrize("pinned", [False, True])
def test_tokens_in_pinned_memory_may_change_after_a_call(cuda, pinned, monkeypatch):
    """The device reads such memory later, if nobody waits; other memory is read at once."""
    copies, to, conv = [], torch.Tensor.to, random_conv(device=cuda)
    stream, (tokens, lengths) = Stream(conv, 2), ABC.encode(["emma", "anna"], context=8)

    def recorded(self, *args, **options):
        copies.extend([options["non_blocking"]] if "non_blocking" in options else [])
        return to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, *_: pinned and not self.is_cuda)
    monkeypatch.setattr(torch.Tensor, "to", recorded)
    for call in (lambda: stream.step(tokens[:, 8]), lambda: stream.push(tokens, lengths), lambda: conv(tokens)):
        call()
        assert copies.pop() == (not pinned) and not copies


@pytest.mark.parametrize("batch_size, compiled", BACKENDS[1:])
@pytest.mark.parametrize("sizes", [WIDE, GATED, DEEP], ids=["wide", "gated", "deep"])
def test_a_state_continues_in_another_stream(batch_size, compiled, sizes, device):
    conv = from_tree(random_tree(**sizes, dtype=torch.float32))
    stream, file = Stream(conv, batch_size, compiled=compiled), io.BytesIO()
    tokens = torch.randint(0, 27, (batch_size, 30), generator=torch.Generator().manual_seed(0))
    streamed(stream, tokens[:, :11])
    stream.reset([1])
    streamed(stream, tokens[:, :5])
    torch.save(stream.state(), file)
    expected = streamed(stream, tokens[:, 5:])
    file.seek(0)
    state = torch.load(file, weights_only=True)
    moved = Stream(conv, batch_size, device=device)
    for other in (stream, Stream(conv, batch_size, compiled=compiled), Stream(conv, batch_size, compiled=False), moved):
        other.load_state(state)
        assert (streamed(other, tokens[:, 5:].to(other.device)).cpu() - expected).abs().max() < 1e-5
    for other in (stream, moved):  # a row that is reset after loading is as old as it was
        other.load_state(state)
        other.reset([0])
    logits = streamed(moved, tokens[:, 5:].to(device)).cpu()
    assert (logits - streamed(stream, tokens[:, 5:])).abs().max() < 1e-5


def test_states_that_do_not_fit_are_rejected():
    conv, other = (random_conv(n_hidden=20, dtype=torch.float32, seed=seed) for seed in (0, 1))
    stream = Stream(conv, 3)
    stream.step(torch.tensor([1, 2, 3]))
    state = stream.state()
    for stranger, message in (
        (Stream(other, 3).state(), "of another model or dtype"),
        (Stream(conv, 3, dtype=torch.float64).state(), "of another model or dtype"),
        (Stream(conv, 4).state(), "'ages' of this state .* has another shape"),
        ({key: state[key] for key in state if key != "keys"}, "'keys' of this state is missing"),
        (state | {"keys": state["keys"] + 10**6}, "out of range; it is damaged"),
        (state | {"layer 0": state["layer 0"] - 1}, "out of range"),
        (state | {"layer 1": state["layer 1"].double()}, "'layer 1' of this state .* is damaged"),
        *[
            (state | {"layer 1": state["layer 1"][..., :columns]}, "'layer 1' of this state .* is damaged")
            for columns in (0, 1, 16, 17)  # of 32, for 20 channels
        ],
        ([state], "a state is a dict of tensors"),
    ):
        assert rejects(message, stream.load_state, stranger)
    assert all(torch.equal(part, state[key]) for key, part in stream.state().items())
    state = Stream(conv := random_conv(**LAYER_NORM)).state()
    conv.layers[0].norm.eps = 1e-3
    assert rejects("of another model or dtype", Stream(conv).load_state, state)


@pytest.mark.parametrize("sizes", [WIDE, GATED, DEEP, OTHERS[1]], ids=["wide", "gated", "deep", "mixed"])
def test_a_state_may_have_the_columns_of_a_gpu_and_lie_on_several_devices(sizes, device):
    stream, tokens = Stream(from_tree(random_tree(**sizes, device=device)), 2), torch.ones(2, 9, dtype=torch.int64)
    streamed(stream, tokens)
    state, expected = stream.state(), streamed(stream, tokens)
    rings = {name: part.cpu() for name, part in state.items() if part.ndim == 3}
    wider = {name: F.pad(part, (0, -part.shape[2] % 64)) for name, part in rings.items()}
    stream.load_state(state | wider | {"keys": state["keys"].cpu()})
    assert torch.equal(streamed(stream, tokens), expected)


@pytest.mark.parametrize("batch_size, compiled", BACKENDS[1:])
def test_a_stream_computes_on_its_device_where_another_one_is_the_default(batch_size, compiled):
    conv, prefixes = random_conv(), ABC.encode(["emma", "ann", *[""] * (batch_size - 2)], context=8)

    def read():
        stream = Stream(conv, batch_size, compiled=compiled)
        pushed = stream.push(*prefixes)
        stream.load_state(stream.state())
        stream.reset([1])
        return pushed, stream.step(prefixes[1])

    expected = read()
    with torch.device("meta"):
        assert all(map(torch.equal, read(), expected))


def test_compiled_steps_that_cannot_run_are_rejected(monkeypatch):
    assert rejects("a step can be a graph on CUDA, not on cpu; leave out graph=True", Stream, random_conv(), graph=True)
    conv, message = random_conv(), r"up to 8 rows on the CPU, in float32 .* pip install 'wavenet-conv.fast.'"
    assert rejects(message, Stream, conv, FEW_ROWS + 1, compiled=True)
    assert rejects(message, Stream, random_conv(dtype=torch.bfloat16), compiled=True)
    monkeypatch.delattr("wavenet_conv.engine.loops", raising=False)
    monkeypatch.setitem(sys.modules, "wavenet_conv.engine.loops", None)  # as if Numba were missing
    assert not Stream(conv).compiled and rejects(message, Stream, conv, compiled=True)


@pytest.mark.parametrize("batch_size", [1, FEW_ROWS + 1])
def test_wrong_arguments_are_rejected_and_change_nothing(batch_size):
    stream, good = Stream(random_conv(), batch_size), torch.zeros(batch_size, dtype=torch.int64)
    before, (tokens, lengths) = stream.state(), ABC.encode(["emma"] * batch_size, context=8)
    for call, arguments, message in (
        (stream.step, (good[:-1],), "step takes tokens int64"),
        (stream.step, (good.float(),), "step takes tokens int64"),
        (stream.step, (good.to("meta"),), "tokens are on meta and the stream on cpu"),
        (stream.step, (good + 27,), r"token 27 at \[0\] is outside the vocabulary of 27"),
        (stream.step, (good - 1,), r"token -1 at \[0\] is outside the vocabulary of 27"),
        (stream.reset, ([batch_size],), f"row {batch_size} is not among the {batch_size} rows"),
        *[(stream.reset, (rows,), "rows is .* give a list of rows") for rows in (good * 1.0, 0, [[0]], "ab", 2**70)],
        (stream.push, (tokens[1:], lengths), "are not those of"),
        (stream.push, (tokens.roll(4, 1), lengths), "do not hold"),
        (stream.push, (torch.where(tokens > 0, 30, 0), lengths), "token 30"),
        *[(call, (stream,), "not copied or pickled") for call in (copy.copy, copy.deepcopy, pickle.dumps)],
        (Stream, (random_conv(), 1.5), "batch_size is 1.5"),
    ):
        assert rejects(message, call, *arguments)
    assert all(torch.equal(part, before[key]) for key, part in stream.state().items())


@pytest.mark.parametrize("batch_size, compiled", BACKENDS[1:])
def test_inference_mode_and_later_steps_change_nothing(batch_size, compiled):
    conv, tokens = random_conv(), torch.ones(batch_size, 2, dtype=torch.int64)
    stream = Stream(conv, batch_size, compiled=compiled)
    first = stream.step(tokens[:, 0])
    expected = torch.stack([first.clone(), stream.step(tokens[:, 1])], 1)
    assert torch.equal(first, expected[:, 0]) and not first.requires_grad  # the next step has not overwritten it
    with torch.inference_mode():
        stream = Stream(conv, batch_size, compiled=compiled)
        assert torch.equal(streamed(stream, tokens), expected)
    stream.reset()
    assert torch.equal(streamed(stream, tokens), expected)
