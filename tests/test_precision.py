"""`exact_float32` turns TF32 off by whichever switch there is, and puts back what it found."""

import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT

from wavenet_conv import exact_float32, precision


def state():
    """Every switch as it reads now, the older ones too where they can still be read."""
    older = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    return [read() for read, _, _ in precision._switches()] + older + [torch.get_float32_matmul_precision()]


@pytest.fixture(params=["highest", "high", "medium"])
def found(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield state()
    torch.set_float32_matmul_precision(before)


def test_it_is_exact_inside_and_restored_after(found):
    with exact_float32():
        assert all(read() == exact for read, _, exact in precision._switches())
        with exact_float32():
            pass
        assert all(read() == exact for read, _, exact in precision._switches())
    assert state() == found


INHERITS = """
import torch
from wavenet_conv import exact_float32, precision
torch.backends.fp32_precision = "tf32"
with exact_float32():
    print([read() for read, _, _ in precision._switches()])
print([read() for read, _, _ in precision._switches()])
torch.backends.fp32_precision = "ieee"
print([read() for read, _, _ in precision._switches()])
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs PyTorch 2.9 or later")
def test_what_was_inherited_is_inherited_again():
    """In a process of its own: a switch that was ever set by itself inherits no more."""
    done = subprocess.run([sys.executable, "-c", INHERITS], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == [str([value] * 4) for value in ("ieee", "tf32", "ieee")]


def test_it_is_restored_after_an_error(found):
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert state() == found


def test_a_pytorch_that_has_only_the_older_switch(monkeypatch):
    """2.6 to 2.8 have `allow_tf32` and no `fp32_precision`; a stand-in takes the place of their `torch.backends`."""
    old = types.SimpleNamespace(cudnn=types.SimpleNamespace(allow_tf32=True))
    monkeypatch.setattr(precision.torch, "backends", old)
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_float32():
            assert old.cudnn.allow_tf32 is False and torch.get_float32_matmul_precision() == "highest"
        assert old.cudnn.allow_tf32 is True and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
