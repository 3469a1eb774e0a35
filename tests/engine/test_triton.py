"""The Triton kernel compiles for GPUs, and runs in Triton's interpreter."""

import pytest
import torch
from helpers import ROOT, run_python

pytest.importorskip("triton", reason="needs Triton: pip install triton")


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


@pytest.mark.slow
def test_kernel_compiles_for_gpus_in_ieee_float32(tmp_path):
    """For (capability, kernel size, channels, vocabulary), without a GPU: no tensor cores, which would round to TF32.

    Shared memory is 64 KiB a block on Turing (75) and 99 KiB on the smallest after it.
    """
    sizes = [(75, 2, 128, 27), (90, 3, 200, 64), (90, 16, 128, 27), (86, 2, 128, 1024)]
    done = run_python(COMPILE.replace("SIZES", str(sizes)), env={"TRITON_CACHE_DIR": str(tmp_path)})
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [found for _, *found in lines] == [["True", "False", "False"]] * len(sizes)
    for (shared, *_), (capability, *_) in zip(lines, sizes):
        assert int(shared) <= (64 if capability == 75 else 99) * 1024


def test_interpreter_that_comes_too_late_is_rejected():
    """Triton's own functions would be compiled and the kernel interpreted."""
    code = """if True:
        import os, torch, triton
        os.environ["TRITON_INTERPRET"] = "1"
        from wavenet_conv.engine import kernel
        print(kernel.why_not("cpu", torch.float32) == kernel.why_not("cuda", torch.float32))
        print(kernel.why_not("cpu", torch.float32))"""
    assert run_python(code).stdout.startswith("True\nTRITON_INTERPRET changed after Triton was imported")
