"""A rival that is a network too: a causal transformer out of `torch.nn`, on whole names in padded batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from wavenet_conv import Vocabulary

# Thirteen recipes were tried on the lecture's list. Validation loss after 1,500 steps: these 1.969; lr 1e-2 or 3e-2
# 1.977; no dropout 1.975, 0.1 1.987; weight decay 0.2 1.975; warmup 0.1 1.970; one layer of width 80 1.994, three of
# width 48 1.967. Feed-forward width 128: lr 5e-3 1.994; without dropout lr 2.5e-3 2.026, 5e-3 1.998, 1e-2 1.990.
SHAPE: dict[str, Any] = {"layers": 2, "heads": 4, "width": 64, "feedforward": 148}
RECIPE: dict[str, Any] = {"batch_size": 256, "lr": 2e-2, "warmup": 0.25, "weight_decay": 0.05, "dropout": 0.05}


class Transformer(nn.Module):
    """Predicts each character of a name, and its end, from `.` and all characters before.

    Norms stand before attention and before the feed-forward layers; positions are learned.

    Args:
        vocab: The vocabulary, in which `.` is token 0.
        longest: Characters of the longest name.
    """

    def __init__(self, vocab: Vocabulary, longest: int):
        super().__init__()
        self.vocab, width = vocab, SHAPE["width"]
        self.embedding, self.positions = nn.Embedding(len(vocab), width), nn.Embedding(longest + 1, width)
        shape = {"d_model": width, "nhead": SHAPE["heads"], "dim_feedforward": SHAPE["feedforward"]}
        options: dict[str, Any] = {"dropout": RECIPE["dropout"], "activation": "gelu", "norm_first": True}
        block = nn.TransformerEncoderLayer(**shape, **options, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, SHAPE["layers"], nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, len(vocab))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, time, vocab)` of what follows each token, int64 `(batch, time)`."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        return self.head(self.blocks(x, mask=mask, is_causal=True))

    def nats(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Minus the log-likelihood of each name `(batch,)`, of tokens and lengths as `Vocabulary.encode` gives them."""
        tokens = tokens[:, : int(lengths.max()) + 1]
        following, inside = F.pad(tokens[:, 1:], (0, 1)), torch.arange(tokens.shape[1]) <= lengths[:, None]
        nats = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten(), reduction="none")
        return (nats.view_as(following) * inside).sum(1)

    @torch.no_grad()
    def score(self, names: Sequence[str], batch_size: int) -> Tensor:
        """The natural-log likelihood of each name, float64 `(names,)`; names of similar length are batched."""
        order, scores = sorted(range(len(names)), key=lambda row: len(names[row])), []
        for start in range(0, len(names), batch_size):
            part = [names[row] for row in order[start : start + batch_size]]
            scores.append(-self.nats(*self.vocab.encode(part, context=1)))
        return torch.cat(scores).double()[torch.tensor(order).argsort()]

    def exact_scores(self, names: Sequence[str]) -> Tensor:
        """The same by a copy in float64, which has no padding to hide: names of one length at a time."""
        exact, scores = copy.deepcopy(self).double(), torch.zeros(len(names), dtype=torch.float64)
        lengths = torch.tensor([len(name) for name in names])
        for length in lengths.unique():
            rows = (lengths == length).nonzero()[:, 0]
            scores[rows] = exact.score([names[row] for row in rows], 1024)
        return scores


@torch.enable_grad()
def train(model: Transformer, names: Sequence[str], steps: int, seed: int) -> None:
    """Trains a transformer in place, as our presets are: AdamW, a one-cycle schedule, each epoch in a new order."""
    size, decay = RECIPE["batch_size"], RECIPE["weight_decay"]
    matrices = [p for p in (*model.blocks.parameters(), model.head.weight) if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups: list[Any] = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=RECIPE["lr"], betas=(0.9, 0.99), fused=True)
    schedule = OneCycleLR(optimizer, RECIPE["lr"], steps + 1, pct_start=RECIPE["warmup"], cycle_momentum=False)
    tokens, lengths = model.vocab.encode(names, context=1)
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(len(names), generator=generator) for _ in range(-(-steps * size // len(names)))]
    model.train()
    for rows in torch.cat(epochs).split(size)[:steps]:
        loss = model.nats(tokens[rows], lengths[rows]).sum() / (lengths[rows] + 1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
