"""IEEE arithmetic whatever the program's settings: turns TF32 and autocast off for a while."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any

import torch

_lock, _inside, _found = Lock(), 0, list[Any]()  # of all threads: how many are inside, and what the first one found
if hasattr(os, "register_at_fork"):  # a child must not inherit a lock that another thread holds
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@contextmanager
def exact_float32() -> Iterator[None]:
    """A context manager that runs float32 convolutions and matrix products in IEEE arithmetic, without autocast.

    TF32 has 10 bits of mantissa, which moves logits by about 1e-3. The switches of CUDA and of the CPU's oneDNN are
    global, so other threads see them too: the first thread that enters sets them, and the last one that leaves restores
    them. From PyTorch 2.9 on these switches are called `fp32_precision`. Read them by that name inside: PyTorch may
    raise where an older one is read (`allow_tf32`, `get_float32_matmul_precision`) after a newer one was set.
    """
    global _inside, _found
    switches = _switches()
    with _lock:
        if not _inside:
            _found = [read() for read, _, _ in switches]
            for _, write, exact in switches:
                write(exact)
        _inside += 1
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for (_, write, _), value in zip(switches, _found):
                    write(value)


def exact_float32_on(device: torch.device) -> AbstractContextManager[None]:
    """`exact_float32()` on CUDA. On the CPU, where entering it takes longer than a short step, autocast alone."""
    if device.type == "cuda":
        return exact_float32()
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


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
