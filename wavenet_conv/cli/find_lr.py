"""`wavenet-conv find-lr`: one step at each learning rate from low to high, and the rate where the loss is lowest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, TrainingError
from ..training.recipe import PRESETS, split_names
from .options import add_command, add_device, device_of, training_names, usage_errors

if TYPE_CHECKING:
    import torch

    from ..training import Trainer

EXPONENTS = (-3.0, 0.0)  # the lecture's
ROWS = 20
EXPLODED = 4  # times the lowest loss

DESCRIPTION = """\
Trains a new model with a learning rate that grows from 0.001 to 1, one step at each rate, as the lecture does, and
prints the mean loss of every twentieth of the steps. The suggestion is the rate of the row with the lowest loss, the
valley before the loss rises. For the one-cycle schedule it is the peak (`wavenet-conv train --lr`). The run ends early
where the loss is NaN or explodes, which is normal at high rates.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv find-lr`."""
    command = add_command(commands, find_lr, "find a learning rate for a list of names", DESCRIPTION)
    add = command.add_argument
    add("file", metavar="FILE", help="one name per line, UTF-8")
    add("--preset", choices=list(PRESETS), default="fast", help="model and recipe to start from (fast)")
    add("--optimizer", choices=("adamw", "sgd"), help="in place of the preset's")
    add("--batch-size", type=int, metavar="N", help="names per step, in place of the preset's")
    add("--steps", type=int, default=1000, metavar="N", help="learning rates to try (1000)")
    add("--seed", type=int, metavar="N", help="in place of the preset's")
    add_device(command)
    add("--plot", metavar="FILE", help="write the loss against the rate as a picture")
    add("--json", dest="as_json", action="store_true", help="the results as one line of JSON")


def find_lr(
    file: str,
    *,
    preset: str = "fast",
    device: str = "auto",
    plot: str | None = None,
    as_json: bool = False,
    **settings: Any,
) -> None:
    """Run `wavenet-conv find-lr`; `settings` are fields of `Recipe`, of which None leaves the preset's.

    Raises `UsageError` for what cannot be started, `TrainingError` where no loss is finite.
    """
    if plot:
        from ..plots import check_plot

        check_plot(plot)
    trainer = _trainer(training_names(file), preset, device, settings)
    if not as_json:
        print(f"{'learning rate':>13}  {'loss (nats)':>11}")
    rows = []
    for rate, loss in try_rates(trainer):
        rows.append((rate, loss))
        if not as_json:
            print(f"{rate:13.2e}  {loss:11.4f}", flush=True)
    rate, loss = min(rows, key=lambda row: row[1] if isfinite(row[1]) else inf)
    if not isfinite(loss):
        raise TrainingError(f"{file}: no learning rate gave a finite loss; try another --preset or --batch-size")
    if plot:
        from ..plots import plot_rates

        plot_rates(plot, rates(trainer.recipe.steps)[: trainer.step].tolist(), trainer.losses, rate)
    if as_json:
        _print_json(trainer, preset, rows, rate)
        return
    if trainer.step < trainer.recipe.steps:
        print(f"ended after {trainer.step:,} of {trainer.recipe.steps:,} steps: the loss exploded")
    print(f"suggestion: --lr {rate:.2g}, where the loss is lowest ({loss:.4f} nats); with one-cycle it is the peak")
    if rate == rows[-1][0]:
        print("the loss has not risen yet at the highest rate, so a higher one may do too")


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


def _trainer(names: list[str], preset: str, device: str, settings: dict[str, Any]) -> Trainer:
    from ..model import WaveNetConfig
    from ..training import Trainer, new_model
    from ..vocabulary import Vocabulary

    shape, recipe = PRESETS[preset]
    given = {name: value for name, value in settings.items() if value is not None}
    with usage_errors(ConfigError):
        recipe = replace(recipe, schedule="constant", ema_decay=0.0, patience=0, **given)
    vocab = Vocabulary.from_names(names)
    model = new_model(WaveNetConfig(vocab_size=len(vocab), **shape), recipe.seed, device_of(device))
    return Trainer(model, vocab, *split_names(names)[:2], recipe)


def _print_json(trainer: Trainer, preset: str, rows: list[tuple[float, float]], suggestion: float) -> None:
    recipe = trainer.recipe
    results = {
        "suggestion": suggestion,
        "rates": [rate for rate, _ in rows],
        "losses": [loss if isfinite(loss) else None for _, loss in rows],
        "steps_taken": trainer.step,
        **{name: getattr(recipe, name) for name in ("steps", "optimizer", "batch_size", "seed")},
        "preset": preset,
    }
    print(json.dumps(results))
