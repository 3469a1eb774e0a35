"""The Triton kernel gives what the plain PyTorch function defines, and refuses where it cannot run.

Triton settles when it is first imported whether kernels run on a GPU or under its interpreter. So the tests that launch
the kernel run here on CUDA, and on the CPU in a process of their own, which `test_under_the_interpreter` starts.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, needs_cuda

from wavenet_conv import kernels
from wavenet_conv.errors import ShapeError
from wavenet_conv.kernels import KernelError, last_layer, last_layer_ref

tl, kernels_tanh = getattr(kernels, "tl", None), kernels._tanh
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not kernels.AVAILABLE, reason="needs Triton: run `pip install triton numpy`")
compiling = pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET=1")

# A logit sums up to 200 products, and each step rounds a sum below 8 by up to 2.4e-7: 200^0.5 such steps at random make
# 3e-6, and the largest difference found here is 1.8e-6. A wrong column, a lost tap or TF32 is off by 1e-4 and more.
TOLERANCE = 3e-6


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=needs_cuda)])
def device(request):
    if not kernels.AVAILABLE:
        pytest.skip("needs Triton: run `pip install triton numpy`")
    return request.param


def numpy_rounds_rows_alike():
    """Whether equal rows of a matrix product, which the interpreter leaves to NumPy, have equal bits here."""
    row, matrix = torch.randn(1, 32), torch.randn(32, 32)
    product = torch.from_numpy(row.expand(64, -1).contiguous().numpy() @ matrix.numpy())
    return torch.equal(product, product[:1].expand(64, -1))


NOT_ALIKE = "needs a NumPy that rounds equal rows alike, as OpenBLAS does on some machines only"


def problem(n, kernel_size=2, channels=128, vocab=27, kinds=50, scale=1.0, seed=0, device="cpu"):
    """Arguments of `last_layer`: preactivations of size `scale`, logits of size about 2."""
    generator = torch.Generator().manual_seed(seed)
    contributions = torch.randn(kernel_size, kinds, channels, generator=generator) * scale / kernel_size**0.5
    children = torch.randint(kinds, (n, kernel_size), generator=generator)
    targets = torch.randint(vocab, (n,), generator=generator)
    head = torch.randn(channels, vocab, generator=generator) * 2 / channels**0.5
    head_bias = torch.randn(vocab, generator=generator)
    return [tensor.to(device) for tensor in (contributions, children, targets, head, head_bias)]


def in_float64(contributions, children, targets, head, head_bias):
    return last_layer_ref(contributions.double(), children, targets, head.double(), head_bias.double())


def distance(arguments):
    """Largest difference to float64, with every entry of the output written and none beside it."""
    n = len(arguments[1])
    around = torch.full((n + 130,), float("nan"), device=arguments[0].device)
    out = last_layer(*arguments, out=around[65 : 65 + n])
    assert out.data_ptr() == around[65:].data_ptr() and out.dtype == torch.float32
    assert around[:65].isnan().all() and around[65 + n :].isnan().all()
    assert not out.isnan().any()
    return (out - in_float64(*arguments)).abs().max().item()


def test_the_definition_is_the_formula():
    contributions, children, targets, head, head_bias = problem(3, kernel_size=3, channels=4, vocab=5, kinds=6)
    expected = []
    for row, target in zip(children.tolist(), targets.tolist()):
        sums = [math.fsum(contributions[tap, child, c].item() for tap, child in enumerate(row)) for c in range(4)]
        logits = [sum(math.tanh(x) * w.item() for x, w in zip(sums, column)) for column in head.t()]
        logits = [logit + bias.item() for logit, bias in zip(logits, head_bias)]
        expected.append(logits[target] - math.log(sum(map(math.exp, logits))))
    found = in_float64(contributions, children, targets, head, head_bias)
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-14
    stacked = last_layer_ref(contributions, children, targets, head, head_bias)
    assert torch.equal(last_layer_ref(list(contributions), children, targets, head, head_bias), stacked)


@pytest.mark.parametrize("vocab", [2, 27, 40])
@pytest.mark.parametrize("channels", [5, 16, 128, 200])
def test_equal_to_float64(device, channels, vocab):
    for n, kernel_size in itertools.product([1, 63, 64, 65, 300], [1, 2, 3, 5]):
        if n == 300 and kernel_size != 2:
            continue  # the interpreter is slow
        assert distance(problem(n, kernel_size, channels, vocab, seed=n + kernel_size, device=device)) < TOLERANCE


@pytest.mark.parametrize("vocab", [1, 16, 17, 65, 300, 513, 1024])
def test_any_vocabulary_up_to_the_limit(device, vocab):
    """Wide ones take smaller blocks. In a vocabulary of one token every log-probability is 0."""
    assert distance(problem(70, channels=40, vocab=vocab, device=device)) < TOLERANCE


def test_many_taps(device):
    assert distance(problem(65, kernel_size=16, channels=24, device=device)) < TOLERANCE


def test_no_rows(device):
    assert last_layer(*problem(0, device=device)).shape == (0,)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e-3, 0.1, 5.0, 40.0, 1e30])
def test_tiny_and_large_preactivations(device, scale):
    assert distance(problem(100, scale=scale, device=device)) < TOLERANCE


@kernels.jit()
def tanh_of(x, out, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    tl.store(out + offset, kernels_tanh(tl.load(x + offset)))


def test_tanh_is_accurate_relative_to_its_size(device):
    """1e-6 is 17 units of 2^-24: on a GPU exp and the division are good to two or three units each, and 1 - exp(-2x)
    triples that where it is smallest. Without the series the error would be 0.1 at x = 2^-20."""
    sizes = 2.0 ** torch.linspace(-40, 6, 2047)
    x = torch.cat([-sizes, torch.zeros(2), sizes]).to(device)
    out = torch.full_like(x, float("nan"))
    tanh_of[(1,)](x, out, len(x))
    exact = x.double().tanh()
    assert ((out - exact).abs() <= 1e-6 * exact.abs()).all()


def test_large_logits(device):
    """Without the largest logit taken off first, exp overflows. At 1,000 float32 numbers are 6e-5 apart."""
    contributions, children, targets, head, head_bias = problem(100, device=device)
    assert distance([contributions, children, targets, head * 100, head_bias]) < 1e-3


def test_a_row_has_the_same_bits_wherever_it_stands(device):
    if INTERPRETED and not numpy_rounds_rows_alike():
        pytest.skip(NOT_ALIKE)
    contributions, children, targets, head, head_bias = problem(300, kernel_size=3, kinds=40, device=device)
    whole = last_layer(contributions, children, targets, head, head_bias)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        order = torch.randperm(300, generator=generator).to(device)
        assert torch.equal(last_layer(contributions, children[order], targets[order], head, head_bias), whole[order])
    for start, stop in [(0, 1), (299, 300), (1, 64), (1, 66), (63, 128), (7, 300), (150, 151)]:
        part = last_layer(contributions, children[start:stop], targets[start:stop], head, head_bias)
        assert torch.equal(part, whole[start:stop])
    more = torch.cat([contributions, contributions.flip(1)], 1)  # other nodes beside the same ones
    assert torch.equal(last_layer(more, children, targets, head, head_bias), whole)


def test_not_a_number_stays_in_its_own_rows(device):
    contributions, children, targets, head, head_bias = problem(200, device=device)
    contributions[0, 7, 3] = float("nan")
    contributions[1, 8, 127] = float("inf")  # tanh makes 1 of it
    hit = children[:, 0] == 7
    assert hit.any() and not hit.all()
    out = last_layer(contributions, children, targets, head, head_bias)
    assert torch.equal(out.isnan(), hit)
    assert (out - in_float64(contributions, children, targets, head, head_bias))[~hit].abs().max() < TOLERANCE


def test_misfits_are_refused(device):
    contributions, children, targets, head, head_bias = good = problem(10, device=device)
    for index, wrong in [
        (0, contributions[0]),
        (0, contributions[:1]),
        (1, children[:, :1]),
        (1, children.int()),
        (2, targets[:9]),
        (3, head[:-1]),
        (3, head.t().contiguous().t()),
        (4, head_bias[:-1]),
    ]:
        with pytest.raises(ShapeError):
            last_layer(*good[:index], wrong, *good[index + 1 :])
    with pytest.raises(ShapeError, match=r"out \(n,\)"):
        last_layer(*good, out=contributions.new_empty(11))


def test_other_precisions_and_gradients_are_refused(device):
    contributions, children, targets, head, head_bias = problem(10, device=device)
    assert kernels.usable(device, torch.float32) and not kernels.usable(device, torch.float64)
    assert kernels.usable(device, torch.float32, 1024) and not kernels.usable(device, torch.float32, 1025)
    with pytest.raises(KernelError, match="float32, not torch.float64"):
        last_layer(contributions.double(), children, targets, head.double(), head_bias.double())
    with pytest.raises(KernelError, match="float32, not torch.bfloat16"):
        last_layer(contributions, children, targets, head.bfloat16(), head_bias)
    with pytest.raises(KernelError, match="no gradient"):
        last_layer(contributions, children, targets, head.requires_grad_(), head_bias)
    with torch.no_grad():
        last_layer(contributions, children, targets, head, head_bias)


@needs_cuda
@needs_triton
@compiling
def test_contributions_beyond_32_bit_offsets():
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free GPU memory")
    contributions, children, targets, head, head_bias = problem(300, channels=128, device="cuda")
    far = torch.empty(2, 2**23 + 50, 128, device="cuda")
    far[:, 2**23 :] = contributions
    whole = last_layer(contributions, children, targets, head, head_bias)
    assert torch.equal(last_layer(far, children + 2**23, targets, head, head_bias), whole)


@needs_triton
def test_under_the_interpreter():
    """Every test above that takes a device, on the CPU. One thread: NumPy then has one order of sums for every row."""
    pytest.importorskip("numpy", reason="needs NumPy for Triton's interpreter: run `pip install numpy`")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "cpu", __file__]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and "passed" in summary, done.stdout + done.stderr
    assert ("1 skipped" if NOT_ALIKE in done.stdout else "passed in") in summary, done.stdout


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wavenet_conv import kernels

types = ["*fp32", "*i64", "*i64", "*fp32", "*fp32", "*fp32", "i32", "i32"]
for capability, kernel_size, channels, vocab in SIZES:
    blocks = kernels._blocks(kernel_size, channels, vocab)
    constants = {name: value for name, value in blocks.items() if name.isupper()}
    options = {name: value for name, value in blocks.items() if not name.isupper()}
    signature = dict(zip(kernels._last_layer.arg_names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernels._last_layer, signature, constants)
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = kernel.asm["ptx"]
    print(kernel.metadata.shared, "fma.rn.f32" in code, "mma" in code, "tf32" in code)
"""


@needs_triton
@compiling
def test_compiles_for_gpus_in_ieee_float32(tmp_path):
    """For (capability, kernel size, channels, vocabulary), without a GPU: no tensor cores, which would round to TF32.

    Shared memory is 64 KiB a block on Turing (75) and 99 KiB on the smallest after it.
    """
    sizes = [(75, 2, 128, 27), (90, 3, 200, 64), (90, 16, 128, 27), (86, 2, 128, 1024)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE.replace("SIZES", str(sizes))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [found for _, *found in lines] == [["True", "False", "False"]] * len(sizes)
    for (shared, *_), (capability, *_) in zip(lines, sizes):
        assert int(shared) <= (64 if capability == 75 else 99) * 1024


@compiling
def test_refused_where_neither_gpu_nor_interpreter_runs_it():
    reason = kernels.why_not("cpu", torch.float32)
    assert ("TRITON_INTERPRET=1" if kernels.AVAILABLE else "pip install triton") in reason
    assert not kernels.usable("cpu", torch.float32)
    with pytest.raises(KernelError, match="last_layer cannot run: "):
        last_layer(*problem(10))


@needs_triton
@compiling
def test_refused_where_the_interpreter_comes_too_late():
    """Triton's own functions would be compiled and the kernel interpreted."""
    code = """if True:
        import os, torch, triton
        os.environ["TRITON_INTERPRET"] = "1"
        from wavenet_conv import kernels
        print(kernels.why_not("cpu", torch.float32) == kernels.why_not("cuda", torch.float32))
        print(kernels.why_not("cpu", torch.float32))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("True\nTRITON_INTERPRET changed after Triton was imported")


@pytest.fixture
def without_triton(monkeypatch):
    """The module as it is imported where there is no Triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("wavenet_conv.kernels_without_triton", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_triton_it_is_refused_by_name(without_triton):
    assert not without_triton.AVAILABLE
    for kind in ("cpu", "cuda", torch.device("cuda", 0)):
        assert not without_triton.usable(kind, torch.float32)
        assert "pip install triton" in without_triton.why_not(kind, torch.float32)
    arguments = problem(10)
    with pytest.raises(without_triton.KernelError, match="pip install triton"):
        without_triton.last_layer(*arguments)
    assert torch.equal(without_triton.last_layer_ref(*arguments), last_layer_ref(*arguments))


def test_without_triton_it_is_said_once(without_triton):
    with pytest.warns(RuntimeWarning, match="pip install triton") as said:
        without_triton.warn_once_without_triton()
        without_triton.warn_once_without_triton()
    assert len(said) == 1 and said[0].filename == __file__


@needs_triton
def test_with_triton_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.warn_once_without_triton()
