"""The last layer for many windows at once, as one Triton kernel in IEEE float32; `last_layer_ref` defines the results.

A window's last node is a gather of what its children contribute, a sum and a tanh. The head, a log-softmax and the
choice of one entry follow. The kernel writes neither nodes nor logits to memory. A window reads
`kernel_size * channels * 4` bytes and takes `channels * vocab * 2` operations: `vocab / (2 * kernel_size)` operations
per byte. That is few, so the kernel is near the limit of the gather. This module can be imported without Triton.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from ..errors import WaveNetConvError

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton, jit = None, lambda **_: lambda function: function

AVAILABLE = triton is not None  # Triton can be imported
MAX_VOCAB = 1024  # a program holds whole rows of logits


class KernelError(WaveNetConvError, RuntimeError):
    """The kernel cannot run here."""


def last_layer_ref(contributions: Tensor, children: Tensor, targets: Tensor, head: Tensor, head_bias: Tensor) -> Tensor:
    """Log-probabilities of the windows' targets in plain PyTorch, for any device and dtype.

    Args:
        contributions: `(kernel_size, kinds, channels)`, what each node below contributes at each tap.
        children: Integers `(n, kernel_size)`, below `kinds`.
        targets: Integers `(n,)`, below `vocab`.
        head: `(channels, vocab)`.
        head_bias: `(vocab,)`.

    Returns:
        `(n,)`, in nats.
    """
    nodes = torch.tanh(sum(tap[child] for tap, child in zip(contributions, children.long().unbind(1))))
    return (nodes @ head + head_bias).log_softmax(1).gather(1, targets.long()[:, None])[:, 0]


def last_layer(contributions: Tensor, children: Tensor, targets: Tensor, head: Tensor, head_bias: Tensor) -> Tensor:
    """`last_layer_ref` as one kernel, in float32 and without gradients.

    The bits of a window's result do not depend on the other windows: block sizes depend on the shapes of the weights
    only, and each row of a block is computed in the same order. Indices are not checked, since that would wait for the
    device: a child out of range reads other memory. Arguments and result are those of `last_layer_ref`, contiguous, on
    one device, and float32. Raises `KernelError` if `why_not` gives a reason.
    """
    if reason := why_not(contributions.device, contributions.dtype, len(head_bias)):
        raise KernelError(f"last_layer cannot run: {reason}")
    kernel_size, kinds, channels = contributions.shape
    n, out = len(children), contributions.new_empty(len(children))
    if n:
        blocks = block_sizes(kernel_size, channels, len(head_bias))
        with torch.cuda.device_of(contributions):
            grid = (triton.cdiv(n, blocks["ROWS"]),)
            last_layer_kernel[grid](contributions, children, targets, head, head_bias, out, n, kinds, **blocks)
    return out


def why_not(device: torch.device | str, dtype: torch.dtype, vocab: int = 1) -> str:
    """Why `last_layer` cannot run there, and the fix; empty if it can."""
    kind = torch.device(device).type
    if not AVAILABLE:
        return "Triton cannot be imported; run `pip install triton`"
    compiled = isinstance(last_layer_kernel, triton.JITFunction)
    if not compiled and kind != "cpu":
        return f"Triton was imported with TRITON_INTERPRET=1, which is for the CPU, not {kind}; start without it"
    if compiled and kind != "cuda":
        return f"Triton compiles for GPUs, not for {kind}; for a check on the CPU start Python with TRITON_INTERPRET=1"
    if dtype != torch.float32:
        return f"the kernel computes in float32, not {dtype}"
    if vocab > MAX_VOCAB:
        return f"the kernel holds at most {MAX_VOCAB} logits a window, not {vocab}"
    return ""


@cache
def warn_once_without_triton() -> None:
    """Warns, once per process, that the plain path runs because Triton is missing."""
    if not AVAILABLE:
        message = "Triton cannot be imported, so the last layer runs as plain PyTorch, which is slower on a GPU; "
        warnings.warn(message + "run `pip install triton`", RuntimeWarning, stacklevel=2)


def block_sizes(kernel_size: int, channels: int, vocab: int) -> dict[str, int | bool]:
    """The kernel's constants: functions of the weights' shapes, within the shared memory of every GPU since Turing."""
    columns = max(16, triton.next_power_of_2(vocab))
    return {
        "KERNEL_SIZE": kernel_size,
        "CHANNELS": channels,
        "VOCAB": vocab,
        "ROWS": max(16, min(64, 8192 // columns)),
        "CHANNEL_BLOCK": 32 if channels > 16 and columns <= 256 else 16,
        "COLUMNS": columns,
        "num_warps": 4 if columns <= 256 else 8,
        "num_stages": 3 if columns <= 64 and kernel_size <= 3 else 1,
        "enable_fp_fusion": True,
    }


@jit()
def accurate_tanh(x):
    """To a few units in the last place; by its series below 1/4, where 1 - exp(-2x) would cancel."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    e = tl.exp(-2 * tl.abs(x))
    ratio = (1 - e) / (1 + e)
    return tl.where(square < 1 / 16, series, tl.where(x < 0, -ratio, ratio))


# What differs between calls of one model is not specialised on, so that all of them run the same machine code.
@jit(do_not_specialize=["children", "targets", "out", "n", "kinds"])
def last_layer_kernel(
    contributions,
    children,
    targets,
    head,
    head_bias,
    out,
    n,
    kinds,
    KERNEL_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    VOCAB: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: ROWS windows, COLUMNS >= VOCAB logits each, summed over blocks of channels. Offsets are int64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = row < n
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, CHANNELS, CHANNEL_BLOCK):
        channel = start + tl.arange(0, CHANNEL_BLOCK)
        nodes = tl.zeros((ROWS, CHANNEL_BLOCK), tl.float32)
        for tap in tl.static_range(KERNEL_SIZE):
            child = tl.load(children + row * KERNEL_SIZE + tap, mask=real, other=0) + kinds.to(tl.int64) * tap
            there = real[:, None] & (channel < CHANNELS)[None, :]
            nodes += tl.load(contributions + child[:, None] * CHANNELS + channel[None, :], mask=there, other=0.0)
        there = (channel < CHANNELS)[:, None] & (column < VOCAB)[None, :]
        weights = tl.load(head + channel[:, None] * VOCAB + column[None, :], mask=there, other=0.0)
        logits = tl.dot(accurate_tanh(nodes), weights, logits, input_precision="ieee")
    logits += tl.load(head_bias + column, mask=column < VOCAB, other=-float("inf"))[None, :]
    logits -= tl.max(logits, 1)[:, None]
    target = tl.load(targets + row, mask=real, other=0)
    wanted = tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), 1)
    tl.store(out + row, wanted - tl.log(tl.sum(tl.exp(logits), 1)), mask=real)
