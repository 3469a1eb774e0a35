"""A list of names as its distinct nodes, from which batches are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.ids import crossing_starts, node_ids, node_starts, tap_views
from ..errors import NamesError
from ..model import ConvWaveNet, check_pair
from ..numbering import from_engine
from ..vocabulary import Vocabulary, checked_names


@dataclass(frozen=True)
class Batch:
    """The windows of some names as their distinct nodes, which have ids within the batch."""

    # Per layer, lowest first, and then for a head that merges nodes.
    children: list[Tensor]  # int64 (nodes, kernel_size): ids of the layer below, or tokens
    multiplicities: list[Tensor]  # (nodes, 1), in the dtype of the weights
    targets: Tensor  # (windows, vocab), how often each token follows each distinct window, or is expected to
    positions: int  # predictions of the batch, the sum of `targets`


class Corpus:
    """A list of names whose distinct nodes are numbered once for all batches.

    The model gives the kernel sizes, the device and the dtype. An empty list and a character that `vocab` does not know
    raise `NamesError`.

    Attributes:
        windows: int64 `(positions,)`, the id of the window at each position of the list.
        next_tokens: int64 `(positions,)`, what follows each window.
        first: int64 `(names,)`, the first position of each name.
        outputs: int64 `(names,)`, the number of positions of each name.
        soft_targets: `(positions, vocab)`, what teachers expect, or None.
    """

    def __init__(self, names: Sequence[str], vocab: Vocabulary, model: ConvWaveNet):
        check_pair(model, vocab)
        names = checked_names(names)
        if not names:
            raise NamesError("there is nothing to learn from an empty list; give at least one name")
        weight, context = model.embedding.weight, model.context
        tokens, lengths, known = vocab.pack(names, context=context)
        if not known.all():
            raise vocab.unknown_character_error(names)
        tokens = from_engine(tokens, vocab.end)  # the model's own numbers: its weights are trained where they are
        tokens, lengths = tokens.to(weight.device), lengths.to(weight.device)
        self.dtype, self.vocab_size = weight.dtype, len(vocab)
        self.children: list[Tensor] = []
        ids, kinds, span = tokens, len(vocab), 1
        config = model.config
        for kernel_size in (*config.kernel_sizes, *([config.head_kernel_size] if config.head_kernel_size > 1 else [])):
            taps, span = tap_views(ids, kernel_size, span), span * kernel_size
            children, ids = node_ids(taps, kinds, crossing_starts(lengths, context, span))
            self.children.append(children)
            kinds = len(children)
        starts = node_starts(lengths, context, context)
        self.windows, self.next_tokens = ids[starts].long(), tokens[starts + context].long()
        self.outputs = lengths + 1
        self.first = self.outputs.cumsum(0) - self.outputs
        self.soft_targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.outputs)

    def chunks(self, size: int = 2**14) -> list[Tensor]:
        """All names in order, as `rows` for `batch`, few enough at a time to bound memory."""
        return list(torch.arange(len(self), device=self.first.device).split(size))

    def batch(self, rows: Tensor, soft_share: float = 0.0) -> Batch:
        """The windows of the names `rows`, int64 `(names,)`; `soft_share` of the targets are `soft_targets`."""
        outputs = self.outputs[rows]
        shift = self.first[rows] - (outputs.cumsum(0) - outputs)
        positions = torch.arange(int(outputs.sum()), device=outputs.device) + shift.repeat_interleave(outputs)
        references = self.windows[positions]
        multiplicity = torch.bincount(references, minlength=len(self.children[-1]))
        renumbered, multiplicities = [], []
        for layer in reversed(range(len(self.children))):
            nodes = multiplicity.nonzero()[:, 0]
            new_ids = (multiplicity > 0).cumsum(0) - 1
            renumbered.append(new_ids[references])
            references, count = self.children[layer][nodes], multiplicity[nodes]
            multiplicities.append(count[:, None].to(self.dtype))
            if layer:  # a child is in every window that contains its parent
                multiplicity = torch.zeros(len(self.children[layer - 1]), dtype=torch.int64, device=nodes.device)
                multiplicity.index_add_(0, references.flatten(), count.repeat_interleave(references.shape[1]))
        windows, *children = *renumbered, references
        pairs = windows * self.vocab_size + self.next_tokens[positions]
        counts = torch.bincount(pairs, minlength=len(multiplicities[0]) * self.vocab_size)
        targets = counts.view(-1, self.vocab_size).to(self.dtype)
        if soft_share and self.soft_targets is not None:
            targets *= 1 - soft_share
            targets.index_add_(0, windows, self.soft_targets[positions], alpha=soft_share)
        return Batch(children[::-1], multiplicities[::-1], targets, len(positions))
