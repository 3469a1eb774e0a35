"""`wavenet-conv sweep`: many trainings with settings that Optuna draws, resumable, in one process or in many."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, TrainingError, UsageError, WaveNetConvError
from ..training.recipe import split_names
from .options import add_command, add_device, check_output, device_of, positive, training_names

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

    from ..training import Trainer
    from .progress import Progress
    from .space import Space

SHOWN = 10  # trials in the table
SQLITE_WAIT = 60  # seconds for another process to end its transaction
TABLES_ATTEMPTS, TABLES_WAIT = 20, 0.5  # for processes that create one storage at the same moment

DESCRIPTION = """\
Trains with many settings, drawn by Optuna from SPACE.toml ('default' is the one in the package), on LIST, split as in
the lecture, and ranks the trials by the lowest validation loss. A trial that is worse than the median of the earlier
ones at the same step is stopped early. In SPACE.toml, `preset` names what to start from; every other key is a field of
Recipe or of WaveNetConfig: a plain value is fixed, {low = 1e-3, high = 3e-2, log = true} is a range, and
{choices = [128, 256]} a list to choose from.

Trials are kept in the storage: the same command adds the trials that are missing up to --trials. Killed trials do not
count. To use several processes or machines, start the same command in each with one storage; trials that run while
another process completes --trials still end. In one process the same seed draws the same trials again.

--output trains the best trial once more, to the same bits on the same machine, and writes its checkpoint.

Exit code 0 when done, 1 for a failed job, 2 for wrong usage, 130 for Ctrl-C.
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
    add("--plot", metavar="FILE", help="write the losses of all trials as a picture")
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
    plot: str | None = None,
    as_json: bool = False,
) -> None:
    """Run `wavenet-conv sweep`; the arguments are its options.

    Raises `UsageError` for what cannot be started, and other `WaveNetConvError`s after that.
    """
    from .progress import Progress

    if output:
        check_output(output, file, space)
    if plot:
        from ..plots import check_plot

        check_plot(plot)
    work = Work(space, file, storage, study, device)
    with Progress(trials, every_update=True) as progress:
        work.run(trials, progress)
    done = work.counted()
    best = ranked(done)
    rows = [_row(work.space, trial) for trial in best + [trial for trial in done if trial not in best]]
    if plot:
        from ..plots import plot_trials

        plot_trials(plot, [(f"trial {row['trial']}", *row["curves"].values()) for row in rows])
    if not best:
        reasons = [trial.user_attrs["measured"].get("broke_down", "stopped early") for trial in done]
        raise TrainingError(f"none of {len(done)} trials came to its end; the first: {reasons[0]}")
    if output:
        work.save(best[0], output, progress)
    if as_json:
        print(json.dumps({"study": study, "trials": rows}))
    else:
        _print_table(rows, len(best))


class Work:
    """One process's part of a sweep: the space, the list and the study."""

    def __init__(self, space: str, file: str, storage: str, study: str, device: str):
        from ..vocabulary import Vocabulary
        from .space import Space, imported

        self.optuna, self.space, self.device = imported("optuna"), Space.read(space), device_of(device)
        names = training_names(file)
        self.train, self.valid, _ = split_names(names)
        self.vocab, self.storage, self.name = Vocabulary.from_names(names), storage, study
        with _storage_errors(UsageError, f"--storage {storage}", "give another one, such as sqlite:///sweep.db"):
            self.study = self._study()
        self._claim(names)

    def _study(self) -> Study:
        optuna, fixed = self.optuna, self.space.fixed
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        waits = {"connect_args": {"timeout": SQLITE_WAIT}} if self.storage.startswith("sqlite") else {}
        # While the learning rate still rises, losses say little.
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=int(fixed["warmup"] * fixed["steps"]))
        attempt = 1
        while True:
            try:
                storage = optuna.storages.RDBStorage(self.storage, engine_kwargs=waits)
                return optuna.create_study(storage=storage, study_name=self.name, pruner=pruner, load_if_exists=True)
            except Exception as error:  # each database has its own
                # Optuna creates tables without a lock, so another process may have created one meanwhile.
                complaint = f"{type(error).__name__} {error} {error.__cause__}"
                if attempt == TABLES_ATTEMPTS or not re.search("already exists|IntegrityError", complaint):
                    raise
            attempt += 1
            sleep(TABLES_WAIT)

    def _claim(self, names: list[str]) -> None:
        """Raises `UsageError` for a study whose trials cannot be compared with this sweep's."""
        from .resumable import sha256_of

        space = self.space
        run = {"names_sha256": sha256_of(names), "preset": space.preset, **space.fixed, **space.ranges}
        run = json.loads(json.dumps(run))
        with self.storage_errors():
            before = self.study.user_attrs.get("sweep", {})
            if not before and not self.study.get_trials(deepcopy=False):
                self.study.set_user_attr("sweep", run)
                return
        differ = [name for name in {**before, **run} if before.get(name) != run.get(name)]
        if differ:
            listed = "; ".join(f"{name} was {before.get(name)} and is {run.get(name)}" for name in differ)
            raise UsageError(
                f"--study {self.name}: {self.storage} has a sweep of that name with other settings ({listed}); "
                "give another --study"
            )

    def storage_errors(self) -> Any:
        """A context for what reads or writes the storage."""
        return _storage_errors(OutputError, self.storage, "fix that and start again to continue")

    def counted(self) -> list[FrozenTrial]:
        """The trials that count: not those that run, or were killed."""
        states = self.optuna.trial.TrialState
        with self.storage_errors():
            return self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))

    def run(self, trials: int, progress: Progress) -> None:
        """Run trials until there are enough."""

        def show(study: Study, _: FrozenTrial) -> None:
            done = self.counted()
            best = "".join(f", best {t.value:.4f} nats (trial {t.number})" for t in ranked(done)[:1])
            progress.update(len(done), f"{len(done):,} of {trials:,} trials{best}")
            if len(done) >= trials:
                study.stop()

        if len(self.counted()) < trials:
            with self.storage_errors():
                self.study.optimize(self._loss, callbacks=[show])

    def _loss(self, trial: Trial) -> float:
        """The lowest validation loss of a trial; keeps what it measures in the trial."""
        import torch

        from ..training import evaluate, run

        # By number, so that neither a resumed sweep nor another process draws the same again.
        seed = (self.space.fixed["seed"] * 1_000_003 + trial.number) % 2**32
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed)
        begin, trainer, stopped = monotonic(), self.trainer(self.space.draw(trial)), False
        curves: dict[str, list[tuple[int, float]]] = {"train": [], "validation": trainer.validations}
        measured: dict[str, Any] = {"threads": torch.get_num_threads(), "parameters": _parameters(trainer)}

        def report(trainer: Trainer) -> bool:
            nonlocal stopped
            since = curves["train"][-1][0] if curves["train"] else 0
            curves["train"].append((trainer.step, float(torch.stack(trainer.losses[since:]).mean())))
            trial.report(trainer.validations[-1][1], trainer.step)
            stopped = not trainer.finished and trial.should_prune()
            return stopped

        try:
            run(trainer, on_validation=report)
        except (TrainingError, torch.OutOfMemoryError) as error:
            stopped, measured["broke_down"] = True, str(error)
        if not stopped:
            measured["train_loss"] = evaluate(trainer.model, trainer.train_corpus)
        measured |= {"best_step": trainer.best_step, "seconds": round(monotonic() - begin, 1), "curves": curves}
        trial.set_user_attr("measured", measured)
        if stopped:
            raise self.optuna.TrialPruned
        return trainer.best_loss

    def trainer(self, drawn: dict[str, Any]) -> Trainer:
        """A training with the settings drawn, before its first step."""
        from ..training import Trainer, new_model

        config, recipe = self.space.configured(drawn, len(self.vocab))
        return Trainer(new_model(config, recipe.seed, self.device), self.vocab, self.train, self.valid, recipe)

    def save(self, trial: FrozenTrial, output: str, progress: Progress) -> None:
        """Train a trial again, since no process keeps weights, and write its checkpoint."""
        import torch

        from ..training import evaluate, run
        from .resumable import save_trained

        progress.say(f"training trial {trial.number} again for {output}")
        threads, trainer = torch.get_num_threads(), self.trainer(self.space.settings(trial))
        torch.set_num_threads(trial.user_attrs["measured"]["threads"])  # on which the last bits depend
        run(trainer)
        torch.set_num_threads(threads)
        if trainer.best_loss != trial.value:
            progress.say(
                f"its loss is {trainer.best_loss:.6f} nats, in the trial {trial.value:.6f}: another machine's bits"
            )
        notes = {
            "preset": self.space.preset,
            "study": self.name,
            "trial": trial.number,
            **asdict(trainer.model.config),
            **asdict(trainer.recipe),
            "train_loss": evaluate(trainer.model, trainer.train_corpus),
            "validation_loss": trainer.best_loss,
            "best_step": trainer.best_step,
            "parameters": _parameters(trainer),
        }
        save_trained(output, trainer.model, self.vocab, self.train, notes)


def ranked(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that came to their end, best first."""
    return sorted((trial for trial in trials if trial.state.name == "COMPLETE"), key=lambda trial: trial.value or 0.0)


def _print_table(rows: list[dict[str, Any]], ended: int) -> None:
    print("trial  validation   train    step  seconds  parameters  settings")
    for row in rows[: min(SHOWN, ended)]:
        drawn = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["settings"].items())
        print(
            f"{row['trial']:5}  {row['validation_loss']:10.4f}  {row['train_loss']:6.4f}  {row['best_step']:6,}  "
            f"{row['seconds']:7.1f}  {row['parameters']:10,}  {drawn}"
        )
    broken = sum(row["state"] == "broke down" for row in rows)
    print(f"{ended:,} trials ended, {len(rows) - ended - broken:,} were stopped early, {broken:,} broke down")


def _row(space: Space, trial: FrozenTrial) -> dict[str, Any]:
    measured = trial.user_attrs["measured"]
    ended = "ended" if trial.state.name == "COMPLETE" else "stopped early"
    return {
        "trial": trial.number,
        "state": "broke down" if "broke_down" in measured else ended,
        "validation_loss": trial.value,
        **{name: measured.get(name) for name in ("train_loss", "best_step", "seconds", "parameters", "threads")},
        "settings": space.settings(trial),
        "curves": measured["curves"],
    }


def _parameters(trainer: Trainer) -> int:
    return sum(parameter.numel() for parameter in trainer.model.parameters())


@contextmanager
def _storage_errors(kind: type[WaveNetConvError], where: str, fix: str) -> Iterator[None]:
    """Raises as `kind` what Optuna and its databases raise."""
    from .space import imported

    optuna, sqlalchemy = imported("optuna"), imported("sqlalchemy")
    driver = (ImportError,) if kind is UsageError else ()
    try:
        yield
    except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, *driver) as error:
        complaint = str(error.__cause__ or error).splitlines()[0]
        raise kind(f"{where}: {complaint}; {fix}") from error
