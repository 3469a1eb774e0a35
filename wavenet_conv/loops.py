"""A stream's step, and names drawn from it, as loops that Numba compiles: for few rows on the CPU.

There the calls of a step's operations take longer than its arithmetic. Numba comes with the extra "fast"; without it
`Stream` and `sample` do the same in PyTorch, which says what is right. Nothing here checks what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

AHEAD = 8  # steps for which a layer with a dilation of as many computes at once what its older children contribute
TAYLOR = tuple(1 / math.factorial(k) for k in range(8, 0, -1))  # of exp(z) - 1
# Columns of `Arrays.layers`: a layer's shape, where its matrices begin in `weights` (GATE: -1 where there is none), in
# which row its part of `children` begins, and in which its part of `early` does for the stream's first row.
KERNEL_SIZE, DILATION, INPUTS, CHANNELS, MATRIX, GATE, GATE_OUTPUTS, CHILDREN, EARLY = range(9)


def compiled(function: Callable) -> Callable:
    """The function, compiled when it is first called, and kept beside the package where that can be written."""
    options = dict(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})  # NaN stays NaN
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep it in
        return njit(function, **options)


class Arrays(NamedTuple):
    """What a stream reads and writes, as NumPy's views of its tensors.

    clocks, keys: int64 `(batch,)`. phases: int64 `(batch,)`, steps since `early` was computed, 0 for not yet. bottom:
    int64, the first layer's children, which are nodes of the table; children: those of the layers above, which lie as
    `_Layer` says. table: `(kernel_size * kinds, channels)`; values: `(kinds, 2 * n_embd)`, or `(kinds, 0)` without gates.
    weights: of each layer its taps' matrices, `(channels, inputs)` each, and the bias, then of each gate likewise;
    layers: int64, a row for each. early: what older children contribute in AHEAD steps, and the bias. hidden: a matrix
    whose last row is the bias, empty without gates. head: `(columns, inputs)`, head_bias: `(columns,)`, -inf behind the
    vocabulary. logits: `(batch, columns)`. scratch: room. The rows of `children`, `early` and `scratch` are as long as
    the widest layer needs.
    """

    vocab_size: int
    clocks: np.ndarray
    keys: np.ndarray
    phases: np.ndarray
    bottom: np.ndarray
    children: np.ndarray
    table: np.ndarray
    values: np.ndarray
    weights: np.ndarray
    layers: np.ndarray
    early: np.ndarray
    hidden: np.ndarray
    head: np.ndarray
    head_bias: np.ndarray
    logits: np.ndarray
    scratch: np.ndarray


@compiled
def add_product(matrix, x, out):
    """out += matrix @ x."""
    for row in range(len(matrix)):
        weights, total = matrix[row], x.dtype.type(0)
        for i in range(len(weights)):
            total += weights[i] * x[i]
        out[row] += total


@compiled
def tanh(x):
    """In place, to 3e-7 in float32 and 1e-15 in float64, in operations that are compiled to vectors, as libm's is not.

    tanh(x) = e / (e + 2) with e = exp(2x) - 1, of which a Taylor polynomial gives the 128th part of 2x; then seven
    times exp(2z) - 1 = e (e + 2).
    """
    two, limit, small = x.dtype.type(2), x.dtype.type(20), x.dtype.type(1 / 64)
    for i in range(len(x)):
        z = min(max(x[i], -limit), limit) * small
        e = x.dtype.type(0)
        for coefficient in TAYLOR:
            e = (e + x.dtype.type(coefficient)) * z
        for _ in range(7):
            e *= e + two
        x[i] = e / (e + two)


@compiled
def place(row, clock, size, batch):
    """Where among a layer's children a row's own of one step is; that of before the first step is the last."""
    return row * size + clock % size if clock >= 0 else batch * size


@compiled
def matrix_at(weights, start, rows, columns):
    """One of the matrices in `weights`."""
    return weights[start : start + rows * columns].reshape(rows, columns)


@compiled
def sum_of_older(row, clock, layer, weights, children, batch, out):
    """A layer's bias and what its older children contribute: at `clock` and as many steps later as `out` has rows."""
    older, inputs, channels, start = layer[KERNEL_SIZE] - 1, layer[INPUTS], layer[CHANNELS], layer[MATRIX]
    size, first = older * layer[DILATION] + 1, layer[CHILDREN]
    bias = start + layer[KERNEL_SIZE] * channels * inputs
    for step in range(len(out)):
        out[step, :channels] = weights[bias : bias + channels]
    for tap in range(older):
        matrix = matrix_at(weights, start + tap * channels * inputs, channels, inputs)
        then = clock - (older - tap) * layer[DILATION]
        for step in range(len(out)):
            add_product(matrix, children[first + place(row, then + step, size, batch)], out[step])


@compiled
def read(row, token, arrays):
    """One row reads one token, and the logits of the next are left in its row of `logits`."""
    weights, layers, children, early = arrays.weights, arrays.layers, arrays.children, arrays.early
    batch, (kinds, width) = len(arrays.keys), arrays.values.shape
    clock, phase = arrays.clocks[row], arrays.phases[row]
    arrays.clocks[row], arrays.phases[row] = clock + 1, (phase + 1) % AHEAD
    key = arrays.keys[row] * arrays.vocab_size % kinds + token
    arrays.keys[row] = key
    x, total, value = arrays.scratch[0], arrays.scratch[1], arrays.scratch[2]
    value[:width] = arrays.values[key]
    for index in range(len(layers)):
        layer = layers[index]
        older, inputs, channels, dilation = layer[KERNEL_SIZE] - 1, layer[INPUTS], layer[CHANNELS], layer[DILATION]
        now = place(row, clock, older * dilation + 1, batch)
        if index == 0:
            arrays.bottom[now] = key
            total[:channels] = arrays.table[older * kinds + key]
            for tap in range(older):
                then = place(row, clock - (older - tap) * dilation, older * dilation + 1, batch)
                total[:channels] += arrays.table[tap * kinds + arrays.bottom[then]]
        else:
            children[layer[CHILDREN] + now, :inputs] = x[:inputs]
            if dilation < AHEAD:
                sum_of_older(row, clock, layer, weights, children, batch, arrays.scratch[1:2])
            else:
                first = layer[EARLY] + row * AHEAD
                if phase == 0:
                    sum_of_older(row, clock, layer, weights, children, batch, early[first : first + AHEAD])
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
def step(tokens, *parts):
    """Every row reads a token. parts: those of `Arrays`, which one by one are handed over much faster."""
    arrays = Arrays(*parts)
    for row in range(len(tokens)):
        read(row, tokens[row], arrays)


@compiled
def mixed(z):
    """`sampling._mixed`, of one number."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def uniform(seed, name, position):
    """`sampling.uniform`, of one name and position."""
    drawn = mixed(mixed(mixed(np.uint64(seed)) + np.uint64(name)) + np.uint64(position))
    return np.float64(drawn >> np.uint64(11)) * 2.0**-53


@compiled
def draw(logits, temperature, number, doubt):
    """The token that falls to a uniform number; -1 where `doubt` away is another one, or the logits are no numbers.

    The logits are overwritten.
    """
    likeliest, total, summed, low, high = logits[0], 0.0, 0.0, 0, 0
    for logit in logits:
        likeliest = max(likeliest, logit)
    for token in range(len(logits)):
        logits[token] = math.exp((logits[token] - likeliest) / temperature)
        total += logits[token]
    if not 1 <= total < math.inf:
        return -1
    for weight in logits:
        summed += weight / total
        low += summed <= number - doubt
        high += summed <= number + doubt
    return min(low, len(logits) - 1) if low == high else -1


@compiled
def draw_names(going, decided, seed, last, start, max_length, temperature, doubt, tokens, *parts):
    """Goes on drawing names in row 0 of a stream until there are `last`, or no room, or a draw is in doubt.

    going: int64, the name's number, the position in it and the token to read next, which are left there as they are at
    the end. decided: what a draw in doubt has come to, else -1. start: tokens that every name begins with. tokens:
    room for those that are drawn, a 0 behind each name. Returns how many they are, and whether a draw is in doubt.
    """
    arrays, count = Arrays(*parts), 0
    name, position, token = going
    doubtful = False
    while name < last and count < len(tokens) - 1:
        if decided < 0:
            if position == 0:
                arrays.clocks[0] = arrays.keys[0] = arrays.phases[0] = token = 0
            read(0, token, arrays)
            if position < len(start):
                decided = start[position]
            else:
                logits = arrays.logits[0, : arrays.vocab_size]
                decided = draw(logits, temperature, uniform(seed, name, position), doubt)
            if decided < 0:
                doubtful = True
                break
        token, decided = decided, -1
        tokens[count] = token
        count, position = count + 1, position + 1
        if token and position == max_length:
            tokens[count] = 0
            count += 1
        if not token or position == max_length:
            name, position = name + 1, 0
    going[:] = name, position, token
    return count, doubtful
