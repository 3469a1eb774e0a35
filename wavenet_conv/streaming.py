"""One new node a level for each new character: the tree's logits from ring buffers of old nodes.

A level needs, beside its newest child, the children at distances d, 2d, ..., (fan_in - 1) * d back (README: Generating
one character at a time; Paine et al. 2016, arXiv:1611.09482). Knows nothing of characters, nor of how they are drawn.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ShapeError, StateError
from .model import ConvWaveNet
from .nodes import SharedNodes, tanh_
from .precision import exact_float32
from .vocabulary import check_tokens

FEW_ROWS = 8  # up to here NumPy runs a step on the CPU: it begins an operation in 0.3 us, PyTorch in 1 us

Array = Tensor | np.ndarray


class Stream:
    """Names that are read side by side, one character of each a step.

        stream = Stream(model, batch=2)
        logits = stream.step(torch.tensor([0, 0]))  # (2, vocab), of each name's first character
        logits = stream.step(torch.tensor([5, 13]))

    A row that has been started anew has read nothing but `.`, and the first `step` reads one more. Fed `.` and then a
    name, a row gives the tree's logits at every position of it: to 1e-12 in float64 and 1e-5 in float32. The state is
    here and not in the model, which is copied: each level keeps what its children contribute to its taps
    (`SharedNodes`), `(fan_in - 1) * dilation + 1` of them a row. The lowest levels, where few nodes are possible, are
    a table.

    model: a `ConvWaveNet`, gated or not, in whatever mode. batch: rows. device and dtype: where and in what to compute
    (as the model is; float32 is IEEE, also on CUDA). Raises `ShapeError` for a batch below 1.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: ConvWaveNet,
        batch: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not isinstance(batch, int) or batch < 1:
            raise ShapeError(f"batch is {batch!r}; it must be an integer of at least 1")
        weights = copy.deepcopy(model).to(device=device, dtype=dtype)
        like = weights.embedding.weight
        self.batch, self.context, self.vocab_size = batch, model.context, model.config.vocab_size
        self.device, self.dtype = like.device, like.dtype
        self._exact = exact_float32 if like.is_cuda else nullcontext
        self._few = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64) and batch <= FEW_ROWS
        self._ops = _NumPy if self._few else _PyTorch
        self.array = self._ops.array
        self._digest = torch.frombuffer(bytearray(_digest(weights)), dtype=torch.uint8)
        self._clock, self._starts = 0, np.zeros(batch, dtype=np.int64)  # steps taken, and at each row's start
        self._keys = self.array(torch.zeros(batch, dtype=torch.int64, device=self.device))  # of newest nodes
        with self._exact():
            self._prepare(SharedNodes(weights), model.dilations)
            self._advance(self._keys.copy() if self._few else self._keys.clone(), start=True)

    def _prepare(self, nodes: SharedNodes, dilations: Sequence[int]) -> None:
        """Everything that a step reads and writes, in `_ops`' arrays."""
        first, like, array = nodes.tabulated, nodes._head, self.array
        self._kinds = self.vocab_size ** prod(nodes.fan_ins[:first])  # nodes in the table
        shifted = torch.arange(self._kinds, device=self.device) * self.vocab_size % self._kinds
        self._shifted, self._shift = array(shifted), array(shifted.new_empty(self.batch))
        contributions, values = nodes._table
        self._table = array(_side_by_side(contributions[:, : self._kinds]))
        shapes = list(zip(nodes._taps, nodes._bias, nodes.fan_ins, dilations))[first:]
        self._levels = [_Level(*shape, self.batch, array) for shape in shapes]
        self._head = array(_with_bias(nodes._head, nodes._head_bias)[:, : self.vocab_size].contiguous())
        self._logits = like.new_empty(self.batch, self.vocab_size)
        self._logits_array = array(self._logits)
        self._values = self._hidden = None
        if nodes._gates is not None:
            gates = nodes._gates
            for level, matrix, bias in zip(self._levels, gates.matrices[first:], gates.biases[first:]):
                level.gate = _Gate(level.sum, matrix, bias, len(gates.hidden), array)
            h, s = values[: self._kinds].chunk(2, 1)
            self._values = array(torch.cat([_with_ones(h), _with_ones(s)], 1))
            self._value = array(like.new_empty(self.batch, self._values.shape[1]))
            # A column that makes a one of the one: what `head` multiplies needs it too.
            one = F.one_hot(torch.tensor(len(gates.hidden)), len(gates.hidden) + 1).to(like)[:, None]
            self._hidden = array(torch.cat([_with_bias(gates.hidden, gates.hidden_bias), one], 1))
            self._top = array(like.new_empty(self.batch, len(one)))

    def step(self, tokens: Tensor) -> Tensor:
        """Reads one token of every row, int64 `(batch,)`, and returns the logits of the next, `(batch, vocab)`.

        Raises `ShapeError` for another shape or dtype, `TokenError` for a token outside the vocabulary (on CUDA the
        check waits for the device); then no row has read anything.
        """
        if not isinstance(tokens, Tensor) or tokens.shape != (self.batch,) or tokens.dtype != torch.int64:
            found = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
            raise ShapeError(f"step takes tokens int64 ({self.batch},), one for each row, not {found}")
        if tokens.device != self.device:
            raise ShapeError(f"tokens are on {tokens.device} and the stream on {self.device}; move them with .to(...)")
        if not self._few or not all(0 <= token < self.vocab_size for token in tokens.tolist()):
            check_tokens(tokens, self.vocab_size)
        return self.next_logits(self.array(tokens)).clone()

    def next_logits(self, tokens: Array) -> Tensor:
        """`step` without its checks, for tokens as `array` has made them; the next step overwrites the logits."""
        if self._few:
            self._advance(tokens)
        else:
            with self._exact():
                self._advance(tokens)
        return self._logits

    def push(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Starts every row anew with a prefix of its own; returns the logits of what follows it, `(batch, vocab)`.

        tokens and lengths: as `vocab.encode(prefixes, context=stream.context)` makes them; one `.` before a prefix is
        enough. Raises `ShapeError` for other shapes, `TokenError` as `step` does; then no row has read anything.
        """
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else repr(part)[:40] for part in (tokens, lengths)]
        if shapes[0][:1] != (self.batch,) or shapes[1] != (self.batch,) or len(shapes[0]) != 2:
            raise ShapeError(
                f"tokens {shapes[0]} and lengths {shapes[1]} are not those of {self.batch} prefixes, one for each row; "
                f"make them with vocab.encode(prefixes, context=stream.context)"
            )
        tokens, lengths = tokens.cpu(), lengths.cpu()
        longest = int(lengths.max())
        before = tokens.shape[1] - longest  # zeros before each prefix
        if before < 1 or int(lengths.min()) < 0 or tokens[:, :before].any():
            raise ShapeError(
                f"tokens {shapes[0]} do not hold `.` and then prefixes of up to {longest} characters; make them with "
                f"vocab.encode(prefixes, context=stream.context)"
            )
        check_tokens(tokens, self.vocab_size)
        # All prefixes end at the same step: a row that has read nothing but `.` may read more of them.
        places = before - 1 + (torch.arange(longest + 1) - (longest - lengths[:, None])).clamp_(min=0)
        self.reset()
        for token in tokens.long().gather(1, places).t().contiguous().to(self.device):
            logits = self.step(token)
        return logits

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Starts these rows anew, or all of them; the others go on as they were.

        rows: numbers, or bool `(batch,)`. Raises `ShapeError` for anything else, naming a row that is not there.
        """
        chosen = torch.arange(self.batch) if rows is None else torch.as_tensor(rows)
        if chosen.dtype == torch.bool and chosen.shape == (self.batch,):
            chosen = chosen.nonzero()[:, 0]
        if chosen.ndim != 1 or (len(chosen) and (chosen.is_floating_point() or chosen.dtype == torch.bool)):
            raise ShapeError(f"rows is {rows!r}; give a list of rows, or a bool for each of the {self.batch} rows")
        rows = chosen.tolist()
        for row in rows:
            if not 0 <= row < self.batch:
                raise ShapeError(f"row {row} is not among the {self.batch} rows, 0 to {self.batch - 1}")
        if rows:
            self.restart(sorted(set(rows)))

    def restart(self, rows: list[int]) -> None:
        """`reset` without its checks, for one or more rows that are there, each of them once."""
        own = slice(None) if len(rows) == self.batch else rows
        oldest = self._clock - int(self._starts[own].min())  # what stands before a row's start is `.` already
        for level in self._levels:
            newest = self._clock % level.size - 1
            for age in range(min(oldest, level.size)):
                level.slots[newest - age][own] = level.pad
        self._keys[own] = 0
        self._starts[own] = self._clock

    def __reduce_ex__(self, protocol: int) -> None:
        raise StateError("a Stream is not copied or pickled; make another of the same model and give it the state()")

    def state(self) -> dict[str, Tensor]:
        """A copy of all that the rows have read, as plain tensors: what `load_state` takes."""
        counts = {"clock": torch.tensor(self._clock), "starts": torch.from_numpy(self._starts.copy())}
        rings = {f"level {index}": torch.as_tensor(level.children).clone() for index, level in enumerate(self._levels)}
        return {"model": self._digest.clone(), **counts, "keys": torch.as_tensor(self._keys).clone(), **rings}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from a `state()`, also from one of another device.

        Raises `StateError` where it is not one, or is of another model, dtype or batch; then nothing has changed.
        """
        if not isinstance(state, dict) or not all(isinstance(part, Tensor) for part in state.values()):
            raise StateError("a state is a dict of tensors, as Stream.state() gives it")
        own = self.state()
        if not torch.equal(state.get("model", torch.zeros(0)).cpu(), own["model"]) or state.keys() != own.keys():
            raise StateError("this state is of another model or dtype; load it into a stream of that one")
        if len(state["starts"]) != self.batch:
            raise StateError(f"this state is of {len(state['starts'])} rows; load it into a stream of that batch")
        for part, tensor in own.items():
            found = state[part]
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise StateError(
                    f"{part!r} of this state is {found.dtype} of shape {tuple(found.shape)}, here it is "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}; the state is damaged, make another"
                )
        keys, starts = state["keys"], state["starts"]
        if keys.min() < 0 or keys.max() >= self._kinds or starts.max() > state["clock"]:
            raise StateError("'keys' or 'starts' of this state are out of range; the state is damaged, make another")
        self._clock, self._starts = int(state["clock"]), state["starts"].cpu().numpy().copy()
        torch.as_tensor(self._keys).copy_(state["keys"])
        for index, level in enumerate(self._levels):
            torch.as_tensor(level.children).copy_(state[f"level {index}"])

    def _advance(self, tokens: Array, start: bool = False) -> None:
        """One step, which leaves its logits in `_logits`.

        start: every level's ring is filled with what its newest child contributes, which is what `.` alone gives.
        """
        ops, keys, child, value = self._ops, self._keys, None, None
        ops.add(ops.take(self._shifted, keys, out=self._shift), tokens, out=keys)
        if self._values is not None:
            value = ops.take(self._values, keys, out=self._value)
        for level in self._levels:
            now = self._clock % level.size
            slot = level.slots[now]
            if child is None:
                ops.take(self._table, keys, out=slot)
            else:
                ops.product(child, level.matrix, out=slot)
            if start:
                level.children[...], level.pad = slot, slot[0] + 0
            child = level.node(ops, now)
            if level.gate is not None:
                child, value = level.gate.node(ops, value)
        if self._hidden is not None:
            child = ops.relu(ops.product(ops.relu(value), self._hidden, out=self._top))
        self._clock += 1
        ops.product(child, self._head, out=self._logits_array)


class _Level:
    """What a level's children have contributed to its taps, newest last, and room for its newest node.

    children: `(size, batch, fan_in * channels)`, of which step t writes entry `t % size`. A bias is the last row of its
    matrix, and what a matrix multiplies has a column of ones behind it: one operation in place of two.
    """

    def __init__(
        self, taps: Tensor, bias: Tensor, fan_in: int, dilation: int, batch: int, array: Callable[[Tensor], Array]
    ):
        channels, self.size, self.gate = taps.shape[2], (fan_in - 1) * dilation + 1, None
        self.matrix = array(_with_bias(_side_by_side(taps), F.pad(bias, (0, (fan_in - 1) * channels))))
        self.children = array(taps.new_empty(self.size, batch, fan_in * channels))
        self.pad: Array | None = None
        self.slots = list(self.children)
        columns = [slice(tap * channels, (tap + 1) * channels) for tap in range(fan_in)]
        *older, self.newest = [[slot[:, own] for slot in self.slots] for own in columns]
        self.older = [(entries, (fan_in - 1 - tap) * dilation) for tap, entries in enumerate(older)]  # and how far back
        self.out = array(_with_ones(taps.new_empty(batch, channels)))
        self.sum = self.out[:, :channels]

    def node(self, ops: type[_NumPy] | type[_PyTorch], now: int) -> Array:
        """The newest node with a one behind it, `(batch, channels + 1)`. now: the entry of its newest child."""
        total = self.newest[now]
        if not self.older:
            ops.add(total, 0, out=self.sum)
        for older, back in self.older:
            total = ops.add(total, older[now - back], out=self.sum)  # what is before the first entry is the last one
        ops.tanh(self.sum)
        return self.out


class _Gate:
    """What makes a gated level's newest node of its sum (`nodes._Gates`): both values of it, each with a one behind.

    The matrix has columns of zeros there, so that the ones are those of the rightmost child, to which it is added.
    """

    def __init__(self, summed: Array, matrix: Tensor, bias: Tensor, n_embd: int, array: Callable[[Tensor], Array]):
        batch, gate = len(summed), len(matrix)
        parts = [F.pad(part, (0, 1)) for part in _with_bias(matrix, bias).split(n_embd, 1)]
        self.f, self.g = summed[:, :gate], summed[:, gate:]
        self.matrix, self.width = array(torch.cat(parts, 1)), n_embd + 1
        self.product = array(matrix.new_empty(batch, len(parts) * self.width))
        self.out = array(_with_ones(matrix.new_empty(batch, gate)))
        self.z = self.out[:, :gate]

    def node(self, ops: type[_NumPy] | type[_PyTorch], rightmost: Array) -> tuple[Array, Array]:
        """h, and h and s side by side; of the last level s alone, twice. rightmost: h and s of the rightmost child."""
        ops.multiply(self.f, ops.add(self.g, 1, out=self.g), out=self.z)
        own = ops.product(self.out, self.matrix, out=self.product)
        own = ops.add(own, rightmost[:, -own.shape[1] :], out=own)
        return own[:, : self.width], own


class _NumPy:
    """The operations of a step on the CPU with few rows, and the arrays that they take: views of tensors."""

    array = staticmethod(Tensor.numpy)
    add, multiply, product = np.add, np.multiply, np.dot

    @staticmethod
    def take(table: np.ndarray, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        return table.take(rows, 0, out, "clip")  # other modes make a new array first

    @staticmethod
    def tanh(x: np.ndarray) -> np.ndarray:
        return np.tanh(x, out=x)

    @staticmethod
    def relu(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0, out=x)


class _PyTorch:
    """The same operations elsewhere."""

    add, multiply, product = torch.add, torch.mul, torch.mm
    tanh, relu = staticmethod(tanh_), torch.relu_

    @staticmethod
    def array(tensor: Tensor) -> Tensor:
        return tensor

    @staticmethod
    def take(table: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        return torch.index_select(table, 0, rows, out=out)


def _side_by_side(taps: Tensor) -> Tensor:
    """`(fan_in, rows, channels)` to `(rows, fan_in * channels)`."""
    return torch.cat(taps.unbind(), 1)


def _with_bias(matrix: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([matrix, bias[None]])


def _with_ones(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 1), value=1.0)


def _digest(model: ConvWaveNet) -> bytes:
    """SHA-256 of a model's shape, dtype and weights."""
    digest = hashlib.sha256(f"{model.config} {model.embedding.weight.dtype}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
