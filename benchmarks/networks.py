"""Rivals that are networks too, out of `torch.nn`: an RNN, a GRU, an LSTM and a causal transformer, on whole names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from wavenet_conv import Vocabulary
from wavenet_conv.training import Recipe

State = tuple[Tensor, ...]  # what a network remembers of the names so far, each `(batch, ...)`


class Network(nn.Module):
    """Predicts each character of a name, and its end, from `.` and all characters before.

    A subclass has `log_probs` and `step`. Names are batches of tokens and lengths, as `Vocabulary.encode` gives them.
    """

    def __init__(self, vocab: Vocabulary):
        super().__init__()
        self.vocab = vocab

    def nats(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Minus the log-likelihood of each name, `(batch,)`."""
        raise NotImplementedError

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits `(batch, vocab)` after one more token of each name, int64 `(batch,)`, and the new state.

        The state before the first token is `()`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def score(self, names: Sequence[str], batch_size: int) -> Tensor:
        """The natural-log likelihood of each name, float64 `(names,)`; names of similar length are batched."""
        order, scores = sorted(range(len(names)), key=lambda row: len(names[row])), []
        for start in range(0, len(names), batch_size):
            part = [names[row] for row in order[start : start + batch_size]]
            scores.append(-self.nats(*self.vocab.encode(part, context=1)))
        return torch.cat(scores).double()[torch.tensor(order).argsort()]

    def exact_scores(self, names: Sequence[str]) -> Tensor:
        """The same by a copy in float64, one character at a time, and all names of one length together."""
        exact, scores = copy.deepcopy(self).double(), torch.zeros(len(names), dtype=torch.float64)
        lengths = torch.tensor([len(name) for name in names])
        for length in lengths.unique():
            rows = (lengths == length).nonzero()[:, 0]
            tokens, _ = self.vocab.encode([names[row] for row in rows], context=1)
            scores[rows] = exact._by_steps(tokens)
        return scores

    @torch.no_grad()
    def _by_steps(self, tokens: Tensor) -> Tensor:
        scores: Any = 0
        state: State = ()
        for token, following in zip(tokens.unbind(1), F.pad(tokens[:, 1:], (0, 1)).unbind(1)):
            logits, state = self.step(token, state)
            scores = scores - F.cross_entropy(logits, following, reduction="none")
        return scores


class Recurrent(Network):
    """`nn.RNN`, `nn.GRU` or `nn.LSTM` on packed batches.

    Args:
        vocab: The vocabulary, in which `.` is token 0.
        kind: "RNN" (tanh), "GRU" or "LSTM".
        width: Of each layer.
        n_embd: Width of the embedding.
        layers: How many.
        dropout: Probability that a layer, or the head, does not see an input.
    """

    def __init__(self, vocab: Vocabulary, kind: str, width: int, n_embd: int, layers: int, dropout: float = 0.0):
        super().__init__(vocab)
        self.embedding, self.dropout = nn.Embedding(len(vocab), n_embd), nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0
        self.body = getattr(nn, kind)(n_embd, width, layers, batch_first=True, dropout=between)
        self.head = nn.Linear(width, len(vocab))

    def nats(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        pack = lambda x: pack_padded_sequence(x, lengths.cpu() + 1, batch_first=True, enforce_sorted=False)
        packed, following = pack(tokens), pack(F.pad(tokens[:, 1:], (0, 1))).data
        x, _ = self.body(packed._replace(data=self.dropout(self.embedding(packed.data))))
        nats = F.cross_entropy(self.head(self.dropout(x.data)), following, reduction="none")
        padded, _ = pad_packed_sequence(PackedSequence(nats, *packed[1:]), batch_first=True)
        return padded.sum(1)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        hidden: Any = tuple(part.transpose(0, 1).contiguous() for part in state)
        given = () if not hidden else (hidden if isinstance(self.body, nn.LSTM) else hidden[0],)
        x, hidden = self.body(self.embedding(tokens)[:, None], *given)
        parts = hidden if isinstance(hidden, tuple) else (hidden,)
        return self.head(x[:, 0]), tuple(part.transpose(0, 1) for part in parts)


class Transformer(Network):
    """`nn.TransformerEncoder` with a causal mask, on padded batches.

    Norms stand before attention and before the feed-forward layers; positions are learned.

    Args:
        vocab: The vocabulary, in which `.` is token 0.
        longest: Characters of the longest name.
        width: Of the embedding and of each layer.
        feedforward: Width of the feed-forward layers.
        layers: How many.
        heads: How many in each layer.
        dropout: As in `nn.TransformerEncoderLayer`.
    """

    def __init__(
        self, vocab: Vocabulary, longest: int, width: int, feedforward: int, layers: int, heads: int, dropout: float = 0
    ):
        super().__init__(vocab)
        self.embedding, self.positions = nn.Embedding(len(vocab), width), nn.Embedding(longest + 1, width)
        shape = {"d_model": width, "nhead": heads, "dim_feedforward": feedforward}
        options: dict[str, Any] = {"dropout": dropout, "activation": "gelu", "norm_first": True}
        block = nn.TransformerEncoderLayer(**shape, **options, batch_first=True)
        self.body = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, len(vocab))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, time, vocab)` of what follows each token, int64 `(batch, time)`."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        return self.head(self.body(x, mask=mask, is_causal=True))

    def nats(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        tokens = tokens[:, : int(lengths.max()) + 1]
        following, inside = F.pad(tokens[:, 1:], (0, 1)), torch.arange(tokens.shape[1]) <= lengths[:, None]
        nats = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten(), reduction="none")
        return (nats.view_as(following) * inside).sum(1)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        tokens = torch.cat([*state, tokens[:, None]], 1)  # all of the name: it is short
        return self(tokens)[:, -1], (tokens,)
