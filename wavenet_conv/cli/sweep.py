"""`wavenet-conv sweep`: many trainings with settings that Optuna draws, resumable, in one process or in many."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import gettempdir
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, TrainingError, UsageError, WaveNetConvError
from ..recipe import split_names
from .options import add_command, add_device, check_output, device_of, positive, training_names

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

    from ..training import Trainer
    from .progress import Progress

SHOWN = 10  # trials in the table
SQLITE_WAIT = 60  # seconds for another process to end its transaction

DESCRIPTION = """\
Trains with many settings, drawn by Optuna from SPACE.toml, and ranks the trials by the lowest validation loss. A trial
that is worse than the median of the earlier ones at the same step is stopped early. In SPACE.toml, `preset` names what
to start from; every other key is a field of Recipe or of WaveNetConfig: a plain value is fixed,
{low = 1e-3, high = 3e-2, log = true} is a range, and {choices = [128, 256]} a list to choose from.

Trials are kept in the storage: the same command adds those missing up to --trials, and several processes may run it at
once. In one process the same seed draws the same trials again. --output trains the best trial once more, to the same
bits on the same machine with the same number of threads.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv sweep`."""
    command = add_command(commands, sweep, "train with many settings and keep the best", DESCRIPTION)
    command.set_defaults(hint="; start again with the same arguments to continue")
    add = command.add_argument
    add("space", metavar="SPACE.toml", help="what is fixed and what is drawn; 'default' is the one in the package")
    add("file", metavar="LIST", help="one name per line, UTF-8")
    add("--trials", type=positive, default=30, metavar="N", help="trials in all, those of earlier runs included (30)")
    add("--storage", default="sqlite:///sweep.db", metavar="URL", help="where trials are kept (sqlite:///sweep.db)")
    add("--study", default="sweep", metavar="NAME", help="which of the storage's sweeps this is (sweep)")
    add_device(command)
    add("--output", metavar="FILE", help="write the best trial's checkpoint")
    add("--json", dest="as_json", action="store_true", help="all trials, best first, as one line of JSON")


def sweep(
    space: str,
    file: str,
    *,
    trials: int = 30,
    storage: str = "sqlite:///sweep.db",
    study: str = "sweep",
    device: str = "auto",
    output: str | None = None,
    as_json: bool = False,
) -> None:
    """Run `wavenet-conv sweep`; the arguments are its options.

    Raises `UsageError` for what cannot be started, and other `WaveNetConvError`s after that.
    """
    from .progress import Progress

    if output:
        check_output(output, file, space)
    work = Work(space, file, storage, study, device)
    with Progress(trials, every_update=True) as progress:
        with _storage_errors(OutputError, storage, "fix that and start again to continue"):
            work.run(trials, progress)
            done = work.counted()
        rows = [work.row(trial) for trial in done]
        if done[0].state.name != "COMPLETE":
            raise TrainingError(f"none of {len(done)} trials came to its end; the first: {rows[0]['state']}")
        if output:
            work.save(done[0], output, progress)
    if as_json:
        print(json.dumps({"study": study, "trials": rows}))
    else:
        _print_table(rows)


class Work:
    """One process's part of a sweep: the space, the list and the study."""

    def __init__(self, space: str, file: str, storage: str, study: str, device: str):
        from ..vocabulary import Vocabulary
        from .resumable import sha256_of

        with _storage_errors(UsageError, f"--storage {storage}", "give another one, such as sqlite:///sweep.db"):
            from .space import Space

            self.space, self.device, self.name = Space.read(space), device_of(device), study
            names = training_names(file)
            self.train, self.valid, _ = split_names(names)
            self.vocab = Vocabulary.from_names(names)
            identity = {"names_sha256": sha256_of(names), "preset": self.space.preset}
            self.study = self._study(storage, json.loads(json.dumps(identity | self.space.fixed | self.space.ranges)))

    def _study(self, storage: str, identity: dict[str, Any]) -> Study:
        """The study, new or as it is in the storage; its trials must be comparable with this sweep's."""
        import optuna
        from filelock import FileLock

        from .resumable import differences, sha256_of

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        waits = {"connect_args": {"timeout": SQLITE_WAIT}} if storage.startswith("sqlite") else {}
        # While the learning rate still rises, losses say little.
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=int(identity["warmup"] * identity["steps"]))
        # Optuna creates tables without a lock, and fails where another process does so at the same moment.
        lock = f"wavenet-conv-sweep-{sha256_of([os.getcwd(), storage])[:16]}.lock"
        with FileLock(Path(gettempdir(), lock)):
            database = optuna.storages.RDBStorage(storage, engine_kwargs=waits)
            study = optuna.create_study(storage=database, study_name=self.name, pruner=pruner, load_if_exists=True)
            before = study.user_attrs.get("sweep", {})
            if not before and not study.trials:
                study.set_user_attr("sweep", before := identity)
        if before != identity:
            raise UsageError(
                f"--study {self.name}: {storage} has a sweep of that name with other settings "
                f"({differences(before, identity)}); give another --study"
            )
        return study

    def counted(self) -> list[FrozenTrial]:
        """The trials that ended, best first, and then those stopped early; not those that run or were killed."""
        trials = [
            trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED")
        ]
        return sorted(trials, key=lambda trial: (trial.state.name, trial.value or 0.0))

    def run(self, trials: int, progress: Progress) -> None:
        """Run trials until there are enough."""

        def show(study: Study, _: FrozenTrial) -> None:
            done = self.counted()
            ended = done[0].state.name == "COMPLETE"
            best = f", best {done[0].value:.4f} nats (trial {done[0].number})" if ended else ""
            progress.update(len(done), f"{len(done):,} of {trials:,} trials{best}")
            if len(done) >= trials:
                study.stop()

        if len(self.counted()) < trials:
            self.study.optimize(self._loss, callbacks=[show])

    def _loss(self, trial: Trial) -> float:
        """The lowest validation loss of a trial; keeps what it measures in the trial."""
        import optuna
        import torch

        from ..training import evaluate, run

        # By number, so that neither a resumed sweep nor another process draws the same again.
        seed = (self.space.fixed["seed"] * 1_000_003 + trial.number) % 2**32
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        begin, trainer, state = monotonic(), self.trainer(self.space.draw(trial)), "ended"

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
        measured = {
            "state": state,
            "train_loss": evaluate(trainer.model, trainer.train_corpus) if state == "ended" else None,
            "best_step": trainer.best_step,
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "seconds": round(monotonic() - begin, 1),
        }
        trial.set_user_attr("measured", measured)
        if state != "ended":
            raise optuna.TrialPruned
        return trainer.best_loss

    def trainer(self, drawn: dict[str, Any]) -> Trainer:
        """A training with the settings drawn, before its first step."""
        from ..training import Trainer, new_model

        config, recipe = self.space.configured(drawn, len(self.vocab))
        return Trainer(new_model(config, recipe.seed, self.device), self.vocab, self.train, self.valid, recipe)

    def row(self, trial: FrozenTrial) -> dict[str, Any]:
        """A trial as --json prints it."""
        losses = {"validation_loss": trial.value, "validations": sorted(trial.intermediate_values.items())}
        return {"trial": trial.number, **losses, **trial.user_attrs["measured"], "settings": self.space.drawn(trial)}

    def save(self, trial: FrozenTrial, output: str, progress: Progress) -> None:
        """Train a trial again, since no process keeps weights, and write its checkpoint."""
        from ..training import run
        from .resumable import save_trained

        progress.say(f"training trial {trial.number} again for {output}")
        trainer = self.trainer(self.space.drawn(trial))
        run(trainer)
        if trainer.best_loss != trial.value:
            progress.say(f"its loss is {trainer.best_loss:.6f} nats, with other bits than in the trial")
        notes = {
            "preset": self.space.preset,
            "study": self.name,
            **self.row(trial),
            "validation_loss": trainer.best_loss,
        }
        notes |= asdict(trainer.model.config) | asdict(trainer.recipe)
        save_trained(output, trainer.model, self.vocab, self.train, notes)


def _print_table(rows: list[dict[str, Any]]) -> None:
    ended = [row for row in rows if row["state"] == "ended"]
    print("trial  validation   train    step  seconds  parameters  settings")
    for row in ended[:SHOWN]:
        drawn = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["settings"].items())
        print(
            f"{row['trial']:5}  {row['validation_loss']:10.4f}  {row['train_loss']:6.4f}  {row['best_step']:6,}  "
            f"{row['seconds']:7.1f}  {row['parameters']:10,}  {drawn}"
        )
    print(f"{len(ended):,} trials ended, {len(rows) - len(ended):,} were stopped early or broke down")


@contextmanager
def _storage_errors(kind: type[WaveNetConvError], where: str, fix: str) -> Iterator[None]:
    """Raises as `kind` what Optuna and its databases raise, and as `UsageError` that a module is missing."""
    try:
        import optuna
        import sqlalchemy

        yield
    except ImportError as error:
        missing = f"a sweep needs {error.name}: pip install {error.name}"
        raise UsageError(missing if error.name else f"{where}: {error}") from error
    except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError) as error:
        complaint = str(error.__cause__ or error).splitlines()[0]
        raise kind(f"{where}: {complaint}; {fix}") from error
