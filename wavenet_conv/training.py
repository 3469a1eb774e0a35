"""Training by sliding, exactly: all windows of a batch of names in one pass, each distinct node evaluated once.

Without dropout, the loss, every gradient and the batch-norm statistics are those of the tree on all windows of the same
names (README: Training by sliding, exactly). Knows nothing of files or of screens.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .errors import ConfigError, ModeError, NamesError, TrainingError
from .model import ConvWaveNet, GatedLayer
from .engine.ids import crossing_starts as crossing
from .engine.ids import node_ids as number
from .engine.ids import node_starts as node_positions
from .engine.ids import tap_views as taps_of
from .vocabulary import Vocabulary, checked_names

VALIDATED = 2**14  # names that are validated together: bounds memory


@dataclass(frozen=True)
class Batch:
    """The windows of some names as their distinct nodes, layer by layer, lowest first.

    children: of each layer int64 `(nodes, kernel_size)`, the numbers of a node's children (tokens at the first layer).
    uses: of each layer `(nodes, 1)`, how many windows have the node. counts: `(windows, vocab)`, how often each token
    follows each distinct window, or is expected to by teachers. Both in the dtype of the weights. positions: how many
    predictions there are.
    """

    children: list[Tensor]
    uses: list[Tensor]
    counts: Tensor
    positions: int


class Corpus:
    """A list of names, its distinct nodes numbered once for all batches, on the device of `model`.

    Raises `NamesError` for an empty list and for a character that `vocab` does not know.
    """

    def __init__(self, names: Sequence[str], vocab: Vocabulary, model: ConvWaveNet):
        names = checked_names(names)
        if not names:
            raise NamesError("a list of no names has nothing to learn from; give at least one name")
        weight, context = model.embedding.weight, model.context
        tokens, lengths, known = vocab.pack(names, context=context)
        if not known.all():
            raise vocab.unknown_character_error(names)
        tokens, lengths = tokens.to(weight.device), lengths.to(weight.device)
        self.dtype, self.vocab_size, self.children = weight.dtype, len(vocab), []
        ids, kinds, span = tokens, len(vocab), 1
        for kernel_size in model.config.kernel_sizes:
            taps, span = taps_of(ids, kernel_size, span), span * kernel_size
            children, ids = number(taps, kinds, crossing(lengths, context, span))
            self.children.append(children)
            kinds = len(children)
        starts = node_positions(lengths, context, context)
        self.windows, self.targets = ids[starts].long(), tokens[starts + context].long()
        self.outputs = lengths + 1
        self.starts = self.outputs.cumsum(0) - self.outputs
        self.taught: Tensor | None = None  # `(positions, vocab)`, what teachers expect

    def __len__(self) -> int:
        return len(self.outputs)

    def batch(self, rows: Tensor, share: float = 0.0) -> Batch:
        """The names with the numbers `rows`, int64 `(names,)`; `share` of the counts is as `taught` says."""
        outputs = self.outputs[rows]
        before = self.starts[rows] - (outputs.cumsum(0) - outputs)  # of a name's first position, less its place here
        positions = int(outputs.sum())
        places = torch.arange(positions, device=outputs.device) + before.repeat_interleave(outputs)
        numbers, children, uses = self.windows[places], [], []
        counts = torch.bincount(numbers, minlength=len(self.children[-1]))
        for layer in reversed(range(len(self.children))):
            met = counts.nonzero()[:, 0]
            here = torch.empty_like(counts)  # a node's number in this batch
            here[met] = torch.arange(len(met), device=met.device)
            if children:
                children[0] = here[children[0]]
            else:
                numbers = here[numbers]
            below, used = self.children[layer][met], counts[met]
            children.insert(0, below)
            uses.insert(0, used[:, None].to(self.dtype))
            if layer:
                counts = torch.zeros(len(self.children[layer - 1]), dtype=torch.int64, device=met.device)
                counts.index_add_(0, below.flatten(), used.repeat_interleave(below.shape[1]))
        followed = torch.bincount(
            numbers * self.vocab_size + self.targets[places], minlength=len(children[-1]) * self.vocab_size
        )
        counts = followed.view(-1, self.vocab_size).to(self.dtype)
        if share:
            counts = ((1 - share) * counts).index_add_(0, numbers, self.taught[places], alpha=share)
        return Batch(children, uses, counts, positions)

    @torch.no_grad()
    def probabilities(self, model: ConvWaveNet) -> Tensor:
        """What a model in evaluation mode, the one that the corpus was made for, expects: `(positions, vocab)`."""
        parts = []
        for rows in torch.arange(len(self), device=self.starts.device).split(VALIDATED):
            first, last = int(self.starts[rows[0]]), int(self.starts[rows[-1]] + self.outputs[rows[-1]])
            _, numbers = self.windows[first:last].unique(return_inverse=True)  # as `batch` numbers them
            parts.append(shared_logits(model, self.batch(rows)).softmax(1)[numbers])
        return torch.cat(parts)


def shared_logits(model: ConvWaveNet, batch: Batch, dropout: float = 0.0) -> Tensor:
    """Logits after every distinct window of a batch: `(windows, vocab)`, differentiable, in the model's mode.

    What a node contributes to its parent at tap j is computed once; a parent is a gather, a sum and an activation.
    dropout: the chance, in training, that a linear map does not see a channel of what it reads; each distinct node
    draws for itself, so that the products are then its own.
    """
    dropout = dropout if model.training else 0.0
    x, skips = model.embedding.weight, None
    for layer, children, uses in zip(model.layers, batch.children, batch.uses):
        h = _fused(layer.conv, x, children, dropout)
        if isinstance(layer, GatedLayer):
            f, g = h.chunk(2, 1)
            z, right = torch.tanh(f) * torch.sigmoid(g), children[:, -1]
            own = _mapped(layer.skip, z, 0.0)
            skips = own if skips is None else own + skips.index_select(0, right)
            x = None if layer.residual is None else _mapped(layer.residual, z, 0.0) + x.index_select(0, right)
        else:
            x = torch.tanh(h if layer.norm is None else layer.norm(h, uses))
    if model.hidden is not None:
        x = F.relu(_mapped(model.hidden, F.relu(skips), dropout))
    return _mapped(model.head, x, dropout)


def _fused(conv: nn.Conv1d, x: Tensor, children: Tensor, dropout: float) -> Tensor:
    """The linear map of a layer: x `(kinds, c_in)` to `(nodes, c_out)`."""
    taps = conv.weight.permute(2, 1, 0)
    if dropout:
        read = F.dropout(x.index_select(0, children.flatten()).view(len(children), len(taps) * x.shape[1]), dropout)
        h = read @ taps.reshape(read.shape[1], -1)
    else:
        h = sum((x @ tap).index_select(0, child) for tap, child in zip(taps, children.unbind(1)))
    return h if conv.bias is None else h + conv.bias


def _mapped(conv: nn.Conv1d, x: Tensor, dropout: float) -> Tensor:
    """A 1x1 convolution of `(nodes, c_in)`."""
    return F.linear(F.dropout(x, dropout) if dropout else x, conv.weight[..., 0], conv.bias)


def total_loss(model: ConvWaveNet, batch: Batch, dropout: float = 0.0) -> Tensor:
    """The sum of -log p over all positions of a batch, in nats: a scalar, differentiable."""
    return -(shared_logits(model, batch, dropout).log_softmax(1) * batch.counts).sum()


@torch.no_grad()
def evaluate(model: ConvWaveNet, corpus: Corpus) -> float:
    """The mean of -log p over all positions of a list, in nats, in evaluation mode; the mode is restored."""
    was_training = model.training
    model.eval()
    batches = (corpus.batch(rows) for rows in torch.arange(len(corpus), device=corpus.starts.device).split(VALIDATED))
    total = sum(float(total_loss(model, batch)) for batch in batches)
    model.train(was_training)
    return total / len(corpus.windows)


def split_names(names: Sequence[str], seed: int = 42) -> tuple[list[str], list[str], list[str]]:
    """The lecture's split: shuffled with `seed`, then 80% to train on, 10% to validate on and 10% to test on."""
    names = list(names)
    random.Random(seed).shuffle(names)
    first, second = int(0.8 * len(names)), int(0.9 * len(names))
    return names[:first], names[first:second], names[second:]


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of the preset "fast".

    steps and batch (names a step). optimizer: "adamw" or "sgd". schedule: "onecycle" (rises to lr over the first
    `warmup` of the steps and falls to nothing) or "constant". weight_decay: on matrices, not on biases and norms.
    dropout: of what linear maps read, see `shared_logits`. average: decay a step of the exponential average of the
    weights that is validated and kept; 0 keeps the weights themselves. every: steps between validations. patience:
    validations without a lower loss after which training stops; 0 never does. taught: where there are teachers, their
    share of what is to be predicted; the rest is what the list says.
    """

    steps: int = 1500
    batch: int = 256
    optimizer: str = "adamw"
    schedule: str = "onecycle"
    lr: float = 1e-2
    warmup: float = 0.25
    weight_decay: float = 0.05
    dropout: float = 0.0
    average: float = 0.0
    every: int = 100
    patience: int = 0
    taught: float = 0.8
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1 and below 2**31")
        for name in ("weight_decay", "patience", "seed"):
            if not 0 <= getattr(self, name) < 2**30:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 2**30")
        for name in ("warmup", "dropout", "average", "taught"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not (isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr is {self.lr}; it must be a positive number")
        for name, known in (("optimizer", ("adamw", "sgd")), ("schedule", ("onecycle", "constant"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it is {' or '.join(map(repr, known))}")


GATED = {"gated": True, "kernel_sizes": (2, 2, 2, 2), "n_embd": 96, "n_hidden": 96}

# name: (fields of WaveNetConfig without the vocabulary, recipe)
PRESETS: dict[str, tuple[dict[str, Any], Recipe]] = {
    "fast": ({}, Recipe()),  # the lecture's last network, below its last validation loss in seconds
    "plain": ({}, Recipe(steps=6000, dropout=0.05, every=250)),
    "gated-plain": (GATED, Recipe(steps=7000, lr=3e-3, dropout=0.2, every=250)),
    "wide": ({}, Recipe(steps=5000, weight_decay=0.03, dropout=0.02, every=250, taught=0.6)),
    "gated": (GATED, Recipe(steps=6000, lr=3e-3, weight_decay=0.1, dropout=0.1, every=250, taught=0.7)),
}

# preset: those of its teachers, each trained first, with a seed of its own
TEACHERS: dict[str, tuple[str, ...]] = {name: ("gated-plain", "gated-plain", "plain") for name in ("wide", "gated")}


class Trainer:
    """One training, step by step; what it does next depends on its recipe, its names and its state, and nothing else.

    model: in whatever mode and place; it is trained in place, in float32 or float64. On the CPU the same recipe, names
    and number of threads give the same bits. Under an initialised `torch.distributed` group each rank takes its share
    of every batch, and losses, gradients and batch-norm statistics are summed over the ranks; dropout draws for each.

    teachers: models of the same vocabulary, of any shape, in evaluation mode. The model then learns what they expect on
    average, which generalises better than what follows a window once (distillation; Hinton et al. 2015,
    arXiv:1503.02531).

    step: steps taken. losses: of each step, in nats, on the device. validations: `(step, loss)`, as `validate` adds
    them. best_step, best_loss and best_weights (a `state_dict`): of the lowest of those.
    """

    def __init__(
        self,
        model: ConvWaveNet,
        vocab: Vocabulary,
        train: Sequence[str],
        valid: Sequence[str],
        recipe: Recipe,
        teachers: Sequence[ConvWaveNet] = (),
    ):
        self.model, self.recipe = model.train(), recipe
        self.train, self.valid = Corpus(train, vocab, model), Corpus(valid, vocab, model)
        for teacher in teachers:
            if teacher.training:
                raise ModeError("a teacher is in training mode; call .eval() first")
            expected = Corpus(train, vocab, teacher).probabilities(teacher).to(model.embedding.weight)
            self.train.taught = expected if self.train.taught is None else self.train.taught.add_(expected)
        if teachers:
            self.train.taught /= len(teachers)
        self.share = recipe.taught if teachers else 0.0
        self.optimizer, self.schedule = _optimizer(model, recipe)
        self.average = None
        if recipe.average:
            mean = get_ema_multi_avg_fn(recipe.average)
            self.average = AveragedModel(model, multi_avg_fn=mean, use_buffers=True)
        self.ranks, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for norm in (layer.norm for layer in model.layers if layer.norm is not None):
            norm.over_ranks = self.ranks > 1
        self.step, self.losses, self.validations = 0, [], []
        self._epoch, self._order = -1, torch.zeros(0, dtype=torch.int64)  # the epoch of `step`, and its order of names
        self.best_step, self.best_loss, self.best_weights = 0, float("inf"), {}

    @property
    def kept(self) -> ConvWaveNet:
        """The model that is validated: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.module

    def advance(self) -> None:
        """One step."""
        recipe = self.recipe
        rows = self._rows()
        batch = self.train.batch(rows[self.rank :: self.ranks], self.share)
        positions = int(self.train.outputs[rows].sum())
        self.optimizer.zero_grad()
        device = self.model.embedding.weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=recipe.dropout > 0):
            if recipe.dropout:
                torch.manual_seed((self.rank << 50) + recipe.seed * 1_000_003 + self.step)
            loss = total_loss(self.model, batch, recipe.dropout) / positions
        loss.backward()
        loss = loss.detach()
        if self.ranks > 1:
            loss = self._summed(loss)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.losses.append(loss)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def validate(self) -> float:
        """The validation loss in nats; keeps the weights where it is the lowest so far.

        Raises `TrainingError` where a loss since the last time, or this one, is NaN or has exploded.
        """
        self._check()
        loss = evaluate(self.kept, self.valid)
        if not isfinite(loss):
            raise self._breakdown(self.step, f"the validation loss is {loss} nats")
        self.validations.append((self.step, loss))
        if loss < self.best_loss:
            weights = {name: tensor.clone() for name, tensor in self.kept.state_dict().items()}
            self.best_step, self.best_loss, self.best_weights = self.step, loss, weights
        return loss

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or validation has not improved for as long as the recipe is patient."""
        since = sum(1 for step, _ in self.validations if step > self.best_step)
        return self.step >= self.recipe.steps or 0 < self.recipe.patience <= since

    def _rows(self) -> Tensor:
        """The names of the next step: every epoch in another random order."""
        steps = -(-len(self.train) // self.recipe.batch)
        epoch, place = divmod(self.step, steps)
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.train), generator=generator)
        rows = self._order[place * self.recipe.batch :][: self.recipe.batch]
        return rows.to(self.train.starts.device)

    def _summed(self, loss: Tensor) -> Tensor:
        """Sums the gradients, in place, and the loss over all ranks."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        flat = torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        loss, *sums = flat.split([1, *(gradient.numel() for gradient in gradients)])
        for gradient, part in zip(gradients, sums):
            gradient.copy_(part.view_as(gradient))
        return loss[0].clone()

    def _check(self) -> None:
        """Raises `TrainingError` at the first step whose loss is NaN or has exploded; looks at what is new only."""
        since = self.validations[-1][0] if self.validations else 0
        new = self.losses[since:]
        limit = 10 * log(self.train.vocab_size + 1)  # ten times what knowing nothing costs
        for step, loss in enumerate(torch.stack(new).tolist() if new else [], start=since + 1):
            if not loss < limit:
                raise self._breakdown(step, f"its loss is {loss:.4g} nats")

    def _breakdown(self, step: int, complaint: str) -> TrainingError:
        kept = f"; the best weights are of step {self.best_step}" if self.best_weights else ""
        return TrainingError(
            f"training broke down at step {step}: {complaint}, with a learning rate up to {self.recipe.lr:g}{kept}; "
            f"try a lower one, such as --lr {self.recipe.lr / 3:.1g}, or `wavenet-conv find-lr`"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on, and what was measured: tensors by name, and numbers that JSON can hold.

        Given to `restore` of a trainer made with the same arguments, training ends with the same bits.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for place, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{name}": value for name, value in values.items()}
        tensors["losses"] = torch.stack(self.losses) if self.losses else torch.zeros(0)
        numbers = {"step": self.step, "best_step": self.best_step, "validations": self.validations}
        return tensors, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes what `state` gave; raises `KeyError` or `RuntimeError` where it is another model's."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        device = self.model.embedding.weight.device
        self.model.load_state_dict(under("model."))
        if self.average is not None:
            self.average.load_state_dict(under("average."))
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in under("optimizer.").items():
            place, of = name.split(".", 1)
            slots.setdefault(int(place), {})[of] = value
        groups = self.optimizer.state_dict()["param_groups"]
        for place, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            for name, value in slots.get(place, {}).items():
                if value.shape == parameter.shape:  # a fused step pairs numbers by their place in memory
                    slots[place][name] = torch.empty_like(parameter).copy_(value)
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.step, self.best_step = numbers["step"], numbers["best_step"]
        self.validations = [(step, loss) for step, loss in numbers["validations"]]
        self.best_loss = dict(self.validations).get(self.best_step, float("inf"))
        self.best_weights = {name: tensor.to(device) for name, tensor in under("best.").items()}
        self.losses = list(tensors["losses"].to(device))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no step was taken before, which is so
            self.schedule.last_epoch = self.step - 1
            self.schedule.step()


def _optimizer(
    model: ConvWaveNet, recipe: Recipe
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Biases, norms and the embedding are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim == 3]
    others = [p for p in model.parameters() if p.ndim != 3]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    options: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True, **options)
    else:
        optimizer = torch.optim.SGD(groups, **options)
    if recipe.schedule == "onecycle":
        total = recipe.steps + 1
        warmup = recipe.warmup if recipe.warmup * total != 1 else 0.0  # it would divide by a rise of no steps
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.lr, total_steps=total, pct_start=float(warmup), cycle_momentum=False
        )
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return optimizer, schedule
