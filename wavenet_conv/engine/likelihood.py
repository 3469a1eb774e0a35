"""Log-likelihoods chunk by chunk: by compiled loops, by PyTorch or on a GPU, with what one call leaves to the next."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..chunks import Chunk
from ..errors import ConfigError
from ..precision import exact_float32
from .device import DeviceLikelihood, Scores
from .shared import SharedNodes
from .tabulated import TabulatedNodes
from .weights import Weights, why_not_compiled

# OpenMP's threads do not survive a fork: a forked child that asks for them waits forever. PyTorch's DataLoader sets one
# thread in its workers for the same reason.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


class Likelihood:
    """What a `Scorer` computes with; arguments and attributes as there. Several threads may use it at once.

    numbers: The token of each code of Latin-1, int32 `(256,)`, if names may be given as codes.
    """

    def __init__(self, weights: Weights, compiled: bool | None, remember: bool, numbers: Tensor | None = None):
        with torch.inference_mode(False), exact_float32():
            self.nodes = SharedNodes(weights)
        why_not = why_not_compiled(weights) if compiled is not False else "compiled is False"
        if compiled and why_not:
            raise ConfigError(f"{why_not}; leave out compiled=True")
        self.compiled, self.remember = not why_not, remember
        self.device, self.numbers = weights.embedding.device, numbers
        self._prepare()

    def _prepare(self) -> None:
        """Makes what is not pickled: views of the weights, and the place for what calls leave to the next."""
        self._caches: list[Any] = []
        self.reads: dict[str, Any] = {}  # options of `packing.packed`
        self._engine: Any = self.nodes
        if self.compiled:
            from .compiled import CompiledNodes  # Numba takes 0.3 s to import

            self._engine = CompiledNodes(self.nodes)
        elif self.device.type == "cuda":
            with torch.inference_mode(False), exact_float32():
                tables = TabulatedNodes(self.nodes)
            self._engine = DeviceLikelihood(tables, self.numbers)
            self.reads = {"as_codes": self.numbers is not None, "tokens": tables.chunk_tokens}

    @property
    def tile(self) -> int:
        """The fewest rows of a matrix product."""
        return 1 if self.compiled else self.nodes.tile

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_caches", "_engine")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def log_probs(self, chunks: Iterable[Chunk], ahead: int = 0, positions: bool = False) -> Iterator[Scores]:
        """Per chunk of `packing.packed`: log-probabilities, their sums per name, lengths, known names.

        On the CPU, except that log-probabilities stay on the scorer's device; `ahead` and `positions` as in
        `DeviceLikelihood`.
        """
        if self.device.type == "cuda":
            return self._engine.log_probs(chunks, ahead, positions)
        return self._on_cpu(chunks)

    def _on_cpu(self, chunks: Iterable[Chunk]) -> Iterator[Scores]:
        cache, complete = self._caches.pop() if self._caches else self._engine.new_cache(), False
        try:
            for tokens, lengths, known, *_ in chunks:
                # Tensors of inference mode could not be written to outside it, by the next call.
                with torch.inference_mode(False), torch.no_grad(), nullcontext() if self.compiled else exact_float32():
                    found, totals = self._engine.log_probs(tokens, lengths, cache)
                yield found, totals, lengths, known
            complete = True
        finally:
            if complete:  # after an interrupt, threads may still write to the cache
                if not self.remember:
                    cache.clear()
                self._caches = [cache]

    @torch.no_grad()
    def logits(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Tensor, Tensor]]:
        """Per chunk, on the CPU: logits of all outputs `(outputs, vocab)`, and lengths."""
        for tokens, lengths, *_ in chunks:
            with exact_float32():
                distinct, rows, _ = self.nodes.logits(tokens.to(self.device), lengths.to(self.device))
            yield distinct[rows].cpu(), lengths
