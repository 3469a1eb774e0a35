"""The counts on the GPU page are those of the operators that run."""

import torch
from helpers import ALPHABET, ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from benchmarks.methods import METHODS, Models
from wavenet_conv import Vocabulary
from wavenet_conv.engine import kernel
from wavenet_conv.engine.shared import SharedNodes
from wavenet_conv.engine.tabulated import TabulatedNodes
from wavenet_conv.engine.weights import fold

PAGE = (ROOT / "docs" / "gpu.md").read_text()
VOCAB = Vocabulary(ALPHABET)
# What starts nothing on a device, and what a model on the CPU checks its tokens with.
VIEWS = {"alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "t", "transpose", "unbind"}
VIEWS |= {"_unsafe_view", "empty", "new_empty", "squeeze", "unfold", "unsqueeze", "view"}
CHECKS = {"aminmax", "stack"}


class Operators(TorchDispatchMode):
    """Collects the names of operators that compute or copy."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names += [name] if name not in VIEWS else []
        return func(*args, **(kwargs or {}))


def models():
    return Models(reference.build((2, 2, 2), n_embd=24, n_hidden=128).eval(), VOCAB)


@torch.no_grad()
def test_operations_per_method_are_those_of_the_page():
    tokens, _ = VOCAB.encode(["analisa"], context=8)
    for method in ("windows", "windows_folded", "slid_conv1d", "slid"):
        call = METHODS[method].on_names(models())
        with Operators() as found:
            call(tokens)
        count = len([name for name in found.names if method[:4] != "slid" or name not in CHECKS])
        assert f"| `{method}` | {count} | {count} |\n" in PAGE


def test_operations_per_chunk_are_those_of_the_page(monkeypatch):
    monkeypatch.setattr(kernel, "why_not", lambda *_: "")
    monkeypatch.setattr(kernel, "last_layer", lambda sums, children, *_: sums.new_zeros(len(children)))
    nodes = TabulatedNodes(SharedNodes(fold(models().conv)), room=2**30)
    text = torch.tensor([*b"emmazoe"], dtype=torch.uint8), torch.tensor([4, 3]), VOCAB.latin1
    with Operators() as found:
        torch.stack(nodes.log_probs_of_codes(*text)[1:])  # as `engine.device` sends them to the host
    assert nodes.tabulated == 2 and f"per chunk of 131,072 names | {len(found.names)} and 3 |" in PAGE
