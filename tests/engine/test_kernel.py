"""The kernel of the last layer where Triton is missing, in Triton's interpreter, and compiled for GPUs."""

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
    assert not module.AVAILABLE and not module.usable("cuda", torch.float32)
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


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wavenet_conv.engine import kernel

types = ["*fp32", "*i64", "*i64", "*fp32", "*fp32", "*fp32", "i32", "i32"]
for capability, kernel_size, channels, vocab in SIZES:
    blocks = kernel.block_sizes(kernel_size, channels, vocab)
    constants = {name: value for name, value in blocks.items() if name.isupper()}
    options = {name: value for name, value in blocks.items() if not name.isupper()}
    signature = dict(zip(kernel.last_layer_kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel.last_layer_kernel, signature, constants)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = compiled.asm["ptx"]
    print(compiled.metadata.shared, "fma.rn.f32" in code, "mma" in code, "tf32" in code)
"""


@needs_triton
@pytest.mark.slow
def test_kernel_compiles_for_gpus_in_ieee_float32(tmp_path):
    """For (capability, kernel size, channels, vocabulary), without a GPU: no tensor cores, which would round to TF32.

    Shared memory is 64 KiB a block on Turing (75) and 99 KiB on the smallest after it.
    """
    sizes = [(75, 2, 128, 27), (90, 16, 128, 27), (86, 2, 128, 1024)]
    done = run_python(COMPILE.replace("SIZES", str(sizes)), env={"TRITON_CACHE_DIR": str(tmp_path)})
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [found for _, *found in lines] == [["True", "False", "False"]] * len(sizes)
    for (shared, *_), (capability, *_) in zip(lines, sizes):
        assert int(shared) <= (64 if capability == 75 else 99) * 1024
