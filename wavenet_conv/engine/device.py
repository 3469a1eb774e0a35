"""Chunks of names on a GPU: text in, sums out, while the host prepares the next chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import Chunk, Codes
from ..precision import exact_float32
from .tabulated import TabulatedNodes

Scores = tuple[Tensor, Tensor, Tensor, Tensor]


class Started(NamedTuple):
    """A chunk that the device works on."""

    chunk: Chunk
    moved: list[Tensor]  # kept: the device reads them on another stream than the one that wrote them
    log_probs: Tensor
    results: Tensor  # float64 on the host: sums per name, and for codes the known characters per name
    done: torch.cuda.Event


class DeviceLikelihood:
    """Log-likelihoods of chunks on a GPU; several threads may use it at once.

    Args:
        nodes: The model.
        numbers: The token of each code, as `TabulatedNodes.log_probs_of_codes` takes them, on the host.
    """

    def __init__(self, nodes: TabulatedNodes, numbers: Tensor | None):
        self.nodes, self.device = nodes, nodes.nodes.embedding.device
        self.numbers = None if numbers is None else numbers.to(self.device)
        torch.cuda.current_stream(self.device).synchronize()  # other streams may read the tables from here on

    def log_probs(self, chunks: Iterable[Chunk], ahead: int, positions: bool) -> Iterator[Scores]:
        """Per chunk: log-probabilities on the device; on the host their sums per name, lengths, and known names.

        Args:
            chunks: As `packing.packed` gives them.
            ahead: How many chunks are started before the results of one are waited for. So the host reads and joins
                names while the device scores others.
            positions: Whether unknown names must have one log-probability, as empty ones.
        """
        started, copies, coming = deque[Started](), torch.cuda.Stream(self.device), iter(chunks)
        try:
            while True:
                try:
                    chunk = next(coming, None)
                except Exception:
                    for earlier in started:  # an unknown character there comes first
                        self._finish(earlier, copies, positions)
                    raise
                if chunk is not None:
                    started.append(self._start(chunk, copies))
                while started and (chunk is None or len(started) > ahead):
                    yield self._finish(started[0], copies, positions)
                    started.popleft()
                if chunk is None:
                    return
        finally:
            for unfinished in started:  # before what the device reads is freed
                unfinished.done.synchronize()

    @torch.no_grad()
    def _start(self, chunk: Chunk, copies: torch.cuda.Stream) -> Started:
        compute = torch.cuda.current_stream(self.device)
        with torch.inference_mode(False), exact_float32(), torch.cuda.device(self.device):
            try:
                with torch.cuda.stream(copies):
                    moved = [part.pin_memory().to(self.device, non_blocking=True) for part in chunk[:2]]
                compute.wait_stream(copies)
                text, lengths = moved
                if isinstance(chunk, Codes) and self.numbers is not None:
                    log_probs, *sums = self.nodes.log_probs_of_codes(text, lengths, self.numbers)
                else:
                    log_probs, *sums = self.nodes.log_probs(text, lengths)
                both = torch.stack(sums)
                results = torch.empty(both.shape, dtype=both.dtype, device="cpu", pin_memory=True)
                results.copy_(both, non_blocking=True)
                return Started(chunk, moved, log_probs, results, compute.record_event())
            except BaseException:
                compute.synchronize()  # before what the device reads is freed
                raise

    def _finish(self, started: Started, copies: torch.cuda.Stream, positions: bool) -> Scores:
        started.done.synchronize()
        chunk, (sums, *characters) = started.chunk, started.results.clone()  # others will write to pinned memory
        known = chunk.known
        if isinstance(chunk, Codes) and not torch.equal(characters[0], chunk.lengths.double()):
            if positions or chunk.unknown == "error":
                packed = chunk.pack()  # raises, or makes unknown names empty ones
                return self._finish(self._start(packed, copies), copies, positions)
            known = known & (characters[0] == chunk.lengths)
        return started.log_probs, sums, chunk.lengths, known
