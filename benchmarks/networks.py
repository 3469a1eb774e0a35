"""Rivals that are networks too, out of `torch.nn`: an RNN, a GRU, an LSTM and a causal transformer, on whole names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import count
from math import inf, isfinite
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.counting import outputs
from wavenet_conv import Vocabulary
from wavenet_conv.errors import TrainingError
from wavenet_conv.training import Recipe

VALIDATION_BATCH = 512  # names

State = tuple[Tensor, ...]  # what a network remembers of the names so far, each `(batch, ...)`


class Network(nn.Module):
    """Predicts each character of a name, and its end, from `.` and all characters before.

    A subclass has `body`, `head`, `forward` and `step`. Tokens and lengths of whole names are those of
    `vocab.encode(names, context=1)`. Score in evaluation mode.
    """

    body: nn.Module
    head: nn.Linear

    def __init__(self, vocab: Vocabulary):
        super().__init__()
        self.vocab = vocab

    def position_nats(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Minus the log-probability of each character and of the end, `(batch, longest + 1)`; zeros after the end."""
        tokens = tokens[:, : int(lengths.max()) + 1]
        following, inside = F.pad(tokens[:, 1:], (0, 1)), torch.arange(tokens.shape[1]) <= lengths[:, None]
        nats = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten(), reduction="none")
        return nats.view_as(following) * inside

    def nats(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Minus the log-likelihood of each name, `(batch,)`."""
        return self.position_nats(tokens, lengths).sum(1)

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

    @torch.no_grad()
    def position_log_probs(self, names: Sequence[str], batch_size: int) -> Tensor:
        """The log-probability of each character and end, name after name, float64 `(positions,)`."""
        parts = []
        for start in range(0, len(names), batch_size):
            tokens, lengths = self.vocab.encode(names[start : start + batch_size], context=1)
            nats = self.position_nats(tokens, lengths)
            parts.append(-nats[torch.arange(nats.shape[1]) <= lengths[:, None]])
        return torch.cat(parts).double()

    @torch.no_grad()
    def exact_scores(self, names: Sequence[str]) -> Tensor:
        """What `score` returns, by a copy in float64, one character at a time, all names of one length together."""
        exact, scores = copy.deepcopy(self).double(), torch.zeros(len(names), dtype=torch.float64)
        lengths = torch.tensor([len(name) for name in names])
        for length in lengths.unique():
            state: State = ()
            rows = (lengths == length).nonzero()[:, 0]
            tokens, _ = self.vocab.encode([names[row] for row in rows], context=1)
            for token, following in zip(tokens.unbind(1), F.pad(tokens[:, 1:], (0, 1)).unbind(1)):
                logits, state = exact.step(token, state)
                scores[rows] -= F.cross_entropy(logits, following, reduction="none")
        return scores


class Recurrent(Network):
    """`nn.RNN`, `nn.GRU` or `nn.LSTM`, trained on packed batches; it scores names of similar length, without packing.

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

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, time, vocab)` of what follows each token, int64 `(batch, time)`."""
        x, _ = self.body(self.dropout(self.embedding(tokens)))
        return self.head(self.dropout(x))

    def position_nats(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        if not self.training:
            return super().position_nats(tokens, lengths)
        pack = lambda x: pack_padded_sequence(x, lengths.cpu() + 1, batch_first=True, enforce_sorted=False)
        packed, following = pack(tokens), pack(F.pad(tokens[:, 1:], (0, 1))).data
        x, _ = self.body(packed._replace(data=self.dropout(self.embedding(packed.data))))
        nats = F.cross_entropy(self.head(self.dropout(x.data)), following, reduction="none")
        padded, _ = pad_packed_sequence(packed._replace(data=nats), batch_first=True)
        return padded

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        hidden: Any = tuple(part.transpose(0, 1).contiguous() for part in state) or None
        if hidden and not isinstance(self.body, nn.LSTM):
            (hidden,) = hidden
        x, hidden = self.body(self.embedding(tokens)[:, None], hidden)
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
        options: dict[str, Any] = {"dropout": dropout, "activation": "gelu", "norm_first": True, "batch_first": True}
        block = nn.TransformerEncoderLayer(width, heads, feedforward, **options)
        self.body = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, len(vocab))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, time, vocab)` of what follows each token, int64 `(batch, time)`."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        return self.head(self.body(x, mask=mask, is_causal=True))

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """As of any network; of a name longer than `longest` it sees the last `longest + 1` tokens."""
        tokens = torch.cat([*state, tokens[:, None]], 1)[:, -self.positions.num_embeddings :]
        return self(tokens)[:, -1], (tokens,)


class Spec(NamedTuple):
    """One of `NETWORKS`: the kind, "RNN", "GRU", "LSTM" or "transformer", its shape, and how it is trained."""

    kind: str
    shape: dict[str, Any]
    recipe: Recipe  # its dropout is the network's, its seed also that of the initial weights


# About as many parameters as the presets "fast" and "gated" have, for 27 tokens and names of up to 15 characters.
# docs/settings.md has the recipes that were tried. Thirteen of "transformer-76k" were before. Validation loss after
# 1,500 steps: lr 2e-2, dropout 0.05 1.969; lr 1e-2 or 3e-2 1.977; no dropout 1.975, 0.1 1.987; weight decay 0.2 1.975;
# warmup 0.1 1.970; one layer of width 80 1.994, three of width 48 1.967. Feed-forward width 128: lr 5e-3 1.994; without
# dropout lr 2.5e-3 2.026, 5e-3 1.998, 1e-2 1.990.
NETWORKS: dict[str, Spec] = {
    "rnn-76k": Spec(
        "RNN", {"width": 250, "n_embd": 24, "layers": 1}, Recipe(steps=3000, lr=6e-3, dropout=0.05, eval_every=250)
    ),
    "gru-76k": Spec(
        "GRU", {"width": 142, "n_embd": 24, "layers": 1}, Recipe(steps=6000, lr=2e-2, dropout=0.1, eval_every=250)
    ),
    "lstm-76k": Spec(
        "LSTM", {"width": 122, "n_embd": 24, "layers": 1}, Recipe(steps=3000, lr=2e-2, dropout=0.05, eval_every=250)
    ),
    "transformer-76k": Spec(
        "transformer",
        {"layers": 2, "heads": 4, "width": 64, "feedforward": 148},
        Recipe(steps=6000, lr=2e-2, dropout=0.1, eval_every=250),
    ),
    "rnn-230k": Spec(
        "RNN", {"width": 452, "n_embd": 24, "layers": 1}, Recipe(steps=3000, lr=3e-3, dropout=0.1, eval_every=250)
    ),
    "gru-230k": Spec("GRU", {"width": 260, "n_embd": 24, "layers": 1}, Recipe(lr=5e-3, dropout=0.1, eval_every=250)),
    "lstm-230k": Spec("LSTM", {"width": 224, "n_embd": 24, "layers": 1}, Recipe(lr=1e-2, dropout=0.1, eval_every=250)),
    "transformer-230k": Spec(
        "transformer",
        {"layers": 2, "heads": 4, "width": 96, "feedforward": 380},
        Recipe(steps=6000, lr=1e-2, dropout=0.1, eval_every=250),
    ),
}


def new_network(name: str, vocab: Vocabulary, longest: int, seed: int, dropout: float) -> Network:
    """A network of `NETWORKS` whose weights are drawn from `seed`; no other random state changes.

    Args:
        name: Its key.
        vocab: The vocabulary, in which `.` is token 0.
        longest: Characters of the longest name that a transformer can score.
        seed: Of the initial weights.
        dropout: Of the network, in training mode.
    """
    kind, shape, _ = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "transformer":
            return Transformer(vocab, longest, **shape, dropout=dropout)
        return Recurrent(vocab, kind, **shape, dropout=dropout)


class Fitted(NamedTuple):
    """What came of a training: steps taken, where the validation loss was lowest, and seconds, validations included."""

    steps: int
    best_step: int
    best_loss: float  # nats per position
    seconds: float


@torch.enable_grad()
def fit(network: Network, train: Sequence[str], valid: Sequence[str], recipe: Recipe) -> Fitted:
    """Train in place by the optimizer, the schedule and the batches of our presets: AdamW, one-cycle; no teachers.

    It leaves the weights with the lowest validation loss, in evaluation mode. The same arguments and number of threads
    give the same bits on the CPU, and no other random state changes.

    Args:
        network: The network, which has its own dropout.
        train: Names to train on.
        valid: Names to validate on, every `eval_every` steps and at the end.
        recipe: How to train. Only `steps`, `batch_size`, `lr`, `warmup`, `weight_decay`, `eval_every` and `seed` are
            read.

    Raises:
        TrainingError: The validation loss is NaN or infinite.
    """
    begin, best_step, best_loss, best_weights = perf_counter(), 0, inf, network.state_dict()
    optimizer, schedule = new_optimizer(network, recipe)
    tokens, lengths = network.vocab.encode(train, context=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # of dropout
        for step, rows in zip(range(1, recipe.steps + 1), batches(len(train), recipe)):
            network.train()
            loss = network.nats(tokens[rows], lengths[rows]).sum() / (lengths[rows] + 1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % recipe.eval_every and step < recipe.steps:
                continue
            found = -float(network.eval().score(valid, VALIDATION_BATCH).sum()) / outputs(valid)
            if not isfinite(found):
                message = f"training broke down by step {step} with a learning rate up to {recipe.lr:g}"
                raise TrainingError(f"{message}: the validation loss is {found}; try a lower one")
            if found < best_loss:
                best_step, best_loss, best_weights = step, found, copy.deepcopy(network.state_dict())
    network.load_state_dict(best_weights)
    return Fitted(recipe.steps, best_step, best_loss, perf_counter() - begin)


def batches(names: int, recipe: Recipe) -> Iterator[Tensor]:
    """The names of each step, without end, int64 `(batch,)`: those of a `Trainer`, each epoch in a new order."""
    for epoch in count():
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        yield from torch.randperm(names, generator=generator).split(recipe.batch_size)


def new_optimizer(network: Network, recipe: Recipe) -> tuple[AdamW, OneCycleLR]:
    """The optimizer and its schedule; only matrices of the body and of the head are decayed."""
    matrices = [p for p in (*network.body.parameters(), network.head.weight) if p.ndim == 2]
    others = [p for p in network.parameters() if not any(p is matrix for matrix in matrices)]
    groups: list[Any] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True)
    total = recipe.steps + 1
    warmup = recipe.warmup if recipe.warmup * total != 1 else 0.0  # a rise of no steps would divide by zero
    return optimizer, OneCycleLR(optimizer, recipe.lr, total, pct_start=float(warmup), cycle_momentum=False)
