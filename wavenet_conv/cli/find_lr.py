"""`wavenet-conv find-lr`: one step at each learning rate from low to high, and the rate where the loss is lowest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from .options import add_command, add_device, add_list, add_recipe, configured, device_of, training_list

if TYPE_CHECKING:
    import torch

    from ..training import Trainer

EXPONENTS = (-3.0, 0.0)  # the lecture's
ROWS = 20
EXPLODED = 4  # times the lowest loss

DESCRIPTION = """\
Trains a new model with a learning rate that grows from 0.001 to 1, one step at each rate, as the lecture does, and
prints the mean loss of every twentieth of the steps. The suggestion is the rate of the row with the lowest loss; for
the one-cycle schedule it is the peak (`wavenet-conv train --lr`). It is normal that the loss explodes at high rates.
Of a preset's teachers only n-grams teach here, so the losses are not those of the training.
"""

FIXED = {"schedule": "constant", "ema_decay": 0.0, "drawn": 0}  # no networks teach here


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv find-lr`."""
    command = add_command(commands, find_lr, "find a learning rate for a list of names", DESCRIPTION)
    add_list(command)
    add_recipe(command, "optimizer", "batch_size", "steps", "seed")
    command.set_defaults(steps=1000)
    add_device(command)
    command.add_argument("--plot", metavar="FILE", help="write the loss against the rate as a picture")
    command.add_argument("--json", dest="as_json", action="store_true", help="the results as one line of JSON")


def find_lr(
    file: str, *, end: str | None, preset: str, device: str, plot: str | None, as_json: bool, **settings: Any
) -> None:
    """Run the command; `settings` are fields of `Recipe`. Raises `TrainingError` where no loss is finite."""
    from ..plots import check_plot, plot_rates
    from ..training import Trainer, new_model

    if plot:
        check_plot(plot)
    _, vocab, parts, _ = training_list(file, end)
    config, recipe = configured(preset, len(vocab), settings | FIXED)
    trainer = Trainer(new_model(config, recipe.seed, device_of(device)), vocab, *parts[:2], recipe)
    rows = []
    if not as_json:
        print("learning rate  loss (nats)")
    for rate, loss in try_rates(trainer):
        rows.append((rate, loss))
        if not as_json:
            print(f"{rate:13.2e}  {loss:11.4f}", flush=True)
    finite = [row for row in rows if isfinite(row[1])]
    if not finite:
        raise TrainingError(f"{file}: no learning rate gave a finite loss; try another --preset or --batch-size")
    rate, loss = min(finite, key=lambda row: row[1])
    if plot:
        plot_rates(plot, rates(recipe.steps)[: trainer.step].tolist(), trainer.losses, rate)
    if as_json:
        print(json.dumps({"suggestion": rate, "rows": finite, "steps_taken": trainer.step, "steps": recipe.steps}))
        return
    if trainer.step < recipe.steps:
        print(f"ended after {trainer.step:,} of {recipe.steps:,} steps: the loss exploded")
    print(f"suggestion: --lr {rate:.2g}, where the loss is lowest ({loss:.4f} nats); with one-cycle it is the peak")


def rates(steps: int) -> torch.Tensor:
    """The learning rate of each step: `(steps,)` float64, with evenly spaced logarithms."""
    import torch

    return 10 ** torch.linspace(*EXPONENTS, steps, dtype=torch.float64)


def try_rates(trainer: Trainer) -> Iterator[tuple[float, float]]:
    """Take one step at each of `rates`; yield the geometric mean of the rates and the mean loss of each part of them.

    There are at most `ROWS` parts. Ends after the first whose loss is NaN or `EXPLODED` times the lowest before it.
    """
    import torch

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
