"""`wavenet-conv sweep`: many trainings with settings that Optuna draws, resumable, in one process or in many."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import threading
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from .arguments import check_output, device_of, training_names
from .errors import ConfigError, OutputError, TrainingError, UsageError, WaveNetConvError
from .model import ConvWaveNet, WaveNetConfig
from .train_command import save_trained
from .training import PRESETS, Recipe, Trainer, evaluate, split_names
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

DEFAULT_SPACE = Path(__file__).parent / "sweep.toml"
SHOWN = 10  # trials in the table
SQLITE_WAIT = 60  # seconds for another process to end its transaction
TABLES_ATTEMPTS, TABLES_WAIT = 20, 0.5  # for processes that begin one storage at the same moment

DESCRIPTION = """\
Trains with many settings, drawn by Optuna from SPACE.toml ('default' is the one in the package), on LIST, split as in
the lecture, and ranks the trials by the lowest validation loss. A trial that does worse than the median of the earlier
ones at the same step is given up. In SPACE.toml, `preset` names what to start from; every other key is a field of
Recipe or of WaveNetConfig: a plain value is fixed, {low = 1e-3, high = 3e-2, log = true} is a range, and
{choices = [128, 256]} a list to choose from.

The storage remembers: started again, a sweep adds the trials that are missing up to --trials in all. Trials that were
killed do not count. Several processes and machines may share one storage; those that are at a trial when the others
have reached --trials still end it. With one worker the same seed draws the same trials again.

--output trains the best trial once more, to the same bits on the same machine, and writes its checkpoint.

Exit code 0 when done, 1 for a failed job, 2 for wrong usage, 130 for Ctrl-C.
"""

# name: the types that a setting may have in TOML; a float may be written as an integer
SETTINGS: dict[str, tuple[type, ...]] = {
    **{field.name: (type(field.default),) for field in fields(Recipe)},
    **{"n_embd": (int,), "n_hidden": (int, list), "kernel_sizes": (list,)},
    **{"batch_norm": (bool,), "bias": (bool,), "gated": (bool,)},
}


def add_parser(commands: Any) -> None:
    """The options of `wavenet-conv sweep`."""
    command = commands.add_parser(
        "sweep",
        help="train with many settings and keep the best",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("space", metavar="SPACE.toml", help="what is fixed and what is drawn; 'default' is the one in the package")
    add("file", metavar="LIST", help="one name a line, UTF-8")
    add("--trials", type=int, default=30, metavar="N", help="trials in all, those of earlier runs included (30)")
    add("--storage", default="sqlite:///sweep.db", metavar="URL", help="where trials are kept (sqlite:///sweep.db)")
    add("--study", default="sweep", metavar="NAME", help="which of the storage's sweeps this is (sweep)")
    add("--workers", type=int, default=1, metavar="N", help="processes, which share PyTorch's threads (1)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute (auto: cuda where it is)")
    add("--output", metavar="FILE", help="write the best trial's checkpoint")
    add("--plot", metavar="FILE", help="write the losses of all trials as a picture")
    add("--json", action="store_true", help="all trials, best first, as one line of JSON")


def sweep(options: Namespace) -> None:
    """Runs `wavenet-conv sweep`; raises `UsageError` for what cannot be begun, its relatives after that."""
    for name in ("trials", "workers"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.output:
        check_output(options.output, options.file, options.space)
    if options.plot:
        from .plots import check_plot

        check_plot(options.plot)
    work = Work(options)
    say = Console(stderr=True, highlight=False, soft_wrap=True)
    missing = options.trials - len(work.counted())
    with say.status("training") if say.is_terminal else nullcontext(), closing(_trials(work, missing)) as trials:
        for _ in trials:
            done = work.counted()
            best = "".join(f", best {t.value:.4f} nats (trial {t.number})" for t in _ranked(done)[:1])
            say.print(f"{len(done):,} of {options.trials:,} trials{best}")
    _finish(work, say)


@dataclass(frozen=True)
class Space:
    """What a sweep trains with. fixed: the preset and what the file changes. ranges: what is drawn, as in the file."""

    where: str
    preset: str
    fixed: dict[str, Any]
    ranges: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: str) -> Space:
        """The space in a TOML file, or `"default"`; raises `UsageError` naming the file, the key and the mend."""
        tomllib = _imported("tomllib", "tomli")
        try:
            found = tomllib.loads((DEFAULT_SPACE if path == "default" else Path(path)).read_bytes().decode())
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}; give a TOML file, or 'default'") from error
        except ValueError as error:
            raise UsageError(f"{path}: not TOML in UTF-8 ({error}); mend it there") from error
        preset = found.pop("preset", "fast")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UsageError(f"{path}: preset is {preset!r}; it is one of {', '.join(PRESETS)}")
        shape, recipe = PRESETS[preset]
        ranges = {name: value for name, value in found.items() if isinstance(value, dict)}
        fixed = {name: value for name, value in found.items() if name not in ranges}
        space = cls(path, preset, {**asdict(recipe), **shape, **fixed}, ranges)
        space._check(fixed)
        return space

    def configured(self, drawn: dict[str, Any], vocab_size: int) -> tuple[WaveNetConfig, Recipe]:
        """Model and recipe with the settings that were drawn; raises `UsageError` where they do not fit together."""
        settings = self.fixed | drawn
        recipe = {field.name: settings.pop(field.name) for field in fields(Recipe)}
        try:
            return WaveNetConfig(vocab_size=vocab_size, **settings), Recipe(**recipe)
        except ConfigError as error:
            raise UsageError(f"{self.where}: {error}") from error

    def draw(self, trial: Trial) -> dict[str, Any]:
        """The settings of a trial."""
        drawn: dict[str, Any] = {}
        for name, given in self.ranges.items():
            if "choices" in given:  # as JSON, since a storage takes no lists
                drawn[name] = json.loads(trial.suggest_categorical(name, [json.dumps(c) for c in given["choices"]]))
            else:
                suggest = trial.suggest_int if int in SETTINGS[name] else trial.suggest_float
                drawn[name] = suggest(name, given["low"], given["high"], log=given.get("log", False))
        return drawn

    def settings(self, trial: FrozenTrial) -> dict[str, Any]:
        """The settings that a trial drew."""
        return {name: json.loads(v) if "choices" in self.ranges[name] else v for name, v in trial.params.items()}

    def _check(self, fixed: dict[str, Any]) -> None:
        """Refuses what no trial could be made of; what this lets pass, every trial can."""
        for name in (*fixed, *self.ranges):
            if name not in SETTINGS:
                raise UsageError(f"{self.where}: {name} is not a setting; the settings are {', '.join(SETTINGS)}")
        ends = {name: self._ends(name, given) for name, given in self.ranges.items()}
        for name, values in (*((name, [value]) for name, value in fixed.items()), *ends.items()):
            types = SETTINGS[name]
            for value in values:
                if type(value) not in types and not (type(value) is int and float in types):
                    kinds = " or ".join(kind.__name__ for kind in types)
                    raise UsageError(f"{self.where}: {name} is {value!r}; it must be of type {kinds}")
        recipe = [name for name in ends if hasattr(Recipe, name)]
        shape = [name for name in ends if name not in recipe]
        for values in product(*(ends[name] for name in shape)):  # which fit together or not
            drawn = dict(zip(shape, values)) | {name: ends[name][0] for name in recipe}
            self.configured(drawn, 27)
        for name in recipe:
            for value in ends[name]:
                self.configured(drawn | {name: value}, 27)

    def _ends(self, name: str, given: dict[str, Any]) -> list[Any]:
        """The values that a setting must be right at, to be right in all of its range."""
        choices, low, high, log = (given.get(key) for key in ("choices", "low", "high", "log"))
        if given.keys() == {"choices"} and isinstance(choices, list) and choices:
            return choices
        right = given.keys() <= {"low", "high", "log"} and {type(low), type(high)} <= {int, float}
        if not right or type(log) not in (bool, type(None)) or not low <= high or (log and low <= 0):
            raise UsageError(
                f"{self.where}: {name} is {given}; a range is {{low = 0.1, high = 1.0}} with low <= high, and "
                "log = true only where low is above 0; or {choices = [1, 2]} with at least one"
            )
        return [low, high]


class Work:
    """A process's part of a sweep: the space, the list, the study."""

    def __init__(self, options: Namespace):
        self.options, self.space, self.device = options, Space.read(options.space), device_of(options.device)
        names = training_names(options.file)
        self.train, self.valid, _ = split_names(names)
        self.vocab = Vocabulary.from_names(names)
        self.optuna = _imported("optuna")
        with _storage_errors(
            UsageError, f"--storage {options.storage}", "give another one, such as sqlite:///sweep.db"
        ):
            self.study = self._study()
        run = {"names_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(), "preset": self.space.preset}
        self._claim({**run, **self.space.fixed, **self.space.ranges})

    def _study(self) -> Study:
        optuna, options, fixed = self.optuna, self.options, self.space.fixed
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        waits = {"connect_args": {"timeout": SQLITE_WAIT}} if options.storage.startswith("sqlite") else {}
        # While the learning rate still rises, losses say little.
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=int(fixed["warmup"] * fixed["steps"]))
        for attempt in range(TABLES_ATTEMPTS):
            try:
                storage = optuna.storages.RDBStorage(options.storage, engine_kwargs=waits)
                return optuna.create_study(
                    storage=storage, study_name=options.study, pruner=pruner, load_if_exists=True
                )
            except Exception as error:  # each database has its own
                if attempt == TABLES_ATTEMPTS - 1 or not _made_elsewhere(error):
                    raise
                sleep(TABLES_WAIT)

    def _claim(self, run: dict[str, Any]) -> None:
        """Refuses a study whose trials are not comparable with this sweep's."""
        options, run = self.options, json.loads(json.dumps(run))
        with self.storage_errors():
            before = self.study.user_attrs.get("sweep", {})
            if not before and not self.study.get_trials(deepcopy=False):
                self.study.set_user_attr("sweep", run)
                return
        differ = [name for name in {**before, **run} if before.get(name) != run.get(name)]
        if differ:
            listed = "; ".join(f"{name} {before.get(name)} there, {run.get(name)} here" for name in differ)
            raise UsageError(
                f"--study {options.study}: a sweep with other settings is there in {options.storage} ({listed}); "
                "give this one another --study"
            )

    def storage_errors(self) -> Any:
        """What to have around what reads or writes the storage."""
        return _storage_errors(OutputError, self.options.storage, "mend that and start again to go on")

    def counted(self) -> list[FrozenTrial]:
        """The trials that count: not those that run, or were killed."""
        states = self.optuna.trial.TrialState
        with self.storage_errors():
            return self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))

    def one(self) -> None:
        """Runs a trial, unless there are enough."""
        if len(self.counted()) >= self.options.trials:
            return
        states = self.optuna.trial.TrialState
        with self.storage_errors():
            trial = self.study.ask()
            # By number, so that a sweep that goes on, or another worker, does not draw the same again.
            seed = (self.space.fixed["seed"] * 1_000_003 + trial.number) % 2**32
            self.study.sampler = self.optuna.samplers.TPESampler(seed=seed)
            state, loss = states.FAIL, None
            try:
                loss = self._tried(trial, self.space.draw(trial))
                state = states.PRUNED if loss is None else states.COMPLETE
            finally:
                self.study.tell(trial, loss, state)

    def _tried(self, trial: Trial, drawn: dict[str, Any]) -> float | None:
        """The lowest validation loss, or None where the trial was given up; keeps with it what it measured."""
        begun, trainer = monotonic(), self.trainer(drawn)
        curves: dict[str, list[tuple[int, float]]] = {"train": [], "validation": trainer.validations}
        ended, measured = True, {"threads": torch.get_num_threads(), "parameters": _parameters(trainer.model)}
        try:
            for loss in validations(trainer):
                since = curves["train"][-1][0] if curves["train"] else 0
                curves["train"].append((trainer.step, float(torch.stack(trainer.losses[since:]).mean())))
                trial.report(loss, trainer.step)
                if not trainer.finished and trial.should_prune():
                    ended = False
                    break
        except (TrainingError, torch.OutOfMemoryError) as error:
            ended, measured["broke_down"] = False, str(error)
        if ended:
            measured["train_loss"] = evaluate(best_of(trainer), trainer.train)
        measured |= {"best_step": trainer.best_step, "seconds": round(monotonic() - begun, 1), "curves": curves}
        for name, value in measured.items():
            trial.set_user_attr(name, value)
        return trainer.best_loss if ended else None

    def trainer(self, drawn: dict[str, Any]) -> Trainer:
        """A training with the settings drawn, before its first step."""
        config, recipe = self.space.configured(drawn, len(self.vocab))
        torch.manual_seed(recipe.seed)
        return Trainer(ConvWaveNet(config).to(self.device), self.vocab, self.train, self.valid, recipe)


def _made_elsewhere(error: Exception) -> bool:
    """Whether another process was just making the storage's tables, which Optuna does without a lock."""
    complaint = f"{type(error).__name__} {error} {error.__cause__}"
    return "already exists" in complaint or "IntegrityError" in complaint


def validations(trainer: Trainer) -> Iterator[float]:
    """Trains to the end, validating as the recipe says; yields the validation losses in nats."""
    while not trainer.finished:
        trainer.advance()
        if trainer.step % trainer.recipe.every == 0 or trainer.step == trainer.recipe.steps:
            yield trainer.validate()


def best_of(trainer: Trainer) -> ConvWaveNet:
    """The model with the best weights, in evaluation mode."""
    trainer.kept.load_state_dict(trainer.best_weights)
    return trainer.kept.eval()


def _trials(work: Work, missing: int) -> Iterator[None]:
    """Runs the missing trials, here or in workers; yields after each."""
    if work.options.workers == 1:
        for _ in range(missing):
            yield work.one()
        return
    workers = min(work.options.workers, max(1, missing))
    threads = max(1, torch.get_num_threads() // workers)
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA, or threads, may hang
    with ProcessPoolExecutor(workers, spawn, _begin_worker, (threads,)) as pool:
        try:
            for trial in as_completed([pool.submit(_one_in_worker, work.options) for _ in range(missing)]):
                yield trial.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise WaveNetConvError("a worker was killed; start again with the same arguments to go on") from error
            raise


_work: Work | None = None  # a worker's own


def _begin_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _one_in_worker(options: Namespace) -> None:
    global _work
    _work = _work or Work(options)
    _work.one()


def _finish(work: Work, say: Console) -> None:
    """Writes the plot and the best trial's checkpoint, and says what came out."""
    options, trials = work.options, work.counted()
    ranked = _ranked(trials)
    if options.plot and trials:
        from .plots import plot_trials

        plot_trials(options.plot, [_curves(trial) for trial in trials])
    if not ranked:
        complaints = [trial.user_attrs["broke_down"] for trial in trials if "broke_down" in trial.user_attrs]
        raise TrainingError(f"none of {len(trials)} trials came to its end; the first: {''.join(complaints[:1])}")
    if options.output:
        _save(work, ranked[0], say)
    if options.json:
        others = [trial for trial in trials if trial not in ranked]
        print(json.dumps({"study": options.study, "trials": [_row(work, trial) for trial in ranked + others]}))
        return
    print("trial  validation   train    step  seconds  parameters  settings")
    for trial in ranked[:SHOWN]:
        row = _row(work, trial)
        drawn = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["settings"].items())
        print(
            f"{row['trial']:5}  {row['validation_loss']:10.4f}  {row['train_loss']:6.4f}  {row['best_step']:6,}  "
            f"{row['seconds']:7.1f}  {row['parameters']:10,}  {drawn}"
        )
    broken = sum("broke_down" in trial.user_attrs for trial in trials)
    print(f"{len(ranked):,} trials ended, {len(trials) - len(ranked) - broken:,} were given up, {broken:,} broke down")


def _curves(trial: FrozenTrial) -> tuple[str, list[tuple[int, float]], list[tuple[int, float]]]:
    curves = trial.user_attrs["curves"]
    return f"trial {trial.number}", curves["train"], curves["validation"]


def _ranked(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that came to their end, best first."""
    return sorted((trial for trial in trials if trial.state.name == "COMPLETE"), key=lambda trial: trial.value)


def _row(work: Work, trial: FrozenTrial) -> dict[str, Any]:
    measured = trial.user_attrs
    ended = "ended" if trial.state.name == "COMPLETE" else "given up"
    return {
        "trial": trial.number,
        "state": "broke down" if "broke_down" in measured else ended,
        "validation_loss": trial.value,
        **{name: measured.get(name) for name in ("train_loss", "best_step", "seconds", "parameters", "threads")},
        "settings": work.space.settings(trial),
        "curves": measured["curves"],
    }


def _save(work: Work, trial: FrozenTrial, say: Console) -> None:
    """Trains the best trial again, since weights of processes on several machines are kept by none, and writes it."""
    threads, output = torch.get_num_threads(), work.options.output
    torch.set_num_threads(trial.user_attrs["threads"])  # on which the last bits depend
    say.print(f"training trial {trial.number} again for {output}")
    trainer = work.trainer(work.space.settings(trial))
    for _ in validations(trainer):
        pass
    torch.set_num_threads(threads)
    if trainer.best_loss != trial.value:
        say.print(f"it came to {trainer.best_loss:.6f} nats, in the trial to {trial.value:.6f}: another machine's bits")
    model = best_of(trainer)
    results = {"train_loss": evaluate(model, trainer.train), "validation_loss": trainer.best_loss}
    results |= {"best_step": trainer.best_step, "parameters": _parameters(model)}
    origin = {"preset": work.space.preset, "study": work.options.study, "trial": trial.number}
    notes = {**origin, **asdict(model.config), **asdict(trainer.recipe), **results}
    save_trained(output, model, work.vocab, work.train, notes)


def _parameters(model: ConvWaveNet) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _storage_errors(kind: type[WaveNetConvError], where: str, mend: str) -> Iterator[None]:
    """Raises as `kind` what Optuna and its databases raise."""
    optuna, sqlalchemy = _imported("optuna"), _imported("sqlalchemy")
    driver = (ImportError,) if kind is UsageError else ()
    try:
        yield
    except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, *driver) as error:
        complaint = str(error.__cause__ or error).splitlines()[0]
        raise kind(f"{where}: {complaint}; {mend}") from error


def _imported(*names: str) -> Any:
    """The first of these modules that is there."""
    for name in names:
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise UsageError(f"a sweep needs {names[-1]}: pip install {names[-1]}")
