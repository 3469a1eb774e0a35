"""The definition of the last layer, and where its kernel compiles, runs and is rejected."""

import importlib.util
import math
import sys
import warnings

import pytest
import torch
from engine.cases import last_layer_problem
from helpers import ROOT, run_python

from wavenet_conv.engine import kernel
from wavenet_conv.engine.kernel import KernelError, last_layer, last_layer_ref

needs_triton = pytest.mark.skipif(not kernel.AVAILABLE, reason="needs Triton: run `pip install triton`")


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


@needs_triton
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


def test_kernel_is_rejected_on_the_cpu():
    reason = kernel.why_not("cpu", torch.float32)
    assert ("TRITON_INTERPRET=1" if kernel.AVAILABLE else "pip install triton") in reason
    assert not kernel.usable("cpu", torch.float32)
    with pytest.raises(KernelError, match="last_layer cannot run: "):
        last_layer(*last_layer_problem(10))


@needs_triton
def test_interpreter_that_comes_too_late_is_rejected():
    """Triton's own functions would be compiled and the kernel interpreted."""
    code = """if True:
        import os, torch, triton
        os.environ["TRITON_INTERPRET"] = "1"
        from wavenet_conv.engine import kernel
        print(kernel.why_not("cpu", torch.float32) == kernel.why_not("cuda", torch.float32))
        print(kernel.why_not("cpu", torch.float32))"""
    assert run_python(code).stdout.startswith("True\nTRITON_INTERPRET changed after Triton was imported")


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
    with pytest.warns(RuntimeWarning, match="pip install triton") as given:
        without_triton.warn_once_without_triton()
        without_triton.warn_once_without_triton()
    assert len(given) == 1 and given[0].filename == __file__


@needs_triton
def test_with_triton_no_warning_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.warn_once_without_triton()
