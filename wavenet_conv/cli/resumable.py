"""A training whose state is saved after each validation, alone or under torchrun, and its checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor

from .. import __version__
from ..checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..config import WaveNetConfig
from ..errors import CheckpointError, TrainingError, UsageError
from ..files import write_whole
from ..model import ConvWaveNet
from ..recipe import Recipe
from ..training import Trainer, evaluate, new_model, run
from ..training.ranks import rank_and_count
from .options import TrainingList, device_of, output_errors, usage_errors
from .progress import Progress

ADVICE = "fix that and start again with --resume"


def build(
    config: WaveNetConfig, seed: int, device: torch.device, dtype: torch.dtype | None = None, where: str = ""
) -> ConvWaveNet:
    """A new model; raises `UsageError` if it is too large for this machine."""
    try:
        return new_model(config, seed, device, dtype)
    except (RuntimeError, TypeError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{where}this model cannot be built here ({reason}); use a smaller one: {config}") from error


@dataclass(frozen=True)
class Setup:
    """What a training shares with those of its teachers."""

    names: TrainingList
    device: torch.device
    dtype: str
    resume: bool

    def say(self, text: str) -> None:
        """Print a line on standard error, on the first rank."""
        Progress(quiet=not is_first_rank()).say(text)


class Run:
    """One training, whose state is in OUTPUT.training after each validation.

    `teachers` says which ones it has. It trains `start` in place, or a new model.
    Raises `UsageError` if the model is too large for this machine, or if there is a state that cannot be resumed.
    """

    def __init__(
        self,
        setup: Setup,
        output: str,
        config: WaveNetConfig,
        recipe: Recipe,
        teachers: Sequence[str] = (),
        start: ConvWaveNet | None = None,
    ):
        self.setup, self.output, self.state_path, self.recipe = setup, output, Path(f"{output}.training"), recipe
        # All that decides about the bits of a training; a run resumes only one with the same.
        identity = {
            "names_sha256": setup.names.sha256,
            **asdict(config),
            **asdict(recipe),
            "teachers": teachers,
            "dtype": setup.dtype,
            "device": torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "ranks": rank_and_count()[1],
            "torch": torch.__version__,
            "wavenet_conv": __version__,
            **({} if start is None else {"from": digest(start)}),
        }
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.interrupted = self._interrupted()
        dtype = getattr(torch, setup.dtype)
        self.model = build(config, recipe.seed, setup.device, dtype) if start is None else start.to(setup.device, dtype)

    def finished(self) -> Checkpoint:
        """What this run has written to OUTPUT; raises `UsageError` if OUTPUT is missing or another run's."""
        with usage_errors(CheckpointError, "--output "):
            checkpoint = load_checkpoint(self.output)
        if changed := differences({name: checkpoint.notes.get(name) for name in self.identity}, self.identity):
            raise UsageError(
                f"--output {self.output}: of another run: {changed}; give another path, or add --overwrite"
            )
        return checkpoint

    def train(self, teachers: Sequence[ConvWaveNet] = (), seconds: float | None = None) -> Trainer:
        """Train to the end or for `seconds`, from an interrupted run's state where there is one.

        Raises `TrainingError` where the list, or what teachers expect of it, does not fit in memory.
        """
        try:
            return self._train(teachers, seconds)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and "allocate" not in str(error):  # PyTorch's is a RuntimeError
                raise
            fix = "take a shorter list, --ngram-share 0 or a smaller --drawn"
            raise TrainingError(f"this training does not fit in memory ({error}); {fix}") from error

    def _train(self, teachers: Sequence[ConvWaveNet], seconds: float | None) -> Trainer:
        teachers = [teacher.to(self.model.embedding.weight) for teacher in teachers]
        trainer = Trainer(self.model, self.setup.names.vocab, *self.setup.names.parts[:2], self.recipe, teachers)
        with Progress(self.recipe.steps, every_update=True, quiet=not is_first_rank()) as progress:
            if self.interrupted is not None:
                trainer.restore(*self.interrupted)
                progress.say(f"resuming after step {trainer.step:,}")

            def record(trainer: Trainer) -> None:
                if is_first_rank():
                    self._save_state(*trainer.state())
                recent = float(torch.stack(trainer.losses[-self.recipe.eval_every :]).mean())
                step = f"step {trainer.step:,} of {self.recipe.steps:,}: train {recent:.4f}"
                losses = f"validation {trainer.validations[-1][1]:.4f}, best {trainer.best_loss:.4f}"
                progress.update(trainer.step, f"{step}, {losses}")

            run(trainer, seconds=seconds, on_validation=record)
            if trainer.best_step == 0:
                progress.say("no step has lowered the validation loss; the weights at the start are kept")
        return trainer

    def save(self, results: dict[str, Any]) -> None:
        """Write the checkpoint with what identifies the run and its results as notes, and delete the state."""
        names = {"names": sum(map(len, self.setup.names.parts)), "split": "80/10/10, shuffled with seed 42"}
        with output_errors(self.output, ADVICE):
            save_trained(self.output, self.model, self.setup.names, names | self.identity | results)
        self.state_path.unlink(missing_ok=True)

    def _interrupted(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that an interrupted run left, if any."""
        path = self.state_path
        if not path.exists():
            return None
        if not self.setup.resume:
            raise UsageError(f"{path}: this training was interrupted; add --resume, or delete this file")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            before, numbers = json.loads(metadata["run"]), json.loads(metadata["numbers"])
        except Exception as error:  # safetensors raises its own error, and many others for a damaged file
            raise UsageError(f"{path}: not the state of a training ({error}); delete it to start again") from error
        if changed := differences(before, self.identity):
            raise UsageError(f"{path}: of another run: {changed}; use the same arguments, or delete it to start again")
        return tensors, numbers

    def _save_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        metadata = {"run": json.dumps(self.identity), "numbers": json.dumps(numbers)}
        data = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
        with output_errors(self.state_path, ADVICE):
            write_whole(self.state_path, data)


def results_of(trainer: Trainer) -> dict[str, Any]:
    """What a training that has ended is judged by; losses are in nats per position."""
    return {
        "train_loss": evaluate(trainer.model, trainer.train_corpus),
        "validation_loss": trainer.best_loss,
        "best_step": trainer.best_step,
        "steps_taken": trainer.step,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }


def save_trained(path: str, model: ConvWaveNet, names: TrainingList, notes: dict[str, Any]) -> None:
    """Write a trained model's checkpoint, with what `Scorer.percentile` and `--novel` need of its list."""
    notes = notes | {"names_sha256": names.sha256}  # of the whole list, not of the part that it learned from
    save_checkpoint(path, model, names.vocab, notes, names=names.parts[0])


def digest(model: ConvWaveNet) -> str:
    """What identifies a teacher."""
    return sha256(
        b"".join(tensor.flatten().view(torch.uint8).numpy().tobytes() for tensor in model.state_dict().values())
    ).hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs in two identities, for messages."""
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)


def is_first_rank() -> bool:
    """Whether this process is the one that writes: the only one, or rank 0."""
    return rank_and_count()[0] == 0


@contextmanager
def locked(output: str) -> Iterator[None]:
    """Keep a second run from writing to OUTPUT; raises `OutputError` where one is there already."""
    lock = FileLock(f"{output}.lock", timeout=0)
    with output_errors(f"{output}.lock", "fix that, or wait until the other training there ends"):
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes it on release
            os.unlink(f"{output}.lock")
        lock.release()


@contextmanager
def distributed(device: str) -> Iterator[torch.device]:
    """The device to compute on; under torchrun inside a process group."""
    kind = device_of(device).type
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield torch.device(kind)
        return
    place = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    # If this module is first imported after init_process_group, its default arguments keep the group alive, and so its
    # threads. A thread that frees a tensor while the interpreter shuts down aborts the process.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield place
    finally:
        dist.destroy_process_group()
