"""Log-likelihoods of many names; every distinct node is evaluated once (`engine.shared`)."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load_checkpoint
from .chunks import Chunk
from .continuing import complete, next_characters
from .engine.likelihood import Likelihood
from .engine.weights import fold
from .errors import ConfigError, NamesError
from .model import ConvWaveNet, check_pair
from .numbering import to_engine
from .packing import CHUNK_NAMES, Names, packed
from .vocabulary import Vocabulary

AHEAD = 2  # chunks that are given to a GPU before it has answered
QUANTILES = 1001  # of a training list's bits per character


class Scorer:
    """Scores names, or any short strings, with a trained model.

        scorer = Scorer.load("default")
        scorer.score(["emma", "xqzvkj"])

    Scores are batch-invariant: a name has the same bits alone, in any batch, order and chunk size, on the same device
    with the same number of threads. On the CPU, loops that Numba compiles compute them if the extra "fast" is installed
    and every layer is a linear map and tanh. They are compiled at the first score, in about five seconds, and kept
    beside the package. On CUDA, tables of lower layers take up to 4 GiB.

    Args:
        model: A `ConvWaveNet` in any mode; it is copied, and batch norm is folded.
        vocab: The vocabulary of the model.
        device: Where to compute. Default: as the model.
        dtype: In what to compute. Default: as the model. float32 is IEEE, also on CUDA.
        quantiles: float32 `(q,)`, ascending bits per character of the training list, for `percentile`.
        compiled: Whether these loops are used, or PyTorch. Default: loops where they can run.
        remember: Whether evaluated nodes serve later calls too: some hundred MiB at most, and the same scores.

    Attributes:
        compiled: Whether the loops are used.
        tile: A matrix product has at least so many rows. More than 1 where this machine's library for products gives a
            row other bits when it is alone.

    Raises:
        ConfigError: The model is no `ConvWaveNet`, the vocabulary not the model's, the device not there; `compiled` is
            True and the loops cannot run.
    """

    def __init__(
        self,
        model: ConvWaveNet,
        vocab: Vocabulary,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantiles: Tensor | None = None,
        compiled: bool | None = None,
        remember: bool = False,
    ):
        check_pair(model, vocab)
        self.vocab, self.quantiles, self.context = vocab, quantiles, model.context
        with torch.inference_mode(False):
            weights = fold(model, device, dtype).end_first(vocab.end)
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self._likelihood = Likelihood(weights, compiled, remember, vocab.latin1)
        self.nodes, self.compiled = self._likelihood.nodes, self._likelihood.compiled

    @property
    def tile(self) -> int:
        return self._likelihood.tile

    def __getstate__(self) -> bytes:
        # As bytes: `multiprocessing` moves tensors to shared memory. All workers would write into the same buffers, and
        # a thread that is scoring would lose the weights that it reads.
        return pickle.dumps(vars(self))

    def __setstate__(self, state: bytes) -> None:
        vars(self).update(pickle.loads(state))

    @classmethod
    def load(cls, path: str | Path = "default", **options: Any) -> Scorer:
        """A scorer from a checkpoint; "default" ships with the package. Options are those of `Scorer(...)`."""
        checkpoint = load_checkpoint(path)
        return cls(checkpoint.model, checkpoint.vocab, **{"quantiles": checkpoint.quantiles} | options)

    def score(self, names: Names, *, unknown: str = "error") -> Tensor:
        """Scores names by their natural-log likelihood, the end of the name included.

        Args:
            names: Any iterable of strings; a NumPy array; a column of pandas, polars, PyArrow or another library with
                the Arrow PyCapsule protocol, in its own order; or `(tokens, lengths)` as `vocab.encode(names,
                context=scorer.context)` returns them, in the vocabulary's own numbers.
            unknown: What a missing value, or a name with a character outside the vocabulary, does: "error" raises,
                "nan" gives NaN.

        Returns:
            `(names,)` in nats, on the CPU, in the scorer's dtype.

        Raises:
            NamesError: A name is missing or has a character outside the vocabulary; names are not strings, or a table.
            ShapeError: Tokens and lengths do not fit each other.
            UsageError: Names are read with PyArrow, which is not installed.
        """
        parts = [scores for scores, _ in self._scores(self._chunks(names, unknown), AHEAD)]
        return _joined(parts, self.dtype)

    def stream(self, names: Names, *, chunk: int = CHUNK_NAMES, unknown: str = "error") -> Iterator[Tensor]:
        """Yields the scores of `names`, an iterable of any length, in order, at most `chunk` at a time.

        Memory is bounded: a chunk ends early if its names are long, and not all nodes are kept for later chunks. Raises
        `ConfigError` at the call if `chunk` is not an integer of at least 1.
        """
        return (scores for scores, _ in self._scores(self._chunks(names, unknown, chunk)))

    def position_log_probs(self, names: Names, *, unknown: str = "error") -> tuple[Tensor, Tensor]:
        """The log-probability, in nats, of every character of each name and of its end.

        Returns:
            Values `(positions,)`, name after name, in the scorer's dtype, and offsets int64 `(names + 1,)`: name i has
            `values[offsets[i] : offsets[i + 1]]`, one more than it has characters. An unknown name has one NaN.
        """
        values, all_lengths = [], []
        for found, _, lengths, known in self._likelihood.log_probs(self._chunks(names, unknown), positions=True):
            values.append(found.cpu())
            values[-1][(torch.cumsum(lengths + 1, 0) - 1)[~known]] = torch.nan
            all_lengths.append(lengths)
        return _joined(values, self.dtype), _offsets(all_lengths)

    def logits(self, names: Names) -> tuple[Tensor, Tensor]:
        """All logits `(positions, vocab)` on the CPU, and offsets as `position_log_probs`. Column t is of token t."""
        parts = list(self._likelihood.logits(packed(names, self.vocab, self.context, CHUNK_NAMES, "error")))
        logits = _joined([logits for logits, _ in parts], self.dtype, len(self.vocab))
        if self.vocab.end:
            logits = logits.index_select(1, to_engine(torch.arange(len(self.vocab), device="cpu"), self.vocab.end))
        return logits, _offsets([lengths for _, lengths in parts])

    def bits_per_character(self, names: Names, *, unknown: str = "error") -> Tensor:
        """Bits that the model needs per character of each name, its end counted as one: `(names,)`."""
        parts = self._scores(self._chunks(names, unknown), AHEAD)
        bits = [scores / (-log(2) * (lengths + 1)) for scores, lengths in parts]
        return _joined(bits, self.dtype)

    def percentile(self, names: Names, *, unknown: str = "error") -> Tensor:
        """Percent of the training list that need fewer bits per character than each name: `(names,)`.

        Near 0 for a very plausible name, 100 for one less plausible than any in the list. Raises `ConfigError` if the
        checkpoint carries no quantiles of its training list.
        """
        if self.quantiles is None:
            fix = "write it with save_checkpoint(path, model, vocab, names=training_names)"
            raise ConfigError(f"this model carries no quantiles of its training list; {fix}")
        return percentile_of(self.bits_per_character(names, unknown=unknown), self.quantiles)

    def next(self, prefixes: Iterable[str], top_k: int = 10) -> list[list[tuple[str | None, float]]]:
        """The likeliest next characters after each prefix; see `continuing.next_characters`."""
        return next_characters(self, prefixes, top_k)

    def complete(self, prefixes: Iterable[str], top_k: int = 10, **options: Any) -> list[list[tuple[str, float]]]:
        """The likeliest whole names that begin with each prefix; see `continuing.complete`."""
        return complete(self, prefixes, top_k, **options)

    def _chunks(self, names: Names, unknown: str, chunk: int = CHUNK_NAMES) -> Iterator[Chunk]:
        return packed(names, self.vocab, self.context, chunk, unknown, **self._likelihood.reads)

    def _scores(self, chunks: Iterator[Chunk], ahead: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Per chunk: scores and lengths, `(names,)` each."""
        for _, totals, lengths, known in self._likelihood.log_probs(chunks, ahead):
            yield totals.masked_fill_(~known, torch.nan).to(self.dtype), lengths


def percentile_of(bits: Tensor, quantiles: Tensor) -> Tensor:
    """Percent of `quantiles` `(q,)` below each number of bits per character, `(names,)`; NaN stays."""
    below = torch.searchsorted(quantiles, bits.float()) * (100 / len(quantiles))
    return below.masked_fill(bits.isnan(), torch.nan)


def training_quantiles(model: ConvWaveNet, vocab: Vocabulary, names: list[str]) -> Tensor:
    """The quantiles of a training list that `Scorer.percentile` reads, float32 `(1001,)`.

    They are bits per character at evenly spaced ranks, from the smallest to the largest. Raises `NamesError` if there
    are no names.
    """
    if not names:
        raise NamesError("names is empty; give the list that the model was trained on")
    bits = Scorer(model, vocab).bits_per_character(names).double()
    places = torch.linspace(0, len(bits) - 1, QUANTILES, dtype=torch.float64, device="cpu").round().long()
    return bits.sort().values[places].float()


def _joined(parts: list[Tensor], dtype: torch.dtype, *shape: int) -> Tensor:
    """All parts `(n, *shape)` one after the other."""
    return torch.cat([torch.zeros(0, *shape, dtype=dtype, device="cpu"), *parts])


def _offsets(lengths: list[Tensor]) -> Tensor:
    outputs = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), *[characters + 1 for characters in lengths]])
    return outputs.cumsum(0)
