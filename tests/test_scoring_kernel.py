"""The scorer through the Triton kernel, which is interpreted on the CPU here, against its plain path."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_kernels import numpy_rounds_rows_alike

from wavenet_conv import kernels

SCRIPT = """
import sys
import torch
sys.path.insert(0, "tests")
from conftest import random_tree
from wavenet_conv import Vocabulary, from_tree, kernels
from wavenet_conv.scoring import Scorer
assert kernels.usable("cpu", torch.float32, 27)
vocab = Vocabulary("abcdefghijklmnopqrstuvwxyz")
names = ["emma", "", "olivia", "a", "xqzvkj", "maximiliano", "emma", "emmanuel", "olive"]
conv = from_tree(random_tree(n_embd=6, n_hidden=20))
by_kernel = Scorer(conv, vocab, dtype=torch.float32)
scores = by_kernel.score(names)
assert (scores - Scorer(conv, vocab).score(names)).abs().max() < 2e-5  # float64 takes the plain path
alone = torch.stack([by_kernel.score([name])[0] for name in names])
assert torch.equal(alone, scores) if ALIKE else torch.allclose(alone, scores, atol=2e-5)
gated = from_tree(random_tree(n_embd=6, n_hidden=20, gated=True))  # has no kernel, and takes the plain path
plain = Scorer(gated, vocab).score(names)
assert (Scorer(gated, vocab, dtype=torch.float32).score(names) - plain).abs().max() < 2e-5
print("equal")
"""


@pytest.mark.skipif(not kernels.AVAILABLE, reason="needs Triton: run `pip install triton`")
def test_the_scorer_through_the_interpreted_kernel():
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SCRIPT.replace("ALIKE", str(numpy_rounds_rows_alike()))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr
