"""`exact_float32` turns TF32 off by whichever switch there is, and puts back what it found."""

import types

import pytest
import torch

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
