"""Scores on a GPU: every window is evaluated, from tables of all nodes that are possible in the lower layers.

A GPU should compute a node sooner than it finds an equal one. So nothing gets an id here. The lecture's network has
27^4 = 531,441 possible nodes in its second layer: what they contribute to their parents takes 544 MB and 17 billion
multiply-adds, once. A position is then two rows of that table, a sum, a tanh and the head. It reads 1,024 bytes and
takes 3,456 multiply-adds: a billion positions per second need 1 TB/s and 7 TFLOP/s.
`shared_logits_ref` defines the results; the tables are made by the functions that `SharedNodes` evaluates nodes with.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import kernel
from .ids import pack_keys, tap_views
from .shared import NodeCache, Readable, SharedNodes, contribute, evaluate, tabulate

TABLES = 2**32  # bytes that a table may take, if they are at most
FREE = 0.25  # of the device's free memory


class TabulatedNodes:
    """A model of which lower layers are tables.

    Args:
        shared: The model.
        room: Bytes that a table may take. Default: 4 GiB, but at most a quarter of the device's free memory.

    Attributes:
        tabulated: How many of the lowest layers are tables.
        chunk_tokens: The most tokens to score at a time: layers above the tables are evaluated at all of them.
        why_not: Why the Triton kernel does not evaluate the last layer; "" if it does.
    """

    @torch.no_grad()
    def __init__(self, shared: SharedNodes, room: int | None = None):
        self.nodes, self.context, self.kernel_sizes = shared.nodes, shared.context, shared.kernel_sizes
        self.table, self.tabulated, self.tile = shared.table, shared.tabulated, shared.tile
        self.vocab_size, device = shared.vocab_size, shared.nodes.embedding.device
        if room is None:
            room = min(TABLES, int(FREE * torch.cuda.mem_get_info(device)[0]))
        nodes = self.nodes
        kinds, last = self.vocab_size ** nodes.dilations[self.tabulated], len(self.kernel_sizes) - 1
        # Of what a node contributes to its parents in each layer, and in a gated model its values.
        node_bytes = [
            (size * c_out + (0 if nodes.hidden is None else 2 * c_in)) * nodes.embedding.itemsize
            for size, c_in, c_out in (taps.shape for taps in nodes.taps)
        ]
        while self.tabulated < last:
            size = self.kernel_sizes[self.tabulated]
            if (kinds**size + self.tile) * node_bytes[self.tabulated + 1] > room:
                break
            self.tabulated += 1
            self.table = tabulate(nodes, self.tabulated, self.table, kinds, size)
            kinds **= size
        above = node_bytes[self.tabulated + 1 :]
        self.chunk_tokens = max(1, room // (2 * max(above))) if above else None
        self.head = nodes.head.weight[:, : self.vocab_size].contiguous()
        self.head_bias = nodes.head.bias[: self.vocab_size]
        self.why_not = self._why_no_kernel()

    def _why_no_kernel(self) -> str:
        nodes, weight = self.nodes, self.nodes.head.weight
        if nodes.hidden is not None or (nodes.activations[-1], nodes.norms[-1]) != ("tanh", None):
            return "the last layer is not a linear map and tanh"
        if weight.is_cuda:
            kernel.warn_once_without_triton()
        reason = kernel.why_not(weight.device, weight.dtype, self.vocab_size)
        if not reason:
            first = torch.zeros(1, self.kernel_sizes[-1], dtype=torch.int32, device=weight.device)
            contributions = weight.new_zeros(self.kernel_sizes[-1], 1, len(weight))
            try:  # Triton needs a C compiler, and a GPU that it knows
                kernel.last_layer(contributions, first, first[0, :1], self.head, self.head_bias)
            except Exception as error:
                reason = f"Triton cannot run the kernel: {error}"
                warnings.warn(f"{reason}; the last layer runs as plain PyTorch, which is slower", RuntimeWarning, 2)
        return reason

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probability, in nats, of the token that follows each output, and their sum for each name.

        Args:
            tokens: Integers `(time,)`, names end to end as `Vocabulary.pack` returns them.
            lengths: int64 `(names,)`, characters per name.

        Returns:
            `(outputs,)`, name after name, L + 1 for a name of L characters; and float64 `(names,)`. Nothing waits for
            the device.
        """
        found, _, outputs = self._found(tokens.int(), lengths)
        return found, _sum_per_name(found, outputs)

    def _found(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of int32 tokens; the token that follows each output; and outputs per name."""
        outputs, positions = lengths + 1, len(tokens) - self.context * (len(lengths) + 1) + len(lengths)
        names = torch.repeat_interleave(outputs, output_size=positions)
        # Names lie `context` tokens apart, and outputs one.
        starts = torch.arange(positions, device=tokens.device).add_(names, alpha=self.context - 1)
        targets = tokens.index_select(0, starts + self.context)
        return self._last_layer(*self._below_last(tokens, starts), targets), targets, outputs

    @torch.no_grad()
    def log_probs_of_codes(self, codes: Tensor, lengths: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`log_probs` from a text, and how many characters of each name are known.

        Args:
            codes: uint8 `(characters,)`, names end to end.
            lengths: As above.
            numbers: int32 `(256,)`, the token of each code; 0 for codes that are not known.

        Returns:
            As above, and the characters of each name that are known, float64 `(names,)`. An unknown one is read as
            token 0.
        """
        names = torch.repeat_interleave(lengths, output_size=len(codes))
        places = torch.arange(self.context, self.context + len(codes), device=codes.device)
        tokens = numbers.new_zeros(len(codes) + self.context * (len(lengths) + 1))
        tokens.index_copy_(0, places.add_(names, alpha=self.context), numbers.index_select(0, codes.int()))
        found, targets, outputs = self._found(tokens, lengths)
        return found, _sum_per_name(found, outputs), _sum_per_name(targets != 0, outputs)

    def _last_layer(self, readable: Readable, children: Tensor, targets: Tensor) -> Tensor:
        """The log-probabilities of the targets of windows with these children, `(windows,)`."""
        if not self.why_not:
            return kernel.last_layer(readable[0], children, targets, self.head, self.head_bias)
        head, first = self.nodes.head, 0
        found = head.weight.new_empty(len(targets))
        for nodes in evaluate(self.nodes, -1, readable, children.long(), self.tile):
            wanted = targets[first : first + len(nodes)].long()[:, None]
            log_probs = torch.log_softmax(torch.addmm(head.bias, nodes, head.weight), 1)
            found[first : first + len(wanted)] = log_probs[: len(wanted)].gather(1, wanted)[:, 0]
            first += len(nodes)
        return found

    def _below_last(self, tokens: Tensor, starts: Tensor) -> tuple[Readable, Tensor]:
        """What the last layer reads, and the children of the windows that start there, `(windows, kernel_size)`.

        A node above the tables is evaluated at every position, also where it covers the end of a name and the padding
        of the next: no window reads those.
        """
        ids, kinds, span = tokens, self.vocab_size, 1
        for size in self.kernel_sizes[: self.tabulated]:
            ids = pack_keys(tap_views(ids, size, span), kinds)
            kinds, span = kinds**size, span * size
        readable = self.table
        for layer in range(self.tabulated, len(self.kernel_sizes) - 1):
            children = torch.stack(tap_views(ids, self.kernel_sizes[layer], span), 1).long()
            span *= self.kernel_sizes[layer]
            tiles = evaluate(self.nodes, layer, readable, children, self.tile)
            readable = contribute(self.nodes, layer + 1, tiles, len(children), NodeCache())
            ids = torch.arange(len(children), device=ids.device)
        taps = tap_views(ids, self.kernel_sizes[-1], span)
        return readable, torch.stack([tap.index_select(0, starts) for tap in taps], 1)


def _sum_per_name(values: Tensor, outputs: Tensor) -> Tensor:
    """Of values `(positions,)`, name after name, with so many outputs each: float64 `(names,)`."""
    return torch.segment_reduce(values.double(), "sum", lengths=outputs, unsafe=True)
