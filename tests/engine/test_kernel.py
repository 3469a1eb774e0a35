"""The last layer as `last_layer_ref` defines it, and its kernel where Triton is missing."""

import importlib.util
import math
import sys
import warnings

import pytest
import torch
from engine.cases import last_layer_problem

from wavenet_conv.engine import kernel
from wavenet_conv.engine.kernel import KernelError, last_layer, last_layer_ref


def test_definition_is_the_formula():
    contributions, children, targets, head, head_bias = last_layer_problem(3, 3, channels=4, vocab=5, kinds=6)
    expected = []
    for row, target in zip(children.tolist(), targets.tolist()):
        sums = [math.fsum(contributions[tap, child, c].item() for tap, child in enumerate(row)) for c in range(4)]
        logits = [sum(math.tanh(x) * w.item() for x, w in zip(sums, column)) for column in head.t()]
        logits = [logit + bias.item() for logit, bias in zip(logits, head_bias)]
        expected.append(logits[target] - math.log(sum(map(math.exp, logits))))
    found = last_layer_ref(contributions.double(), children, targets, head.double(), head_bias.double())
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-14


def test_kernel_is_rejected_on_the_cpu():
    reason = kernel.why_not("cpu", torch.float32)
    assert ("TRITON_INTERPRET=1" if kernel.AVAILABLE else "pip install triton") in reason
    assert not kernel.usable("cpu", torch.float32)
    with pytest.raises(KernelError, match="last_layer cannot run: "):
        last_layer(*last_layer_problem(10))


@pytest.fixture
def without_triton(monkeypatch):
    """The module as it is imported where there is no Triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("wavenet_conv.engine.kernel_without_triton", kernel.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_triton_the_kernel_is_rejected_and_one_warning_is_given(without_triton):
    assert not without_triton.AVAILABLE
    for kind in ("cpu", "cuda", torch.device("cuda", 0)):
        assert not without_triton.usable(kind, torch.float32)
        assert "pip install triton" in without_triton.why_not(kind, torch.float32)
    arguments = last_layer_problem(10)
    with pytest.raises(without_triton.KernelError, match="pip install triton"):
        without_triton.last_layer(*arguments)
    assert torch.equal(without_triton.last_layer_ref(*arguments), last_layer_ref(*arguments))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        without_triton.warn_once_without_triton()
        without_triton.warn_once_without_triton()
    assert len(given) == 1 and "run `pip install triton`" in str(given[0].message)
