"""IEEE float32 for a while. Knows only PyTorch's switches (README: Numbers that mislead)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions and matrix products in IEEE float32 inside the `with`; what was found is restored after it.

    cuDNN convolutions run float32 in TF32 (10 bits of mantissa) unless told otherwise, which moves logits by about
    1e-3. PyTorch has had two switches for this, and raises where they are mixed: `fp32_precision` is used where the
    installed version has it, else `allow_tf32` and `float32_matmul_precision`. Both CUDA and the CPU's oneDNN are set.
    The switches are global: other threads see them too.
    """
    found = [(owner, name, getattr(owner, name)) for owner, name, _ in _switches()]
    matmul_precision = None if _has_fp32_precision() else torch.get_float32_matmul_precision()
    try:
        if matmul_precision is not None:
            torch.set_float32_matmul_precision("highest")
        for owner, name, exact in _switches():
            setattr(owner, name, exact)
        yield
    finally:
        if matmul_precision is not None:
            torch.set_float32_matmul_precision(matmul_precision)
        for owner, name, value in found:
            setattr(owner, name, value)


def _has_fp32_precision() -> bool:
    return hasattr(torch.backends, "fp32_precision")


def _switches() -> list[tuple[object, str, object]]:
    """(owner, attribute, the value that means IEEE float32) of every switch that this PyTorch has."""
    backends = torch.backends
    if _has_fp32_precision():
        owners = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
