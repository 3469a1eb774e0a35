"""One character at a time: one new node per layer per step, from ring buffers of old nodes.

A layer's new node needs, beside the newest child, the children at distances d, 2d, ..., (kernel_size - 1) * d back,
where d is its dilation. Source: Paine et al. 2016, arXiv:1611.09482.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError, StateError
from ..model import ConvWaveNet
from ..numbering import to_engine
from ..precision import exact_float32_on
from ..vocabulary import check_tokens, tokens_on
from .nodes import COLUMNS, CUDA_COLUMNS
from .rings import GraphSteps, TorchSteps
from .shared import SharedNodes
from .weights import Weights, fold

FEW_ROWS = 8  # up to here compiled loops are faster: they take row after row, and read all weights for each


class Stream:
    """Reads names side by side, one character of each per step.

        stream = Stream(model, batch_size=2)
        logits = stream.step(torch.tensor([0, 0]))  # (2, vocab), of each name's first character
        logits = stream.step(torch.tensor([5, 13]))

    A new row has read nothing but `end`, and the first step reads one more. Fed `end` and then a name, a row gives the
    logits of the model at every position: to 1e-12 in float64 and 1e-5 in float32. The model is copied. Tokens and
    columns of logits are in the model's own numbers.

    Args:
        model: A `ConvWaveNet` of any kind, in any mode.
        batch_size: Rows.
        device: Where to compute. Default: as the model.
        dtype: In what to compute. Default: as the model. float32 is IEEE, also on CUDA.
        compiled: Whether Numba's loops take the steps, or PyTorch. Default: loops where they can run, which is on the
            CPU in float32 or float64 with at most 8 rows and the extra "fast", for layers with tanh and no layer norm,
            or gated ones. They are compiled at the first step, in some seconds, and kept beside the package.
        graph: Whether each step is one CUDA graph, captured at the second step, with the same results.
        end: The token that pads before a name and ends it, `vocab.end`.

    Raises:
        ShapeError: `batch_size` is below 1.
        ConfigError: `compiled` or `graph` is True and cannot be; `end` is no token of the model; `device` is not there.
    """

    @torch.inference_mode(False)  # a stream made in inference mode can be used outside
    @torch.no_grad()
    def __init__(
        self,
        model: ConvWaveNet,
        batch_size: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool | None = None,
        graph: bool = False,
        end: int = 0,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ShapeError(f"batch_size is {batch_size!r}; it must be an integer of at least 1")
        weights = fold(model, device, dtype)
        self.batch_size, self.context, self.vocab_size = batch_size, model.context, model.config.vocab_size
        if not isinstance(end, int) or not 0 <= end < self.vocab_size:
            raise ConfigError(f"end is {end!r}; it must be a token of the model, 0 to {self.vocab_size - 1}")
        self.end, weights = end, weights.end_first(end)
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self._vocab_tokens = torch.arange(self.vocab_size, device=self.device)
        self._engine_tokens = to_engine(self._vocab_tokens, end)
        self._digest = torch.frombuffer(bytearray(_digest(weights)), dtype=torch.uint8)
        with exact_float32_on(self.device):
            self.backend = _backend(weights, batch_size, compiled, graph)
        self.compiled = type(self.backend) not in (TorchSteps, GraphSteps)
        gated, lower = weights.hidden is not None, weights.layers[self.backend.first :]
        widths = [len(weights.embedding[0]) if gated else layer.taps.shape[2] for layer in lower]
        self._channels = {f"layer {above}": width for above, width in enumerate(widths, start=1)}  # in each ring

    def step(self, tokens: Tensor) -> Tensor:
        """Reads one token per row.

        Tokens int64 `(batch_size,)` to the logits of the next ones, `(batch_size, vocab)`. On CUDA this does not wait
        for the device, except for tokens in pinned memory: tokens on the host are checked and copied, and a token on
        the device that is outside the vocabulary makes a kernel fail (a device-side assert).

        Raises:
            ShapeError, TokenError: Another shape, dtype or device; a token outside the vocabulary. No row reads then.
        """
        if not isinstance(tokens, Tensor) or tokens.shape != (self.batch_size,) or tokens.dtype != torch.int64:
            found = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
            raise ShapeError(f"step takes tokens int64 ({self.batch_size},), one per row, not {found}")
        if tokens.device != self.device and not (tokens.device.type == "cpu" and self.device.type == "cuda"):
            raise ShapeError(f"tokens are on {tokens.device} and the stream on {self.device}; move them with .to(...)")
        if tokens.is_cuda:  # of a wrong token the steps would make a wrong key; this lookup fails
            tokens = self._vocab_tokens.index_select(0, tokens)
        elif self.batch_size > FEW_ROWS or not all(0 <= token < self.vocab_size for token in tokens.tolist()):
            check_tokens(tokens, self.vocab_size)
        return self.advance(tokens_on(self.device, tokens)).clone()

    def advance(self, tokens: Tensor) -> Tensor:
        """`step` without its checks; the next step overwrites the logits."""
        with exact_float32_on(self.device):
            if self.end == 0:
                return self.backend.step(tokens)
            return self.backend.step(self._engine_tokens[tokens]).index_select(1, self._engine_tokens)

    def push(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Resets every row and reads a prefix of its own into it.

        Args:
            tokens: int64 `(batch_size, time)`, as `vocab.encode(prefixes, context=stream.context)` returns them. One
                `end` before a prefix is enough.
            lengths: int64 `(batch_size,)`, characters per prefix.

        Returns:
            Logits of what follows each prefix, `(batch_size, vocab)`.

        Raises:
            ShapeError, TokenError: Other shapes, a token outside the vocabulary. Then nothing is read.
        """
        columns = _columns_of(tokens, lengths, self.batch_size, self.end)
        check_tokens(columns, self.vocab_size)
        self.reset()
        for column in tokens_on(self.device, columns):
            logits = self.advance(column)
        return logits.clone()

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Makes these rows, or all of them, new ones; the others continue.

        Args:
            rows: Row numbers, or bool `(batch_size,)`. Raises `ShapeError` for anything else, naming a wrong row.
        """
        mask = torch.zeros(self.batch_size, dtype=torch.bool, device="cpu")
        mask[_numbers_of(rows, self.batch_size)] = True
        self.backend.reset(mask.to(self.device))

    def state(self) -> dict[str, Tensor]:
        """A copy of all that the rows have read, as plain tensors: what `load_state` takes."""
        return {"model": self._digest.clone()} | {name: part.clone() for name, part in self.backend.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues from a `state()`, also from one of another device.

        Raises:
            StateError: Not a state, or one of another model, dtype or batch size. Nothing has then changed.
        """
        if not isinstance(state, dict) or not all(isinstance(part, Tensor) for part in state.values()):
            raise StateError("a state is a dict of tensors, as Stream.state() returns it")
        state = {name: part.cpu() for name, part in state.items()}
        if not torch.equal(state.get("model", self._digest[:0]), self._digest):
            raise StateError("this state is of another model or dtype; load it into a stream of that one")
        for name, part in self.backend.state().items():
            if name not in state or not _fits(state[name], part, self._channels.get(name, 0)):
                raise StateError(f"{name!r} of this state is missing or has another shape; it is damaged, make another")
        keys = torch.cat([state["keys"], state["layer 0"].flatten()])
        if keys.min() < 0 or keys.max() >= self.backend.kinds or min(state["ages"].min(), state["clock"].min()) < 0:
            raise StateError("'keys', 'ages' or 'clock' of this state are out of range; it is damaged, make another")
        self.backend.load_state(state)

    def __reduce_ex__(self, protocol: object) -> tuple:
        raise StateError("a Stream is not copied or pickled; make another of the same model and give it the state()")


def _fits(given: Tensor, mine: Tensor, channels: int) -> bool:
    """Whether a part of a state is like the stream's; a ring may have the columns of another device."""
    *sizes, columns = mine.shape
    allowed = {-(channels // -width) * width for width in (COLUMNS, CUDA_COLUMNS)} if mine.ndim == 3 else {columns}
    return given.dtype == mine.dtype and given.shape in [(*sizes, count) for count in allowed]


def _columns_of(tokens: Tensor, lengths: Tensor, rows: int, end: int) -> Tensor:
    """What each step of `Stream.push` reads, int64 `(steps, rows)`.

    All prefixes end at the same step: a row that has read nothing but `end` may read more of it.
    """
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else repr(part)[:40] for part in (tokens, lengths)]
    if shapes[0][:1] != (rows,) or shapes[1] != (rows,) or len(shapes[0]) != 2:
        raise ShapeError(
            f"tokens {shapes[0]} and lengths {shapes[1]} are not those of {rows} prefixes, one per row; "
            f"make them with vocab.encode(prefixes, context=stream.context)"
        )
    tokens, lengths = tokens.cpu(), lengths.cpu()
    longest = int(lengths.max())
    before = tokens.shape[1] - longest  # padding before each prefix
    if before < 1 or int(lengths.min()) < 0 or (tokens[:, :before] != end).any():
        raise ShapeError(
            f"tokens {shapes[0]} do not hold token {end} and then prefixes of up to {longest} characters; "
            f"make them with vocab.encode(prefixes, context=stream.context)"
        )
    places = before - 1 + (torch.arange(longest + 1, device="cpu") - (longest - lengths[:, None])).clamp_(min=0)
    return tokens.long().gather(1, places).t().contiguous()


def _numbers_of(rows: Sequence[int] | Tensor | None, count: int) -> list[int]:
    """The row numbers that the argument of `Stream.reset` means."""
    try:
        chosen = torch.as_tensor(range(count) if rows is None else rows, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(())
    if chosen.dtype == torch.bool and chosen.shape == (count,):
        chosen = chosen.nonzero()[:, 0]
    if chosen.ndim != 1 or (len(chosen) and (chosen.is_floating_point() or chosen.dtype == torch.bool)):
        raise ShapeError(f"rows is {rows!r}; give a list of rows, or a bool for each of the {count} rows")
    numbers = [int(row) for row in chosen.tolist()]
    for row in numbers:
        if not 0 <= row < count:
            raise ShapeError(f"row {row} is not among the {count} rows, 0 to {count - 1}")
    return numbers


def _backend(weights: Weights, rows: int, compiled: bool | None, graph: bool) -> TorchSteps:
    """What takes the steps, by the arguments of `Stream`."""
    device, dtype = weights.embedding.device, weights.embedding.dtype
    loops_can_run = weights.only_tanh and rows <= FEW_ROWS and _loops_can_run(device, dtype)
    if graph and device.type != "cuda":
        raise ConfigError(f"a step can be a graph on CUDA, not on {device}; leave out graph=True")
    if compiled and not weights.only_tanh:
        raise ConfigError(
            "compiled steps know tanh and gated layers, but no other activation, no layer norm and no head that "
            "merges nodes; leave out compiled=True"
        )
    if compiled and not loops_can_run:
        raise ConfigError(
            f"compiled steps are for up to {FEW_ROWS} rows on the CPU, in float32 or float64, and need Numba: "
            f"pip install 'wavenet-conv[fast]', or leave out compiled=True"
        )
    shared = SharedNodes(weights)
    if loops_can_run and compiled is not False:
        from .loops import CompiledSteps  # Numba takes 0.3 s to import

        return CompiledSteps(shared, rows)
    return GraphSteps(shared, rows) if graph else TorchSteps(shared, rows)


def _loops_can_run(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return False
    try:
        from . import loops  # noqa: F401
    except ImportError:  # Numba is missing, or does not support the NumPy that is installed
        return False
    return True


def _digest(weights: Weights) -> bytes:
    """SHA-256 of a model's shape, dtype and weights."""
    eps = [None if layer.norm is None else layer.norm.eps for layer in weights.layers]
    digest = hashlib.sha256(f"{weights.config} {eps} {weights.embedding.dtype}".encode())

    def update(tensor: Tensor) -> Tensor:
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return tensor

    weights.map(update)
    return digest.digest()
