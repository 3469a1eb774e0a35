"""Turns TF32 off for a while: cuDNN uses it for float32 convolutions by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """A context manager that runs float32 convolutions and matrix products in IEEE arithmetic.

    TF32 has 10 bits of mantissa, which moves logits by about 1e-3. The switches of CUDA and of the CPU's oneDNN are
    set, and restored at the end; they are global, so other threads see them too.
    """
    switches = _switches()
    found = [read() for read, _, _ in switches]
    try:
        for _, write, exact in switches:
            write(exact)
        yield
    finally:
        for (_, write, _), value in zip(switches, found):
            write(value)


def exact_float32_on(device: torch.device) -> AbstractContextManager[None]:
    """`exact_float32()` on CUDA. Nothing on the CPU, where entering it takes longer than a short step."""
    return exact_float32() if device.type == "cuda" else nullcontext()


def _switches() -> list[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """(read, write, the value for IEEE float32) of every switch in this version of PyTorch."""
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):
        owners = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        return [_attribute(owner, "fp32_precision", "ieee") for owner in owners]
    # Up to 2.8. The matmul precision includes `cuda.matmul.allow_tf32`, with three values instead of two.
    matmul = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
    return [matmul, _attribute(backends.cudnn, "allow_tf32", False)]


def _attribute(owner: Any, name: str, exact: Any) -> tuple[Callable[[], Any], Callable[[Any], None], Any]:
    return partial(getattr, owner, name), partial(setattr, owner, name), exact
