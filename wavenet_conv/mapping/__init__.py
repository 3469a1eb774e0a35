"""Maps a notebook's model to the equal `ConvWaveNet`, by what it computes.

The model runs once on windows of tokens, and every operator that it calls is followed (`trace`, `rules`). What comes
out is a chain of linear maps of neighbours, norms and activations, which `assemble` writes as convolutions:

    Conv1d.weight = rearrange(Linear.weight, "(j c) o -> o c j")

Then both models run on windows in which every token stands at every position, and have to agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import MappingError, ShapeError
from ..model import ConvWaveNet
from ..notebook import as_function, left_as_found, logits_in
from ..precision import exact_float32_on
from .assemble import assemble, describe
from .rules import WIDTH, logits_of
from .trace import Tracer
from .values import WINDOWS

LONGEST = 4096  # tokens per window that are tried
FURTHER = 64  # more tokens per window that are tried after a number that fits
FAILURES = 8  # numbers of tokens that are traced
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}
TOKENS_AT_ONCE = 2**17  # in the windows that both models read together
MOST_TOKENS = 2**22  # in all windows that are compared


def from_tree(model: Any, *, context: int | None = None) -> ConvWaveNet:
    """Maps a model of windows to the convolutional model that computes the same logits at every position.

    The model is run, not read: classes, attributes and wrappers may have any names. It looks up a table by the tokens;
    then any number of layers merge k neighbours each (k may differ per layer), by a linear map, batch norm, layer norm
    over channels or no norm, and tanh, ReLU, GELU, SiLU, sigmoid or no activation; a last linear map gives the logits.
    The gated block of the WaveNet paper is known too (`GatedLayer`). Other arithmetic with constants per channel
    becomes part of a linear map. A batch norm stays one where its parts can be told, which are
    `(x - mean) / sqrt(var + eps) * gamma + beta` in any order or `torch.nn.BatchNorm1d`, so that training can go on;
    one that is spelled out has a momentum of 0.1. One that divides by a running standard deviation becomes part of the
    linear map.

    The model runs some times, in evaluation mode and without gradients. Its flags, attributes, statistics, weights and
    the random state are afterwards what they were. Tokens keep their numbers: where the notebook's `stoi` is not `.` as
    0 and sorted characters as 1, 2, ..., take `Vocabulary.from_mapping(stoi)`.

        conv = from_tree(model)
        print(verify(model, conv, names, Vocabulary.from_mapping(stoi)))

    Args:
        model: Maps tokens int64 `(windows, context)` to logits `(windows, vocab)`, floating, or to a tuple or dict that
            holds them: a module, a function, any callable, or a list of layers to call in order.
        context: Tokens per window. Default: the number for which the model makes one prediction per window.

    Returns:
        The model in evaluation mode, on the device and in the dtype of the logits.

    Raises:
        MappingError: The model computes something that has no equal, or `context` has to be given. The message has all
            that is wrong: the operator, where the model calls it, why, and the fix.
    """
    if isinstance(model, ConvWaveNet):
        raise MappingError("the model is a ConvWaveNet already; from_tree takes a model of windows")
    if context is not None and (not isinstance(context, Integral) or isinstance(context, bool) or context < 1):
        raise MappingError(f"context is {context!r}; it must be an integer of at least 1")
    try:
        function = as_function(model)
    except ShapeError as error:
        raise MappingError(str(error)) from error
    # The first one turns gradients on again, which the second one turns off.
    with torch.inference_mode(False), left_as_found(model) as tensors, ExitStack() as stack:
        device = next((tensor.device for tensor in tensors if tensor.is_floating_point()), torch.device("cpu"))
        stack.enter_context(exact_float32_on(device))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        trace = _trace(model, function, int(context), device) if context else _found(model, function, device)
        complaints = trace.complaints if trace.conv is None else _differences(function, trace)
        if complaints:
            raise _error(complaints, tensors)
    return trace.conv


@dataclass
class Trace:
    """What one run has shown: the model, or what is wrong; and the operators that have been followed."""

    conv: Any  # a ConvWaveNet, or None
    complaints: tuple[str, ...]
    operators: list[str]
    size: int  # tokens per window


def _found(model: Any, function: Callable[[Tensor], Any], device: torch.device) -> Trace:
    """The trace for the number of tokens for which a model makes one prediction per window."""
    errors: dict[bool, str] = {}  # one of a model that ran, and one of a model that did not

    def fits(size: int) -> bool:
        try:
            logits_in(function(torch.zeros(WINDOWS, size, dtype=torch.int64, device=device)), WINDOWS)
        except Exception as error:  # any kind, since it is the model's
            if size <= 8 or not errors:
                errors[isinstance(error, ShapeError)] = _text(error)
            return False
        return True

    failed: list[Trace] = []
    for size in range(1, LONGEST + 1):
        if failed and size > failed[0].size + FURTHER:
            break
        if not fits(size):
            continue
        trace = _trace(model, function, size, device)
        if trace.conv is not None:
            further = range(2, 257) if size == 1 else (*range(size + 1, min(2 * size, size + FURTHER)), 2 * size)
            others = islice(filter(fits, further), FAILURES)
            return next(
                (again for other in others if (again := _conflict(model, function, size, other, device))), trace
            )
        failed.append(trace)
        if len(failed) == FAILURES:
            break
    if failed:
        return failed[-1]  # a window of 1 token may run by broadcasting alone
    raise MappingError(
        f"the model makes one prediction per window for no number of tokens from 1 to {LONGEST:,}; "
        f"{errors[max(errors)]}; give the number as context=, or wrap the model in a function of the windows alone"
    )


def _conflict(
    model: Any, function: Callable[[Tensor], Any], size: int, other: int, device: torch.device
) -> Trace | None:
    """A failed trace if a model that maps for `size` tokens makes one prediction of `other` tokens too."""
    # Row i has another token at position i. A model that reads pairs of 9 tokens leaves out the last one.
    one_moved = torch.eye(other + 1, other, dtype=torch.int64, device=device)
    try:
        logits = logits_in(function(one_moved), len(one_moved))
    except Exception:  # any kind, since it is the model's
        return None
    difference, size_of_logits = (logits[:-1] - logits[-1]).abs().amax(1), logits.abs().max().clamp(min=1)
    if (difference <= TOLERANCE.get(logits.dtype, 0) * size_of_logits).any():
        return None
    trace = _trace(model, function, other, device)
    if trace.conv is None and all(text.endswith(WIDTH) for text in trace.complaints):
        return None
    complaint = f"it makes one prediction per window of {size} and of {other} tokens; say which with context="
    return Trace(None, (*trace.complaints, complaint), trace.operators, other)


def _trace(model: Any, function: Callable[[Tensor], Any], size: int, device: torch.device) -> Trace:
    """Runs a model on windows of `size` tokens and follows them."""
    windows = torch.zeros(WINDOWS, size, dtype=torch.int64, device=device)
    tracer = Tracer(model, windows)
    try:
        with tracer:
            logits = logits_in(function(windows), WINDOWS)
    except Exception as error:  # any kind, since it is the model's
        complaint = f"the model cannot run on windows of shape {tuple(windows.shape)}: {_text(error)}"
        return Trace(None, (*tracer.written, complaint), tracer.operators, size)
    value = logits_of(tracer, tracer.values.get(logits), logits.dtype)
    complaints = (*tracer.written, *value.complaints)
    if complaints or value.stage is None:
        return Trace(None, complaints, tracer.operators, size)
    try:
        return Trace(assemble(value.stage, logits), (), tracer.operators, size)
    except MappingError as error:
        return Trace(None, (str(error),), tracer.operators, size)


def _error(complaints: tuple[str, ...], tensors: list[Tensor]) -> MappingError:
    if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in tensors):
        complaints += ("a tensor of the model is NaN or infinite",)
    text = complaints[0] if len(complaints) == 1 else "".join(f"\n- {complaint}" for complaint in complaints)
    return MappingError(f"the model has no equal convolutional model: {text}")


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, ShapeError) else f"{type(error).__name__}: {error}"


def _differences(function: Callable[[Tensor], Any], trace: Trace) -> tuple[str, ...]:
    """A complaint unless both models agree on windows in which every token is at every position."""
    conv = trace.conv
    device, vocab_size = conv.embedding.weight.device, conv.config.vocab_size
    every = torch.arange(vocab_size)[:, None]
    drawn = torch.randint(vocab_size, (64, conv.context), generator=torch.Generator().manual_seed(0))
    zeros = torch.linspace(0, conv.context, min(conv.context + 1, 64)).long()[:, None]  # before a name's first tokens
    begun = drawn[0].masked_fill(torch.arange(conv.context) < zeros, 0)
    windows = torch.cat(
        [begun, drawn, (every + torch.arange(conv.context)) % vocab_size, every.expand(-1, conv.context)]
    )
    windows = windows[: max(64, MOST_TOKENS // conv.context)].to(device)
    tolerance = TOLERANCE[conv.embedding.weight.dtype]
    for part in windows.split(max(1, TOKENS_AT_ONCE // conv.context)):
        try:
            expected = logits_in(function(part.clone()), len(part)).double()
        except Exception as error:  # any kind, since it is the model's
            return (f"the model cannot run on windows of shape {tuple(part.shape)}: {_text(error)}",)
        found = conv(part)[:, 0]
        difference = (expected - found).abs().masked_fill(expected == found, 0.0)  # also where both are infinite
        size = float(expected.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1))
        if not (difference <= tolerance * size).all():
            # What the dtype does to this model may be more than the tolerance.
            rounding = (found - copy.deepcopy(conv).double()(part)[:, 0]).abs().nan_to_num(nan=0.0).max()
            if (difference <= tolerance * size + 16 * float(rounding)).all():
                continue
            largest = float(difference.nan_to_num(nan=torch.inf).max())
            return (
                f"it computes something else than its trace shows, with a largest difference of {largest:.3g}; does "
                f"its Python code depend on the tokens?\n- traced: {', '.join(trace.operators)}\n"
                f"- mapped: {describe(conv)}",
            )
    return ()
