"""What the tests share: devices, lists of names, and trees whose every number is random."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# One thread, here and in the processes that tests start, since operations are small. Tests of threads set their own
# number. A thread that waits sleeps: on a busy machine, threads that spin take ten times as long.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
import torch
from hypothesis import settings

import reference
from wavenet_conv import Vocabulary, exact_float32
from wavenet_conv.names import lecture_names, read_names

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)
# A shell starts background jobs with SIGINT ignored, and their commands inherit that: those that tests interrupt would
# never end.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: run pytest on a machine that has one"
)
try:
    from wavenet_conv import loops
except ModuleNotFoundError:
    loops = None

needs_numba = pytest.mark.skipif(loops is None, reason="needs Numba: pip install 'wavenet-conv[fast]'")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    """Every device there is, with float32 in IEEE arithmetic."""
    with exact_float32():
        yield torch.device(request.param)


@pytest.fixture(scope="session")
def names() -> list[str]:
    return read_names(ROOT / "names.txt")


@pytest.fixture(scope="session")
def vocab(names) -> Vocabulary:
    return Vocabulary.from_names(names)


@pytest.fixture(scope="session")
def lecture_list() -> list[str]:
    """The lecture's own list, which is never part of this repository."""
    path = lecture_names()
    if path is None:
        pytest.skip(
            "needs the lecture's list: run `wavenet-conv lecture-names`, or name it in WAVENET_CONV_LECTURE_NAMES"
        )
    return read_names(path)


def parts_of(tree) -> list[reference.layers.Layer]:
    """The layers of a tree in order, a gated block's linear layers in its place."""
    inside = [vars(layer).values() if isinstance(layer, reference.GatedBlock) else [layer] for layer in tree.layers]
    return [part for parts in inside for part in parts if isinstance(part, reference.layers.Layer)]


def random_tree(kernel_sizes=(2, 2, 2), dtype=torch.float64, device="cpu", seed=0, **sizes) -> reference.Sequential:
    """A tree in evaluation mode in which no weight, bias, gamma, beta or running statistic has its first value.

    Statistics of 0 and 1 would hide a batch norm that is dropped, folded twice or read in the wrong order.
    """
    generator = torch.Generator().manual_seed(seed)
    tree = reference.build(kernel_sizes, generator=generator, **sizes)
    with torch.no_grad():
        for layer in parts_of(tree):
            if isinstance(layer, reference.BatchNorm1d):
                layer.gamma.uniform_(0.5, 1.5, generator=generator)
                layer.beta.normal_(std=0.5, generator=generator)
                layer.running_mean = torch.randn(layer.gamma.shape, generator=generator)
                layer.running_var = torch.rand(layer.gamma.shape, generator=generator) + 0.5
            elif isinstance(layer, reference.Linear) and layer.bias is not None:
                layer.bias.normal_(std=0.5, generator=generator)
        tree.layers[-1].weight.mul_(10)  # the head starts ten times smaller, which would hide differences
    return tree.eval().to(dtype=dtype, device=device)
