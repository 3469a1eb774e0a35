"""The folded model gives the logits of `ConvWaveNet.forward`, and shares nothing with the model that it was made of."""

import pytest
import torch
from engine.cases import ABC, DTYPES, outputs_of, random_conv, rejects
from helpers import EXACT, KINDS, random_tree, run_python, to_exact

import reference
from wavenet_conv import ConvWaveNet, FoldedWaveNet, WaveNetConfig, WaveNetConvError, fold_batch_norm, from_tree
from wavenet_conv.engine.weights import fold

TOKENS = torch.randint(27, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (1,), (2, 1, 5), (1, 4, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, {"n_hidden": 128}], ids=str)
def test_logits_are_those_of_the_convolutional_pass(device, kernel_sizes, kind, dtype, tolerance):
    conv = random_conv(kernel_sizes, **kind, dtype=dtype, device=device)
    folded = fold_batch_norm(conv)
    for batch, time in ((0, 24), (1, 24), (3, 24), (3, conv.context + 1), (0, conv.context), (3, conv.context)):
        tokens = TOKENS[:batch, :time].to(device)
        logits = folded(tokens)
        assert logits.shape == (batch, time - conv.context + 1, 27) and logits.dtype == dtype
        assert logits.is_contiguous() and not logits.requires_grad
        assert torch.allclose(logits, conv(tokens).detach(), rtol=0, atol=tolerance)
        assert torch.equal(folded(tokens.int()), logits)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_of_models_without_a_bias_or_with_other_widths(bias):
    config = WaveNetConfig(vocab_size=301, n_embd=5, n_hidden=(7, 20, 3), norm="none", bias=bias)
    conv = ConvWaveNet(config, dtype=torch.float64).eval()
    assert torch.allclose(fold_batch_norm(conv)(TOKENS * 11), conv(TOKENS * 11), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [{}, {"gated": True}, EXACT], ids=["tanh", "gated", "mixed"])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (1, 4, 1, 2)], ids=str)
def test_logits_are_the_trees_to_the_bit_where_arithmetic_is_exact(names, device, clamp_for_tanh, kernel_sizes, kind):
    tree = to_exact(random_tree(kernel_sizes, n_embd=6, n_hidden=16, **kind)).to(device)
    folded = fold_batch_norm(from_tree(tree))
    clamp_for_tanh()
    expected = outputs_of(tree, names[::40], ABC, device)[0]
    assert expected.unique().numel() > 100  # the outputs differ
    assert torch.equal(outputs_of(folded, names[::40], ABC, device)[0], expected)
    windows = TOKENS[:, : folded.context].to(device)
    assert torch.equal(folded(windows), reference.window_logits(tree, windows))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_folded_model_is_a_copy_of_a_model_in_any_mode(device, kind):
    """So is the one that `to` returns, and one folded in another dtype."""
    conv = random_conv(**kind)
    expected = fold_batch_norm(conv)(TOKENS)
    state = {name: tensor.clone() for name, tensor in conv.state_dict().items()}
    folded, again = fold_batch_norm(conv.train()), fold_batch_norm(conv)
    for rounded in (folded.to(device, torch.float32), FoldedWaveNet(fold(conv, device, torch.float32))):
        logits = rounded(TOKENS.to(device))
        assert (rounded.config, rounded.context, rounded.device.type) == (folded.config, conv.context, device.type)
        assert logits.dtype == torch.float32 and (logits.cpu() - expected).abs().max() < 1e-4  # so are the weights
    assert conv.training and all(torch.equal(tensor, state[name]) for name, tensor in conv.state_dict().items())
    with torch.no_grad():
        for tensor in conv.state_dict().values():
            tensor.add_(1)
    again.weights.map(lambda tensor: tensor.zero_())
    assert torch.equal(folded(TOKENS), expected) and not again(TOKENS).any()


@pytest.mark.parametrize("make", [lambda conv: conv, fold_batch_norm], ids=["convolutions", "folded"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_pass_does_not_wait_for_the_device(cuda, kind, make):
    """So a CUDA graph can hold it. Replayed with other tokens, it gives their logits."""
    model, tokens = make(random_conv(**kind, device=cuda)), TOKENS.to(cuda)
    with torch.no_grad():
        first = model(tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(tokens)
        for other in (TOKENS.flip(0, 1), TOKENS):
            tokens.copy_(other)
            graph.replay()
            assert torch.equal(logits, model(other))  # which are still on the host
    assert torch.equal(logits, first)


WRONG_ON_CUDA = """
import sys, torch
from wavenet_conv import ConvWaveNet, Stream, WaveNetConfig, fold_batch_norm
conv = ConvWaveNet(WaveNetConfig(), device="cuda").eval()
kind, token = sys.argv[1], int(sys.argv[2])
shape, call = {
    "conv": ((2, 9), conv),
    "folded": ((2, 9), fold_batch_norm(conv)),
    "step": ((1,), Stream(conv).step),
    "numbered": ((1,), Stream(conv, end=5).step),
}[kind]
call(torch.full(shape, token, device="cuda")).cpu()
"""


@pytest.mark.parametrize("call", ["conv", "folded", "step", "numbered"])
@pytest.mark.parametrize("token", [27, -1])
def test_a_wrong_token_on_the_device_fails_there(cuda, call, token):
    """In another process, since nothing runs on the device afterwards."""
    process = run_python(WRONG_ON_CUDA, call, token, check=False)
    assert process.returncode and "device-side assert" in process.stderr


def test_wrong_arguments_are_rejected(device):
    folded = fold_batch_norm(random_conv(device=device))
    for tokens, message in (
        (TOKENS[:, :7].to(device), "7 tokens is shorter than the context of 8; put 8 tokens of padding before"),
        ([[1, 2]], "tokens are a list; pass an int64 tensor"),
        (TOKENS.to("meta"), f"tokens are on meta and the model on {device.type}.*; move them"),
        (TOKENS[0], r"tokens must be int64 \(batch, time\), not torch"),
        (TOKENS.float(), r"tokens must be int64 \(batch, time\), not torch"),
    ):
        assert rejects(message, folded, tokens)
    for model in (random_tree(), folded):
        assert rejects(f"got a {type(model).__name__}, not a ConvWaveNet", fold_batch_norm, model)
    for token, row, time in ((27, 1, 4), (-1, 2, 0)):
        tokens = TOKENS.clone()
        tokens[row, time] = token
        with pytest.raises(IndexError, match=rf"token {token} at \[{row}, {time}\] is outside the vocabulary") as error:
            folded(tokens)
        assert isinstance(error.value, WaveNetConvError)
