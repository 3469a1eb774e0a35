"""Changing one token changes exactly the outputs whose window holds it."""

import pytest
import torch
from conftest import random_tree

from wavenet_conv import fold_batch_norm, from_tree

TIME = 40


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3,), (3, 2, 2), (2, 5), (1, 4), (4, 1, 3)])
def test_the_receptive_field_is_the_context(device, kernel_sizes, gated):
    conv = from_tree(random_tree(kernel_sizes, n_embd=24, n_hidden=12, gated=gated, device=device))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 27, (1, TIME), generator=generator).to(device)
    for model in (conv, conv.forward_conv1d, fold_batch_norm(conv)):
        with torch.no_grad():
            before = model(tokens)[0]
            for position in range(TIME):
                changed = tokens.clone()
                changed[0, position] = tokens[0, position] % 26 + 1
                moved = (model(changed)[0] != before).any(1)
                # Output t reads tokens [t, t + context).
                outputs = torch.arange(len(moved), device=device)
                assert torch.equal(moved, (outputs <= position) & (position < outputs + conv.context))
