"""IEEE float32 for a while. Knows only PyTorch's switches (README: Numbers that mislead)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions and matrix products in IEEE float32 inside the `with`; what was found is restored after it.

    cuDNN convolutions run float32 in TF32 (10 bits of mantissa) unless told otherwise, which moves logits by about
    1e-3. PyTorch has had two switches for this, and raises where they are mixed: `fp32_precision` is used where the
    installed version has it, else `allow_tf32` and the float32 matmul precision. CUDA and the CPU's oneDNN are set.
    The switches are global: other threads see them too.
    """
    switches = _switches()
    found = [read() for read, _, _ in switches]
    try:
        for _, write, exact in switches:
            write(exact)
        yield
    finally:
        for (read, write, _), value in zip(switches, found):
            if isinstance(value, str) and value != "none" and read() == "ieee":
                write("none")  # a switch that took its value from `torch.backends.fp32_precision` takes it again
            if read() != value:
                write(value)


def _switches() -> list[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """(read, write, the value that means IEEE float32) of every switch that this PyTorch has."""
    backends = torch.backends
    if hasattr(backends, "fp32_precision"):
        owners = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        return [_attribute(owner, "fp32_precision", "ieee") for owner in owners]
    # Up to 2.8. The matmul precision also holds `cuda.matmul.allow_tf32`, with three values in place of two.
    matmul = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
    return [matmul, _attribute(backends.cudnn, "allow_tf32", False)]


def _attribute(owner: Any, name: str, exact: Any) -> tuple[Callable[[], Any], Callable[[Any], None], Any]:
    return partial(getattr, owner, name), partial(setattr, owner, name), exact
