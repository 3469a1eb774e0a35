"""The convolutional model is a stack of dilated `nn.Conv1d` and has clear errors."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wavenet_conv import ConvWaveNet, Scorer, Vocabulary, WaveNetConfig, WaveNetConvError, sample, verify
from wavenet_conv.training import fit

TOKENS = torch.randint(27, (3, 20), generator=torch.Generator().manual_seed(0))


def small(**config):
    torch.manual_seed(0)
    return ConvWaveNet(WaveNetConfig(**({"n_embd": 6, "n_hidden": 10} | config))).eval()


def test_model_is_a_stack_of_dilated_convolutions():
    conv = ConvWaveNet(WaveNetConfig())
    assert (conv.context, conv.dilations) == (8, (1, 2, 4))
    assert sum(p.numel() for p in conv.parameters()) == 76_579
    for layer, dilation, c_in in zip(conv.layers, (1, 2, 4), (24, 128, 128), strict=True):
        assert type(layer.conv) is nn.Conv1d and layer.conv.weight.shape == (128, c_in, 2)
        assert layer.conv.dilation == (dilation,) and layer.conv.padding == (0,) and layer.conv.bias is None
        assert (layer.kernel_size, layer.dilation) == (2, dilation)
    mixed = small(kernel_sizes=(3, 1, 4, 2))
    assert (mixed.context, mixed.dilations) == (24, (1, 3, 3, 12))
    assert torch.equal(mixed(TOKENS.repeat(1, 2).int()), mixed(TOKENS.repeat(1, 2)))


def test_layers_are_as_the_config_names_them():
    per_layer = {"norm": ["batch", "layer", "none"], "activation": ("gelu", "none", "relu")}
    conv = small(**per_layer, n_hidden=[10, 7, 8], head_kernel_size=2, head_norm="batch")
    assert conv.config == WaveNetConfig(**asdict(conv.config)) and conv.config.bias is None
    assert conv.config.biases == (False, True, True) and conv.config.norm == ("batch", "layer", "none")
    assert [type(layer.norm).__name__ for layer in conv.layers] == ["BatchNorm", "LayerNorm", "NoneType"]
    assert [layer.conv.bias is not None for layer in conv.layers] == [False, True, True]
    assert [layer.activation for layer in conv.layers] == ["gelu", "none", "relu"]
    assert (conv.head.kernel_size, conv.head.dilation, conv.context) == ((2,), (8,), 16)
    x = torch.randn(3, 10, 20)
    expected = F.layer_norm(conv.layers[1].conv(x).transpose(1, 2), (7,)).transpose(1, 2)
    assert torch.equal(conv.layers[1](x), expected) and conv(TOKENS).shape == (3, 5, 27)
    for given, bias in ((None, True), (False, False), (True, True)):
        assert WaveNetConfig(norm="layer", bias=given).bias is bias
    assert WaveNetConfig().norm == ("batch",) * 3 and WaveNetConfig(gated=True).norm == ("none",) * 3


@pytest.mark.parametrize("config", [{}, {"gated": True}, {"head_kernel_size": 2}], ids=str)
def test_new_weights_are_the_lectures(config):
    """Normal over the square root of the inputs, a head ten times smaller, no bias."""
    torch.manual_seed(0)
    conv = ConvWaveNet(WaveNetConfig(n_embd=96, n_hidden=96, **config))
    assert not any(bias.any() for name, bias in conv.named_parameters() if name.endswith("bias"))
    for part in (module for module in conv.modules() if isinstance(module, nn.Conv1d)):
        factor = 0.1 if part is conv.head else 1.0
        inputs = part.in_channels * part.kernel_size[0]
        assert abs(part.weight.std() * inputs**0.5 / factor - 1) < 0.05  # 2,592 draws or more


@pytest.mark.parametrize("token", [27, -1, 10**12])
def test_token_outside_the_vocabulary_is_named(device, token):
    tokens = TOKENS.clone()
    tokens[1, 4] = token
    with pytest.raises(IndexError, match=rf"token {token} at \[1, 4\] is outside .* 27 tokens.*encode"):
        small().to(device)(tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[:, :7], "7 tokens is shorter than the context of 8; put 8 tokens of padding before"),
        ([[1, 2]], "tokens are a list; pass an int64 tensor"),
        (TOKENS[0], r"tokens must be int64 \(batch, time\), not torch.int64 of shape \(20,\)"),
        (TOKENS.to("meta"), "tokens are on meta and the model on cpu; move them"),
    ],
)
def test_tokens_that_are_no_sequences_are_rejected(tokens, message):
    with pytest.raises(WaveNetConvError, match=message):
        small()(tokens)
    with pytest.raises(WaveNetConvError, match="value.*channel.*no variance; train on more"):
        small().train()(TOKENS[:1, :8])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(kernel_sizes=(2, 0, 2)), r"kernel_sizes\[1\] is 0"),
        (dict(kernel_sizes=(True, 2)), r"kernel_sizes\[0\] is True"),
        (dict(kernel_sizes=8), "at least one"),
        (dict(n_hidden=(4, 5)), "n_hidden has 2 entries for 3 layers"),
        (dict(vocab_size="27"), "vocab_size is '27'"),
        *[
            (dict(gated=True) | other, "gated layers have biases, .* leave norm, activation, bias, head_kernel_size")
            for other in (
                {"norm": "batch"},
                {"activation": "relu"},
                {"bias": False},
                {"head_kernel_size": 2},
                {"head_norm": "batch"},
            )
        ],
        (dict(norm="bath"), "norm is 'bath'; it must be one of 'batch', 'layer', 'none'"),
        (dict(norm=("batch", None, "none")), "norm is None; it must be one of"),
        (dict(norm=("batch", "none")), "norm has 2 entries for 3 layers; give one each, or one for all"),
        (dict(activation=3), "activation is 3; it must be one of 'tanh', 'relu', 'gelu', 'silu', 'sigmoid', 'none'"),
        (dict(bias=1), "bias is 1; it must be one of None, True, False"),
        (dict(gated="yes"), "gated is 'yes'; it must be one of True, False"),
        (dict(head_kernel_size=0), "head_kernel_size is 0; it must be an integer of at least 1"),
        (dict(head_norm=("batch",)), "head_norm is .'batch',.; it must be one of"),
    ],
)
def test_config_of_an_impossible_model_is_rejected(config, message):
    with pytest.raises(WaveNetConvError, match=message):
        WaveNetConfig(**config)


STOI = {".": 0, "a": 1, "b": 2}
CALLS = {
    "Scorer": Scorer,
    "sample": lambda model, vocab: sample(model, vocab, 1),
    "fit": lambda model, vocab: fit(model, vocab, ["a"], ["b"]),
    "verify": lambda model, vocab: verify(model, model, ["a"], vocab),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_dictionary_is_no_vocabulary_and_a_notebooks_model_no_convolutional_one(call):
    model = ConvWaveNet(WaveNetConfig(3, 2, 2))
    with pytest.raises(WaveNetConvError, match=r"the vocabulary is a dict; take Vocabulary.from_mapping\(stoi\)"):
        call(model, STOI)
    with pytest.raises(WaveNetConvError, match="model is a Linear.*(map it with from_tree first|with a ConvWaveNet)"):
        call(torch.nn.Linear(2, 2), Vocabulary.from_mapping(STOI))
