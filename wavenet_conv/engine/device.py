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
    results: Tensor  # float64 on the host: sums per name, and for codes the number of known characters
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

    def log_probs(self, chunks: Iterable[Chunk], ahead: int) -> Iterator[Scores]:
        """Per chunk: log-probabilities on the device; on the host their sums per name, lengths, and known names.

        ahead: How many chunks are started before the results of one are waited for. So the host reads and joins names
        while the device scores others.
        """
        started, copies = deque[Started](), torch.cuda.Stream(self.device)
        try:
            for chunk in chunks:
                started.append(self._start(chunk, copies))
                if len(started) > ahead:
                    yield self._finish(started.popleft(), copies)
            while started:
                yield self._finish(started.popleft(), copies)
        except Exception:
            while started:  # an unknown character there comes first
                self._finish(started.popleft(), copies)
            raise
        finally:
            for unfinished in started:  # before what the device reads is freed
                unfinished.done.synchronize()

    @torch.no_grad()
    def _start(self, chunk: Chunk, copies: torch.cuda.Stream) -> Started:
        compute = torch.cuda.current_stream(self.device)
        with torch.inference_mode(False), exact_float32(), torch.cuda.device(self.device):
            with torch.cuda.stream(copies):
                moved = [part.pin_memory().to(self.device, non_blocking=True) for part in chunk[:2]]
            compute.wait_stream(copies)
            text, lengths = moved
            if isinstance(chunk, Codes) and self.numbers is not None:
                log_probs, sums, known = self.nodes.log_probs_of_codes(text, lengths, self.numbers)
                sums = torch.cat([sums, known[None]])
            else:
                log_probs, sums = self.nodes.log_probs(text, lengths)
            results = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            results.copy_(sums, non_blocking=True)
            return Started(chunk, moved, log_probs, results, compute.record_event())

    def _finish(self, started: Started, copies: torch.cuda.Stream) -> Scores:
        started.done.synchronize()
        chunk, sums = started.chunk, started.results
        if isinstance(chunk, Codes):
            names = len(chunk.lengths)
            if int(sums[names]) < len(chunk.codes):
                packed = chunk.pack()  # raises, or marks the names with unknown characters
                return self._finish(self._start(packed, copies), copies)
            sums = sums[:names]
        return started.log_probs, sums, chunk.lengths, chunk.known
