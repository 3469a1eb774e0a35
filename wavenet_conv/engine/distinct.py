"""The loops of `compiled`: finds distinct nodes by their keys, evaluates them, and looks up what names need."""

from __future__ import annotations

import numpy as np

from .jit import compiled, expm1, tanh
from .tile import ROWS, WIDTH, multiply_block, prefetch

ROW, KEY = 0, 1  # columns of a slot: a node's row + 1, or 0 in an empty slot; and its key
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio
BLOCK = 256  # keys whose slots are fetched together
AHEAD = 16  # positions whose log-probabilities are fetched before they are needed
LOWEST = -40.0  # its exponential is nothing beside the largest term of a softmax, which is 1


@compiled
def window_keys(tokens, lengths, ends, context, begin, end, vocab_size, keys):
    """Writes the keys of all windows of the names from `begin` to `end`."""
    kinds, leading = np.uint64(vocab_size), np.uint64(1)
    for _ in range(context - 1):
        leading *= kinds
    for name in range(begin, end):
        start, output, key = ends[name] + name * context, ends[name] + name, np.uint64(0)
        keys[output] = key
        for t in range(lengths[name]):
            key = (key - np.uint64(tokens[start + t]) * leading) * kinds + np.uint64(tokens[start + context + t])
            keys[output + t + 1] = key


@compiled
def number(keys, kinds, part, parts, slots, count, first, children, rows):
    """Finds the row of each key that belongs to a part. A new one gets the next row; its children's keys are written.

    kinds: How many children are possible. first, count: Nodes of the part before this call and before this loop.
    Returns the slots, which may be new ones, and the count.
    """
    mine = np.empty(BLOCK, np.int64)
    for start in range(0, len(keys), BLOCK):
        found = 0
        for i in range(start, min(start + BLOCK, len(keys))):  # without a branch, which the processor would mispredict
            mine[found] = i
            found += part_of(hash_of(keys[i]), parts) == part
        for i in mine[:found]:
            prefetch(slots, np.intp(first_slot(slots, hash_of(keys[i]))), 0)
        for i in mine[:found]:
            key = keys[i]
            slot = find(slots, key)
            if slots[slot, ROW]:
                rows[i] = slots[slot, ROW] - np.uint64(1)
                continue
            rows[i] = count * parts + part
            slots[slot, ROW], slots[slot, KEY] = rows[i] + np.uint64(1), key
            for tap in range(len(children) - 1, 0, -1):
                children[tap, count - first] = key % kinds
                key //= kinds
            children[0, count - first] = key
            count += 1
            if 2 * count > len(slots):
                slots = grown(slots)
    return slots, count


@compiled
def hash_of(key):
    """The low 16 bits say to which part a key belongs (`part_of`), the others where to look for it (`first_slot`)."""
    hashed = key * GOLDEN
    hashed = (hashed ^ (hashed >> np.uint64(32))) * GOLDEN
    return hashed ^ (hashed >> np.uint64(32))


@compiled
def part_of(hashed, parts):
    """The part that a key belongs to, from 0 to `parts - 1`."""
    return np.int64((hashed & np.uint64(0xFFFF)) * np.uint64(parts) >> np.uint64(16))


@compiled
def first_slot(slots, hashed):
    """The slot from which a key is looked for."""
    return (hashed >> np.uint64(16)) & np.uint64(len(slots) - 1)


@compiled
def find(slots, key):
    """The slot of a key, or the empty one where it belongs."""
    mask, slot = np.uint64(len(slots) - 1), first_slot(slots, hash_of(key))
    while slots[slot, ROW] and slots[slot, KEY] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@compiled
def grown(slots):
    """Twice as many slots, with the same nodes."""
    more = np.zeros((2 * len(slots), 2), np.uint64)
    for i in range(len(slots)):
        if slots[i, ROW]:
            key = slots[i, KEY]
            slot = find(more, key)
            more[slot, ROW], more[slot, KEY] = slots[i, ROW], key
    return more


@compiled
def evaluate(readable, children, first, count, part, parts, weights, bias, vocab_size, values):
    """Evaluates the nodes of a part from `first` to `count`, a block at a time, and writes what their parents read.

    readable: For each tap, what the children contribute. children: Rows of these, `(taps, count - first)`.
    vocab_size: 0, or where the log-probabilities of so many tokens are written in place of `x @ weights + bias`.
    """
    x = np.empty((ROWS, len(weights)), values.dtype)
    logits = np.empty((ROWS, values.shape[1]), values.dtype)
    for node in range(first, count, ROWS):
        for i in range(ROWS):
            add_up(readable, children, min(node + i, count - 1) - first, x[i])
            if node + i + ROWS < count:
                fetch(readable, children, node + i + ROWS - first)
        tanh(x.reshape(-1))
        for column in range(0, values.shape[1], WIDTH // values.itemsize):
            if vocab_size:
                multiply_block(x, weights, bias, column, logits, 0, 1)
            else:
                multiply_block(x, weights, bias, column, values, node * parts + part, parts)
        if vocab_size:
            log_softmax(logits, vocab_size)
            for i in range(ROWS):
                values[(node + i) * parts + part] = logits[i]


@compiled
def add_up(readable, children, node, out):
    """What the children of a node contribute, tap after tap."""
    contribution = readable[0][children[0, node]]
    for i in range(len(out)):
        out[i] = contribution[i]
    for tap in range(1, len(readable)):
        contribution = readable[tap][children[tap, node]]
        for i in range(len(out)):
            out[i] += contribution[i]


@compiled
def fetch(readable, children, node):
    """Fetches what `add_up` will read."""
    for tap in range(len(readable)):
        contributions, row = readable[tap], np.intp(children[tap, node])
        for column in range(0, contributions.shape[1], WIDTH // contributions.itemsize):
            prefetch(contributions, row, column)


@compiled
def log_softmax(logits, vocab_size):
    """In place, row by row, for the columns below `vocab_size`."""
    number = logits.dtype.type
    terms = np.empty_like(logits)
    for i in range(len(logits)):
        row, largest = logits[i], logits[i, 0]
        for token in range(1, vocab_size):
            largest = max(largest, row[token])
        for token in range(len(row)):
            row[token] -= largest
            terms[i, token] = max(row[token], number(LOWEST)) * number(1 / 8)
    expm1(terms.reshape(-1))
    for i in range(len(logits)):
        total = number(0)
        for token in range(vocab_size):
            term = terms[i, token] + number(1)  # then to the power of 8, so that small ones have all their digits
            term *= term
            term *= term
            total += term * term
        normalizer = np.log(total)
        for token in range(logits.shape[1]):
            logits[i, token] -= normalizer


@compiled
def look_up(tokens, lengths, ends, context, begin, end, values, rows, log_probs, totals):
    """The log-probability of what follows each window, and for each name from `begin` to `end` their sum."""
    for name in range(begin, end):
        start, output, total = ends[name] + (name + 1) * context, ends[name] + name, 0.0
        for t in range(lengths[name] + 1):
            if output + t + AHEAD < len(rows):
                prefetch(values, np.intp(rows[output + t + AHEAD]), 0)
                prefetch(values, np.intp(rows[output + t + AHEAD]), values.shape[1] // 2)
            token = tokens[start + t] if t < lengths[name] else 0
            log_prob = values[rows[output + t], token]
            log_probs[output + t] = log_prob
            total += log_prob
        totals[name] = total
