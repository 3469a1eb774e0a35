"""The Triton kernel gives what `last_layer_ref` defines, on a GPU or in Triton's interpreter.

Triton decides when it is first imported which of them runs kernels. So on a machine without a GPU these tests run in
another process, which `test_triton.py` starts.
"""

import os

import pytest
import torch
import triton.language as tl
from engine.cases import ABC, last_layer_problem, random_conv

from wavenet_conv import Scorer
from wavenet_conv.engine.kernel import KernelError, accurate_tanh, jit, last_layer, last_layer_ref, usable

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# A logit sums up to 200 products, and each step rounds a sum below 8 by up to 2.4e-7: 200^0.5 such steps at random make
# 3e-6. A wrong column, a lost tap or TF32 is off by 1e-4 and more.
TOLERANCE = 1e-5
ALIKE = 0 if DEVICE == "cuda" else TOLERANCE  # the interpreter leaves products to NumPy, which may round rows unlike


def problem(*args, **options):
    return [tensor.to(DEVICE) for tensor in last_layer_problem(*args, **options)]


def in_float64(contributions, children, targets, head, head_bias):
    return last_layer_ref(contributions.double(), children, targets, head.double(), head_bias.double())


def distance(arguments):
    """Largest difference to float64."""
    out = last_layer(*arguments)
    assert out.dtype == torch.float32 and out.shape == arguments[2].shape and not out.isnan().any()
    return (out - in_float64(*arguments)).abs().max().item()


PROBLEMS = [
    *[dict(n=n, kernel_size=k) for n, k in ((1, 1), (63, 5), (64, 2), (65, 3), (300, 2))],  # tiles full and not
    *[dict(n=65, channels=channels, vocab=vocab) for channels in (5, 16, 128, 200) for vocab in (2, 27, 40)],
    *[dict(n=70, channels=40, vocab=vocab) for vocab in (1, 16, 17, 65, 300, 513, 1024)],  # up to the limit
    *[dict(n=100, scale=scale) for scale in (0.0, 1e-30, 1e-6, 1e-3, 0.1, 5.0, 40.0, 1e30)],
    dict(n=65, kernel_size=16, channels=24),
]


@pytest.mark.parametrize("options", PROBLEMS, ids=str)
def test_results_are_those_of_float64(options):
    assert distance(problem(**options)) < TOLERANCE


def test_no_rows_and_large_logits_give_results():
    """The largest logit is subtracted before exp. At 1,000 float32 numbers are 6e-5 apart."""
    contributions, children, targets, head, head_bias = problem(100)
    assert distance([contributions, children, targets, head * 100, head_bias]) < 1e-3
    assert last_layer(*problem(0)).shape == (0,)


@jit()
def tanh_of(x, out, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    tl.store(out + offset, accurate_tanh(tl.load(x + offset)))


def test_tanh_is_accurate_relative_to_its_size():
    """To 17 units of 2^-24; on a GPU exp and the division are good to three. Without the series 2^-20 would be lost."""
    sizes = 2.0 ** torch.linspace(-40, 6, 2047)
    x = torch.cat([-sizes, torch.zeros(2), sizes]).to(DEVICE)
    out = torch.full_like(x, float("nan"))
    tanh_of[(1,)](x, out, len(x))
    exact = x.double().tanh()
    assert ((out - exact).abs() <= 1e-6 * exact.abs()).all()


def test_a_row_has_the_same_bits_wherever_it_is():
    contributions, children, targets, head, head_bias = problem(300, kernel_size=3, kinds=40)
    whole = last_layer(contributions, children, targets, head, head_bias)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for rows in (order, *(slice(*ends) for ends in [(0, 1), (299, 300), (1, 64), (1, 66), (63, 128), (150, 151)])):
        part = last_layer(contributions, children[rows], targets[rows], head, head_bias)
        assert (part - whole[rows]).abs().max() <= ALIKE
    more = torch.cat([contributions, contributions.flip(1)], 1)  # other nodes beside the same ones
    assert (last_layer(more, children, targets, head, head_bias) - whole).abs().max() <= ALIKE


def test_nan_stays_in_its_own_rows():
    contributions, children, targets, head, head_bias = problem(200)
    contributions[0, 7, 3] = float("nan")
    contributions[1, 8, 127] = float("inf")  # tanh makes 1 of it
    hit = children[:, 0] == 7
    out = last_layer(contributions, children, targets, head, head_bias)
    assert hit.any() and not hit.all() and torch.equal(out.isnan(), hit)
    assert (out - in_float64(contributions, children, targets, head, head_bias))[~hit].abs().max() < TOLERANCE


def test_another_dtype_or_a_larger_vocabulary_is_rejected():
    contributions, *others = problem(10)
    with pytest.raises(KernelError, match=r"float32, not torch\.float64"):
        last_layer(contributions.double(), *others)
    assert usable(DEVICE, torch.float32, 1024) and not usable(DEVICE, torch.float32, 1025)


@pytest.mark.parametrize("gated", [False, True], ids=["tanh", "gated"])
def test_a_scorer_gives_the_scores_of_float64(names, gated):
    names = names[:: 1000 if DEVICE == "cpu" else 20]
    conv = random_conv(n_hidden=20, gated=gated, device=DEVICE)
    scorer = Scorer(conv, ABC, dtype=torch.float32)
    scores = scorer.score(names)
    assert (scores - Scorer(conv, ABC).score(names)).abs().max() < 2e-4
    alone = torch.stack([scorer.score([name])[0] for name in names[:40]])
    assert (alone - scores[:40]).abs().max() <= 20 * ALIKE


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 10 GiB of GPU memory")
def test_contributions_beyond_32_bit_offsets_give_the_same_bits():
    contributions, children, targets, head, head_bias = problem(300, channels=128)
    far = torch.empty(2, 2**23 + 50, 128, device=DEVICE)
    far[:, 2**23 :] = contributions
    whole = last_layer(contributions, children, targets, head, head_bias)
    assert torch.equal(last_layer(far, children + 2**23, targets, head, head_bias), whole)
