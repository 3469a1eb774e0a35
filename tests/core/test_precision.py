"""`exact_float32` turns TF32 off by the switches that there are, and restores what it found."""

import contextlib
import operator
import threading
import types

import pytest
import torch

from wavenet_conv import exact_float32, precision

NEW = hasattr(torch.backends, "fp32_precision")  # PyTorch 2.9 or later


def switches():
    """Every switch that `exact_float32` sets."""
    if NEW:
        names = ("cuda.matmul", "cudnn.conv", "mkldnn.matmul", "mkldnn.conv")
        return [operator.attrgetter(name)(torch.backends).fp32_precision for name in names]
    return [torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()]


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_it_is_exact_inside_nests_and_is_restored_even_after_an_error(precision):
    before, inside = torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision(precision)
    try:
        found = switches()
        with contextlib.suppress(KeyError), exact_float32():
            inside.append(switches())
            with exact_float32():
                pass
            inside.append(switches())
            raise KeyError
        assert inside == [["ieee"] * 4 if NEW else [False, "highest"]] * 2 and switches() == found
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_last_thread_that_leaves_restores_the_switches():
    before, found = torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision("medium")
    try:
        expected = switches()
        first, second = exact_float32(), exact_float32()
        first.__enter__()
        run = threading.Thread(target=second.__enter__)
        run.start()
        run.join()
        first.__exit__(None, None, None)
        found.append(switches())
        run = threading.Thread(target=second.__exit__, args=(None, None, None))
        run.start()
        run.join()
        assert found == [["ieee"] * 4 if NEW else [False, "highest"]] and switches() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_it_works_with_the_older_switch_alone(monkeypatch):
    """2.6 to 2.8 have `allow_tf32` and no `fp32_precision`; a stand-in replaces their `torch.backends`."""
    old = types.SimpleNamespace(cudnn=types.SimpleNamespace(allow_tf32=True))
    monkeypatch.setattr(precision.torch, "backends", old)
    with exact_float32():
        assert old.cudnn.allow_tf32 is False
    assert old.cudnn.allow_tf32 is True
