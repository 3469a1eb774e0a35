"""The slid model as a torch module: its two passes agree, the fast one notices every change, errors are clear."""

import copy
import io

import pytest
import torch
from conftest import needs_cuda, random_tree
from torch import nn

from wavenet_conv import ConvWaveNet, WaveNetConfig, WaveNetConvError, fold_batch_norm, from_tree
from wavenet_conv.model import GatedLayer

TOKENS = torch.randint(27, (3, 20), generator=torch.Generator().manual_seed(0))


def small(**config):
    torch.manual_seed(0)
    return ConvWaveNet(WaveNetConfig(**({"n_embd": 6, "n_hidden": 10} | config))).eval()


def test_it_is_a_stack_of_dilated_convolutions():
    conv = ConvWaveNet(WaveNetConfig())
    assert (conv.context, conv.dilations) == (8, (1, 2, 4))
    assert sum(p.numel() for p in conv.parameters()) == 76_579
    for layer, dilation, c_in in zip(conv.layers, (1, 2, 4), (24, 128, 128)):
        assert type(layer.conv) is nn.Conv1d and layer.conv.bias is None
        assert layer.conv.kernel_size == (2,) and layer.conv.dilation == (dilation,) and layer.conv.padding == (0,)
        assert layer.conv.weight.shape == (128, c_in, 2)
    assert type(conv.head) is nn.Conv1d and conv.head.kernel_size == (1,)
    mixed = small(kernel_sizes=(3, 1, 4, 2))
    assert (mixed.context, mixed.dilations) == (24, (1, 3, 3, 12))
    with torch.no_grad():
        assert conv.eval()(TOKENS).shape == (3, 13, 27)


def test_a_gated_model_is_the_papers_stack():
    conv = ConvWaveNet(WaveNetConfig(kernel_sizes=(2, 2, 2, 2), n_embd=96, n_hidden=96, gated=True))
    assert conv.config.batch_norm is False and conv.config.bias is True
    assert sum(p.numel() for p in conv.parameters()) == 227_931
    for layer, dilation in zip(conv.layers, (1, 2, 4, 8)):
        assert isinstance(layer, GatedLayer) and layer.norm is None
        assert (layer.kernel_size, layer.dilation) == (2, dilation) == (layer.conv.kernel_size[0], layer.conv.dilation[0])
        assert layer.conv.weight.shape == (192, 96, 2) and layer.skip.weight.shape == (96, 96, 1)
        assert (layer.residual is None) == (dilation == 8)
    assert conv.hidden.weight.shape == (96, 96, 1) and conv.head.weight.shape == (27, 96, 1)
    assert not any(bias.any() for name, bias in conv.named_parameters() if name.endswith("bias"))
    for of, inputs, factor in (
        (conv.layers[1].conv, 192, 1),
        (conv.layers[1].residual, 96, 1),
        (conv.layers[3].skip, 96, 1),
        (conv.hidden, 96, 1),
        (conv.head, 96, 0.1),
    ):
        assert abs(of.weight.std() * inputs**0.5 / factor - 1) < 0.05  # normal over sqrt(fan-in), 2,592 draws or more
    assert ConvWaveNet(WaveNetConfig()).hidden is None


def test_gates_by_hand():
    """The residual and the skip sum of an output are those along the right spine of its tree."""
    conv = small(kernel_sizes=(3, 2), n_hidden=(5, 4), gated=True).double()
    first, second = conv.layers
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_()
        h = conv.embedding(TOKENS[0, :6]).T  # (n_embd, 6)

        def gate(layer, children):
            wide = torch.einsum("ocj,cj->o", layer.conv.weight, children) + layer.conv.bias
            return wide[: len(wide) // 2].tanh() * wide[len(wide) // 2 :].sigmoid()

        z = [gate(first, h[:, start : start + 3]) for start in (0, 3)]
        below = [first.residual.weight[..., 0] @ of + first.residual.bias for of in z]
        top = gate(second, torch.stack([below[0] + h[:, 2], below[1] + h[:, 5]], 1))
        skips = [layer.skip.weight[..., 0] @ of + layer.skip.bias for layer, of in ((first, z[1]), (second, top))]
        hidden = (conv.hidden.weight[..., 0] @ (skips[0] + skips[1]).relu() + conv.hidden.bias).relu()
        logits = conv.head.weight[..., 0] @ hidden + conv.head.bias
        assert torch.allclose(conv(TOKENS[:1, :6])[0, 0], logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3,), (1,), (2, 1, 5)])
@pytest.mark.parametrize("kind", [{"batch_norm": True}, {"batch_norm": False}, {"gated": True}], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_the_fast_pass_is_the_conv1d_pass(device, kernel_sizes, kind, gradients):
    conv = from_tree(random_tree(kernel_sizes, n_embd=6, n_hidden=10, **kind, device=device))
    with torch.set_grad_enabled(gradients):
        for batch in (0, 1, 3):
            tokens = TOKENS[:batch].to(device)
            fast, defined = conv(tokens), conv.forward_conv1d(tokens)
            assert fast.shape == (batch, 20 - conv.context + 1, 27) and fast.requires_grad == gradients
            assert fast.is_contiguous()
            assert torch.allclose(fast, defined, rtol=0, atol=1e-12)


CHANGES = {
    "in place": lambda conv: conv.layers[1].conv.weight.data.mul_(2),
    "a new tensor in .data": lambda conv: setattr(conv.head.bias, "data", conv.head.bias.data + 1),
    "a new parameter": lambda conv: setattr(conv.embedding, "weight", nn.Parameter(conv.embedding.weight * 2)),
    "a new module": lambda conv: conv.layers.__setitem__(1, type(conv.layers[1])(10, 10, 2, 2, True, False).eval()),
    "a new submodule": lambda conv: setattr(conv, "head", nn.Conv1d(10, 27, 1)),
    "another dtype": lambda conv: conv.double(),
    "loaded weights": lambda conv: conv.load_state_dict(small_state()),
    "assigned weights": lambda conv: conv.load_state_dict(small_state(), assign=True),
    "batch statistics": lambda conv: conv.layers[0].norm.running_mean.add_(1),
    "weight norm": lambda conv: scaled(nn.utils.parametrizations.weight_norm(conv.layers[1].conv)),
    "a hook": lambda conv: conv.head.register_forward_hook(lambda *call: call[-1] + 1),
    "a transposed weight": lambda conv: setattr(
        conv.layers[1].conv.weight, "data", swapped(conv.layers[1].conv.weight)
    ),
    "another mode": lambda conv: conv.train(),
}


GATED_CHANGES = {
    "a convolution in place": lambda conv: conv.layers[1].conv.weight.data.mul_(2),
    "a new residual": lambda conv: setattr(conv.layers[1], "residual", nn.Conv1d(10, 6, 1)),
    "a new tensor in a skip's bias": lambda conv: setattr(conv.layers[2].skip, "bias", nn.Parameter(torch.ones(6))),
    "a new hidden": lambda conv: setattr(conv, "hidden", nn.Conv1d(6, 6, 1)),
    "weight norm of a residual": lambda conv: scaled(nn.utils.parametrizations.weight_norm(conv.layers[0].residual)),
    "a hook on a skip": lambda conv: conv.layers[0].skip.register_forward_hook(lambda *call: call[-1] + 1),
    "a hook on hidden": lambda conv: conv.hidden.register_forward_hook(lambda *call: call[-1] + 1),
    "another dtype": lambda conv: conv.double(),
}


def scaled(conv):
    conv.parametrizations.weight.original0.data.mul_(2)


def swapped(weight):
    return weight.data.transpose(0, 1)


def small_state():
    torch.manual_seed(1)
    return ConvWaveNet(WaveNetConfig(n_embd=6, n_hidden=10)).state_dict()


@pytest.mark.parametrize("change", CHANGES)
def test_the_fast_pass_notices_every_change(change):
    """Without gradients the views of the weights are kept between calls; nothing stale may come out of that."""
    assert_noticed(small(), CHANGES[change])


@pytest.mark.parametrize("change", GATED_CHANGES)
def test_the_fast_pass_of_a_gated_model_notices_every_change(change):
    assert_noticed(small(gated=True), GATED_CHANGES[change])


def assert_noticed(conv, change):
    with torch.no_grad():
        before = conv(TOKENS)
        assert torch.equal(conv(TOKENS), before)
        change(conv)
        after = conv(TOKENS)
        assert not torch.equal(after.to(before.dtype), before)
        assert torch.allclose(after, conv.forward_conv1d(TOKENS), rtol=0, atol=1e-5)


def test_a_batch_norm_that_was_not_there_is_noticed():
    folded = fold_batch_norm(small())
    with torch.no_grad():
        before = folded(TOKENS)
        folded.layers[1].norm = copy.deepcopy(small().layers[1].norm).eval()
        folded.layers[1].norm.bias.add_(1)
        assert not torch.equal(folded(TOKENS), before)
        assert torch.allclose(folded(TOKENS), folded.forward_conv1d(TOKENS), rtol=0, atol=1e-5)


def test_weight_norm_trains_and_autocast_runs():
    conv = small(batch_norm=False)
    nn.utils.parametrizations.weight_norm(conv.layers[1].conv)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(conv(TOKENS), conv.forward_conv1d(TOKENS))
        conv(TOKENS).square().mean().backward()
        for parameter in conv.parameters():
            parameter.data -= 0.1 * parameter.grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small()(TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize("gated", [False, True])
def test_functional_calls_and_stacked_models(gated):
    models = [ConvWaveNet(WaveNetConfig(n_embd=6, n_hidden=10, gated=gated)).eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    with torch.no_grad():
        base = copy.deepcopy(models[0])
        base(TOKENS)
        together = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (TOKENS,)))(
            parameters, buffers
        )
        for model, logits in zip(models, together):
            assert torch.allclose(model(TOKENS), logits, rtol=0, atol=1e-5)


def test_copies_and_pickles_are_independent():
    conv = small()
    with torch.no_grad():
        before = conv(TOKENS)
        twin = copy.deepcopy(conv)
        twin.head.bias.add_(1)
        assert torch.equal(conv(TOKENS), before) and not torch.equal(twin(TOKENS), before)
    file = io.BytesIO()
    torch.save(conv, file)
    assert len(file.getvalue()) < 4 * 4 * sum(p.numel() for p in conv.parameters()) + 20_000
    assert all(p.requires_grad for p in conv.parameters())


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_flow_after_a_pass_without(gated):
    conv = small(gated=gated)
    with torch.inference_mode():
        conv(TOKENS)
    conv(TOKENS).sum().backward()
    assert all(p.grad is not None for p in conv.parameters())


def test_the_same_seed_gives_the_same_model():
    assert all(torch.equal(p, q) for p, q in zip(small().parameters(), small().parameters()))
    weights = ConvWaveNet(WaveNetConfig(n_embd=64, n_hidden=256)).layers[1].conv.weight
    assert abs(weights.std() * (2 * 256) ** 0.5 - 1) < 0.02  # the lecture's 1 / sqrt(fan-in)


@pytest.mark.parametrize(("token", "place"), [(27, [1, 4]), (-1, [2, 0]), (10**12, [0, 19])])
def test_a_token_outside_the_vocabulary(device, token, place):
    conv = small().to(device)
    tokens = TOKENS.clone()
    tokens[tuple(place)] = token
    for run in (conv, conv.forward_conv1d):
        with pytest.raises(IndexError) as refused:
            run(tokens.to(device))
        assert isinstance(refused.value, WaveNetConvError)
        assert f"token {token} at {place} is outside the vocabulary of 27 tokens" in str(refused.value)
        assert "encode" in str(refused.value)


def test_a_sequence_shorter_than_the_context():
    conv = small()
    with pytest.raises(WaveNetConvError, match="7 tokens is shorter than the context of 8; put 8 zeros before"):
        conv(TOKENS[:, :7])
    with torch.no_grad():
        assert conv(TOKENS[:, :8]).shape == (3, 1, 27)


def test_tokens_that_are_no_tensor():
    with pytest.raises(WaveNetConvError, match="tokens are a list; pass an int64 tensor"):
        small()([[1, 2]])


@needs_cuda
def test_tokens_on_another_device():
    with pytest.raises(WaveNetConvError, match="tokens are on cpu and the model on cuda:0; move them"):
        small().cuda()(TOKENS)


@pytest.mark.parametrize("tokens", [TOKENS[0], TOKENS[None], TOKENS.float()])
def test_other_shapes_and_dtypes(tokens):
    with pytest.raises(WaveNetConvError, match=r"tokens must be int64 \(batch, time\), not torch"):
        small()(tokens)


def test_int32_tokens_are_the_same():
    conv = fold_batch_norm(small())
    with torch.no_grad():
        assert torch.equal(conv(TOKENS.int()), conv(TOKENS))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(kernel_sizes=(2, 0, 2)), r"kernel_sizes\[1\] is 0"),
        (dict(kernel_sizes=(2, -1)), r"kernel_sizes\[1\] is -1"),
        (dict(kernel_sizes=(2.0,)), r"kernel_sizes\[0\] is 2.0"),
        (dict(kernel_sizes=(True, 2)), r"kernel_sizes\[0\] is True"),
        (dict(kernel_sizes=()), "at least one layer"),
        (dict(kernel_sizes=8), "at least one layer"),
        (dict(n_hidden=(4, 5)), "2 widths for 3 layers"),
        (dict(n_hidden=0), r"n_hidden\[0\] is 0"),
        (dict(n_embd=0), "n_embd is 0"),
        (dict(vocab_size="27"), "vocab_size is '27'"),
        (dict(gated=True, batch_norm=True), "batch_norm is True and gated too"),
        (dict(gated=True, bias=False), "bias is False and gated is True"),
    ],
)
def test_impossible_models_are_refused(config, message):
    with pytest.raises(WaveNetConvError, match=message):
        WaveNetConfig(**config)


def test_a_config_that_is_none():
    with pytest.raises(WaveNetConvError, match=r"config is \(2, 2\); pass a WaveNetConfig"):
        ConvWaveNet((2, 2))
