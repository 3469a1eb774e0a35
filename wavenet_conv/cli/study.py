"""The trials of a sweep: what they train with, read from TOML, and the Optuna study that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import gettempdir
from time import monotonic
from typing import Any

import optuna
import sqlalchemy
import torch
from filelock import FileLock
from optuna.trial import FrozenTrial, Trial, TrialState

from ..errors import TrainingError, UsageError, WaveNetConvError
from ..names import sha256_of
from ..recipe import PRESETS, Recipe
from ..training import Trainer, run
from .options import configured, device_of, output_errors, training_list
from .progress import Progress
from .resumable import build, differences, results_of, save_trained

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SQLITE_WAIT = 60  # seconds for another process to end its transaction
DEFAULT = Path(__file__).parent.parent / "sweep.toml"

NOT_SETTINGS = ("ngram_share", "drawn")  # of a recipe: trials have no networks as teachers, only n-grams, or none
# name: the types that a setting may have in TOML; a float may be written as an integer.
SETTINGS: dict[str, tuple[type, ...]] = {
    **{field.name: (type(field.default), int) for field in fields(Recipe) if field.name not in NOT_SETTINGS},
    "n_embd": (int,),
    "n_hidden": (int, list),
    "kernel_sizes": (list,),
    **dict.fromkeys(("norm", "activation"), (str, list)),
    **dict.fromkeys(("bias", "gated"), (bool,)),
    "head_kernel_size": (int,),
    "head_norm": (str,),
}


def read_space(path: str) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """A TOML file, or "default": the preset, the settings without what is drawn, and the ranges of that.

    Raises `UsageError` naming the file, the key and the fix.
    """
    try:
        found = tomllib.loads((DEFAULT if path == "default" else Path(path)).read_bytes().decode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: {reason}; give a TOML file in UTF-8, or 'default'") from error
    preset = found.pop("preset", "fast")
    if preset not in list(PRESETS):
        raise UsageError(f"{path}: preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    for name, value in found.items():
        if name not in SETTINGS:
            raise UsageError(f"{path}: {name} is not a setting; the settings are {', '.join(SETTINGS)}")
        if not _is_valid(name, value):
            fix = "{choices = [...]}, or {low = ..., high = ...} with low <= high and, if log = true, low above 0"
            kind = SETTINGS[name][0].__name__
            raise UsageError(f"{path}: {name} is {value!r}; give a value of type {kind}, {fix}")
    shape, recipe = PRESETS[preset]
    ranges = {name: value for name, value in found.items() if isinstance(value, dict)}
    fixed = {name: value for name, value in found.items() if name not in ranges}
    settings = {**asdict(recipe), **shape, **fixed, "drawn": 0}
    if "distill_weight" in found and not settings["ngram_share"]:
        raise UsageError(f"{path}: distill_weight does nothing, since preset {preset!r} has no n-grams; leave it out")
    ends = {name: given.get("choices") or [given["low"], given["high"]] for name, given in ranges.items()}
    first = {name: values[0] for name, values in ends.items()}
    others = (first | {name: value} for name, values in ends.items() for value in values)
    for drawn in (first, *others):  # where the ends of a range are valid, all values between are
        configured(preset, 27, settings | drawn, f"{path}: ")
    return preset, settings, ranges


def _is_valid(name: str, value: Any) -> bool:
    """Whether a value, a range or a list of choices has the setting's type; a range is of numbers, in order."""
    kinds = SETTINGS[name]
    if not isinstance(value, dict):
        return type(value) in kinds
    if value.keys() == {"choices"}:
        choices = value["choices"]
        return isinstance(choices, list) and bool(choices) and all(type(choice) in kinds for choice in choices)
    if not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        return False
    low, high, log = value["low"], value["high"], value.get("log", False)
    if not {type(low), type(high)} <= {int, float}.intersection(kinds) or type(log) is not bool:
        return False
    return low <= high and (low > 0 or not log)


class Work:
    """One process's part of a sweep: the space, the list and the study."""

    def __init__(self, space: str, file: str, end: str | None, storage: str, study: str, device: str):
        with storage_errors(UsageError, f"--storage {storage}", "give another one, such as sqlite:///sweep.db"):
            self.space, (self.preset, self.settings, self.ranges) = space, read_space(space)
            self.names, self.device, self.name = training_list(file, end), device_of(device), study
            identity = {"names_sha256": self.names.sha256, "preset": self.preset, **self.settings, **self.ranges}
            self.study = self._study(storage, json.loads(json.dumps(identity)))

    def _study(self, storage: str, identity: dict[str, Any]) -> optuna.Study:
        """The study, new or as it is in the storage; its trials must be comparable with this sweep's."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        waits = {"connect_args": {"timeout": SQLITE_WAIT}} if storage.startswith("sqlite") else {}
        # While the learning rate still rises, losses say little.
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=int(self.settings["warmup"] * self.settings["steps"]))
        # Optuna creates tables without a lock, and fails where another process does so at the same moment.
        lock = f"wavenet-conv-sweep-{sha256_of([os.getcwd(), storage])[:16]}.lock"
        with FileLock(Path(gettempdir(), lock)):
            database = optuna.storages.RDBStorage(storage, engine_kwargs=waits)
            study = optuna.create_study(storage=database, study_name=self.name, pruner=pruner, load_if_exists=True)
            before = study.user_attrs.get("sweep", {})
            if not before and not study.trials:
                study.set_user_attr("sweep", before := identity)
        if before != identity:
            changed = differences(before, identity)
            raise UsageError(
                f"--study {self.name}: {storage} has it with other settings ({changed}); give another name"
            )
        return study

    def counted(self) -> list[FrozenTrial]:
        """The trials that ended, best first, and then those stopped early; not those that run or were killed."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return sorted(trials, key=lambda trial: (trial.state.name, trial.value or 0.0))

    def run(self, trials: int, progress: Progress) -> None:
        """Run trials until there are enough."""

        def show(study: optuna.Study, _: FrozenTrial) -> None:
            done = self.counted()
            best = f", best {done[0].value:.4f} nats" if done[0].state == TrialState.COMPLETE else ""
            progress.update(len(done), f"{len(done):,} of {trials:,} trials{best}")
            if len(done) >= trials:
                study.stop()

        if len(self.counted()) < trials:
            self.study.optimize(self._loss, callbacks=[show])

    def draw(self, trial: Trial) -> dict[str, Any]:
        """Draw the settings of a trial."""
        for name, given in self.ranges.items():
            if "choices" in given:  # as JSON, since a storage takes no lists
                trial.suggest_categorical(name, [json.dumps(choice) for choice in given["choices"]])
            else:
                suggest: Any = trial.suggest_float if float in SETTINGS[name] else trial.suggest_int
                suggest(name, given["low"], given["high"], log=given.get("log", False))
        return {name: json.loads(v) if "choices" in self.ranges[name] else v for name, v in trial.params.items()}

    def _loss(self, trial: Trial) -> float:
        """The lowest validation loss of a trial; keeps in the trial the row that --json prints."""
        # By number, so that neither a resumed sweep nor another process draws the same again.
        seed = (self.settings["seed"] * 1_000_003 + trial.number) % 2**32
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        begin, settings, state = monotonic(), self.draw(trial), "ended"
        trainer = self.trainer(settings)

        def report(trainer: Trainer) -> bool:
            nonlocal state
            trial.report(trainer.validations[-1][1], trainer.step)
            if not trainer.finished and trial.should_prune():
                state = "stopped early"
            return state != "ended"

        try:
            run(trainer, on_validation=report)
        except (TrainingError, torch.OutOfMemoryError) as error:
            state = str(error)
        row = {
            "trial": trial.number,
            "state": state,
            "settings": settings,
            "seconds": round(monotonic() - begin, 1),
            "validations": trainer.validations,
            **(results_of(trainer) if state == "ended" else {}),
        }
        trial.set_user_attr("row", row)
        if state != "ended":
            raise optuna.TrialPruned
        return trainer.best_loss

    def trainer(self, drawn: dict[str, Any]) -> Trainer:
        """A training with the settings drawn, before its first step; raises as `build` does."""
        vocab, parts = self.names.vocab, self.names.parts
        config, recipe = configured(self.preset, len(vocab), self.settings | drawn)
        model = build(config, recipe.seed, self.device, where=f"{self.space}: ")
        return Trainer(model, vocab, *parts[:2], recipe)

    def save(self, row: dict[str, Any], output: str) -> None:
        """Train the trial of a row again, since no process keeps weights, and write its checkpoint."""
        trainer = self.trainer(row["settings"])
        run(trainer)
        notes = row | asdict(trainer.model.config) | asdict(trainer.recipe)
        notes |= {"validation_loss": trainer.best_loss, "preset": self.preset, "study": self.name}
        with output_errors(output, "fix that and start again to continue"):
            save_trained(output, trainer.model, self.names, notes)


@contextmanager
def storage_errors(kind: type[WaveNetConvError], where: str, fix: str) -> Iterator[None]:
    """Raise as `kind` what Optuna and its databases raise."""
    try:
        yield
    except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        complaint = str(error.__cause__ or error).splitlines()[0]
        raise kind(f"{where}: {complaint}; {fix}") from error
