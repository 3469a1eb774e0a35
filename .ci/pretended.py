"""Runs a module on a simulated CUDA device, having said what this project's Triton kernels compute.

python -m pretend .ci/pretended.py -m benchmarks.slide --device cuda
python -m pretend .ci/pretended.py -m pytest -k cuda
"""

import os
import runpy
import sys

import pretend
import torch

from wavenet_conv.engine import shared, tabulated
from wavenet_conv.engine.kernel import last_layer_ref

shared.CUDA_TILE, tabulated.TABLES = 1024, 2**25  # the host computes: smaller matrix products and tables


@pretend.kernel("last_layer_kernel", "out")
def last_layer(contributions, children, targets, head, head_bias, out, n, kinds, KERNEL_SIZE, CHANNELS, VOCAB, **_):
    """The definition in float64, once the arguments are what the kernel expects."""
    assert children.shape == (n, KERNEL_SIZE) and int(children.min()) >= 0 and int(children.max()) < kinds
    assert targets.shape == out.shape == (n,) and int(targets.min()) >= 0 and int(targets.max()) < VOCAB
    assert contributions.shape == (KERNEL_SIZE, kinds, CHANNELS) and head.shape == (CHANNELS, VOCAB)
    out.copy_(last_layer_ref(contributions.double(), children, targets, head.double(), head_bias.double()))


def convolution_backward(grad_output, x, weight, *options):
    """A GPU's kernel for this; a build for CPUs has none that the simulated device finds."""
    found = torch.ops.aten.convolution_backward(*map(torch.ops.pretend.alias, (grad_output, x, weight)), *options)
    results = tuple(None if of is None else torch.empty_like(of, device="cuda") for of in found)
    written = [result for result in results if result is not None]
    torch.ops.pretend.launch("convolution_backward", [grad_output, x, weight], written)
    for result, of in zip(results, found):
        if of is not None:
            torch.ops.pretend.alias(result).copy_(of)
    return results


ATEN = torch.library.Library("aten", "IMPL")
ATEN.impl("convolution_backward", convolution_backward, "CUDA")


if __name__ == "__main__":
    assert torch.cuda.is_available(), "start this with python -m pretend"
    sys.path[0] = os.getcwd()
    sys.argv = sys.argv[2:] if sys.argv[1:2] == ["-m"] else sys.exit(__doc__)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
