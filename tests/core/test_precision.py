"""`exact_float32` turns TF32 off by the switches that there are, and restores what it found."""

import contextlib
import operator
import threading
import types

import pytest
import torch
from helpers import ALPHABET, random_tree

from wavenet_conv import Scorer, Stream, Vocabulary, exact_float32, from_tree, precision, sample, sampling, verify
from wavenet_conv.continuing import complete

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


VOCAB = Vocabulary(ALPHABET)
CALLS = {  # numbers that a user reads; all of them as tensors
    "sample": lambda tree, conv, names: VOCAB.encode(sample(conv, VOCAB, 4000), context=1)[0],
    "sample streamed": lambda tree, conv, names: VOCAB.encode(sample(conv, VOCAB, 4000), context=1)[0],
    "stream": lambda tree, conv, names: Stream(conv, len(names)).push(*VOCAB.encode(names, context=8)),
    "score": lambda tree, conv, names: Scorer(conv, VOCAB).score(names),
    "complete": lambda tree, conv, names: torch.tensor([pair[1] for pair in complete(Scorer(conv, VOCAB), [""])[0]]),
    "verify": lambda tree, conv, names: torch.tensor(verify(tree, conv, names, VOCAB).max_abs_diff),
    "from_tree": lambda tree, conv, names: torch.nn.utils.parameters_to_vector(conv.parameters()),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("call", CALLS)
def test_tf32_that_the_program_asks_for_on_cuda_changes_nothing(names, call, monkeypatch):
    """TF32 moves logits by 1e-3, and with them some names."""
    monkeypatch.setattr(sampling, "LONG", 0 if "streamed" in call else sampling.LONG)
    sizes = (2,) * 5 if "streamed" in call else (2, 2, 2)  # so deep that the first rings hold matrix products
    tree = random_tree(sizes, n_hidden=128, dtype=torch.float32, device="cuda")
    before, found = torch.get_float32_matmul_precision(), []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found.append(CALLS[call](tree, from_tree(tree), names[:40]))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.allclose(*found, rtol=0, atol=1e-5)
