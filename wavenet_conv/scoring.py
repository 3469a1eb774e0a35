"""Log-likelihoods of many names, every distinct node evaluated once. Knows nothing of files of names."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterable, Iterator
from itertools import islice
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load_checkpoint
from .errors import ConfigError, ShapeError
from .model import ConvWaveNet
from .nodes import Carried, SharedNodes
from .precision import exact_float32
from .vocabulary import Vocabulary, check_tokens, checked_names, lengths_of

Names = Iterable[str] | tuple[Tensor, Tensor]

# Tokens that are numbered together: bounds memory to some hundred bytes each. Below 2**22, so that an int64 for each
# is less than the 32 MiB from which glibc hands out fresh pages at every allocation.
CHUNK_TOKENS = 4_000_000
CHUNK_NAMES = 2**17


# OpenMP's threads do not survive a fork: a forked child that asks for them waits forever. PyTorch's DataLoader sets one
# thread in its workers for the same reason.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


class Scorer:
    """Scores names, or any short strings, with a trained model.

        scorer = Scorer.load("default")
        scorer.score(["emma", "xqzvkj"])

    A name's score does not depend on its company: it has the same bits alone, in any batch, in any order, in any chunk
    size, on the same device with the same number of threads. Nodes are evaluated in tiles of one fixed shape, the last
    one filled up, so that every matrix product is the same operation whatever it is part of; a name's positions are
    added in order, in float64, and rounded once.

    model: a `ConvWaveNet`, in whatever mode; it is copied, and batch norm folded. vocab: what its tokens mean. device
    and dtype: where and in what to compute (as the model is; float32 is IEEE, also on CUDA). quantiles: float32 `(q,)`,
    ascending bits per character of the model's training list, for `percentile`. remember: whether nodes that one call
    has evaluated serve the next calls too (some hundred MiB at most, and no other scores); else a call starts anew.
    Raises `ConfigError` where the vocabulary is not the model's.
    """

    def __init__(
        self,
        model: ConvWaveNet,
        vocab: Vocabulary,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantiles: Tensor | None = None,
        remember: bool = False,
    ):
        if len(vocab) != model.config.vocab_size:
            raise ConfigError(
                f"the vocabulary has {len(vocab)} tokens and the model {model.config.vocab_size}; "
                f"use the vocabulary that the model was trained with"
            )
        self.vocab, self.quantiles, self.context = vocab, quantiles, model.context
        weights = copy.deepcopy(model).to(device=device, dtype=dtype)
        self.device, self.dtype = weights.embedding.weight.device, weights.embedding.weight.dtype
        self.remember = remember
        self._carried: list[Carried] = []  # what the last call has left: room to write in, and nodes to remember
        with exact_float32():
            self.nodes = SharedNodes(weights)

    def __getstate__(self) -> bytes:
        """For pickling and copying: the values of everything but the buffers that calls write into.

        `multiprocessing` would move the tensors themselves to shared memory. Then all workers would write into the same
        buffers, and a thread that is scoring would lose the weights that it reads.
        """
        return pickle.dumps(self.__dict__ | {"_carried": []})

    def __setstate__(self, state: bytes) -> None:
        self.__dict__.update(pickle.loads(state))

    @classmethod
    def load(cls, path: str | Path = "default", **options: Any) -> Scorer:
        """A scorer from a checkpoint; "default" is the one that ships with the package. Options as in `Scorer(...)`."""
        checkpoint = load_checkpoint(path)
        return cls(checkpoint.model, checkpoint.vocab, **{"quantiles": checkpoint.quantiles} | options)

    def score(self, names: Names, *, unknown: str = "error") -> Tensor:
        """The natural-log likelihood of each name, its end included: `(names,)` on the CPU, in the scorer's dtype.

        names: any iterable of strings, or `(tokens, lengths)` as `vocab.encode(names, context=scorer.context)` makes
        them. unknown: what to do with a name that has a character outside the vocabulary: "error" raises `NamesError`
        naming it, "nan" scores it NaN.
        """
        return torch.cat([torch.zeros(0, dtype=self.dtype), *self.stream(names, unknown=unknown)])

    def stream(self, names: Names, *, chunk: int = CHUNK_NAMES, unknown: str = "error") -> Iterator[Tensor]:
        """The scores of `names`, an iterable of any length, in order, at most `chunk` at a time.

        Nodes below windows, and windows near a name's start, are shared in the whole stream, other windows at most
        inside a chunk; memory is bounded by the chunk. A chunk also ends early where its names are long.
        """
        for log_probs, lengths, known in self._log_probs(names, chunk, unknown):
            # Adds one after the other, which `sum` does not.
            scores = torch.segment_reduce(log_probs.double(), "sum", lengths=lengths + 1, unsafe=True)
            yield scores.masked_fill_(~known, torch.nan).to(self.dtype)

    def position_log_probs(self, names: Names, *, unknown: str = "error") -> tuple[Tensor, Tensor]:
        """The log-probability of every character of each name and of its end.

        Returns the values, name after name, in the scorer's dtype, and offsets int64 `(names + 1,)`: name i has
        `values[offsets[i] : offsets[i + 1]]`, one value more than it has characters. An unknown name has one NaN.
        """
        parts = list(self._log_probs(names, CHUNK_NAMES, unknown))
        for log_probs, lengths, known in parts:
            log_probs[(torch.cumsum(lengths + 1, 0) - 1)[~known]] = torch.nan
        values = torch.cat([torch.zeros(0, dtype=self.dtype), *[log_probs for log_probs, _, _ in parts]])
        return values, _offsets([lengths for _, lengths, _ in parts])

    def logits(self, names: Names) -> tuple[Tensor, Tensor]:
        """All logits: `(positions, vocab)` on the CPU, and offsets as `position_log_probs` gives them."""
        parts, lengths = [torch.zeros(0, len(self.vocab), dtype=self.dtype)], []
        for tokens, of, _ in self._packed(names, CHUNK_NAMES, "error"):
            with exact_float32():
                distinct, rows, _ = self.nodes.logits(tokens.to(self.device), of.to(self.device))
            parts.append(distinct[rows].cpu())
            lengths.append(of)
        return torch.cat(parts), _offsets(lengths)

    def bits_per_character(self, names: Names, *, unknown: str = "error") -> Tensor:
        """Bits that the model needs for a character of each name, its end counted as one: `(names,)`."""
        names = names if _encoded(names) else checked_names(names)
        lengths = names[1] if _encoded(names) else torch.tensor([len(name) for name in names])
        return self.score(names, unknown=unknown) / (-log(2) * (lengths + 1))

    def percentile(self, names: Names, *, unknown: str = "error") -> Tensor:
        """Percent of the training list that need fewer bits a character than each name: `(names,)`.

        Near 0 for a most plausible name, 100 for one less plausible than any in the list. Raises `ConfigError` where
        the checkpoint carries no such quantiles.
        """
        if self.quantiles is None:
            raise ConfigError("this model carries no quantiles of its training list; give Scorer(..., quantiles=...)")
        bits = self.bits_per_character(names, unknown=unknown)
        below = torch.searchsorted(self.quantiles, bits.float()) * (100 / len(self.quantiles))
        return below.masked_fill(bits.isnan(), torch.nan)

    def _log_probs(self, names: Names, chunk: int, unknown: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunk after chunk: log-probabilities of what comes next, `(positions,)` on the CPU, lengths, known or not."""
        carried, whole = self._carried.pop() if self._carried else Carried(), False
        try:
            for tokens, lengths, known in self._packed(names, chunk, unknown):
                with torch.no_grad(), exact_float32():
                    log_probs = self.nodes.log_probs(tokens.to(self.device), lengths.to(self.device), carried)
                yield log_probs.cpu(), lengths, known
            whole = True
        finally:
            if not (whole and self.remember):
                carried.forget()
            self._carried = [carried]

    def _packed(self, names: Names, chunk: int, unknown: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Tokens end to end, lengths and which names are known, chunk after chunk."""
        if unknown not in ("error", "nan"):
            raise ConfigError(f"unknown is {unknown!r}; it is 'error' or 'nan'")
        if _encoded(names):
            yield self._repacked(*names)
            return
        for part, lengths in _chunks(names, chunk, self.context):
            tokens, lengths, known = self.vocab.pack(part, context=self.context, lengths=lengths)
            if unknown == "error" and not known.all():
                raise self.vocab.unknown_character_error(part)
            yield tokens, lengths, known

    def _repacked(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Names that `Vocabulary.encode` has padded, end to end."""
        tokens, lengths = tokens.cpu(), lengths.cpu()
        longest = int(lengths.max()) if len(lengths) else 0
        if tokens.ndim != 2 or len(tokens) != len(lengths) or tokens.shape[1] < self.context + longest:
            raise ShapeError(
                f"tokens of shape {tuple(tokens.shape)} and {len(lengths)} lengths up to {longest} are not what "
                f"vocab.encode(names, context={self.context}) makes"
            )
        check_tokens(tokens, len(self.vocab))
        own = torch.arange(tokens.shape[1]) < self.context + lengths[:, None]
        packed = torch.cat([tokens[own], tokens.new_zeros(self.context)])
        return packed, lengths, torch.ones(len(lengths), dtype=torch.bool)


def _encoded(names: Names) -> bool:
    return isinstance(names, tuple) and len(names) == 2 and all(isinstance(part, Tensor) for part in names)


def _offsets(lengths: list[Tensor]) -> Tensor:
    outputs = torch.cat([torch.zeros(1, dtype=torch.int64), *[of + 1 for of in lengths]])
    return outputs.cumsum(0)


def _chunks(names: Iterable[str], chunk: int, context: int) -> Iterator[tuple[list[str], Tensor]]:
    """Parts of the names and their lengths, int64: at most `chunk` names at a time, and CHUNK_TOKENS, or one name."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        checked_names(names)  # raises
    names = iter(names)
    while part := list(islice(names, chunk)):
        ends = torch.cumsum((lengths := lengths_of(part)) + context, 0)
        while part:
            fitting = max(1, int(torch.searchsorted(ends, CHUNK_TOKENS, right=True)))
            yield part[:fitting], lengths[:fitting]
            part, lengths, ends = part[fitting:], lengths[fitting:], ends[fitting:] - ends[fitting - 1]
