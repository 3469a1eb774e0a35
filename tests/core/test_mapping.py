"""Models of anyone's spelling become convolutions with the same logits, weights and norms; nothing of them changes."""

from __future__ import annotations

import inspect
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from core import spellings
from core.notebooks import KINDS, build
from einops import rearrange
from helpers import KINDS as TREES
from helpers import norms_of, parts_of, random_tree
from hypothesis import example, given, settings
from torch import nn

import reference
from wavenet_conv import from_tree, verify
from wavenet_conv.model import BatchNorm
from wavenet_conv.vocabulary import Vocabulary

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
WHOLE = [name for name in KINDS if ":" not in name]
LETTERS = Vocabulary("abcdefghijklmnopqrstuvwxyz")
NAMES = ["", "a", "zoe", "emma", "quincy", "wolfeschlegelstein"]


def as_called(model):
    layers = isinstance(model, (list, tuple, nn.ModuleList))
    return partial(spellings.run, [as_called(layer) for layer in model]) if layers else model


@torch.no_grad()
def logits_of(model, windows):
    """What a model gives for windows: its first result with one row of logits per window."""
    out = as_called(model)(windows)
    out = list(out.values()) if isinstance(out, dict) else out
    out = next(x for x in out if x is not None) if isinstance(out, (list, tuple)) else out
    return out.reshape(len(windows), -1)


def assert_equal(model, conv, tolerance):
    """Both give the same logits at every position of the names."""
    tokens, lengths = LETTERS.encode(NAMES, context=conv.context)
    inside = torch.arange(tokens.shape[1] - conv.context + 1) <= lengths[:, None]
    with torch.no_grad():
        found = conv(tokens)[inside]
    expected = logits_of(model, tokens.unfold(1, conv.context, 1)[inside].contiguous())
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert ((found - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all(), (found - expected).abs().max()
    assert expected.std() > 0.1


def members(thing, path="model", seen=None):
    """Path and value of everything inside a model that can change: tensors, flags, numbers, containers, closures."""
    seen = {} if seen is None else seen
    if isinstance(thing, (type, type(torch), torch.dtype, str)) or id(thing) in seen:
        return
    seen[id(thing)] = thing
    yield path, thing
    if inspect.isfunction(thing):
        names = inspect.getclosurevars(thing)
        inside = names.nonlocals | names.globals | {"defaults": thing.__defaults__}
    elif inspect.ismethod(thing):
        inside = {"self": thing.__self__}
    elif isinstance(thing, partial):
        inside = {"args": thing.args}
    elif isinstance(thing, dict):
        inside = thing
    elif isinstance(thing, (list, tuple)):
        inside = dict(enumerate(thing))
    else:
        inside = {} if isinstance(thing, torch.Tensor) else getattr(thing, "__dict__", {})
    for name, part in list(inside.items()):
        yield from members(part, f"{path}.{name}", seen)


def tensors_of(model):
    return {path: part for path, part in members(model) if isinstance(part, torch.Tensor)}


def snapshot(model):
    """All that from_tree must leave alone, as values that compare by `==`."""
    found = {}
    for path, part in members(model):
        if isinstance(part, torch.Tensor):
            grad = part.grad.tolist() if part.is_leaf and part.grad is not None else None
            found[path] = (id(part), part.detach().double().tolist(), part.requires_grad, grad, str(part.dtype))
        elif isinstance(part, (bool, int, float, type(None))):
            found[path] = part
        else:
            found[path] = (id(part), sorted(vars(part)) if hasattr(part, "__dict__") else None)
    return found, torch.random.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_default_dtype()


@pytest.mark.parametrize("name", KINDS)
def test_kind_maps_to_its_layers_and_logits(name):
    kind = KINDS[name]
    model = build(name)
    conv = from_tree(model)
    assert conv.config == kind.config and not conv.training
    assert_equal(model, conv, TOLERANCE[torch.float64])
    for norm in (module for module in conv.modules() if isinstance(module, (BatchNorm, nn.LayerNorm))):
        assert norm.eps == kind.eps and getattr(norm, "momentum", 0.1) == 0.1
    single = build(name, torch.float32)
    assert_equal(single, from_tree(single, context=conv.context), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.bits])
def test_weights_and_statistics_are_the_same_bits(name):
    model = build(name, torch.float32)
    conv = from_tree(model)
    known = {tensor.detach().numpy().tobytes() for tensor in tensors_of(model).values()}
    for path, tensor in conv.state_dict().items():
        layouts = [tensor]
        if tensor.ndim == 3:
            layouts += [tensor.mT, rearrange(tensor, "o c j -> (j c) o"), rearrange(tensor, "o c j -> o (j c)")]
            layouts += [rearrange(tensor, "o c j -> j c o")]
        same = any(layout.contiguous().numpy().tobytes() in known for layout in layouts)
        taps = tensor.ndim == 3 and all(
            any(layout.contiguous().numpy().tobytes() in known for layout in (tap, tap.T)) for tap in tensor.unbind(2)
        )
        assert same or taps or not tensor.any(), path


@pytest.mark.parametrize("name", WHOLE)
def test_training_goes_on(name):
    model = build(name, torch.float32)
    conv = from_tree(model).train()
    tokens, lengths = LETTERS.encode(NAMES, context=conv.context)
    before = {path: value.clone() for path, value in conv.state_dict().items()}
    logits = conv(tokens, lengths).flatten(0, 1)
    F.cross_entropy(logits, torch.arange(len(logits)) % 27).backward()
    torch.optim.SGD(conv.parameters(), lr=0.1).step()
    changed = [path for path, value in conv.state_dict().items() if not torch.equal(value, before[path])]
    assert {"embedding.weight", "head.weight"} <= {*changed}
    assert all(f"layers.{i}.norm.running_var" in changed for i, n in enumerate(conv.config.norms) if n == "batch")


def test_mapped_model_has_tensors_of_its_own():
    model = build("channels_first")
    conv = from_tree(model, context=8)
    pointers = {tensor.data_ptr() for tensor in tensors_of(model).values()}
    assert not any(tensor.data_ptr() in pointers for tensor in conv.state_dict().values())
    assert all(parameter.requires_grad for parameter in conv.parameters())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", [*WHOLE, *(name for name in KINDS if name.startswith(("norm: ", "wrapper: ")))])
def test_nothing_of_the_model_changes(name, training):
    model = build(name, torch.float32)
    context = KINDS[name].config.context
    for tensor in tensors_of(model).values():
        tensor.grad = torch.randn(tensor.shape) if tensor.requires_grad else None
    evaluated = logits_of(model, torch.arange(5 * context).view(5, context) % 27)
    for _, part in members(model):
        if isinstance(getattr(part, "training", None), bool):
            part.training = training
    before = snapshot(model)
    conv = from_tree(model, context=context)
    assert snapshot(model) == before
    with torch.no_grad():  # it is the model in evaluation mode
        found = conv(torch.arange(5 * context).view(5, context) % 27)[:, 0]
    assert torch.allclose(found, evaluated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TREES, ids=str)
def test_nothing_of_a_reference_tree_in_training_changes(kind):
    tree = random_tree((2, 2), n_embd=6, n_hidden=10, **kind, dtype=torch.float32).train()
    tree(torch.randint(27, (8, reference.context_of(tree))))
    before = snapshot(tree)
    conv = from_tree(tree)
    assert snapshot(tree) == before
    assert_equal(tree.eval(), conv, 1e-5)


class Encoder:
    """Runs a model that its methods refer to, or that is its only attribute."""

    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def encode(self, x):
        return self.net(x)

    def __call__(self, x):
        return self.encode(x)


REACHED_BY = {
    "a default argument": lambda model: lambda x, net=model: net(x),
    "a keyword default": lambda model: lambda x, *, net=model: net(x),
    "a slot": Encoder,
    "a helper method": lambda model: type(
        "Net", (), {"__call__": Encoder.__call__, "encode": lambda self, x: model(x)}
    )(),
    "a class attribute": lambda model: type("Net", (), {"net": [model], "__call__": lambda self, x: self.net[0](x)})(),
    "a set": lambda model: (lambda models: lambda x: next(iter(models))(x))({model}),
}


@pytest.mark.parametrize("way", REACHED_BY)
def test_a_model_in_training_is_found_wherever_it_is(way):
    model = build("flat_of_torch").train()
    before = snapshot(model)
    conv = from_tree(REACHED_BY[way](model), context=4)
    assert snapshot(model) == before
    assert_equal(model.eval(), conv, 1e-12)


@pytest.mark.parametrize("name", ["wrapper: own Sequential", "wrapper: all_layers", "channels_first", "flat_of_torch"])
def test_verify_changes_nothing(name):
    model = build(name)
    conv = from_tree(model, context=KINDS[name].config.context)
    before = snapshot(model), snapshot(conv)
    assert verify(model, conv, NAMES, LETTERS)
    assert (snapshot(model), snapshot(conv)) == before


def test_bfloat16_maps_with_its_rounding():
    model = build("flat_of_torch", torch.float32).bfloat16()
    conv = from_tree(model)
    assert conv.embedding.weight.dtype == torch.bfloat16
    assert_equal(model, conv, 0.1)


def test_momentum_of_a_torch_batch_norm_is_kept():
    model = build("flat_of_torch")
    model[3].momentum = 0.01
    assert from_tree(model).layers[0].norm.momentum == 0.01


def test_a_given_context_chooses_among_those_that_fit():
    table, positions, weight = torch.randn(27, 6), torch.randn(3, 6), torch.randn(18, 27)
    model = lambda x: (table[x] + positions).flatten(1) @ weight  # one token is repeated at three positions
    assert [from_tree(model, context=context).context for context in (1, 3)] == [1, 3]


@st.composite
def spelled_trees(draw):
    """Arguments of `spellings.tree`: random sizes, widths and spellings."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    choices = dict(
        merge=spellings.MERGES,
        linear=spellings.LINEARS,
        norm=spellings.MAKE_NORM,
        activation=spellings.ACTIVATIONS,
        wrapper=spellings.WRAPPERS,
    )
    widths = draw(st.lists(st.integers(2, 7), min_size=len(sizes), max_size=len(sizes)))
    chosen = {part: draw(st.sampled_from([*names])) for part, names in choices.items()}
    return dict(sizes=tuple(sizes), widths=widths, **chosen), draw(st.integers(0, 999))


PARTS_OF_A_NORM = dict(merge="channel by channel", linear="a matrix per child", norm="lecture", activation="none")


@settings(max_examples=60)
@given(spelled_trees())
@example((dict(sizes=(1, 2), widths=[2, 2], **PARTS_OF_A_NORM, wrapper="list"), 0))
def test_random_spellings_map(arguments):
    spelling, seed = arguments
    model = build(partial(spellings.tree, **spelling), seed=seed)
    conv = from_tree(model, context=torch.tensor(spelling["sizes"]).prod().item())
    assert conv.config.kernel_sizes == spelling["sizes"] and conv.config.widths == tuple(spelling["widths"])
    assert {*conv.config.activations} == {spellings.ACTIVATIONS[spelling["activation"]][0]}
    assert ({*conv.config.norms} == {"batch"}) == (spelling["norm"] in spellings.NORMS)
    assert_equal(model, conv, 1e-12)


@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", TREES, ids=str)
def test_there_and_back_gives_the_same_bits(kernel_sizes, kind):
    tree = random_tree(kernel_sizes, n_embd=6, n_hidden=10, **kind, dtype=torch.float32)
    for norm in norms_of(tree):
        norm.eps, norm.momentum = 1e-3, 0.3  # a momentum that is spelled out cannot be traced
    back = reference.from_conv(from_tree(tree))
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in tree.layers]
    for original, copied in zip(parts_of(tree), parts_of(back), strict=True):
        for name, value in vars(original).items():
            other = getattr(copied, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(other, value) and other.data_ptr() != value.data_ptr(), name
            else:
                assert other == (0.1 if name == "momentum" else value), name
