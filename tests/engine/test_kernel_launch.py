"""The Triton kernel gives what `last_layer_ref` defines, on a GPU or in Triton's interpreter.

Triton decides when it is first imported which of them runs kernels. So on a machine without a GPU `test_kernel.py` runs
these tests in another process.
"""

import os

import pytest
import torch
from engine.cases import ABC, last_layer_problem, random_conv

from wavenet_conv import Scorer
from wavenet_conv.engine.kernel import KernelError, last_layer, last_layer_ref, why_not

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# A logit sums up to 200 products, and each step rounds a sum below 8 by up to 2.4e-7: 200^0.5 such steps at random make
# 3e-6. A wrong column, a lost tap or TF32 is off by 1e-4 and more.
TOLERANCE = 1e-5
ALIKE = 0 if DEVICE == "cuda" else TOLERANCE  # the interpreter leaves products to NumPy, which may round rows unlike

PROBLEMS = [
    *[dict(n=n, kernel_size=k) for n, k in ((0, 2), (1, 1), (63, 5), (64, 2), (65, 3), (300, 2))],  # tiles full and not
    *[dict(n=65, channels=channels, vocab=vocab) for channels in (5, 16, 200) for vocab in (2, 27, 40)],
    *[dict(n=70, channels=40, vocab=vocab) for vocab in (1, 17, 300, 1024)],  # up to the limit
    *[dict(n=100, scale=scale) for scale in (0.0, 1e-30, 1e-3, 0.1, 5.0, 1e30)],
]


@pytest.mark.parametrize("options", PROBLEMS, ids=str)
def test_results_are_those_of_float64(options):
    """Also of large logits, from which the largest is subtracted before exp."""
    contributions, children, targets, head, head_bias = last_layer_problem(**options, device=DEVICE)
    for size in (1, 100):
        exact = last_layer_ref(contributions.double(), children, targets, head.double() * size, head_bias.double())
        out = last_layer(contributions, children, targets, head * size, head_bias)
        assert out.dtype == torch.float32 and torch.allclose(out.double(), exact, rtol=0, atol=TOLERANCE * size)


def test_a_row_has_the_same_bits_wherever_it_is():
    contributions, children, *others = last_layer_problem(300, kernel_size=3, kinds=40, device=DEVICE)
    targets, *head = others
    whole = last_layer(contributions, children, targets, *head)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for rows in (order, *(slice(*ends) for ends in [(0, 1), (299, 300), (1, 66), (63, 128)])):
        assert (last_layer(contributions, children[rows], targets[rows], *head) - whole[rows]).abs().max() <= ALIKE
    more = torch.cat([contributions, contributions.flip(1)], 1)  # other nodes beside the same ones
    assert (last_layer(more, children, targets, *head) - whole).abs().max() <= ALIKE
    contributions[0, 7, 3], hit = float("nan"), children[:, 0] == 7  # NaN stays in its own rows
    out = last_layer(contributions, children, targets, *head)
    assert hit.any() and torch.equal(out.isnan(), hit) and (out - whole)[~hit].abs().max() <= ALIKE


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_children_and_targets_may_be_of_any_integers(dtype):
    contributions, children, targets, *head = last_layer_problem(70, kernel_size=3, device=DEVICE)
    expected = last_layer(contributions, children, targets, *head)
    found = last_layer(contributions, children.to(dtype), targets.to(dtype), *head)
    assert (found - expected).abs().max() <= ALIKE


def test_another_dtype_or_a_larger_vocabulary_is_rejected():
    contributions, *others = last_layer_problem(10, device=DEVICE)
    with pytest.raises(KernelError, match=r"float32, not torch\.float64"):
        last_layer(contributions.double(), *others)
    assert not why_not(DEVICE, torch.float32, 1024) and why_not(DEVICE, torch.float32, 1025)


def test_a_scorer_gives_the_scores_of_float64(names):
    names, conv = names[:: 1000 if DEVICE == "cpu" else 20], random_conv(n_hidden=20, device=DEVICE)
    scorer = Scorer(conv, ABC, dtype=torch.float32)
    scores = scorer.score(names)
    assert (scores - Scorer(conv, ABC).score(names)).abs().max() < 2e-4
    alone = torch.stack([scorer.score([name])[0] for name in names[:40]])
    assert (alone - scores[:40]).abs().max() <= 20 * ALIKE
