"""Names drawn from a model: few of them character by character from a stream, many of them prefix by prefix.

All ways, and any batch, draw the same names. Knows nothing of files and commands.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, SamplingError
from .model import ConvWaveNet
from .nodes import Carried, SharedNodes, number
from .precision import exact_float32
from .streaming import FEW_ROWS, Stream, compiled_loops
from .vocabulary import END, Vocabulary

BATCH = 2**17  # names that are drawn together,
CHARACTERS = 2**24  # where they may come to no more than this
MANY = 512  # names side by side from which on prefixes are worth sharing
SHORT = 128  # a window of more tokens is not worth keeping for each prefix
STREAMED = 1024  # rows of a stream
STEPS = 16  # of a stream between two questions to its device
ROOM = 2**16  # tokens that compiled loops draw between two looks at them
WORTH = 2**17  # characters at most from which on loops are worth compiling
ENDLESS = 2**62  # names, and characters, that nobody sees the end of
MAX_LENGTH = 100  # characters
ROWS_TOKENS = 2**17  # tokens of context in all rows of a stream: some hundred MiB
WINDOWS = 4096  # that are repeated in float64 together
TIED = 1e-9  # logits no further apart are equal: far more than float64's rounding moves them
DOUBT = 2e-5  # of a probability or a logit: far more than float32's rounding moves it


def sample(model: ConvWaveNet, vocab: Vocabulary, n: int, **options) -> list[str]:
    """`n` names drawn from the model, as `sample_stream` draws them; takes its options."""
    if n is None:
        raise ConfigError("n is None; give the number of names, or take sample_stream, which goes on without end")
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
    batch: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool | None = None,
) -> Iterator[str]:
    """Names drawn from the model one after the other: `n` of them, or without end.

    The same seed gives the same names whatever the batch, the device and the number of threads: a name's characters
    are drawn by uniform numbers that depend on the seed, the name's number and the position alone (`uniform`), by
    inverse CDF, and float32 decides only where rounding cannot have changed the outcome. A draw within DOUBT of
    another outcome is repeated in float64. So these are the names that the explicit tree in float64, drawn from one
    call a character, gives for these numbers. (Of devices only the CPU has been run.)

    temperature: divides the logits; at 0 the likeliest character is taken. top_k: only the k likeliest characters are
    drawn. top_p: only the likeliest ones that together reach a probability of p, at this temperature; with top_k those
    that both keep. Equally likely ones (logits 1e-9 apart) stay together. prefix: how every name begins, of any length.
    max_length: most characters in a name, the prefix included; a name is cut there. batch: names that are drawn side by
    side, which decides about speed and memory only. device and dtype: where and in what to compute (as the model is,
    but at least in float32). compiled: whether loops that Numba compiles take the steps, for few names at a time, and
    where every character may be drawn the draws, too; None: where that is fastest and can be, as for a `Stream`.
    Rounding is taken to be that of logits up to about forty.
    Raises `ConfigError` naming an option that is wrong, `NamesError` for a prefix with a character that is not in the
    vocabulary; the iterator raises `SamplingError` where logits are NaN, saying after what.
    """
    draw = _Draw(temperature, top_k, top_p)
    if len(vocab) != model.config.vocab_size:
        raise ConfigError(
            f"the vocabulary has {len(vocab)} tokens and the model {model.config.vocab_size}; "
            f"use the vocabulary that the model was trained with"
        )
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed!r}; it must be an integer from 0 to 2**63 - 1")
    if n is not None and (not isinstance(n, int) or n < 0):
        raise ConfigError(f"n is {n!r}; it must be an integer of at least 0, or None for names without end")
    for what, value in (("max_length", max_length), ("batch", BATCH if batch is None else batch)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{what} is {value!r}; it must be an integer of at least 1")
    if compiled not in (None, True, False):
        raise ConfigError(f"compiled is {compiled!r}; it must be True, False or None")
    start = vocab.encode([prefix], context=1)[0][0, 1:].tolist()
    if len(start) > max_length:
        raise ConfigError(
            f"the prefix {prefix[:40]!r} has {len(start)} characters and max_length is {max_length}; "
            f"give a max_length of at least {len(start)}"
        )
    n, max_length = None if n is None else min(n, ENDLESS), min(max_length, ENDLESS)
    model = copy.deepcopy(model).to(device=device, dtype=dtype).eval()
    if model.embedding.weight.dtype.itemsize < 4:
        model = model.float()  # half precision rounds by far more than DOUBT
    sampler = _Sampler(model, vocab, draw, start, max_length, seed)
    if compiled and compiled_loops(sampler.device, sampler.dtype) is None:
        raise ConfigError(
            "compiled loops are for the CPU and need Numba: pip install 'wavenet-conv[fast]', or leave out compiled"
        )
    return sampler.names(n, batch, compiled)


def uniform(seed: int, names: Tensor, positions: Tensor) -> Tensor:
    """The number in [0, 1) by which each name's character at each position is drawn: float64, of multiples of 2**-53.

    names and positions: int64, broadcast. Three rounds of SplitMix64's mixing function, so that any of them is had
    without the others. Source: Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number Generators, figure 17.
    """
    return _number(_mixed(_mixed(torch.tensor(seed, device=names.device)) + names), positions)


def _number(mixed: Tensor, positions: Tensor) -> Tensor:
    return _shifted(_mixed(mixed + positions), 11).double() * 2.0**-53


def _mixed(z: Tensor) -> Tensor:
    """Of int64, taken for unsigned; products are modulo 2**64."""
    z = z + (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)


@dataclass(frozen=True)
class _Draw:
    """How a character is drawn from logits."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        given = self.temperature
        if not isinstance(given, (int, float)) or not (given == 0 or 1e-100 <= given <= 1e100):
            raise ConfigError(f"temperature is {given!r}; it must be 0, or a number from 1e-100 to 1e100")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ConfigError(f"top_k is {self.top_k!r}; it must be an integer of at least 1, or left out")
        if self.top_p is not None and not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1, or left out")

    def doubt(self, dtype: torch.dtype) -> float:
        """How far from another outcome a number must be for one to be sure of it."""
        return 0.0 if dtype == torch.float64 else DOUBT * max(1.0, 1 / (self.temperature or 1.0))

    @property
    def all_are_kept(self) -> bool:
        """Whether every character may be drawn."""
        return self.temperature > 0 and self.top_k is None and self.top_p in (None, 1)

    def cumulative(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The distribution that is drawn from, summed up, and where it is in doubt which characters are kept.

        logits `(n, vocab)` to `(n, vocab)`, NaN where there is no distribution; and bool `(n,)`, or None where all are
        kept.
        """
        x = logits if self.temperature in (0, 1) else logits / self.temperature
        top_k = 1 if self.temperature == 0 else self.top_k or x.shape[1]
        doubtful = None
        if top_k < x.shape[1] or self.top_p not in (None, 1):
            x, doubtful = self._kept(x, min(top_k, x.shape[1]), 2.0 if self.top_p in (None, 1) else self.top_p)
        return torch.softmax(x, 1).cumsum(1), doubtful

    def _kept(self, x: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
        doubt, falling = self.doubt(x.dtype), x.sort(1, descending=True).values
        before = torch.softmax(falling, 1).cumsum(1)[:, :-1]  # what the likelier ones reach, of all but the likeliest
        doubtful = ((before - top_p).abs() < doubt).any(1)
        kept = (1 + (before < top_p - TIED).sum(1, keepdim=True)).clamp_(max=top_k)
        least = falling.gather(1, kept - 1)
        behind = falling.gather(1, kept.clamp(max=x.shape[1] - 1))
        doubtful |= ((least - behind < doubt) & (kept < x.shape[1]))[:, 0]
        return x.masked_fill(x < least - TIED * max(1.0, 1 / (self.temperature or 1.0)), -torch.inf), doubtful


class _Sampler:
    """Four ways to draw the same names.

    A way gives, position by position, the distribution in the model's dtype; where a number is too near to another
    outcome in it, `exactly` decides.
    """

    def __init__(
        self, model: ConvWaveNet, vocab: Vocabulary, draw: _Draw, start: list[int], max_length: int, seed: int
    ):
        self.model, self.draw, self.seed = model, draw, seed
        self.start, self.max_length = start, max_length  # tokens that every name begins with
        self.device, self.dtype = model.embedding.weight.device, model.embedding.weight.dtype
        self.mixed_seed = _mixed(torch.tensor(seed, device=self.device))
        self.doubt = draw.doubt(self.dtype)
        self._blocks: dict[tuple[int, int], np.ndarray] = {}
        self._codes = np.array([ord(character) for character in END + vocab.characters], dtype=np.int32)

    def names(self, n: int | None, batch: int | None, compiled: bool | None) -> Iterator[str]:
        """`n` names in the way that is fastest for so many, of those that `batch` and `compiled` leave."""
        fitting = max(1, CHARACTERS // max(self.max_length + 1, len(self._codes)))
        side_by_side = min(BATCH if batch is None else batch, fitting, n or BATCH)
        if not compiled and side_by_side >= MANY and self.model.context <= SHORT:
            return self.by_prefix(n, side_by_side)
        rows = min(side_by_side, FEW_ROWS if compiled else STREAMED, max(1, ROWS_TOKENS // self.model.context))
        if rows > FEW_ROWS or self.device.type != "cpu":
            return self.by_stream(n, rows)
        if compiled is None:
            worth = n is None or n * self.max_length >= WORTH
            compiled = worth and compiled_loops(self.device, self.dtype) is not None
        return self.one_by_one(n) if compiled and self.draw.all_are_kept else self.by_few(n, rows, compiled)

    def _text(self, tokens: np.ndarray) -> str:
        return self._codes[tokens].tobytes().decode("utf-32-le", "surrogatepass")

    def _names(self, tokens: np.ndarray) -> list[str]:
        """The names whose tokens these are, each with its end."""
        return self._text(tokens).split(END)[:-1]

    def by_prefix(self, n: int | None, batch: int) -> Iterator[str]:
        """Names chunk after chunk; in a chunk, those that have begun alike share what the model says of it."""
        nodes, carried = SharedNodes(self.model), Carried()
        for first in count(step=batch) if n is None else range(0, n, batch):
            last = first + batch if n is None else min(first + batch, n)
            with torch.no_grad(), exact_float32() if self.device.type == "cuda" else nullcontext():
                tokens = self._tokens(torch.arange(first, last, device=self.device), nodes, carried)
            yield from self._names(tokens)

    def _tokens(self, names: Tensor, nodes: SharedNodes, carried: Carried) -> np.ndarray:
        """The tokens of the names with these numbers, each name with its end."""
        windows = torch.tensor([([0] * nodes.context + self.start)[-nodes.context :]], device=self.device)
        prefixes, going = torch.zeros_like(names), torch.arange(len(names), device=self.device)
        mixed, columns = _mixed(self.mixed_seed + names), [torch.full_like(names, token) for token in self.start]
        for position in range(len(self.start), self.max_length):
            # Of each distinct prefix of the names that go on: its window, what may follow it, summed.
            summed, doubtful = self.draw.cumulative(nodes.window_logits(windows, carried))
            nan = summed[:, -1].isnan()
            doubtful = nan if doubtful is None else doubtful | nan
            if doubtful.any():
                summed[doubtful] = self._exact_cumulative(windows[doubtful]).to(self.dtype)
            numbers = _number(mixed, torch.tensor(position, device=self.device))
            of_names = summed.index_select(0, prefixes)
            low, high = torch.searchsorted(of_names, self.bounds(numbers), right=True).unbind(1)
            unsure = (low != high).nonzero()[:, 0]
            low = low.index_copy(0, unsure, self.exactly(windows[prefixes[unsure]], numbers[unsure]))
            low.clamp_(max=nodes.vocab_size - 1)
            columns.append(torch.zeros_like(names).index_copy_(0, going, low))
            on = low.nonzero()[:, 0]
            if not len(on):
                break
            going, mixed = going[on], mixed[on]
            longer, prefixes = number([prefixes[on], low[on]], max(len(windows), nodes.vocab_size))
            windows = torch.cat([windows[longer[:, 0], 1:], longer[:, 1:]], 1)
        tokens = torch.stack([*columns, torch.zeros_like(names)], 1)
        own = torch.arange(tokens.shape[1], device=self.device) <= (tokens != 0).sum(1, keepdim=True)
        return tokens[own].cpu().numpy()

    def by_stream(self, n: int | None, rows: int) -> Iterator[str]:
        """Names side by side, a character of each a step; the row of a finished one begins the next at once."""
        drawing, first = _Rows(self, rows), 0  # the first name that is not given yet
        names = tokens = np.empty(0, dtype=np.int64)
        while n is None or first < n:
            new_names, new_tokens = drawing.run()
            names, tokens = np.concatenate([names, new_names]), np.concatenate([tokens, new_tokens])
            order = names.argsort(kind="stable")
            names, tokens = names[order], tokens[order]
            unfinished = drawing.names.cpu().numpy()
            upto = int(unfinished.min())
            whole = int(names.searchsorted(upto))
            ends = np.flatnonzero(np.diff(names[:whole], append=upto))
            ends = ends[tokens[ends] != 0]  # of names that were cut
            yield from self._names(np.insert(tokens[:whole], ends + 1, 0))[: None if n is None else n - first]
            first, names, tokens = upto, names[whole:], tokens[whole:]
            for row in drawing.undecided():
                name = int(unfinished[row])
                if n is None or name < n:
                    before = tokens[names == name]
                    drawing.decided[row] = self._decided(name, len(before), before[-self.model.context :])

    def by_few(self, n: int | None, rows: int, compiled: bool) -> Iterator[str]:
        """The same on the host, for few rows: a step of them is sooner drawn from than the operations of many begun."""
        stream, upcoming = Stream(self.model, rows, compiled=compiled), iter(count() if n is None else range(n))
        names: list[int | None] = [next(upcoming, None) for _ in range(rows)]
        drawn: list[list[int]] = [[] for _ in range(rows)]  # tokens of each row's name
        finished: dict[int, list[int]] = {}
        first, tokens = 0, torch.zeros(rows, dtype=torch.int64)  # the name that is given next; what is read next
        while n is None or first < n:
            summed, fresh = self._summed(stream.next_logits(tokens)), []
            for row, name in enumerate(names):
                if name is None:
                    continue
                tokens[row] = token = self._token(summed[row], name, drawn[row])
                drawn[row].append(token)
                if not token or len(drawn[row]) == self.max_length:
                    finished[name], drawn[row] = drawn[row] + [0] * (token > 0), []
                    names[row], tokens[row] = next(upcoming, None), 0
                    fresh.append(row)
            if fresh:
                stream.reset(fresh)
            while first in finished:
                yield from self._names(np.array(finished.pop(first)))
                first += 1

    def _summed(self, logits: Tensor) -> np.ndarray:
        """The summed distributions, NaN where which characters are kept is in doubt."""
        summed, doubtful = self.draw.cumulative(logits)
        if doubtful is not None:
            summed[doubtful] = torch.nan
        return summed.numpy()

    def _token(self, summed: np.ndarray, name: int, before: list[int]) -> int:
        """The token of a name after those before it."""
        position = len(before)
        if position < len(self.start):
            return self.start[position]
        low, high = summed.searchsorted(self._bounds_of(name // 64, position // 16)[name % 64, position % 16], "right")
        if low == high and summed[-1] > 0.5:  # and not NaN
            return min(int(low), len(summed) - 1)
        return self._decided(name, position, np.array(before[-self.model.context :], dtype=np.int64))

    def _bounds_of(self, names: int, positions: int) -> np.ndarray:
        """`(64, 16, 2)`, of 64 names and 16 positions: made one by one they would take longer than the model."""
        if (names, positions) not in self._blocks:
            if len(self._blocks) > 2 * STREAMED:
                self._blocks.clear()
            places = torch.arange(64)[:, None] + names * 64, torch.arange(16) + positions * 16
            self._blocks[names, positions] = self.bounds(uniform(self.seed, *places)).numpy()
        return self._blocks[names, positions]

    def one_by_one(self, n: int | None) -> Iterator[str]:
        """One name after the other in compiled loops."""
        stream, last = Stream(self.model, compiled=True), ENDLESS if n is None else n
        draw_names = compiled_loops(self.device, self.dtype).draw_names
        start, room = np.array(self.start, dtype=np.int64), np.empty(ROOM, dtype=np.int64)
        going, decided, parts = np.zeros(3, dtype=np.int64), -1, [np.empty(0, dtype=np.int64)]  # of names to be given
        options = last, start, self.max_length, float(self.draw.temperature), self.doubt
        recent = parts[0]
        while going[0] < last:
            drawn, doubtful = draw_names(going, decided, self.seed, *options, room, *stream.arrays)
            parts.append(room[:drawn].copy())
            whole = 1 + max(np.flatnonzero(parts[-1] == 0), default=-1)
            if whole:
                parts, unfinished = [*parts[:-1], parts[-1][:whole]], parts[-1][whole:]
                yield from self._names(np.concatenate(parts))
                parts = [unfinished]
            recent = np.concatenate([recent, room[:drawn]])[-self.model.context :]
            if doubtful:
                name, position, _ = going.tolist()
                decided = self._decided(name, position, recent[len(recent) - min(position, len(recent)) :])
            else:
                decided = -1

    def _decided(self, name: int, position: int, before: np.ndarray) -> int:
        """The token of a name at a position. before: those before it, the last `context` of them at the most."""
        window = torch.zeros(1, self.model.context, dtype=torch.int64, device=self.device)
        window[0, self.model.context - len(before) :] = torch.from_numpy(before)
        return int(self.exactly(window, uniform(self.seed, torch.tensor([name]), torch.tensor([position]))))

    def exactly(self, windows: Tensor, numbers: Tensor) -> Tensor:
        """The tokens that follow windows `(n, context)` for these numbers, in float64."""
        summed = self._exact_cumulative(windows)
        tokens = torch.searchsorted(summed, numbers.to(summed.device)[:, None], right=True)[:, 0]
        return tokens.clamp_(max=summed.shape[1] - 1)  # where rounding has left the last sum below the number

    @torch.no_grad()
    def _exact_cumulative(self, windows: Tensor) -> Tensor:
        logits = torch.cat([self._exact.tree_logits(part) for part in windows.split(WINDOWS)])
        summed, _ = self.draw.cumulative(logits)
        wrong = summed[:, -1].isnan().nonzero()
        if len(wrong):
            window = self._text(windows[wrong[0, 0]].cpu().numpy())
            raise SamplingError(f"the logits after {window!r} are NaN or infinite; train the model again")
        return summed

    @cached_property
    def _exact(self) -> SharedNodes:
        return SharedNodes(copy.deepcopy(self.model).double())

    def bounds(self, numbers: Tensor) -> Tensor:
        """What is to fall on one token, for that to be the outcome: numbers float64 `(...)` to `(..., 2)`."""
        return torch.stack([numbers - self.doubt, numbers + self.doubt], -1).to(self.dtype)


class _Rows:
    """The rows of a stream, each with a name that it draws; STEPS characters of each are drawn without a question.

    Where a draw is in doubt a row stands still until `decided` says what it has come to. On CUDA the STEPS are one
    graph, which is captured when they have run once.
    """

    def __init__(self, sampler: _Sampler, rows: int):
        self.sampler, self.stream, self.graph = sampler, Stream(sampler.model, rows, compiled=False), None
        self.names = torch.arange(rows, device=sampler.device)
        self.tokens = torch.zeros_like(self.names)  # are read next
        self.decided, self.unsure = torch.full_like(self.names, -1), torch.zeros_like(self.names, dtype=torch.bool)
        self.begun = torch.tensor(rows, device=sampler.device)
        self.drawn = self.names.new_zeros(STEPS, 2, rows)  # names and their tokens, -1 where a row stood still
        self.start = torch.tensor(sampler.start, dtype=torch.int64, device=sampler.device)

    @torch.no_grad()
    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Up to STEPS steps: names that have become longer, and by which tokens, in the order of drawing."""
        device, steps = self.sampler.device, STEPS
        if device.type == "cpu":
            steps = self._steps(until_unsure=True)
        else:
            with torch.cuda.device(device):
                self._replay()
        names, tokens = self.drawn[:steps].transpose(0, 1).cpu().numpy()
        return names[tokens >= 0], tokens[tokens >= 0]

    def _replay(self) -> None:
        """The steps as a graph, on the current device; the first time one by one, which makes what a capture needs."""
        if self.graph is not None:
            return self.graph.replay()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._steps()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self._steps()

    def undecided(self) -> list[int]:
        """The rows that stand still."""
        return self.unsure.nonzero()[:, 0].tolist()

    def _steps(self, until_unsure: bool = False) -> int:
        """Takes the steps, if so wished only until a row stands still; returns how many."""
        for step, drawn in enumerate(self.drawn, start=1):
            self._step(drawn)
            if until_unsure and self.unsure.any():
                return step
        return STEPS

    def _step(self, drawn: Tensor) -> None:
        """Reads a token of every row and draws the next one."""
        sampler, stream, names = self.sampler, self.stream, self.names
        keys, positions = stream.keys.clone(), stream.clocks.clone()
        summed, doubtful = sampler.draw.cumulative(stream.next_logits(self.tokens))
        numbers = _number(_mixed(sampler.mixed_seed + names), positions)
        low, high = torch.searchsorted(summed, sampler.bounds(numbers), right=True).unbind(1)
        unsure = (low != high) | ~(summed[:, -1] > 0.5)  # NaN, too
        if doubtful is not None:
            unsure |= doubtful
        asked = self.decided < 0
        unsure &= asked
        token = torch.where(asked, low.clamp(max=summed.shape[1] - 1), self.decided)
        if len(self.start):
            given = positions < len(self.start)
            unsure &= ~given
            token = torch.where(given, self.start[positions.clamp(max=len(self.start) - 1)], token)
        drawn[0], drawn[1] = names, token.masked_fill(unsure, -1)
        ended = ~unsure & ((token == 0) | (stream.clocks == sampler.max_length))
        fresh = ended.cumsum(0)
        names.copy_(torch.where(ended, self.begun + fresh - 1, names))
        self.begun += fresh[-1]
        self.unsure.copy_(unsure)
        self.decided.fill_(-1)
        # A row that stands still reads its token again; one that begins a name has read nothing and reads a `.`.
        for now, before, after in (
            (stream.keys, keys, stream.keys),
            (stream.clocks, positions, stream.clocks),
            (self.tokens, self.tokens, token),
        ):
            now.copy_(torch.where(unsure, before, after).masked_fill_(ended, 0))
