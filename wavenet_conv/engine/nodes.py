"""From the sum of what its children contribute to a node's value: what `shared` and `stream` have in common.

What a node contributes to its parent at tap j is its value times the matrix of that tap. A parent sums up the
contributions of its children and applies its norm and activation, or in a gated model the gate, the residual and the
skip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ACTIVATIONS
from .weights import Affine, LayerWeights, NormWeights, Weights

# The columns of a matrix product are a multiple of this: otherwise equal rows can differ in their last bits.
COLUMNS = 16
# On a GPU cuBLAS also chooses its method by the alignment of addresses, up to 256 bytes: this many float32.
CUDA_COLUMNS = 64


@dataclass(frozen=True)
class NodeWeights:
    """Weights laid out for evaluating nodes one by one, with columns in multiples of 16, on a GPU of 64."""

    taps: tuple[Tensor, ...]  # per layer (kernel_size, c_in, c_out)
    biases: tuple[Tensor, ...]  # per layer (c_out,)
    dilations: tuple[int, ...]  # per layer, positions between two taps
    norms: tuple[NormWeights | None, ...]  # per layer, layer norm of the channels that are not padding
    activations: tuple[str, ...]  # per layer, a key of `ACTIVATIONS`
    embedding: Tensor  # (vocab, n_embd); in a gated model (vocab, 2 * n_embd), h and s side by side
    gates: tuple[Affine, ...]  # per layer of a gated model, residual and skip side by side; the last has the skip only
    hidden: Affine | None  # the map before the head of a gated model
    head: Affine  # (channels, columns), padded to such a multiple with logits of minus infinity
    vocab_size: int  # columns of the head that are logits

    @classmethod
    def prepare(cls, weights: Weights) -> NodeWeights:
        """Lays out a model's weights; they are copied."""
        columns = CUDA_COLUMNS if weights.embedding.is_cuda else COLUMNS
        weights = widen(weights, columns)
        gates: tuple[Affine, ...] = ()
        embedding = weights.embedding
        if weights.hidden is not None:
            # sigmoid(x) = (1 + tanh(x / 2)) / 2, so one tanh serves f and g. The halvings, which are exact, are left to
            # the weights before and after it.
            weights = replace(weights, layers=tuple(_with_halved_gate(layer) for layer in weights.layers))
            gates = tuple(_side_by_side(layer) for layer in weights.layers)
            embedding = torch.cat([embedding, torch.zeros_like(embedding)], 1)
        # A product with 32 columns takes two thirds of the time of one with 27.
        spare = -weights.config.vocab_size % columns
        head = Affine(F.pad(weights.head.weight, (0, spare)), F.pad(weights.head.bias, (0, spare), value=-torch.inf))
        return cls(
            taps=tuple(layer.taps for layer in weights.layers),
            biases=tuple(layer.bias for layer in weights.layers),
            dilations=tuple(layer.dilation for layer in weights.layers),
            norms=tuple(layer.norm for layer in weights.layers),
            activations=tuple(layer.activation for layer in weights.layers),
            embedding=embedding,
            gates=gates,
            hidden=weights.hidden,
            head=head,
            vocab_size=weights.config.vocab_size,
        )

    @property
    def n_embd(self) -> int:
        """Width of the values that a gated node's parents read."""
        return self.taps[0].shape[1]

    def values(self, layer: int, summed: Tensor, rightmost: Tensor | None) -> Tensor:
        """Nodes of a layer from their sums `(n, c_out)`, which include the bias and are overwritten.

        Of a gated model also from h and s of the rightmost children, `(n, 2 * n_embd)`; the nodes are then h and s side
        by side, and for the last layer what the head reads, `(n, n_embd)`.
        """
        if rightmost is None or self.hidden is None:
            norm = self.norms[layer]
            if norm is not None:
                channels = len(norm.weight)
                summed[:, :channels] = F.layer_norm(summed[:, :channels], (channels,), *norm)
            return activate_(summed, self.activations[layer])
        gate = self.gates[layer]
        f, g = tanh_(summed).chunk(2, 1)
        z = f * g.add_(_ONE)
        nodes = torch.addmm(rightmost[:, -gate.weight.shape[1] :], z, gate.weight).add_(gate.bias)
        if gate is not self.gates[-1]:
            return nodes
        return torch.addmm(self.hidden.bias, nodes.relu_(), self.hidden.weight).relu_()


def widen(weights: Weights, width: int) -> Weights:
    """An equal model in which matrix products have a multiple of `width` columns; the new channels are zero.

    An activation may make another constant of that zero; the rows of the matrices that would read it are zero.
    """
    gated = weights.hidden is not None
    inner = [-(layer.taps.shape[2] // (1 + gated) // -width) * width for layer in weights.layers]
    n_embd = weights.embedding.shape[1]  # a number of columns only in a gated model
    outer = [-(n_embd // -width) * width] * (len(inner) + 1) if gated else [max(n_embd, width), *inner]
    layers = []
    for layer, c_in, c_out in zip(weights.layers, outer, inner):
        taps, bias = layer.taps, layer.bias
        if gated:  # f and g are widened separately
            taps = torch.cat([_pad(half, c_in, c_out) for half in taps.chunk(2, 2)], 2)
            bias = torch.cat([_pad(half, c_out) for half in bias.chunk(2)])
        else:
            taps, bias = _pad(taps, c_in, c_out), _pad(bias, c_out)
        residual, skip = _pad_affine(layer.residual, c_out, c_in), _pad_affine(layer.skip, c_out, c_in)
        layers.append(replace(layer, taps=taps, bias=bias, residual=residual, skip=skip))
    embedding, hidden = _pad(weights.embedding, outer[0]), _pad_affine(weights.hidden, outer[0], outer[0])
    head = Affine(_pad(weights.head.weight, outer[-1], weights.head.weight.shape[1]), weights.head.bias)
    return replace(weights, embedding=embedding, layers=tuple(layers), hidden=hidden, head=head)


def _pad(tensor: Tensor, *shape: int) -> Tensor:
    """Zeros behind the last dimensions, up to `shape`."""
    spare = [(0, size - old) for size, old in zip(reversed(shape), reversed(tensor.shape))]
    return F.pad(tensor, [size for pair in spare for size in pair]).contiguous()


def _pad_affine(pair: Affine | None, c_in: int, c_out: int) -> Affine | None:
    return None if pair is None else Affine(_pad(pair.weight, c_in, c_out), _pad(pair.bias, c_out))


def _with_halved_gate(layer: LayerWeights) -> LayerWeights:
    taps, bias = layer.taps.clone(), layer.bias.clone()
    for weight in (taps, bias):
        weight[..., weight.shape[-1] // 2 :] /= 2
    return replace(layer, taps=taps, bias=bias)


def _side_by_side(layer: LayerWeights) -> Affine:
    """Residual and skip as one map of `f * (1 + tanh(g / 2))`."""
    maps = [pair for pair in (layer.residual, layer.skip) if pair is not None]
    return Affine(torch.cat([pair.weight for pair in maps], 1) / 2, torch.cat([pair.bias for pair in maps]))


_ONE = torch.tensor(1.0, device="cpu")  # a Python number would be wrapped at every call
_GRAIN = 32768  # PyTorch gives a thread no fewer elements than this
_ONE_THREAD = 16384  # up to so many elements, every activation is computed by one thread


def tanh_(x: Tensor) -> Tensor:
    """tanh in place, where the bits of an element do not depend on its position; on the CPU in float32 to 2e-7.

    There it is `2 * sigmoid(2 * x) - 1`, since sigmoid takes a fifth of the time of tanh. PyTorch's sigmoid computes
    whole vectors and the rest of each thread's part one by one, with other last bits. If the parts are not whole
    vectors, sigmoid is written out in operations that round alike in both cases.
    """
    if x.dtype != torch.float32 or x.is_cuda:
        return torch.tanh_(x)
    parts = max(1, min(torch.get_num_threads(), -(-x.numel() // _GRAIN)))
    x = x.add_(x)
    x = x.sigmoid_() if x.numel() % (64 * parts) == 0 else x.neg_().exp_().add_(_ONE).reciprocal_()
    return torch.sub(x.add_(x), _ONE, out=x)


def activate_(x: Tensor, activation: str) -> Tensor:
    """An activation by the rule of `tanh_`, in place or not: the bits of an element do not depend on its position.

    Where the parts of PyTorch's threads are not whole vectors, x is cut into parts that one thread computes.
    """
    if activation == "tanh":
        return tanh_(x)
    function, threads = ACTIVATIONS[activation], torch.get_num_threads()
    parts = (max(1, min(threads, -(-x.numel() // _GRAIN))), threads)  # as in `tanh_`; gelu takes every thread
    if x.is_cuda or x.numel() <= _ONE_THREAD or all(x.numel() % (64 * count) == 0 for count in parts):
        return function(x)
    return torch.cat([function(part) for part in x.flatten().split(_ONE_THREAD)]).view_as(x)
