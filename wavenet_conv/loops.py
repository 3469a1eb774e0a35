"""A stream's step, and names drawn from it, as loops that Numba compiles: for few rows on the CPU.

There the calls of a step's operations take longer than its arithmetic. Numba comes with the extra "fast"; without it
`Stream` and `sample` do the same in PyTorch, which says what is right. Nothing here checks what it is given.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})  # NaN stays NaN

AHEAD = 8  # steps for which a level with a dilation of as many computes at once what its older children contribute
TAYLOR = tuple(1 / math.factorial(k) for k in range(8, 0, -1))  # of exp(z) - 1
# Columns of `Arrays.levels`: a level's shape, where its matrices begin in `weights` (GATE is -1 where there is none), in
# which row its part of `children` begins, and in which its part of `early` does for the stream's first row.
FAN_IN, DILATION, INPUTS, CHANNELS, MATRIX, GATE, GATE_OUTPUTS, CHILDREN, EARLY = range(9)


class Arrays(NamedTuple):
    """What a stream reads and writes, as NumPy's views of its tensors.

    clocks, keys: int64 `(batch,)`. phases: int64 `(batch,)`, steps since `early` was computed, 0 for not yet. bigrams:
    int64, the first level's children, which are nodes of the table; children: those of the levels above, which lie as
    `_Level` says. table: `(fan_in * kinds, channels)`; values: of a gated model `(kinds, 2 * n_embd)`, else `(kinds, 0)`.
    weights: all levels' matrices, each with `fan_in * inputs` rows and a bias, end to end; levels: int64, a row for
    each. early: what older children contribute in AHEAD steps, and the bias. hidden, head: matrices with a bias,
    `hidden` empty but in a gated model. logits: `(batch, columns)`, -inf in those behind the vocabulary. scratch: room.
    The rows of `children`, `early` and `scratch` are as long as the widest level needs.
    """

    vocab_size: int
    clocks: np.ndarray
    keys: np.ndarray
    phases: np.ndarray
    bigrams: np.ndarray
    children: np.ndarray
    table: np.ndarray
    values: np.ndarray
    weights: np.ndarray
    levels: np.ndarray
    early: np.ndarray
    hidden: np.ndarray
    head: np.ndarray
    logits: np.ndarray
    scratch: np.ndarray


@compiled
def add_product(x, matrix, out):
    """out += x @ matrix, four rows of the matrix at a time, each of which is read from memory once for all rows of x.

    The rows of x and of `out` may be longer than they need be.
    """
    inputs, columns = matrix.shape
    whole = inputs - inputs % 4
    for i in range(0, whole, 4):
        m = matrix[i : i + 4]
        for row in range(len(x)):
            a, b, c, d = x[row, i], x[row, i + 1], x[row, i + 2], x[row, i + 3]
            total = out[row, :columns]
            for j in range(len(total)):
                total[j] += (a * m[0, j] + b * m[1, j]) + (c * m[2, j] + d * m[3, j])
    for i in range(whole, inputs):
        for row in range(len(x)):
            for j in range(columns):
                out[row, j] += x[row, i] * matrix[i, j]


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
    """Where among a level's children a row's own of one step is; that of before the first step is the last."""
    return row * size + clock % size if clock >= 0 else batch * size


@compiled
def add_older(row, clock, steps, level, matrix, arrays, out):
    """out += what the older children contribute at `clock`, `clock + 1`, ..., `steps` of them."""
    older, inputs, x = level[FAN_IN] - 1, level[INPUTS], arrays.scratch[3 : 3 + steps]
    for tap in range(older):
        first = clock - (older - tap) * level[DILATION]
        for step in range(steps):
            then = place(row, first + step, older * level[DILATION] + 1, len(arrays.keys))
            x[step, :inputs] = arrays.children[level[CHILDREN] + then, :inputs]
        add_product(x, matrix[tap * inputs : (tap + 1) * inputs], out)


@compiled
def matrix_at(start, rows, columns, arrays):
    """One of the matrices in `weights`."""
    return arrays.weights[start : start + rows * columns].reshape(rows, columns)


@compiled
def read(row, token, arrays):
    """One row reads one token, and the logits of the next are left in its row of `logits`."""
    batch, (kinds, width) = len(arrays.keys), arrays.values.shape
    clock, phase = arrays.clocks[row], arrays.phases[row]
    arrays.clocks[row], arrays.phases[row] = clock + 1, (phase + 1) % AHEAD
    key = arrays.keys[row] * arrays.vocab_size % kinds + token
    arrays.keys[row] = key
    x, total, value = arrays.scratch[0:1], arrays.scratch[1:2], arrays.scratch[2]
    value[:width] = arrays.values[key]
    for index in range(len(arrays.levels)):
        level = arrays.levels[index]
        older, inputs, channels, dilation = level[FAN_IN] - 1, level[INPUTS], level[CHANNELS], level[DILATION]
        now = place(row, clock, older * dilation + 1, batch)
        if index == 0:
            arrays.bigrams[now] = key
            total[0, :channels] = arrays.table[older * kinds + key]
            for tap in range(older):
                then = place(row, clock - (older - tap) * dilation, older * dilation + 1, batch)
                total[0, :channels] += arrays.table[tap * kinds + arrays.bigrams[then]]
        else:
            matrix = matrix_at(level[MATRIX], (older + 1) * inputs + 1, channels, arrays)
            arrays.children[level[CHILDREN] + now, :inputs] = x[0, :inputs]
            if dilation < AHEAD:
                total[0, :channels] = matrix[-1]
                add_older(row, clock, 1, level, matrix, arrays, total)
            else:
                first = level[EARLY] + row * AHEAD
                if phase == 0:
                    early = arrays.early[first : first + AHEAD]
                    early[:, :channels] = matrix[-1]
                    add_older(row, clock, AHEAD, level, matrix, arrays, early)
                total[0] = arrays.early[first + phase]
            add_product(x, matrix[older * inputs : (older + 1) * inputs], total)
        tanh(total[0, :channels])
        if level[GATE] < 0:
            x[0, :channels] = total[0, :channels]
        else:
            outputs, half = level[GATE_OUTPUTS], channels // 2
            total[0, :half] *= total[0, half:channels] + 1
            matrix = matrix_at(level[GATE], half + 1, outputs, arrays)
            x[0, :outputs] = value[width - outputs : width] + matrix[-1]
            add_product(total, matrix[:half], x)
            value[:outputs] = x[0, :outputs]
    if len(arrays.hidden):
        inputs = arrays.hidden.shape[1]
        x[0, :inputs], total[0, :inputs] = np.maximum(x[0, :inputs], 0), arrays.hidden[-1]
        add_product(x, arrays.hidden[:-1], total)
        x[0, :inputs] = np.maximum(total[0, :inputs], 0)
    logits = arrays.logits[row : row + 1]
    logits[0] = arrays.head[-1]
    add_product(x, arrays.head[:-1], logits)


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
    """The token that falls to a uniform number; -1 where `doubt` away is another one, or the logits are no numbers."""
    likeliest, total, summed, low, high = logits[0], 0.0, 0.0, 0, 0
    for logit in logits:
        likeliest = max(likeliest, logit)
    for logit in logits:
        total += math.exp((logit - likeliest) / temperature)
    if not 1 <= total < math.inf:
        return -1
    for logit in logits:
        summed += math.exp((logit - likeliest) / temperature) / total
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
