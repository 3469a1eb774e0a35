"""`exact_float32` turns TF32 off by whichever switch there is, and puts back what it found."""

import types

import pytest
import torch

from wavenet_conv import exact_float32, precision


def state():
    """Every switch as it reads now, new and old, errors of mixing included."""
    reads = {name: getattr(owner, attribute) for name, owner, attribute in named()}
    return reads | {"matmul precision": torch.get_float32_matmul_precision()}


def named():
    return [(f"{i} {name}", owner, name) for i, (owner, name, _) in enumerate(precision._switches())] + [
        ("old matmul", torch.backends.cuda.matmul, "allow_tf32"),
        ("old cudnn", torch.backends.cudnn, "allow_tf32"),
    ]


@pytest.fixture(params=["highest", "high", "medium"])
def found(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield state()
    torch.set_float32_matmul_precision(before)


def test_it_is_exact_inside_and_restored_after(found):
    with exact_float32():
        assert all(getattr(owner, name) == exact for owner, name, exact in precision._switches())
        with exact_float32():
            pass
        assert all(getattr(owner, name) == exact for owner, name, exact in precision._switches())
    assert state() == found


def test_it_is_restored_after_an_error(found):
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert state() == found


def test_a_pytorch_that_has_only_the_older_switch(monkeypatch):
    """2.6 to 2.8 have `allow_tf32` and no `fp32_precision`; their switches are stood in for by plain attributes."""
    old = types.SimpleNamespace(
        cuda=types.SimpleNamespace(matmul=types.SimpleNamespace(allow_tf32=True)),
        cudnn=types.SimpleNamespace(allow_tf32=True),
    )
    monkeypatch.setattr(precision.torch, "backends", old)
    before = torch.get_float32_matmul_precision()
    with exact_float32():
        assert old.cuda.matmul.allow_tf32 is False and old.cudnn.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "highest"
    assert old.cuda.matmul.allow_tf32 is True and old.cudnn.allow_tf32 is True
    assert torch.get_float32_matmul_precision() == before
