"""One training, step by step, with a state from which it can be resumed to the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from math import inf, isfinite, log
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import TrainingError
from ..model import BatchNorm, ConvWaveNet, check_pair
from ..recipe import Recipe
from ..vocabulary import Vocabulary
from .corpus import Corpus
from .loss import Normalize, evaluate, total_loss
from .ranks import batch_norm_over_ranks, rank_and_count, sum_over_ranks
from .teaching import Teaching


class Trainer:
    """One training: a model (trained in place, in its dtype and on its device), a recipe and two lists of names.

    On the CPU the same arguments and number of threads give the same bits. In a `torch.distributed` group each rank
    takes its share of each batch. What teachers expect is a share of the targets (`Teaching`; distillation, Hinton et
    al. 2015, arXiv:1503.02531).

    Attributes:
        train_corpus: the names to train on.
        corpus: those, and the names that teachers have drawn for this epoch.
        step: steps taken.
        seconds: seconds spent here, on what teachers expect, and in `run`.
        losses: of each step, in nats per position: scalars on the device.
        validations: `(step, loss)` of each validation, in nats per position; `run` begins with one at step 0.
        best_step: the step of the lowest validation loss.
        best_loss: the lowest validation loss.
        best_weights: the weights at that step, a `state_dict`.
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
        check_pair(model, vocab)
        begin = monotonic()
        self.model, self.recipe, self.device = model.train(), recipe, model.embedding.weight.device
        self._teaching = Teaching(train, vocab, recipe, teachers, model)
        self.train_corpus, self.valid_corpus = self._teaching.corpus, Corpus(valid, vocab, model)
        self.corpus = self.train_corpus
        self.optimizer, self._schedule = new_optimizer(model, recipe)
        self._average = None
        if recipe.ema_decay:
            update = get_ema_multi_avg_fn(recipe.ema_decay)
            self._average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        self._rank, self._ranks = rank_and_count()
        self._normalize: Normalize = batch_norm_over_ranks if self._ranks > 1 else BatchNorm.__call__
        self.losses: list[Tensor] = []
        self.validations: list[tuple[int, float]] = []
        self._epoch, self._order = -1, torch.zeros(0, dtype=torch.int64)
        self.step, self.best_step, self.best_loss, self.best_weights = 0, 0, inf, dict[str, Tensor]()
        self.seconds = monotonic() - begin

    @property
    def validated_model(self) -> ConvWaveNet:
        """The model that is validated: the moving average where the recipe asks for one."""
        return self.model if self._average is None else self._average.module  # type: ignore[return-value]

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or the last `patience` validations were no better than an earlier one."""
        since = sum(step > self.best_step for step, _ in self.validations)
        return self.step >= self.recipe.steps or 0 < self.recipe.patience <= since

    def next_rows(self) -> Tensor:
        """The names of the next step, int64; each epoch has its own random order."""
        size, seed = self.recipe.batch_size, self.recipe.seed
        names = len(self.train_corpus) * (1 + self.recipe.drawn)
        epoch, place = divmod(self.step, -(-names // size))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(names, generator=generator)
            self.corpus = self._teaching.corpus_of(epoch)
        return self._order[place * size :][:size].to(self.device)

    def advance(self) -> None:
        """Take one step."""
        dropout, seed, rows = self.recipe.dropout, self.recipe.seed, self.next_rows()
        batch = self.corpus.batch(rows[self._rank :: self._ranks], self.recipe.distill_weight)
        positions = batch.positions if self._ranks == 1 else int(self.corpus.outputs[rows].sum())
        self.optimizer.zero_grad()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else [], enabled=dropout > 0):
            if dropout:
                torch.manual_seed((self._rank << 50) + seed * 1_000_003 + self.step)
            loss = total_loss(self.model, batch, dropout, self._normalize) / positions
        loss.backward()
        loss = loss.detach() if self._ranks == 1 else sum_over_ranks(loss.detach(), self.model)
        self.optimizer.step()
        self._schedule.step()
        self.step += 1
        self.losses.append(loss)
        if self._average is not None:
            self._average.update_parameters(self.model)

    def validate(self) -> float:
        """Measure the validation loss in nats per position, and keep the weights where it is the lowest so far.

        Raises `TrainingError` where it, or the loss of a step since the last validation, is NaN or has exploded.
        """
        since = self.validations[-1][0] if self.validations else 0
        limit = 10 * log(self.train_corpus.vocab_size + 1)  # ten times the loss of a uniform guess
        recent = torch.stack(self.losses[since:]).tolist() if self.losses[since:] else []
        broken = [step for step, value in enumerate(recent, since + 1) if not value < limit]
        loss = evaluate(self.validated_model, self.valid_corpus)
        if broken or not isfinite(loss):
            step, lr = (*broken, self.step)[0], self.recipe.lr
            raise TrainingError(
                f"training broke down at step {step}: a loss is NaN or above {limit:.0f} nats, with a learning rate up "
                f"to {lr:g}; try a lower one, such as --lr {lr / 3:.1g}, or `wavenet-conv find-lr`"
            )
        self.validations.append((self.step, loss))
        if loss < self.best_loss:
            weights = {name: tensor.clone() for name, tensor in self.validated_model.state_dict().items()}
            self.best_step, self.best_loss, self.best_weights = self.step, loss, weights
        return loss

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on and all that was measured: tensors by name, and numbers for JSON."""
        parts = {"model": self.model.state_dict(), "best": self.best_weights}
        if self._average is not None:
            parts["average"] = self._average.state_dict()
        for index, values in self.optimizer.state_dict()["state"].items():
            parts[f"optimizer.{index}"] = values
        tensors = {f"{part}.{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
        tensors["losses"] = torch.stack(self.losses) if self.losses else torch.zeros(0)
        numbers = {name: getattr(self, name) for name in ("step", "best_step", "validations", "seconds")}
        return tensors, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Continue from a `state`, to the same bits; the trainer must have been made with the same arguments."""
        self.model.load_state_dict(_part(tensors, "model."))
        if self._average is not None:
            self._average.load_state_dict(_part(tensors, "average."))
        slots = {}
        for index, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            slots[index] = _part(tensors, f"optimizer.{index}.")
            for name, value in slots[index].items():
                if value.shape == parameter.shape:  # a fused optimizer needs the parameter's own memory layout
                    slots[index][name] = torch.empty_like(parameter).copy_(value)
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.best_step, self.seconds = numbers["step"], numbers["best_step"], float(numbers["seconds"])
        self.validations = [(step, loss) for step, loss in numbers["validations"]]
        self.best_loss = dict(self.validations).get(self.best_step, inf)
        self.best_weights = {name: tensor.to(self.device) for name, tensor in _part(tensors, "best.").items()}
        self.losses = list(tensors["losses"].to(self.device))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that the optimizer has taken no step yet
            self._schedule.last_epoch = self.step - 1
            self._schedule.step()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def new_optimizer(model: ConvWaveNet, recipe: Recipe) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The optimizer and its schedule; only weight matrices are decayed."""
    matrices = [p for p in model.parameters() if p.ndim == 3]
    others = [p for p in model.parameters() if p.ndim != 3]
    groups: list[Any] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    make: Any = partial(AdamW, betas=(0.9, 0.99), fused=True) if recipe.optimizer == "adamw" else SGD
    optimizer = make(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.schedule == "constant":
        return optimizer, ConstantLR(optimizer, factor=1.0)
    total = recipe.steps + 1
    warmup = recipe.warmup if recipe.warmup * total != 1 else 0.0  # a rise of no steps would divide by zero
    return optimizer, OneCycleLR(optimizer, recipe.lr, total, pct_start=float(warmup), cycle_momentum=False)
