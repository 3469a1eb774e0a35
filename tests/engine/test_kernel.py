"""The kernel of the last layer where it cannot run, and in Triton's interpreter."""

import importlib.util
import sys
import warnings

import pytest
import torch
from engine.cases import last_layer_problem
from helpers import ROOT, run_python

from wavenet_conv.engine import kernel
from wavenet_conv.engine.kernel import KernelError, last_layer

needs_triton = pytest.mark.skipif(not kernel.AVAILABLE, reason="needs Triton: pip install triton")


def test_kernel_is_rejected_on_the_cpu():
    reason = kernel.why_not("cpu", torch.float32)
    assert ("TRITON_INTERPRET=1" if kernel.AVAILABLE else "pip install triton") in reason
    with pytest.raises(KernelError, match="last_layer cannot run: "):
        last_layer(*last_layer_problem(10))


def test_without_triton_the_kernel_is_rejected_and_one_warning_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("wavenet_conv.engine.kernel_without_triton", kernel.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.AVAILABLE and module.why_not("cuda", torch.float32)
    with pytest.raises(module.KernelError, match="pip install triton"):
        module.last_layer(*last_layer_problem(10))
    with pytest.warns(RuntimeWarning, match="run `pip install triton`"):
        module.warn_once_without_triton()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.warn_once_without_triton()


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these tests")
def test_launches_in_the_interpreter():
    """One thread: NumPy then has one order of sums for every row."""
    code = "import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    path, env = ROOT / "tests/engine/test_kernel_launch.py", {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = run_python(code, path, env=env, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
