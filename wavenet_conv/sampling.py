"""Names drawn from a model: prefix by prefix, or from a stream if the context is long.

The same seed gives the same names for every batch size and every count, by construction: a character depends on the
seed, the name's number, the position and the logits after the window, and all of these have the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .engine.ids import node_ids
from .engine.rings import TILE_ROWS, TorchSteps
from .engine.shared import NodeCache, SharedNodes
from .engine.weights import fold
from .errors import ConfigError, SamplingError
from .model import ConvWaveNet, check_pair
from .numbering import to_engine
from .precision import exact_float32_on
from .vocabulary import Vocabulary

BATCH = 2**17  # names drawn together,
CHARACTERS = 2**24  # if they have no more characters than this
LONG = 128  # tokens of context above which a window per prefix takes too much memory
STREAM_ROWS = 1024  # rows of a stream,
STREAM_TOKENS = 2**17  # if they have no more tokens of context than this: some hundred MiB
STREAM_STEPS = 16  # steps between two looks at what has been drawn
MAX_LENGTH = 100  # characters
UNBOUNDED = 2**62  # names, or characters
TIE = 1e-9  # logits at most this far apart are equal: far more than float64 rounds


def sample(model: ConvWaveNet, vocab: Vocabulary, n: int, **options: Any) -> list[str]:
    """`n` names drawn from the model; takes the options of `sample_stream`."""
    if n is None:
        raise ConfigError("n is None; give the number of names, or use sample_stream, which draws without end")
    return list(sample_stream(model, vocab, n, **options))


def sample_stream(
    model: ConvWaveNet,
    vocab: Vocabulary,
    n: int | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prefix: str = "",
    max_length: int = MAX_LENGTH,
    seed: int = 42,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[str]:
    """Yields names drawn from the model.

    A character is drawn by inverse CDF from the uniform number of its seed, name and position (`uniform`). In float64
    the names are those that the lecture's loop draws from the tree for the same numbers, with tokens in the
    vocabulary's own order.

    Args:
        model: A `ConvWaveNet` in any mode, which is copied.
        vocab: Its vocabulary.
        n: How many names. Default: without end.
        temperature: Divides the logits; at 0 the most likely character is taken.
        top_k: Draw from the k most likely characters only.
        top_p: Draw from the fewest most likely characters that reach this probability, at this temperature; with
            `top_k` from those that both keep. Equally likely characters (logits 1e-9 apart) stay together.
        prefix: How every name begins, of any length.
        max_length: Most characters per name, the prefix included; longer names are cut.
        seed: Another seed draws other names.
        batch_size: Names drawn together. Changes speed and memory, not the names.
        device: Where to compute. Default: as the model.
        dtype: In what to compute. Default: as the model, in at least float32.

    Raises:
        ConfigError: An option is wrong, or the device is not there; the message names it.
        NamesError: The prefix has a character outside the vocabulary.
        SamplingError: From the iterator: logits are NaN or infinite.
    """
    draw = Draw(temperature, top_k, top_p)
    check_pair(model, vocab)
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed!r}; it must be an integer from 0 to 2**63 - 1")
    if n is not None and (not isinstance(n, int) or n < 0):
        raise ConfigError(f"n is {n!r}; it must be an integer of at least 0, or None for names without end")
    for name, value in (("max_length", max_length), ("batch_size", BATCH if batch_size is None else batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1")
    start = to_engine(vocab.encode([prefix], context=1)[0][0, 1:], vocab.end).tolist()
    if len(start) > max_length:
        given = f"the prefix {prefix!r:.40} has {len(start)} characters and max_length is {max_length}"
        raise ConfigError(f"{given}; give a max_length of at least {len(start)}")
    dtype = model.embedding.weight.dtype if dtype is None else dtype
    weights = fold(model, device, dtype if dtype.itemsize >= 4 else torch.float32)
    with exact_float32_on(weights.embedding.device):
        shared = SharedNodes(weights.end_first(vocab.end))
    count = UNBOUNDED if n is None else min(n, UNBOUNDED)
    sampler = Sampler(shared, vocab, draw, start, seed, count, min(max_length, UNBOUNDED))
    side_by_side = min(BATCH if batch_size is None else batch_size, max(1, sampler.count))
    return sampler.by_stream(side_by_side) if shared.context > LONG else sampler.by_prefix(side_by_side)


def uniform(seed: int, names: Tensor, positions: Tensor) -> Tensor:
    """The number in [0, 1) by which each name's character at each position is drawn: float64, multiples of 2**-53.

    Three rounds of SplitMix64's mixing function, so that each number can be computed without the others.
    `names` (the names' numbers) and `positions` are int64 and broadcast; `seed` is from 0 to 2**63 - 1.
    Source: Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number Generators, figure 17.
    """
    mixed = _mix(_mix(torch.tensor(seed, device=names.device)) + names)
    return _shift(_mix(mixed + positions), 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """Of int64 taken as unsigned; products are modulo 2**64."""
    z = z + (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ _shift(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from logits; the options of `sample_stream`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        given = self.temperature
        if not isinstance(given, (int, float)) or not (given == 0 or 1e-100 <= given <= 1e100):
            raise ConfigError(f"temperature is {given!r}; it must be 0, or a number from 1e-100 to 1e100")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ConfigError(f"top_k is {self.top_k!r}; it must be an integer of at least 1, or left out")
        if self.top_p is not None and not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1, or left out")

    def cumulative(self, logits: Tensor) -> Tensor:
        """The distribution that is drawn from, summed up: `(n, vocab)`; NaN where logits are NaN or infinite."""
        temperature = min(max(self.temperature or 1.0, 1e-30), 1e30)  # what float32 can hold
        x = logits if temperature == 1 else (logits - logits.amax(1, keepdim=True)) / temperature
        top_k = min(1 if self.temperature == 0 else self.top_k or x.shape[1], x.shape[1])
        top_p = 2.0 if self.top_p in (None, 1) else float(self.top_p or 1)
        if top_k < x.shape[1] or top_p < 1:
            falling = x.sort(1, descending=True).values
            before = torch.softmax(falling, 1).cumsum(1)[:, :-1]  # the probability of what is more likely
            kept = (1 + (before < top_p - TIE).sum(1, keepdim=True)).clamp_(max=top_k)
            least = falling.gather(1, kept - 1)
            x = x.masked_fill(x < least - TIE * max(1.0, 1 / temperature), -torch.inf)
        return torch.softmax(x, 1).cumsum(1)


def tokens_at(summed: Tensor, numbers: Tensor) -> Tensor:
    """The tokens on which numbers in [0, 1) fall: summed `(n, vocab)`, numbers float64 `(n,)`, to int64 `(n,)`."""
    last = summed[:, -1:]
    places = (numbers[:, None] * last).to(summed.dtype)
    # Rounding must not move a number to the end, behind the last token that has a probability.
    places = torch.minimum(places, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(summed, places, right=True)[:, 0]


class Sampler:
    """Two ways to draw the same names: `count` of them, each beginning with the tokens `start`.

    Tokens are in the engines' numbers (`numbering.to_engine`); only a draw counts them in the vocabulary's own order.
    """

    def __init__(
        self,
        shared: SharedNodes,
        vocab: Vocabulary,
        draw: Draw,
        start: list[int],
        seed: int,
        count: int,
        max_length: int,
    ):
        self.shared, self.draw, self.start, self.seed = shared, draw, start, seed
        self.count, self.max_length, self.device = count, max_length, shared.nodes.embedding.device
        self.end, self.padding = vocab.end, vocab.padding
        self.columns = to_engine(torch.arange(len(vocab), device=self.device), vocab.end)
        self.codes = np.array([ord(character) for character in vocab.padding + vocab.characters], dtype=np.int32)

    def by_prefix(self, batch_size: int) -> Iterator[str]:
        """Batch after batch; names that have begun alike share what the model says of their prefix."""
        cache = NodeCache()
        batch_size = min(batch_size, max(1, CHARACTERS // max(self.max_length + 1, len(self.codes))))
        for first in count(step=batch_size):
            if first >= self.count:
                return
            names = torch.arange(first, min(first + batch_size, self.count), device=self.device)
            with exact_float32_on(self.device):
                tokens = self._tokens(names, cache)
            yield from self._text(tokens).split(self.padding)[:-1]

    def by_stream(self, batch_size: int) -> Iterator[str]:
        """Names side by side, one character of each per step; the row of a finished name begins the next one."""
        rows = min(batch_size, STREAM_ROWS, max(1, STREAM_TOKENS // self.shared.context))
        rows += -rows % TILE_ROWS
        with exact_float32_on(self.device):
            steps = TorchSteps(self.shared, rows, tile=TILE_ROWS)
        first = 0  # the first name that has not been yielded
        active, begun = torch.arange(rows, device=self.device), rows
        tokens = positions = torch.zeros_like(active)
        names, drawn = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        while first < self.count:
            parts = []
            for _ in range(STREAM_STEPS):
                with exact_float32_on(self.device):
                    summed = self._cumulative(steps.step(tokens))
                tokens = to_engine(tokens_at(summed, uniform(self.seed, active, positions)), self.end)
                if self.start:
                    start = torch.tensor(self.start, device=self.device)
                    given = start[positions.clamp(max=len(start) - 1)]
                    tokens = torch.where(positions < len(start), given, tokens)
                tokens = tokens.masked_fill(active >= self.count, 0)  # rows behind the last name end at once
                parts.append(torch.stack([active, tokens]))
                bad = summed[:, -1].isnan().nonzero()
                if len(bad):
                    parts.insert(0, torch.from_numpy(np.stack([names, drawn])).to(self.device))
                    before, after = torch.cat(parts, 1)
                    raise self._failure(after[before == active[bad[0, 0]]][:-1][-self.shared.context :])
                positions = positions + 1
                ended = (tokens == 0) | (positions == self.max_length)
                new = ended.cumsum(0)
                active, begun = torch.where(ended, begun + new - 1, active), begun + int(new[-1])
                tokens, positions = tokens.masked_fill(ended, 0), positions.masked_fill(ended, 0)
                steps.reset(ended)
            block = torch.cat(parts, 1).cpu().numpy()
            names, drawn = np.concatenate([names, block[0]]), np.concatenate([drawn, block[1]])
            order = names.argsort(kind="stable")
            names, drawn = names[order], drawn[order]
            upto = int(active.min())
            whole = int(names.searchsorted(upto))
            ends = np.flatnonzero(np.diff(names[:whole], append=upto))
            cut = ends[drawn[ends] != 0]  # names that max_length has ended
            yield from self._text(np.insert(drawn[:whole], cut + 1, 0)).split(self.padding)[:-1][: self.count - first]
            first, names, drawn = upto, names[whole:], drawn[whole:]

    def _cumulative(self, logits: Tensor) -> Tensor:
        """The distribution after each row of logits, summed up in the vocabulary's own order: `(n, vocab)`."""
        return self.draw.cumulative(logits.index_select(1, self.columns) if self.end else logits)

    def _tokens(self, names: Tensor, cache: NodeCache) -> np.ndarray:
        """The tokens of the names with these numbers, each name with its end."""
        context, vocab_size = self.shared.context, self.shared.vocab_size
        windows = torch.tensor([([0] * context + self.start)[-context:]], device=self.device)
        prefixes, going = torch.zeros_like(names), torch.arange(len(names), device=self.device)
        columns = [torch.full_like(names, token) for token in self.start]
        for position in range(len(self.start), self.max_length):
            # Per distinct prefix of the names that go on: its window, and what may follow it.
            summed = self._cumulative(self.shared.window_logits(windows, cache))
            bad = summed[:, -1].isnan().nonzero()
            if len(bad):
                raise self._failure(windows[bad[0, 0]])
            numbers = uniform(self.seed, names[going], torch.tensor(position, device=self.device))
            tokens = to_engine(tokens_at(summed.index_select(0, prefixes), numbers), self.end)
            columns.append(torch.zeros_like(names).index_copy_(0, going, tokens))
            goes_on = tokens.nonzero()[:, 0]
            if not len(goes_on):
                break
            going = going[goes_on]
            longer, prefixes = node_ids([prefixes[goes_on], tokens[goes_on]], max(len(windows), vocab_size))
            windows = torch.cat([windows[longer[:, 0], 1:], longer[:, 1:]], 1)
        matrix = torch.stack([*columns, torch.zeros_like(names)], 1)
        kept = torch.arange(matrix.shape[1], device=self.device) <= (matrix != 0).sum(1, keepdim=True)
        return matrix[kept].cpu().numpy()

    def _text(self, tokens: np.ndarray) -> str:
        return self.codes[tokens].tobytes().decode("utf-32-le", "surrogatepass")

    def _failure(self, window: Tensor) -> SamplingError:
        text = self._text(window.cpu().numpy()).lstrip(self.padding)
        return SamplingError(f"the logits after {text!r} are NaN or infinite; train the model again")
