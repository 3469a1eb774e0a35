"""Steps of a stream as loops that Numba compiles, for few rows on the CPU. `rings.TorchSteps` defines the results.

With few rows, calling PyTorch's operations takes longer than their arithmetic.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .jit import compiled, tanh
from .rings import TorchSteps
from .shared import SharedNodes

AHEAD = 8  # a layer with at least this dilation computes what its older children contribute for so many steps at once
# Columns of `Arrays.layers`: a layer's shape; where its matrices begin in `weights` (GATE is -1 if there is none); in
# which row its part of `children` begins; in which row its part of `early` begins for the first row of the stream.
KERNEL_SIZE, DILATION, INPUTS, CHANNELS, MATRIX, GATE, GATE_OUTPUTS, CHILDREN, EARLY = range(9)


class Arrays(NamedTuple):
    """What the loops read and write: NumPy views of tensors. A ring's last row is padding."""

    vocab_size: int
    ages: np.ndarray  # int64 (rows,), steps since each row was reset
    keys: np.ndarray  # int64 (rows,), each row's newest node in the table
    bottom: np.ndarray  # int64 (size * rows + 1,), the lowest layer's ring of node ids
    children: np.ndarray  # the rings of the layers above, (size * rows + 1, widest) each
    table: np.ndarray  # (kernel_size * kinds, c_out), what the nodes of the table contribute
    values: np.ndarray  # (kinds, 2 * n_embd), their values in a gated model, else (kinds, 0)
    weights: np.ndarray  # flat: per layer the taps' matrices (c_out, c_in) and the bias, then per gate likewise
    layers: np.ndarray  # int64, one row per layer; see the names of the columns
    early: np.ndarray  # the bias and what older children contribute, in AHEAD steps
    hidden: np.ndarray  # a matrix whose last row is the bias; empty in models that are not gated
    head: np.ndarray  # (columns, c_in)
    head_bias: np.ndarray  # (columns,), minus infinity behind the vocabulary
    logits: np.ndarray  # (rows, columns)
    scratch: np.ndarray  # intermediate results


class CompiledSteps(TorchSteps):
    """The backend that takes its steps in compiled loops. Its rings are parts of one array."""

    @torch.no_grad()
    def __init__(self, shared: SharedNodes, rows: int):
        super().__init__(shared, rows)
        self.phase = 0  # steps since `early` was computed, 0 for not yet
        self.logits = self.nodes.head.weight.new_empty(rows, len(self.nodes.head.bias))
        self.arrays = self._make_arrays(rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Reads one token per row, int64 `(rows,)`; returns logits `(rows, vocab)`, overwritten by the next step."""
        step(tokens.contiguous().numpy(), self.clock, self.phase, *self.arrays)
        self.clock, self.phase = self.clock + 1, (self.phase + 1) % AHEAD
        return self.logits[:, : self.nodes.vocab_size]

    def reset(self, mask: Tensor) -> None:
        """Makes the rows of a mask, bool `(rows,)`, new ones."""
        super().reset(mask)
        self.phase = 0

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues from a `state()` of the same shapes."""
        super().load_state(state)
        self.phase = 0

    def _make_arrays(self, rows: int) -> Arrays:
        nodes, first = self.nodes, self.first
        taps, biases, like = nodes.taps[first:], nodes.biases[first:], nodes.head.weight
        weights = [[*(tap.t() for tap in matrices), bias] for matrices, bias in zip(taps, biases)]
        weights += [[gate.weight.t(), gate.bias] for gate in nodes.gates[first:]]
        starts = [0, *accumulate(sum(part.numel() for part in parts) for parts in weights)]
        values = like.new_empty(self.kinds, 0) if self.values is None else self.values
        widest = max(values.shape[1], len(like), *(size for matrices in taps for size in matrices.shape[1:]))
        widest += -widest % 16  # no row begins inside a cache line
        children, ring_starts = self._join_rings(rows, widest)
        layers = []
        for index, matrices in enumerate(taps):
            gate = (-1, 0)
            if nodes.gates:
                gate = (starts[len(taps) + index], len(nodes.gates[first + index].bias))
            where = (starts[index], *gate, ring_starts[index], index * rows * AHEAD)
            layers.append((len(matrices), nodes.dilations[first + index], *matrices.shape[1:], *where))
        hidden = like.new_empty(0, 0)
        if nodes.hidden is not None:
            hidden = torch.cat([nodes.hidden.weight.t(), nodes.hidden.bias[None]])
        tensors = {
            "ages": self.ages,
            "keys": self.keys,
            "bottom": torch.cat([self.rings[0].nodes.flatten(), self.keys.new_zeros(1)]),
            "children": children,
            "table": self.table.flatten(0, 1),
            "values": values,
            "weights": torch.cat([part.flatten() for parts in weights for part in parts]),
            "layers": torch.tensor(layers, device=like.device),
            "early": like.new_zeros(len(layers) * rows * AHEAD, widest),
            "hidden": hidden,
            "head": nodes.head.weight.t().contiguous(),
            "head_bias": nodes.head.bias,
            "logits": self.logits,
            "scratch": like.new_zeros(3, widest),
        }
        self.rings[0].nodes = tensors["bottom"][:-1].view_as(self.rings[0].nodes)
        return Arrays(nodes.vocab_size, **{name: tensor.numpy() for name, tensor in tensors.items()})

    def _join_rings(self, rows: int, widest: int) -> tuple[Tensor, list[int]]:
        """Moves the rings above the lowest one into one array; returns it and the row where each ring begins."""
        above = self.rings[1:]
        starts = [0, 0, *accumulate(len(ring.nodes) * rows + 1 for ring in above)]
        children = self.nodes.head.weight.new_zeros(starts[-1], widest)
        for ring, start in zip(above, starts[1:]):
            size, width = len(ring.nodes), len(ring.padding)
            part = children[start : start + size * rows, :width].unflatten(0, (size, rows))
            ring.nodes = part.copy_(ring.nodes)
            children[start + size * rows, :width] = ring.padding
        return children, starts


@compiled
def add_product(matrix, x, out):
    """out += matrix @ x."""
    for row in range(len(matrix)):
        weights, total = matrix[row], x.dtype.type(0)
        for i in range(len(weights)):
            total += weights[i] * x[i]
        out[row] += total


@compiled
def place(row, clock, age, back, size, rows):
    """In which row of its ring the child of `back` steps ago is; the last row is padding."""
    return (clock - back) % size * rows + row if age >= back else size * rows


@compiled
def matrix_at(weights, start, rows, columns):
    """One of the matrices in `weights`."""
    return weights[start : start + rows * columns].reshape(rows, columns)


@compiled
def sum_of_older(row, clock, age, layer, weights, children, rows, out):
    """The bias and what older children contribute: in row i of `out` for the step `i` steps from now."""
    older, inputs, channels, start = layer[KERNEL_SIZE] - 1, layer[INPUTS], layer[CHANNELS], layer[MATRIX]
    size, first = older * layer[DILATION] + 1, layer[CHILDREN]
    bias = start + layer[KERNEL_SIZE] * channels * inputs
    for ahead in range(len(out)):
        out[ahead, :channels] = weights[bias : bias + channels]
    for tap in range(older):
        matrix = matrix_at(weights, start + tap * channels * inputs, channels, inputs)
        back = (older - tap) * layer[DILATION]
        for ahead in range(len(out)):
            child = first + place(row, clock + ahead, age + ahead, back, size, rows)
            add_product(matrix, children[child], out[ahead])


@compiled
def read(row, token, clock, phase, arrays):
    """One row reads one token; the logits of the next one are written to its row of `logits`."""
    weights, layers, children, early = arrays.weights, arrays.layers, arrays.children, arrays.early
    rows, (kinds, width) = len(arrays.keys), arrays.values.shape
    age = arrays.ages[row]
    arrays.ages[row] = age + 1
    key = arrays.keys[row] * arrays.vocab_size % kinds + token
    arrays.keys[row] = key
    x, total, value = arrays.scratch[0], arrays.scratch[1], arrays.scratch[2]
    value[:width] = arrays.values[key]
    for index in range(len(layers)):
        layer = layers[index]
        older, inputs, channels, dilation = layer[KERNEL_SIZE] - 1, layer[INPUTS], layer[CHANNELS], layer[DILATION]
        size = older * dilation + 1
        newest = place(row, clock, age, 0, size, rows)
        if index == 0:
            arrays.bottom[newest] = key
            total[:channels] = arrays.table[older * kinds + key]
            for tap in range(older):
                child = place(row, clock, age, (older - tap) * dilation, size, rows)
                total[:channels] += arrays.table[tap * kinds + arrays.bottom[child]]
        else:
            children[layer[CHILDREN] + newest, :inputs] = x[:inputs]
            if dilation < AHEAD:
                sum_of_older(row, clock, age, layer, weights, children, rows, arrays.scratch[1:2])
            else:
                first = layer[EARLY] + row * AHEAD
                if phase == 0:
                    sum_of_older(row, clock, age, layer, weights, children, rows, early[first : first + AHEAD])
                total[:channels] = early[first + phase, :channels]
            add_product(matrix_at(weights, layer[MATRIX] + older * channels * inputs, channels, inputs), x, total)
        tanh(total[:channels])
        if layer[GATE] < 0:
            x[:channels] = total[:channels]
        else:
            outputs, half = layer[GATE_OUTPUTS], channels // 2
            total[:half] *= total[half:channels] + 1
            bias = layer[GATE] + outputs * half
            x[:outputs] = value[width - outputs : width] + weights[bias : bias + outputs]
            add_product(matrix_at(weights, layer[GATE], outputs, half), total, x)
            value[:outputs] = x[:outputs]
    if len(arrays.hidden):
        inputs = len(arrays.hidden) - 1
        x[:inputs], total[:inputs] = np.maximum(x[:inputs], 0), arrays.hidden[inputs]
        add_product(arrays.hidden[:inputs], x, total)
        x[:inputs] = np.maximum(total[:inputs], 0)
    logits = arrays.logits[row]
    logits[:] = arrays.head_bias
    add_product(arrays.head, x, logits)


@compiled
def step(tokens, clock, phase, *parts):
    """Every row reads a token. parts: those of `Arrays`; one by one they are passed much faster."""
    arrays = Arrays(*parts)
    for row in range(len(tokens)):
        read(row, tokens[row], clock, phase, arrays)
