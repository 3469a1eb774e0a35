"""The environment of the tests, and fixtures: devices, lists of names, exact arithmetic."""

from __future__ import annotations

import os
import signal

# One thread, also in the processes that tests start, since operations are small; tests of threads set their own number.
# A waiting thread sleeps: on a busy machine, threads that spin take ten times as long.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
import torch
from helpers import ROOT
from hypothesis import settings

from wavenet_conv import Vocabulary, exact_float32
from wavenet_conv.names import lecture_names, read_names

torch.set_num_threads(1)
# A shell starts background jobs with SIGINT ignored, and their children inherit that: commands that tests interrupt
# would never end.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """Every device of this machine, with float32 in IEEE arithmetic."""
    with exact_float32():
        yield torch.device(request.param)


@pytest.fixture(params=["cuda"])
def cuda(request):
    """A CUDA device, for what is only there, with float32 in IEEE arithmetic."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with exact_float32():
        yield torch.device(request.param)


@pytest.fixture(scope="session")
def names() -> list[str]:
    """The 46,325 names of this repository."""
    return read_names(ROOT / "names.txt")


@pytest.fixture(scope="session")
def vocab(names) -> Vocabulary:
    return Vocabulary.from_names(names)


@pytest.fixture(scope="session")
def lecture_list() -> list[str]:
    """The lecture's own list, which is not part of this repository."""
    path = lecture_names()
    if path is None:
        pytest.skip("needs the lecture's list: run `wavenet-conv lecture-names`")
    return read_names(path)


@pytest.fixture
def clamp_for_tanh(monkeypatch):
    """A function that replaces tanh by a clamp, which is exact, also inside sigmoid(x) = (1 + tanh(x / 2)) / 2.

    Models are mapped before it is called.
    """

    def replace():
        monkeypatch.setattr(torch, "sigmoid", lambda x: (1 + torch.tanh(x / 2)) / 2)
        monkeypatch.setattr(torch, "tanh", lambda x: x.clamp(-1, 1))
        monkeypatch.setattr(torch, "tanh_", lambda x: x.clamp_(-1, 1))

    return replace
