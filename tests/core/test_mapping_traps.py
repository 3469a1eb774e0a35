"""Models that write into their input, hide parts, or read tokens in Python."""

import types

import pytest
import torch
from torch import nn, rand, randn

from wavenet_conv import Vocabulary, from_tree, verify
from wavenet_conv.errors import MappingError

ABC = Vocabulary("abcdefghijklmnopqrstuvwxyz")


class Parts(types.SimpleNamespace):
    """A flat tree of three tokens, `logits(h(x))`, by a seed."""

    def __init__(self):
        torch.manual_seed(0)
        self.C, self.W, self.V = (randn(*shape).double() for shape in ((27, 6), (18, 10), (10, 27)))
        self.P, self.A = randn(100, 6).double(), randn(600, 27).double()
        self.mean, self.var, self.gain = randn(10).double(), rand(10).double() + 0.5, rand(10).double() + 0.5

    def h(self, x):
        return self.C[x].flatten(1) @ self.W

    def logits(self, h):
        return torch.tanh(h) @ self.V


p = Parts()


def writes_into_the_window(x):
    x[:, 0] = 0
    return p.logits(p.h(x))


def writes_through_numpy(x):
    x.numpy().sort(1)
    return p.logits(p.h(x))


def writes_into_a_view(x):
    h = p.h(x)
    h.view(-1, 10).sub_(p.mean)
    return p.logits(h)


def has_a_rule_for_one_window(x):
    logits = p.logits(p.h(x))
    for row, tokens in enumerate(x.tolist()):
        if tokens == [5, 5, 5]:
            logits[row] = 0
    return logits


def computes_in_bfloat16(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.tanh(p.C.float()[x].flatten(1) @ p.W.float()) @ p.V.float()


def broadcasts_positions(x):
    return (p.C[x] + p.P).flatten(1) @ p.A


CHANGES = "changes a part of a tensor that is used later, as recurrent cells do; compute a new one"
REJECTED = [
    (writes_into_the_window, 3, rf"`fill` in test_mapping_traps.py, line \d+ .x.:, 0. = 0. {CHANGES}"),
    (writes_through_numpy, 3, "computes something else than its trace shows"),
    (writes_into_a_view, None, f"`sub` in .* {CHANGES}"),
    (has_a_rule_for_one_window, None, "computes something else.*does its Python code depend on the tokens"),
    (computes_in_bfloat16, None, "the embedding is torch.float32 and the logits torch.bfloat16; compute in one dtype"),
    (broadcasts_positions, None, "one prediction per window of 1 and of 100 tokens; say which with context="),
    (
        lambda x: (p.h(x), p.logits(p.h(x))),
        None,
        r"several rows per window, \(2, 10\) and \(2, 27\); return the logits",
    ),
    (
        lambda x: torch.cat([p.h(x), torch.ones(len(x), 1)], 1) @ randn(11, 27).double(),
        3,
        "joins values with constants",
    ),
]


@pytest.mark.parametrize(("model", "context", "message"), REJECTED, ids=[message[:30] for *_, message in REJECTED])
def test_model_is_rejected(model, context, message):
    with pytest.raises(MappingError, match=message):
        from_tree(model, context=context)


FOLDED = {
    "a threshold and a scale": lambda x: p.logits((p.h(x) - p.mean) / torch.sqrt(torch.tensor(18.0))),
    "a gain inside": lambda x: p.logits((p.h(x) - p.mean) * (torch.rsqrt(p.var + 1e-5) * p.gain)),
    "in place": lambda x: p.logits((p.h(x) - p.mean) / p.var.clone().add_(1e-5).sqrt_()),
}


@pytest.mark.parametrize("model", FOLDED.values(), ids=FOLDED)
def test_what_is_no_batch_norm_by_its_parts_folds(model):
    conv = from_tree(model)
    assert conv.config.norm == ("none",) and verify(model, conv, ["emma"], ABC).equal


def in_training(**options):
    layers = [nn.Embedding(27, 6), nn.Flatten(), nn.Linear(18, 10), nn.BatchNorm1d(10, **options), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(10, 27))
    model(torch.randint(27, (9, 3)))
    return model


def test_module_that_no_attribute_leads_to_runs_in_evaluation_mode():
    hidden = types.ModuleType("hidden")
    hidden.net = in_training()
    before = {name: tensor.clone() for name, tensor in hidden.net.state_dict().items()}
    assert from_tree(lambda x: hidden.net(x)).config.norm == ("batch",)
    assert all(torch.equal(before[name], tensor) for name, tensor in hidden.net.state_dict().items())
    assert hidden.net.training and hidden.net[3].training


def test_average_of_all_batches_becomes_a_momentum():
    assert from_tree(in_training(momentum=None)).layers[0].norm.momentum == 0.1


def test_model_that_inference_mode_or_autocast_surrounds_can_be_trained():
    model = in_training()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        conv = from_tree(model)
    conv.train()(torch.randint(27, (4, 9))).sum().backward()
    assert conv.head.weight.grad.dtype == torch.float32


def test_generator_of_the_notebook_is_left_as_it_was():
    g = torch.Generator().manual_seed(1)
    before = g.get_state()
    with pytest.raises(MappingError, match="draws random numbers"):
        from_tree(lambda x: p.logits(p.h(x) + torch.randn(10, generator=g)))
    assert torch.equal(g.get_state(), before)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_script_module_maps():
    model = torch.jit.script(in_training())
    assert verify(model, from_tree(model), ["emma"], ABC).equal and model.training


MERGES = [randn(12, 10).double() / 3, *(randn(20, 10).double() / 4 for _ in range(2))]


def recursive(x, layer=2):
    if x.shape[1] == 1:
        return p.C[x[:, 0]]
    halves = [recursive(half, layer - 1) for half in x.chunk(2, 1)]
    return torch.tanh(torch.cat(halves, 1) @ MERGES[layer] + p.mean)


def lists(x):
    nodes = [p.C[column] for column in x.unbind(1)]
    for W in MERGES:
        pairs = zip(nodes[::2], nodes[1::2])
        nodes = [torch.tanh(((torch.hstack(pair) @ W) - p.mean) / torch.sqrt(p.var + 1e-5) * p.gain) for pair in pairs]
    return nodes[0]


def a_matrix_per_child(x):
    h = p.C[x]
    for W in MERGES:
        left, right = W.chunk(2)
        h = torch.tanh(h[:, ::2] @ left + h[:, 1::2] @ right + p.mean)
    return h[:, 0]


@pytest.mark.parametrize("nodes, norm", [(recursive, "none"), (lists, "batch"), (a_matrix_per_child, "none")])
def test_tree_that_is_computed_node_by_node_maps(nodes, norm):
    model = lambda x: nodes(x) @ p.V
    conv = from_tree(model)
    assert conv.config.kernel_sizes == (2, 2, 2) and conv.config.norm == (norm,) * 3
    assert verify(model, conv, ["emma", "olivia"], ABC).equal


def test_long_context_is_found():
    weight, table = randn(300 * 6, 27), randn(27, 6)
    assert from_tree(lambda x: table[x].flatten(1) @ weight).context == 300


@pytest.mark.parametrize("table", [randn(8, 6), nn.Embedding(8, 6).weight], ids=["tensor", "embedding"])
def test_positions_that_broadcast_over_one_token_are_named(table):
    """A window of one token runs too, and shows another fault: it is at every place."""
    embed, low, high, head = nn.Embedding(27, 6), nn.Linear(12, 9), nn.Linear(36, 10), nn.Linear(10, 27)

    def model(x):
        h = torch.tanh(low((embed(x) + table).unflatten(1, (4, 2)).flatten(2)))
        return head(torch.tanh(high(h.flatten(1))))

    with pytest.raises(MappingError, match="constants that differ per position .learned positions.*train again"):
        from_tree(model)
