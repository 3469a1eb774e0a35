"""`wavenet-conv find-lr`: one step at each learning rate from low to high, and the rate where the loss is lowest."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from math import inf, isfinite
from typing import Any

import torch
from rich.console import Console

from .arguments import device_of, training_names
from .errors import ConfigError, TrainingError, UsageError
from .model import ConvWaveNet, WaveNetConfig
from .training import PRESETS, Trainer, split_names
from .vocabulary import Vocabulary

EXPONENTS = (-3.0, 0.0)  # the lecture's
ROWS = 20
EXPLODED = 4  # times the lowest loss

DESCRIPTION = """\
Trains a fresh model with a learning rate that grows from 0.001 to 1, one step at each rate, as the lecture does, and
prints the mean loss of every twentieth of the steps. The suggestion is the rate of the row with the lowest loss, the
valley before the loss rises. For the one-cycle schedule it is the peak (`wavenet-conv train --lr`). The run ends early
where the loss is NaN or explodes, which is normal at high rates.
"""


def add_parser(commands: Any) -> None:
    """The options of `wavenet-conv find-lr`."""
    command = commands.add_parser("find-lr", help="find a learning rate for a list of names", description=DESCRIPTION)
    add = command.add_argument
    add("file", metavar="FILE", help="one name a line, UTF-8")
    add("--preset", choices=list(PRESETS), default="fast", help="model and recipe to start from (fast)")
    add("--optimizer", choices=("adamw", "sgd"), help="in place of the preset's")
    add("--batch", type=int, metavar="N", help="names a step, in place of the preset's")
    add("--steps", type=int, default=1000, metavar="N", help="learning rates to try (1000)")
    add("--seed", type=int, metavar="N", help="in place of the preset's")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute (auto: cuda where it is)")
    add("--plot", metavar="FILE", help="write the loss against the rate as a picture")
    add("--json", action="store_true", help="the results as one line of JSON")


def find_lr(options: Namespace) -> None:
    """Runs `wavenet-conv find-lr`; raises `UsageError` for what cannot be begun, `TrainingError` where no loss is."""
    if options.plot:
        from .plots import check_plot

        check_plot(options.plot)
    names = training_names(options.file)
    trainer = _trainer(options, names)
    rows: list[tuple[float, float]] = []
    say = Console(stderr=True, highlight=False)
    with say.status("trying learning rates") if options.json and say.is_terminal else nullcontext():
        if not options.json:
            print(f"{'learning rate':>13}  {'loss (nats)':>11}")
        for rate, loss in try_rates(trainer):
            rows.append((rate, loss))
            if not options.json:
                print(f"{rate:13.2e}  {loss:11.4f}", flush=True)
    rate, loss = min(rows, key=lambda row: row[1] if isfinite(row[1]) else inf)
    if not isfinite(loss):
        raise TrainingError(
            f"{options.file}: not one learning rate gave a finite loss; try another --preset or --batch"
        )
    if options.plot:
        from .plots import plot_rates

        tried = rates(trainer.recipe.steps)[: trainer.step].tolist()
        plot_rates(options.plot, tried, torch.stack(trainer.losses), rate)
    _say(options, trainer, rows, rate, loss)


def rates(steps: int) -> torch.Tensor:
    """The learning rate of each step: `(steps,)` float64, their logarithms evenly spaced."""
    return 10 ** torch.linspace(*EXPONENTS, steps, dtype=torch.float64)


def try_rates(trainer: Trainer) -> Iterator[tuple[float, float]]:
    """Takes one step at each of `rates`; yields for every part of them the mean rate (geometric) and loss in nats.

    There are at most `ROWS` parts. Ends early after one whose loss is NaN or `EXPLODED` times the lowest so far.
    """
    lowest = inf
    for part in rates(trainer.recipe.steps).split(-(-trainer.recipe.steps // ROWS)):
        for rate in part.tolist():
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate
            trainer.advance()
        loss = float(torch.stack(trainer.losses[-len(part) :]).mean())
        yield float(part.log().mean().exp()), loss
        lowest = min(lowest, loss)
        if not loss < EXPLODED * lowest:
            return


def _trainer(options: Namespace, names: list[str]) -> Trainer:
    shape, recipe = PRESETS[options.preset]
    given = {name: getattr(options, name) for name in ("optimizer", "batch", "seed", "steps")}
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        recipe = replace(recipe, schedule="constant", average=0.0, patience=0, **changes)
    except ConfigError as error:
        raise UsageError(f"--{error}") from error
    vocab, device = Vocabulary.from_names(names), device_of(options.device)
    torch.manual_seed(recipe.seed)
    model = ConvWaveNet(WaveNetConfig(vocab_size=len(vocab), **shape)).to(device)
    return Trainer(model, vocab, *split_names(names)[:2], recipe)


def _say(options: Namespace, trainer: Trainer, rows: list[tuple[float, float]], rate: float, loss: float) -> None:
    recipe = trainer.recipe
    if options.json:
        results = {
            "suggestion": rate,
            "rates": [rate for rate, _ in rows],
            "losses": [loss if isfinite(loss) else None for _, loss in rows],
            "steps_taken": trainer.step,
            **{name: getattr(recipe, name) for name in ("steps", "optimizer", "batch", "seed")},
            "preset": options.preset,
        }
        print(json.dumps(results))
        return
    if trainer.step < recipe.steps:
        print(f"ended after {trainer.step:,} of {recipe.steps:,} steps: the loss exploded")
    print(f"suggestion: --lr {rate:.2g}, where the loss is lowest ({loss:.4f} nats); with one-cycle it is the peak")
    if rate == rows[-1][0]:
        print("the loss had not risen yet at the highest rate, so a higher one may do too")
