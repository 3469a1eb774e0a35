"""Fixtures of the engine's tests, and where its kernel can be launched."""

import importlib.util
import os

import pytest
import torch

# Kernels run on a GPU, or in the process that test_kernel.py starts.
launches = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if launches and importlib.util.find_spec("triton") else ["test_kernel_launch.py"]


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    """The number of threads that PyTorch uses."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
