"""One new node a layer for each new character: the tree's logits from ring buffers of old nodes.

A layer needs, beside its newest child, the children at distances d, 2d, ..., (kernel_size - 1) * d back (README: Generating
one character at a time; Paine et al. 2016, arXiv:1611.09482). Knows nothing of characters, nor of how they are drawn.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ConfigError, ShapeError, StateError
from .model import ConvWaveNet
from .nodes import SharedNodes, tanh_
from .precision import exact_float32
from .vocabulary import check_tokens

if TYPE_CHECKING:
    from .loops import Arrays

FEW_ROWS = 8  # up to here compiled loops take the steps, row after row, and read all weights for each


class Stream:
    """Names that are read side by side, one character of each a step.

        stream = Stream(model, batch=2)
        logits = stream.step(torch.tensor([0, 0]))  # (2, vocab), of each name's first character
        logits = stream.step(torch.tensor([5, 13]))

    A row that has been started anew has read nothing but `.`, and the first `step` reads one more. Fed `.` and then a
    name, a row gives the tree's logits at every position of it: to 1e-12 in float64 and 1e-5 in float32. The state is
    here and not in the model, which is copied: each layer keeps the last `(kernel_size - 1) * dilation + 1` of its children
    in every row. The lowest layers, where few nodes are possible, are a table.

    model: a `ConvWaveNet`, gated or not, in whatever mode. batch: rows. device and dtype: where and in what to compute
    (as the model is; float32 is IEEE, also on CUDA). compiled: whether loops that Numba compiles take the steps and not
    PyTorch; None: where they can, which is on the CPU, in float32 or float64, with up to 8 rows and the extra "fast".
    The very first step then takes some seconds; what has been compiled is kept beside the package.
    Raises `ShapeError` for a batch below 1, `ConfigError` where `compiled` asks for what cannot be.
    """

    @torch.inference_mode(False)  # else it could not be used outside
    @torch.no_grad()
    def __init__(
        self,
        model: ConvWaveNet,
        batch: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool | None = None,
    ):
        if not isinstance(batch, int) or batch < 1:
            raise ShapeError(f"batch is {batch!r}; it must be an integer of at least 1")
        weights = copy.deepcopy(model).to(device=device, dtype=dtype)
        like = weights.embedding.weight
        self.batch, self.context, self.vocab_size = batch, model.context, model.config.vocab_size
        self.device, self.dtype = like.device, like.dtype
        if compiled not in (None, True, False):
            raise ConfigError(f"compiled is {compiled!r}; it must be True, False or None")
        self._loops = None if compiled is False or batch > FEW_ROWS else compiled_loops(self.device, self.dtype)
        self.compiled = self._loops is not None
        if compiled and not self.compiled:
            raise ConfigError(
                f"compiled steps are for up to {FEW_ROWS} rows on the CPU, in float32 or float64, and need Numba: "
                f"pip install 'wavenet-conv[fast]', or leave out compiled=True"
            )
        self._exact = exact_float32 if like.is_cuda else nullcontext
        self._digest = torch.frombuffer(bytearray(_digest(weights)), dtype=torch.uint8)
        self.clocks = torch.zeros(batch, dtype=torch.int64, device=self.device)  # steps since each row's start
        self.keys = torch.zeros_like(self.clocks)  # each row's newest node of those in the table
        with self._exact():
            self._prepare(SharedNodes(weights), model.dilations)
            self._advance(self.keys.clone(), start=True)
        self.arrays = self._for_loops() if self.compiled else None  # of `loops`
        self.reset()

    def _prepare(self, nodes: SharedNodes, dilations: Sequence[int]) -> None:
        """Everything that a step reads and writes."""
        self._first, (contributions, values) = nodes.tabulated, nodes._table
        self._kinds = self.vocab_size ** dilations[self._first]  # nodes in the table
        self._table = contributions[:, : self._kinds].flatten(0, 1)  # what they contribute, tap after tap
        self._gates, self._values = nodes._gates, None if values is None else values[: self._kinds]
        layers = list(zip(nodes._taps, nodes._bias, dilations))[self._first :]
        self._layers = [_Layer(taps, bias, dilation, self.batch) for taps, bias, dilation in layers]
        self._layers[0].children = self.keys.new_zeros(len(self._layers[0].children))  # a node of the table is its key
        self._head, self._head_bias = nodes._head, nodes._head_bias
        self._logits = self._head.new_empty(self.batch, len(self._head_bias))
        self._shown = self._logits[:, : self.vocab_size]
        # Of each layer, row after row, its children: which row's they are, how many steps back, and among how many.
        children = [
            (row, back, layer.size, layer.size * row, layer.size * self.batch)
            for layer in self._layers
            for row in range(self.batch)
            for back in layer.back
        ]
        self._row, self._back, self._size, self._row_start, self._pad = (
            torch.tensor(children, device=self.device).t().contiguous()
        )
        self._counts = [len(layer.back) * self.batch for layer in self._layers]
        taps = torch.arange(0, len(self._table), self._kinds, device=self.device)
        self._tap_rows = taps.repeat(self.batch)  # of the first layer's children, as many

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
        if self.batch > FEW_ROWS or not all(0 <= token < self.vocab_size for token in tokens.tolist()):
            check_tokens(tokens, self.vocab_size)
        return self.next_logits(tokens).clone()

    def next_logits(self, tokens: Tensor) -> Tensor:
        """`step` without its checks and without asking the device; the next step overwrites the logits."""
        if self.compiled:
            self._loops.step(tokens.contiguous().numpy(), *self.arrays)
        else:
            with torch.no_grad(), self._exact():
                self._advance(tokens)
        return self._shown

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
        try:
            chosen = torch.as_tensor(range(self.batch) if rows is None else rows, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            chosen = torch.empty(())
        if chosen.dtype == torch.bool and chosen.shape == (self.batch,):
            chosen = chosen.nonzero()[:, 0]
        if chosen.ndim != 1 or (len(chosen) and (chosen.is_floating_point() or chosen.dtype == torch.bool)):
            raise ShapeError(f"rows is {rows!r}; give a list of rows, or a bool for each of the {self.batch} rows")
        for row in chosen.tolist():
            if not 0 <= row < self.batch:
                raise ShapeError(f"row {row} is not among the {self.batch} rows, 0 to {self.batch - 1}")
        chosen = chosen.long().to(self.device)
        self.clocks[chosen] = self.keys[chosen] = 0  # what stands before a row's start is never read
        self._forget_early()

    def _forget_early(self) -> None:
        """Of what the compiled loops have computed ahead of time."""
        if self.compiled:
            self.arrays.phases[:] = 0

    def __reduce_ex__(self, protocol: int) -> None:
        raise StateError("a Stream is not copied or pickled; make another of the same model and give it the state()")

    def _parts(self) -> dict[str, Tensor]:
        rings = {f"layer {index}": layer.children for index, layer in enumerate(self._layers)}
        return {"model": self._digest, "clocks": self.clocks, "keys": self.keys, **rings}

    def state(self) -> dict[str, Tensor]:
        """A copy of all that the rows have read, as plain tensors: what `load_state` takes."""
        return {name: part.clone() for name, part in self._parts().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from a `state()`, also from one of another device.

        Raises `StateError` where it is not one, or is of another model, dtype or batch; then nothing has changed.
        """
        if not isinstance(state, dict) or not all(isinstance(part, Tensor) for part in state.values()):
            raise StateError("a state is a dict of tensors, as Stream.state() gives it")
        own = self._parts()
        if not torch.equal(state.get("model", torch.zeros(0)).cpu(), self._digest) or state.keys() != own.keys():
            raise StateError("this state is of another model or dtype; load it into a stream of that one")
        if state["clocks"].ndim == 1 and len(state["clocks"]) != self.batch:
            raise StateError(f"this state is of {len(state['clocks'])} rows; load it into a stream of that batch")
        for name, part in own.items():
            found = state[name]
            if found.shape != part.shape or found.dtype != part.dtype:
                raise StateError(
                    f"{name!r} of this state is {found.dtype} of shape {tuple(found.shape)}, here it is "
                    f"{part.dtype} of shape {tuple(part.shape)}; the state is damaged, make another"
                )
        keys = torch.cat([state["keys"], state["layer 0"]])
        if keys.min() < 0 or keys.max() >= self._kinds or state["clocks"].min() < 0:
            raise StateError("'keys' or 'clocks' of this state are out of range; the state is damaged, make another")
        for name, part in own.items():
            part.copy_(state[name])
        self._forget_early()

    def _advance(self, tokens: Tensor, start: bool = False) -> None:
        """One step in PyTorch, which leaves its logits in `_logits`; its operations never ask the device.

        start: all that a layer keeps becomes its newest child, which is what `.` alone gives.
        """
        child = self.keys.mul_(self.vocab_size).remainder_(self._kinds).add_(tokens)
        value = None if self._values is None else self._values.index_select(0, child)
        then = self.clocks.index_select(0, self._row) - self._back
        places = torch.where(then < 0, self._pad, then % self._size + self._row_start).split(self._counts)
        self.clocks += 1
        for index, (layer, own) in enumerate(zip(self._layers, places)):
            kernel_size = len(layer.back)
            if start:
                layer.children[...] = child[0]
            layer.children.index_copy_(0, own[kernel_size - 1 :: kernel_size], child)
            children = layer.children.index_select(0, own)
            if index == 0:
                rows = self._table.index_select(0, children + self._tap_rows)
                total = rows.view(self.batch, kernel_size, -1).sum(1)
            else:
                total = torch.addmm(layer.bias, children.view(self.batch, -1), layer.weight)
            if value is None:
                child = tanh_(total)
            else:
                value = self._gates.nodes(self._first + index, total, value)
                child = value[:, : self._gates.n_embd]
        torch.addmm(self._head_bias, child, self._head, out=self._logits)

    def _for_loops(self) -> Arrays:
        """What `loops` reads and writes; from now on the layers' children are parts of it."""
        loops = self._loops
        like, (first, *above), gates, hidden = self._head, self._layers, [], self._head.new_empty(0, 0)
        if self._gates is not None:
            gates = list(zip(self._gates.matrices, self._gates.biases))[self._first :]
            hidden = torch.cat([self._gates.hidden.t(), self._gates.hidden_bias[None]])
        weights = [[*[tap.t() for tap in layer.weight.split(layer.shape[0])], layer.bias] for layer in self._layers]
        weights += [[matrix.t(), bias] for matrix, bias in gates]
        starts = [0, *accumulate(sum(part.numel() for part in parts) for parts in weights)]
        rows = [0, 0, *accumulate(len(layer.children) for layer in above)]  # the first layer's children are elsewhere
        values = like.new_empty(self._kinds, 0) if self._values is None else self._values.contiguous()
        widest = max(values.shape[1], len(like), *(width for layer in self._layers for width in layer.shape))
        widest += -widest % 16  # no row begins inside a cache line
        children = like.new_zeros(rows[-1], widest)
        layers = []
        for index, layer in enumerate(self._layers):
            gate = (starts[len(self._layers) + index], len(gates[index][1])) if gates else (-1, 0)
            early = index * self.batch * loops.AHEAD
            layers.append((len(layer.back), layer.dilation, *layer.shape, starts[index], *gate, rows[index], early))
        for layer, start in zip(above, rows[1:]):
            part = children[start : start + len(layer.children), : layer.shape[0]]
            layer.children = part.copy_(layer.children)
        arrays = {
            "clocks": self.clocks,
            "keys": self.keys,
            "phases": torch.zeros_like(self.clocks),
            "bottom": first.children,
            "children": children,
            "table": self._table,
            "values": values,
            "weights": torch.cat([part.flatten() for parts in weights for part in parts]),
            "layers": torch.tensor(layers, device=self.device),
            "early": like.new_zeros(len(layers) * self.batch * loops.AHEAD, widest),
            "hidden": hidden,
            "head": self._head.t().contiguous(),
            "head_bias": self._head_bias,
            "logits": self._logits,
            "scratch": like.new_zeros(3, widest),
        }
        return loops.Arrays(self.vocab_size, *[arrays[name].numpy() for name in loops.Arrays._fields[1:]])


class _Layer:
    """A layer's weights, and of every row its last children.

    weight: `(kernel_size * inputs, channels)`, rows for each tap, oldest first. children: those of row r at its step t are
    entry `r * size + t % size`; the last entry is what `.` alone gives. back: how many steps each tap's child is back.
    """

    def __init__(self, taps: Tensor, bias: Tensor, dilation: int, batch: int):
        kernel_size, inputs, channels = taps.shape
        self.dilation, self.shape = dilation, (inputs, channels)
        self.weight, self.bias = taps.flatten(0, 1), bias
        self.back = [(kernel_size - 1 - tap) * dilation for tap in range(kernel_size)]
        self.size = (kernel_size - 1) * dilation + 1
        self.children = taps.new_empty(batch * self.size + 1, inputs)


def compiled_loops(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module `loops` where few rows can be read in compiled loops, else None."""
    return _loops() if device.type == "cpu" and dtype in (torch.float32, torch.float64) else None


@cache
def _loops() -> ModuleType | None:
    try:
        from . import loops  # only when it is wanted: Numba takes 0.3 s to import
    except ImportError:  # Numba is not there, or not made for the NumPy that is
        return None
    return loops


def _digest(model: ConvWaveNet) -> bytes:
    """SHA-256 of a model's shape, dtype and weights."""
    digest = hashlib.sha256(f"{model.config} {model.embedding.weight.dtype}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
