"""Shared nodes: every distinct node is evaluated once, and gives the logits of the convolutional pass."""

import random

import pytest
import torch
from engine.cases import ABC, DTYPES, outputs_of, random_conv
from helpers import LAYER_NORM, LINEAR, MIXED

from wavenet_conv import Scorer
from wavenet_conv.config import ACTIVATIONS
from wavenet_conv.engine import ids, nodes, shared
from wavenet_conv.engine.shared import NodeCache, SharedNodes, shared_logits_ref
from wavenet_conv.engine.weights import fold

SHAPES = [(2, 2, 2), (8,), (1,), (3, 2, 2), (1, 4, 2), (2, 4, 1), (2, 2, 2, 2, 2)]
CASES = [(sizes, kind) for sizes in SHAPES for kind in ({}, {"gated": True})]
CASES += [((2, 2, 2), LAYER_NORM), ((1, 4, 2), MIXED), ((8,), LINEAR), ((1,), MIXED), ((3, 2, 2), LAYER_NORM | MIXED)]
SETTINGS = [(None, "", 0), (ids, "TABLE_KEYS", 0), (ids, "NEARLY_ALL_DISTINCT", 0.0)]
SETTINGS += [(shared, "TABULATED", 0), (shared, "TILE", 16)]


def logits_of_names(model: SharedNodes, names, device="cpu"):
    """Logits of all outputs, the number of distinct windows, and the token that follows each output."""
    tokens, lengths, _ = ABC.pack(names, context=model.context)
    distinct, rows, targets = model.logits(tokens.to(device), lengths.to(device))
    return distinct[rows], len(distinct), targets.long()


@pytest.mark.parametrize("kernel_sizes, kind", CASES, ids=str)
@pytest.mark.parametrize("module, name, value", SETTINGS, ids=[name for _, name, _ in SETTINGS])
def test_logits_of_names_are_those_of_the_convolutional_pass(
    names, device, monkeypatch, kernel_sizes, module, name, value, kind
):
    if module is not None:
        monkeypatch.setattr(module, name, value)
    some = [*names[::97], "", "a" * 50]
    conv = random_conv(kernel_sizes, **kind, device=device)
    expected, following = outputs_of(conv, some, ABC, device)
    logits, distinct, targets = logits_of_names(SharedNodes(fold(conv)), some, device)
    assert (logits - expected).abs().max() < 1e-12
    assert torch.equal(targets.cpu(), following)
    padded = ["." * conv.context + name for name in some]
    windows = [name[i : i + conv.context] for name in padded for i in range(len(name) - conv.context + 1)]
    assert distinct == len(set(windows)) or (name == "NEARLY_ALL_DISTINCT" and distinct == len(windows))


@pytest.mark.parametrize("kernel_sizes, kind", CASES, ids=str)
def test_definition_gives_the_logits_of_the_convolutional_pass(device, kernel_sizes, kind):
    """One row per distinct window, of windows that need not come from one name; so does `window_logits`."""
    for dtype, tolerance in DTYPES:
        conv = random_conv(kernel_sizes, **kind, dtype=dtype, device=device)
        weights, cache = fold(conv), NodeCache()
        model, generator = SharedNodes(weights), torch.Generator().manual_seed(0)
        for _ in range(3):
            windows = torch.randint(3, (40, conv.context), generator=generator).to(device)
            windows[20:] = windows[:20]
            expected = conv(windows)[:, 0].detach()
            logits, rows = shared_logits_ref(weights, windows)
            assert len(logits) == len(windows.unique(dim=0)) and (logits[rows] - expected).abs().max() < tolerance
            for found in (model.window_logits(windows), model.window_logits(windows, cache)):
                assert found.shape == expected.shape and (found - expected).abs().max() < tolerance
        assert model.window_logits(windows[:0]).shape == (0, 27)


@pytest.mark.parametrize("room", [shared.CACHED, 100_000], ids=["kept", "forgotten"])
def test_chunks_of_a_stream_share_their_nodes(names, monkeypatch, room):
    """With room for all, no 4-gram and no window of up to 5 characters is evaluated for a second chunk."""
    evaluated, original, names = [], shared.ids_of_names, random.Random(0).sample(names, 6000)

    def counting(*args, **options):
        layers, *rest = original(*args, **options)
        evaluated.append([len(children) for children in layers])
        return layers, *rest

    monkeypatch.setattr(shared, "CACHED", room)
    monkeypatch.setattr(shared, "ids_of_names", counting)
    monkeypatch.setattr(ids, "NEARLY_ALL_DISTINCT", 2.0)  # look for equal windows in every chunk
    scorer = Scorer(random_conv(), ABC, compiled=False)
    scores = torch.cat(list(scorer.stream(names, chunk=2000)))
    found, four_grams, early, others = torch.tensor(evaluated).sum(0).tolist(), set(), set(), 0
    for chunk in (names[:2000], names[2000:4000], names[4000:]):
        padded = ["." * 8 + name for name in chunk]
        four_grams |= {name[i : i + 4] for name in padded for i in range(len(name) - 3)}
        windows = {name[i : i + 8] for name in padded for i in range(len(name) - 7)}
        early |= {window for window in windows if window[:3] == "..."}
        others += sum(window[:3] != "..." for window in windows)
    assert (found == [len(four_grams), len(early) + others]) == (room > 100_000)
    assert torch.equal(scorer.score(names), scores) and torch.equal(scorer.score(names[:2000]), scores[:2000])


@pytest.mark.parametrize("kernel_sizes", [(4, 4), (2, 2, 2), (3, 2, 2), (2, 4, 1), (2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("keys", [ids.TABLE_KEYS, 0], ids=["tables", "sorted"])
def test_nodes_that_other_calls_or_chunks_left_change_no_score(names, monkeypatch, kernel_sizes, keys):
    """Nearly every node of unlike names is distinct, without a lookup; the third call continues from the first."""
    monkeypatch.setattr(ids, "TABLE_KEYS", keys)
    conv, order = random_conv(kernel_sizes), random.Random(0)
    scorer, fresh = (Scorer(conv, ABC, compiled=False, remember=remember) for remember in (True, False))
    like = ["".join(order.choices("abc", k=order.randint(4, 9))) for _ in range(1500)]
    unlike = ["".join(order.choices(ABC.characters, k=90)) for _ in range(40)]
    for part in (like, unlike, like[::-1], unlike, names[::20]):
        assert torch.equal(scorer.score(part), expected := fresh.score(part))
        assert torch.equal(torch.cat(list(scorer.stream(part, chunk=500))), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("threads", range(1, 9), indirect=True)
def test_bits_of_an_activation_do_not_depend_on_the_place(threads, activation):
    """Also where PyTorch's threads get parts that are no whole vectors: 3 of 131,072 elements, 4 of 81,920."""
    for channels in (6, 80, 100, 128):
        for x in torch.randn(10, generator=torch.Generator().manual_seed(0)).tolist():
            values = nodes.activate_(torch.full((shared.TILE, channels), x), activation)
            assert (values == values[0, 0]).all()
            assert abs(values[0, 0] - ACTIVATIONS[activation](torch.tensor(x))) < 1e-6
