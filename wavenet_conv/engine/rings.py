"""Steps of a stream in PyTorch, and the ring buffers that every backend of a stream has. `Stream` checks what comes in.

All rows take their steps together, so a ring has one write position. A row that has been reset is younger than the
ring: children from before its first step are those of `.` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .shared import SharedNodes

TILE_ROWS = 128  # rows of every matrix product of a sampler, so that a row's bits do not depend on the others


class Ring:
    """The last children of one layer, in every row."""

    def __init__(self, kernel_size: int, dilation: int, padding: Tensor, rows: int):
        self.backs = [(kernel_size - 1 - tap) * dilation for tap in range(kernel_size)]  # steps back per tap
        self.padding = padding  # the child that `.` alone gives, (c_in,); of the lowest layer its id, ()
        # (size, rows, c_in), or int64 (size, rows); the child of step t is entry t % size.
        self.nodes = padding.expand(self.backs[0] + 1, rows, *padding.shape).clone()

    def push(self, child: Tensor, clock: int, ages: Tensor, settled: int) -> list[Tensor]:
        """Writes the newest child and returns the child of each tap, `(rows, c_in)`.

        `settled`: steps since the last reset of any row; an older child of a younger row is padding.
        """
        self.nodes[clock % len(self.nodes)] = child
        children = []
        for back in self.backs:
            old = self.nodes[(clock - back) % len(self.nodes)]
            if back > settled:
                young = (ages < back).view(-1, *[1] * self.padding.ndim)
                old = torch.where(young, self.padding, old)
            children.append(old)
        return children

    def push_at(self, child: Tensor, places: Tensor, young: Tensor) -> list[Tensor]:
        """`push` with the clock on the device.

        Args:
            child: The newest child.
            places: The entry of each tap's child, int64 `(taps,)`; the last is that of the newest child.
            young: Whether a row is younger than that child, bool `(taps, rows)`.
        """
        self.nodes.index_copy_(0, places[-1:], child[None])
        olds = self.nodes.index_select(0, places)
        young = young.view(*young.shape, *[1] * self.padding.ndim)
        return list(torch.where(young, self.padding, olds))


class TorchSteps:
    """A backend: the state of all rows, and a step that never waits for the device.

    Layers that `SharedNodes` tabulates need no ring: the last tokens of a row are a key into the table.
    """

    @torch.no_grad()
    def __init__(self, shared: SharedNodes, rows: int, tile: int | None = None):
        self.tile = rows if tile is None else tile  # rows of one matrix product
        self.nodes, self.first = shared.nodes, shared.tabulated
        self.kinds = shared.vocab_size ** self.nodes.dilations[self.first]  # keys of the table
        contributions, values = shared.table
        self.table = contributions[:, : self.kinds].contiguous()
        self.values = None if values is None else values[: self.kinds].contiguous()
        self.clock, self.settled = 0, 0  # steps taken, and since the last reset of any row
        self.keys = torch.zeros(
            rows, dtype=torch.int64, device=self.table.device
        )  # each row's newest node in the table
        self.ages = torch.zeros_like(self.keys)  # steps since each row was reset
        self.rings = self._new_rings(rows)

    def _new_rings(self, rows: int) -> list[Ring]:
        child, rings = torch.zeros_like(self.keys[0]), []
        value = None if self.values is None else self.values[:1]
        for layer, (taps, dilation) in enumerate(zip(self.nodes.taps, self.nodes.dilations)):
            if layer >= self.first:
                rings.append(Ring(len(taps), dilation, child, rows))
                value = self._value(layer, [child[None]] * len(taps), value)
                child = value[0, : self.nodes.n_embd] if self.values is not None else value[0]
        return rings

    def _value(self, layer: int, children: list[Tensor], rightmost: Tensor | None) -> Tensor:
        """The nodes of a layer with these children."""
        if layer == self.first:
            summed = self.table[0].index_select(0, children[0])
            for tap, ids in enumerate(children[1:], start=1):
                summed += self.table[tap].index_select(0, ids)
        else:
            taps = self.nodes.taps[layer]
            summed = torch.addmm(self.nodes.biases[layer], torch.cat(children, 1), taps.flatten(0, 1))
        return self.nodes.values(layer, summed, rightmost)

    def _tiled(self, layer: int, children: list[Tensor], rightmost: Tensor | None) -> Tensor:
        """`_value` in tiles of a fixed number of rows."""
        if self.tile == len(self.keys):
            return self._value(layer, children, rightmost)
        tiles = zip(*(child.split(self.tile) for child in children))
        values = [None] * len(self.keys) if rightmost is None else rightmost.split(self.tile)
        return torch.cat([self._value(layer, list(tile), value) for tile, value in zip(tiles, values)])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Reads one token per row, int64 `(rows,)`; returns logits `(rows, vocab)`."""
        logits = self._read(tokens)
        self.clock, self.settled = self.clock + 1, self.settled + 1
        return logits

    def _pushes(self) -> Iterator[Callable[[Tensor], list[Tensor]]]:
        """What writes a child into each ring and returns the child of each tap."""
        clock, ages, settled = self.clock, self.ages, self.settled
        return (partial(ring.push, clock=clock, ages=ages, settled=settled) for ring in self.rings)

    def _read(self, tokens: Tensor) -> Tensor:
        """What a step does on the device."""
        child = self.keys.mul_(self.nodes.vocab_size).remainder_(self.kinds).add_(tokens)
        value = None if self.values is None else self.values.index_select(0, child)
        for layer, push in enumerate(self._pushes(), start=self.first):
            value = self._tiled(layer, push(child), value)
            child = value[:, : self.nodes.n_embd] if self.values is not None else value
            if self.values is None:
                value = None
        self.ages += 1
        head = self.nodes.head
        logits = [torch.addmm(head.bias, tile, head.weight) for tile in child.split(self.tile)]
        return (logits[0] if len(logits) == 1 else torch.cat(logits))[:, : self.nodes.vocab_size]

    def reset(self, mask: Tensor) -> None:
        """Makes the rows of a mask, bool `(rows,)`, new ones."""
        self.ages.masked_fill_(mask, 0)
        self.keys.masked_fill_(mask, 0)
        self.settled = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on: the tensors themselves, not copies."""
        rings = {f"layer {index}": ring.nodes for index, ring in enumerate(self.rings)}
        return {"clock": torch.tensor([self.clock], device="cpu"), "ages": self.ages, "keys": self.keys, **rings}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues from a `state()` of the same shapes, but for the padding of columns."""
        for name, part in self.state().items():
            given = state[name]
            if part.ndim == 3:  # a device has its own number of columns, and those behind the channels are padding
                width = min(part.shape[2], given.shape[2])
                part, given = part[..., :width], given[..., :width]
            part.copy_(given)
        self.clock, self.settled = int(state["clock"]), 0


class GraphSteps(TorchSteps):
    """A backend for CUDA whose kernels are one launch: it copies tokens in, replays a graph and copies logits out.

    The graph reads the clock on the device, which takes some more kernels than a step of `TorchSteps`. The first step
    runs without a graph, which prepares the libraries that it calls; the second one is captured.
    """

    def __init__(self, shared: SharedNodes, rows: int):
        super().__init__(shared, rows)
        self._now = self.keys.new_zeros(1)  # the clock
        self._taps = [len(ring.backs) for ring in self.rings]
        # Of each tap of all rings: its steps back, and the size of its ring.
        self._backs = self.keys.new_tensor([back for ring in self.rings for back in ring.backs])
        self._sizes = self.keys.new_tensor([len(ring.nodes) for ring in self.rings for _ in ring.backs])
        self._tokens, self._logits = torch.zeros_like(self.keys), torch.empty(0)  # what the graph reads and writes
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prepared = False

    def _pushes(self) -> Iterator[Callable[[Tensor], list[Tensor]]]:
        places = ((self._now - self._backs) % self._sizes).split(self._taps)
        young = (self.ages < self._backs[:, None]).split(self._taps)
        return (partial(ring.push_at, places=at, young=rows) for ring, at, rows in zip(self.rings, places, young))

    def _read(self, tokens: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        if not self._prepared:
            self._prepared, logits = True, super()._read(self._tokens)
            self._now += 1
            return logits
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()
        return self._logits

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph, device = torch.cuda.CUDAGraph(), self.keys.device
        # PyTorch's own stream for captures is on the first device that has captured. Other threads may use the device.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
        ):
            self._logits = super()._read(self._tokens)
            self._now += 1
        return graph

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues from a `state()` of the same shapes."""
        super().load_state(state)
        self._now.fill_(self.clock)
