"""The folded model gives the logits of `ConvWaveNet.forward`, and shares nothing with the model that it was made of."""

import pytest
import torch
from engine.cases import ABC, BREAKS, DTYPES, broken, outputs_of, random_conv, rejects
from helpers import KINDS, random_tree, to_exact

import reference
from wavenet_conv import ConvWaveNet, FoldedWaveNet, WaveNetConfig, WaveNetConvError, fold_batch_norm, from_tree
from wavenet_conv.engine.weights import fold

TOKENS = torch.randint(27, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3,), (1,), (2, 1, 5), (3, 2), (1, 4, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, {"n_hidden": 128}], ids=str)
def test_logits_are_those_of_the_convolutional_pass(device, kernel_sizes, kind, dtype, tolerance):
    conv = random_conv(kernel_sizes, **kind, dtype=dtype, device=device)
    folded = fold_batch_norm(conv)
    for batch, time in ((0, 24), (1, 24), (3, 24), (3, conv.context + 1), (0, conv.context), (3, conv.context)):
        tokens = TOKENS[:batch, :time].to(device)
        logits, expected = folded(tokens), conv(tokens).detach()
        assert logits.shape == (batch, time - conv.context + 1, 27) and logits.dtype == dtype
        assert logits.is_contiguous() and not logits.requires_grad
        assert torch.allclose(logits, expected, rtol=0, atol=tolerance)
        assert torch.equal(folded(tokens.int()), logits)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_of_models_without_a_bias_or_with_other_widths(bias):
    config = WaveNetConfig(vocab_size=301, n_embd=5, n_hidden=(7, 20, 3), batch_norm=False, bias=bias)
    conv = ConvWaveNet(config, dtype=torch.float64).eval()
    assert torch.allclose(fold_batch_norm(conv)(TOKENS * 11), conv(TOKENS * 11), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True], ids=["tanh", "gated"])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3,), (3, 2), (1, 4, 1, 2)], ids=str)
def test_logits_are_the_trees_to_the_bit_where_arithmetic_is_exact(names, device, clamp_for_tanh, kernel_sizes, gated):
    tree = to_exact(random_tree(kernel_sizes, n_embd=6, n_hidden=16, gated=gated)).to(device)
    folded = fold_batch_norm(from_tree(tree))
    expected = outputs_of(tree, names[::40], ABC, device)[0]
    assert expected.unique().numel() > 100  # the outputs differ
    assert torch.equal(outputs_of(folded, names[::40], ABC, device)[0], expected)
    windows = TOKENS[:, : folded.context].to(device)
    assert torch.equal(folded(windows), reference.window_logits(tree, windows))


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize("gated", [False, True], ids=["tanh", "gated"])
def test_broken_weights_are_seen(kind, gated):
    conv = random_conv(gated=gated)
    weights = fold(conv)
    for time in (8, 24):
        expected = conv(TOKENS[:, :time])
        assert (FoldedWaveNet(weights)(TOKENS[:, :time]) - expected).abs().max() < 1e-12
        assert (FoldedWaveNet(broken(weights, kind))(TOKENS[:, :time]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_folded_model_is_a_copy_of_a_model_in_any_mode(kind):
    conv = random_conv(**kind)
    expected = fold_batch_norm(conv)(TOKENS)
    state = {name: tensor.clone() for name, tensor in conv.state_dict().items()}
    folded, again = fold_batch_norm(conv.train()), fold_batch_norm(conv)
    assert conv.training and all(torch.equal(tensor, state[name]) for name, tensor in conv.state_dict().items())
    with torch.no_grad():
        for tensor in conv.state_dict().values():
            tensor.add_(1)
    assert torch.equal(folded(TOKENS), expected)
    again.weights.map(lambda tensor: tensor.zero_())
    assert torch.equal(folded(TOKENS), expected) and not again(TOKENS).any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_another_dtype_or_device_leaves_the_model_as_it_was(device, kind):
    folded = fold_batch_norm(random_conv(**kind))
    expected, moved = folded(TOKENS), folded.to(device, torch.float32)
    logits = moved(TOKENS.to(device))
    assert (logits.dtype, logits.device.type, moved.device.type) == (torch.float32, device.type, device.type)
    assert (logits.cpu() - expected).abs().max() < 1e-4  # weights are rounded to float32
    assert folded.dtype == torch.float64 and torch.equal(folded(TOKENS), expected)
    assert moved.config == folded.config and moved.context == 8
    weights = fold(random_conv(**kind), device, torch.float32)  # folded in float32
    assert (FoldedWaveNet(weights)(TOKENS.to(device)).cpu() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("token, row, time", [(27, 1, 4), (-1, 2, 0), (10**12, 0, 19)])
def test_tokens_outside_the_vocabulary_are_rejected(device, token, row, time):
    tokens = TOKENS.clone()
    tokens[row, time] = token
    folded = fold_batch_norm(random_conv(device=device))
    with pytest.raises(IndexError, match=rf"token {token} at \[{row}, {time}\] is outside the vocabulary of 27") as e:
        folded(tokens.to(device))
    assert isinstance(e.value, WaveNetConvError)


def test_other_arguments_are_rejected():
    folded = fold_batch_norm(random_conv())
    assert rejects("7 tokens is shorter than the context of 8; put 8 zeros before", folded, TOKENS[:, :7])
    assert rejects("tokens are a list; pass an int64 tensor", folded, [[1, 2]])
    assert rejects("tokens are on meta and the model on cpu; move them", folded, TOKENS.to("meta"))
    for tokens in (TOKENS[0], TOKENS[None], TOKENS.float()):
        assert rejects(r"tokens must be int64 \(batch, time\), not torch", folded, tokens)
    for model in (random_tree(), None, torch.nn.Linear(2, 2), folded):
        assert rejects(f"got a {type(model).__name__}, not a ConvWaveNet", fold_batch_norm, model)
