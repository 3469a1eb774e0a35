"""A model without an equal is rejected with the reason, the place in its code, and the fix; several reasons at once."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from core.notebooks import build
from core.spellings import Layer, embedding, fan_in, fresh, lecture, spelled, tree
from torch import nn, randn

from wavenet_conv import ConvWaveNet, WaveNetConfig, from_tree
from wavenet_conv.errors import MappingError

REJECTED = {}  # name: (builder, context, patterns that the message has)


def rejected(*patterns, context=None):
    def register(make):
        REJECTED[make.__name__] = (make, context, patterns)
        return make

    return register


class Around(nn.Module):
    """An embedding, an inner function of x (batch, time, channels) and of modules, and a head."""

    def __init__(self, function, inputs=6, **inner):
        super().__init__()
        self.emb, self.lm_head, self.function = nn.Embedding(27, 6), nn.Linear(inputs, 27), function
        self.inner = nn.ModuleDict(inner)
        fresh(self)

    def forward(self, idx):
        return self.lm_head(self.function(self.emb(idx), **self.inner))


def with_layer(place, layer, **spelling):
    layers = tree((2, 2), **spelling)
    layers.insert(place, layer)
    return layers


HERE = r"test_mapping_errors.py, line \d+"


@rejected(rf"`add` in {HERE} .* constants that differ per position .learned positions.")
def learned_positions():
    P = randn(4, 6)
    return with_layer(1, lambda x: torch.tanh(x + P))


@rejected(rf"`add` in {HERE} .* constants that differ per position", context=4)
def learned_positions_before_a_linear_map():
    P = randn(4, 6)
    return with_layer(1, lambda x: x + P)


@rejected("statistics per position: .*let the batch norm reduce over all axes but the last, .0, 1. .*train again")
def statistics_per_position():
    norm = spelled(lambda x, m, v, g, b, e: (x - m) / torch.sqrt(v + e) * g + b)(10)
    norm.running_mean = randn(1, 2, 10)
    return [*tree((2, 2))[:3], norm, *tree((2, 2))[4:]]


@rejected("attention", HERE, context=4)
def attention():
    def attend(x, q, k, v):
        weights = F.softmax(q(x) @ k(x).mT / 6**0.5, dim=-1)
        return (weights @ v(x))[:, -1]

    return Around(attend, q=nn.Linear(6, 6), k=nn.Linear(6, 6), v=nn.Linear(6, 6))


@rejected("reads positions that overlap", HERE, context=4)
def overlapping_windows():
    W = fan_in(12, 10)
    return Around(lambda x: (x.unfold(1, 2, 1).flatten(2) @ W).flatten(1), 30)


@rejected(rf"`add(mm)?` in {HERE} .*recurrent connection", context=4)
def recurrent_cell():
    W, U = fan_in(6, 6), fan_in(6, 6)

    def recur(x):
        h = torch.tanh(x[:, 0] @ W)
        for t in range(1, x.shape[1]):
            h = torch.tanh(x[:, t] @ W + h @ U)
        return h

    return Around(recur)


@rejected("looks up|numbers of the tokens", HERE, context=3)
def rows_by_gather():
    table, weight = randn(27, 6), randn(18, 27)
    return lambda x: table.gather(0, x.reshape(-1, 1).expand(-1, 6)).view(-1, 18) @ weight


@rejected("adds two values that both depend on the tokens .a residual")
def residual_connection():
    block = nn.Linear(10, 10)
    return with_layer(5, Layer(lambda x: x + torch.tanh(block(x))))


@rejected("missing 1 required positional argument: 'length'", "wrap the model in a function of the windows alone")
def two_inputs():
    return lambda x, length: x


@rejected("joins values of different layers; a layer merges nodes of one layer, k of them each time", HERE, context=5)
def unequal_children():
    W, V = fan_in(12, 10), fan_in(18, 10)
    return Around(lambda x: torch.cat([x[:, :2].flatten(1) @ W, x[:, 2:].flatten(1) @ V], 1), 20)


@rejected("`bmm` in .* uses other weights at each position", HERE, context=4)
def weights_per_position():
    W = randn(2, 12, 10)
    return Around(lambda x: torch.tanh(torch.einsum("bti,tio->bto", lecture(x, 2), W)).flatten(1), 20)


@rejected("computes with the numbers of the tokens; look up the rows of an embedding instead", context=3)
def tokens_as_numbers():
    W = randn(3, 27)
    return lambda x: x.to(W.dtype) @ W


@rejected("looks up something else than the rows of a table .vocab, channels. by the tokens", HERE, context=2)
def trigram_table():
    table = randn(27, 27, 27)
    return lambda x: table[x[:, 0], x[:, 1]]


@rejected("NaN or infinite")
def a_weight_of_nan():
    layers = tree((2, 2))
    layers[2].weight[0, 0] = torch.nan
    return layers


@rejected("the logits do not depend on the tokens", context=2)
def constant_logits():
    logits = randn(27)
    return lambda x: logits.expand(len(x), 27)


@rejected(
    "computes something else",
    "traced: .*index, .*mm",
    "mapped: embedding 27 x 6; linear of 2, .*; head of 1",
)
def python_that_reads_the_tokens():
    model = build(partial(tree, (2, 2), wrapper="closure"))
    return lambda x: model(x.flip(1)) if int(x.max()) > 0 else model(x)


@rejected("computes something else", "traced: ", "mapped: ")
def a_rule_for_one_token():
    model = build(partial(tree, (2, 2), wrapper="closure"))
    return lambda x: model(x) + (1.0 if bool((x == 13).any()) else 0.0)


@rejected("computes something else|constants|not depend")
def a_detour_by_numpy():
    model = build(partial(tree, (2, 2), wrapper="closure"), torch.float32)
    return lambda x: torch.from_numpy(model(x).numpy() * (1 + x[:, :1].numpy()))


def convolved(outputs, **options):
    return lambda: Around(lambda x, conv: conv(x.mT).mT.flatten(1), outputs, conv=nn.Conv1d(6, 10, 2, **options))


def flat(layer, **options):
    layers = lambda: [nn.Embedding(27, 6, **options), nn.Flatten(), nn.Linear(12, 10), layer(), nn.Linear(10, 27)]
    return lambda: fresh(nn.Sequential(*layers()))


def inserted(place, function):
    return lambda: with_layer(place, Layer(function))


def standardized(x, axis):
    return (x - x.mean(axis, keepdim=True)) / x.std(axis, keepdim=True)


def attend(x, att):
    return F.scaled_dot_product_attention(att(x), x, x)[:, -1]


UNKNOWN = r"is not among the activations: tanh, ReLU, GELU .by erf., SiLU, sigmoid"
OVERLAP = r"`convolution` in inner.conv .Conv1d. reads positions that overlap or are no neighbours"
NO_STATISTICS = partial(nn.BatchNorm1d, 10, track_running_stats=False)
for name, context, make, pattern in [
    ("stride 1", 4, convolved(30), OVERLAP),
    ("dilation", 4, convolved(20, dilation=2), OVERLAP),
    ("padding", 4, convolved(30, stride=2, padding=1), r"`convolution` in inner.conv .Conv1d. pads with zeros"),
    ("attention of torch", 4, lambda: Around(attend, att=nn.Linear(6, 6)), "attention"),
    ("GRU", 4, lambda: Around(lambda x, rnn: rnn(x)[0][:, -1], rnn=nn.GRU(6, 6, batch_first=True)), "inner.rnn .GRU"),
    (
        "mean of positions",
        4,
        lambda: Around(lambda x: x.mean(1)),
        f"`mean` in {HERE}.* is a statistic of positions or channels",
    ),
    ("ELU", 2, flat(nn.ELU), rf"`elu` in 3 .ELU. {UNKNOWN}"),
    ("LeakyReLU", 2, flat(nn.LeakyReLU), r"`leaky_relu` in 3 .LeakyReLU. (is not among the activations|has no equal)"),
    ("GELU by tanh", 2, flat(partial(nn.GELU, approximate="tanh")), rf"`gelu` in 3 .GELU. {UNKNOWN}"),
    ("no statistics", 2, flat(NO_STATISTICS), "in 3 .BatchNorm1d. uses statistics of the batch"),
    ("max_norm", 2, flat(nn.Tanh, max_norm=1.0), "in 0 .Embedding. .*.max_norm.; build it without"),
    ("log_softmax", 4, inserted(10, lambda x: x.log_softmax(-1)), f"{HERE}.* return the logits themselves"),
    ("probabilities", 4, inserted(10, lambda x: F.softmax(x, 1)), f"{HERE}.* return the logits themselves"),
    ("narrow", 4, lambda: [*tree((2, 2))[:-1], nn.Linear(10, 26)], "26 numbers per window, and its embedding has 27"),
    (
        "dropout",
        4,
        inserted(4, lambda x: F.dropout(x)),
        f"{HERE}.* random numbers; give F.dropout training=",
    ),
    ("noise alone", 4, inserted(4, lambda x: x + torch.randn_like(x)), rf"^[^\n]*{HERE}.* random numbers; [^\n]*$"),
    ("batch", 4, inserted(3, lambda x: standardized(x, 0)), rf"`mean` in {HERE}.* depend on other examples"),
    (
        "channels",
        4,
        inserted(4, lambda x: standardized(x, -1)),
        f"{HERE}.* is a statistic of positions or channels; of these only nn.LayerNorm",
    ),
]:
    REJECTED[name] = (make, context, [pattern])


@pytest.mark.parametrize("name", REJECTED)
def test_model_without_an_equal_is_rejected_with_reason_and_place(name):
    make, context, patterns = REJECTED[name]
    with pytest.raises(MappingError) as raised:
        from_tree(build(make), context=context)
    for pattern in patterns:
        assert re.search(pattern, str(raised.value)), f"{pattern}\n{raised.value}"


def test_independent_complaints_come_in_one_message():
    layers = with_layer(4, nn.ELU())
    layers[-1:-1] = [Layer(lambda x: F.dropout(x)), nn.LeakyReLU()]
    with pytest.raises(MappingError, match=r"(?s)\n- `elu` .*\n- .*draws random numbers.*\n- `leaky_relu` "):
        from_tree(layers)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "the model is a int; pass what maps tokens"),
        (None, "the model is a NoneType; pass what maps tokens"),
        ([], "the model is a list; pass what maps tokens"),
        ([embedding, None], "the model is a NoneType"),
        (type("Net", (nn.Module,), {}), "the model is the class Net; pass an instance"),
        (ConvWaveNet(WaveNetConfig(27, 4, 4, (2,))), "is a ConvWaveNet already; from_tree takes a model of windows"),
        (torch.zeros(27, 27), "the model is a Tensor"),
        ({"layers": []}, "the model is a dict"),
    ],
    ids=str,
)
def test_what_is_no_model_is_rejected(model, message):
    with pytest.raises(MappingError, match=message):
        from_tree(model)


@pytest.mark.parametrize("context", [0, -1, 2.0, True, "8"])
def test_context_must_be_a_positive_integer(context):
    with pytest.raises(
        MappingError, match=f"context is {re.escape(repr(context))}; it must be an integer of at least 1"
    ):
        from_tree(build(tree), context=context)


def test_no_context_fits():
    weight, table = randn(31, 27), randn(27, 6)
    model = lambda x: table[x].flatten(1) @ weight
    with pytest.raises(MappingError, match="no number of tokens from 1 to 4,096; .*cannot be multiplied.*context="):
        from_tree(model)


def test_context_that_does_not_fit():
    with pytest.raises(MappingError, match=r"cannot run on windows of shape \(2, 7\)"):
        from_tree(build(tree), context=7)


def test_ambiguous_context_has_to_be_given():
    table = torch.randn(27, 27, dtype=torch.float64)
    model = lambda x: table[x].view(len(x), -1)[:, :27]
    positions, weight = torch.randn(3, 27).double(), torch.randn(81, 27).double()
    broadcast = lambda x: (table[x] + positions).flatten(1) @ weight
    with pytest.raises(MappingError, match="one prediction per window of 1 and of 3 tokens; say which with context="):
        from_tree(broadcast)
    assert from_tree(model, context=1).context == 1
    assert from_tree(broadcast, context=3).context == 3
