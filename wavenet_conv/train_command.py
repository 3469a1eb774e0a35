"""`wavenet-conv train`: a list of names in, a checkpoint out, resumable. Knows nothing of how a step is taken."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .arguments import check_output, device_of, training_names
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .errors import CheckpointError, OutputError, TrainingError, UsageError, WaveNetConvError
from .files import locked, write_whole
from .model import ConvWaveNet, WaveNetConfig
from .scoring import Scorer
from .training import PRESETS, TEACHERS, Corpus, Recipe, Trainer, evaluate, split_names
from .vocabulary import Vocabulary

QUANTILES = 1001  # of the training list's bits per character, for `Scorer.percentile`

DESCRIPTION = """\
Trains a model on a list of names, one a line, and writes a checkpoint that `wavenet-conv score --model` and
Scorer.load take. The list is split as in the lecture: shuffled with seed 42, 80% to train on, 10% to validate on, 10%
to test on (read only with --test, once, at the end). The weights with the lowest validation loss are kept.

The run is resumable: all of its state is in OUTPUT.training after every validation, and --resume goes on from there,
to the same bits as an undisturbed run (on the CPU, with the same number of threads). Where there is nothing to resume,
--resume starts.

Under torchrun every rank takes its share of each batch; without dropout N ranks train as one does.

Exit code 0 when done, 1 for a failed job (a training that broke down, a full disk), 2 for wrong usage, 130 for Ctrl-C.
"""


def add_parser(commands: Any) -> None:
    """The options of `wavenet-conv train`."""
    command = commands.add_parser(
        "train",
        help="train a model on a list of names",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("file", metavar="FILE", help="one name a line, UTF-8")
    add("-o", "--output", required=True, metavar="OUTPUT", help="where the checkpoint is written")
    add("--preset", choices=list(PRESETS), default="fast", help="model and recipe to start from (fast)")
    add(
        "--teacher",
        action="append",
        metavar="PATH",
        help="a checkpoint to learn from, in place of the preset's teachers",
    )
    add("--kernel-sizes", type=_integers, metavar="2,2,2", help="how many nodes each layer fuses, lowest first")
    add("--n-embd", type=int, metavar="N", help="width of the embedding")
    add("--n-hidden", type=int, metavar="N", help="width of every layer")
    add("--gated", action="store_true", default=None, help="gated layers with residual and skip connections")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="steps to take")
    length.add_argument("--epochs", type=int, metavar="N", help="times to see every name")
    add("--seconds", type=float, metavar="S", help="stop after the validation that ends after S seconds of training it")
    for field in fields(Recipe):
        if field.name not in ("steps", "schedule", "optimizer"):
            kind = int if isinstance(field.default, int) else float
            add(f"--{field.name.replace('_', '-')}", type=kind, metavar="X", help=f"see Recipe ({field.name})")
    add("--optimizer", choices=("adamw", "sgd"), help="of torch.optim")
    add("--schedule", choices=("onecycle", "constant"), help="of the learning rate")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute (auto: cuda where it is)")
    add("--resume", action="store_true", help="go on where an interrupted run with the same arguments was")
    add("--test", action="store_true", help="read the test part too, once, at the end")
    add("--plot", metavar="FILE", help="write the loss curves as a picture")
    add("--json", action="store_true", help="the results as one line of JSON")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of the weights")


def _integers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ArgumentTypeError(f"{text!r} is not a list of integers such as 2,2,2")
    return tuple(map(int, parts))


def train(options: Namespace) -> None:
    """Runs `wavenet-conv train`; raises `UsageError` for what cannot be begun, its relatives after that."""
    names = training_names(options.file)
    parts = split_names(names)
    vocab = Vocabulary.from_names(names)
    config, recipe = _configured(options, len(vocab), len(parts[0]))
    _check_output(options)
    given = [_loaded(path, vocab) for path in options.teacher or []]
    with _ranks(options.device) as device, locked(f"{options.output}.lock") if _first() else nullcontext():
        say = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not _first())
        _report_list(say, options.file, names, parts)
        digest = sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()
        data = Data(options, digest, vocab, parts, device, say)
        mine = _identity(data, config, recipe, [])
        _interrupted(data, options.output, {name: mine[name] for name in mine if name != "teachers"})  # before teachers
        presets = TEACHERS.get(options.preset, ()) if recipe.taught and not given else ()
        trained = [_teacher(data, name, recipe.seed + 1 + place) for place, name in enumerate(presets)]
        run = Run(data, options.output, config, recipe, [*given, *(teacher for teacher, _ in trained)])
        run.train(options.seconds)
        if _first():
            _finish(run, sum(seconds for _, seconds in trained))
            for place in range(len(presets)):
                with suppress(OSError):
                    os.unlink(_teacher_path(options.output, recipe.seed + 1 + place))


@dataclass(frozen=True)
class Data:
    """What the training that was asked for shares with those of its teachers."""

    options: Namespace
    names_sha256: str
    vocab: Vocabulary
    parts: tuple[list[str], list[str], list[str]]
    device: torch.device
    say: Console


class Run:
    """One training, whose state is in OUTPUT.training after every validation."""

    def __init__(
        self, data: Data, output: str, config: WaveNetConfig, recipe: Recipe, teachers: Sequence[Checkpoint] = ()
    ):
        self.data, self.output, self.recipe, self.seconds = data, output, recipe, 0.0
        self.state = Path(f"{output}.training")
        self.identity = _identity(data, config, recipe, teachers)
        torch.manual_seed(recipe.seed)
        try:
            model = ConvWaveNet(config, dtype=getattr(torch, data.options.dtype)).to(data.device)
        except (RuntimeError, TypeError, MemoryError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"this model cannot be built here ({reason}); give a smaller one: {config}") from error
        models = [teacher.model.to(model.embedding.weight) for teacher in teachers]
        self.trainer = Trainer(model, data.vocab, *data.parts[:2], recipe, models)

    def train(self, limit: float | None = None) -> None:
        """Takes up an interrupted run where that is asked for, and trains to the end, or for `limit` seconds.

        Raises `TrainingError` where it breaks down.
        """
        self._restore()
        try:
            self._advance(limit)
        except TrainingError as error:
            left = f"; delete {self.state} first" if self.state.exists() else ""
            raise TrainingError(f"{self.output}: {error}{left}") from error

    def _advance(self, limit: float | None) -> None:
        trainer, recipe, begun = self.trainer, self.recipe, monotonic() - self.seconds
        with _progress(self.data.say, recipe) as show:
            while not trainer.finished:
                trainer.advance()
                if trainer.step % recipe.every == 0 or trainer.step == recipe.steps:
                    loss, self.seconds = trainer.validate(), monotonic() - begun
                    self._record()
                    show(trainer, loss)
                    if limit is not None and self.seconds >= limit:
                        break

    def best(self) -> ConvWaveNet:
        """The model with the lowest validation loss, in evaluation mode."""
        self.trainer.kept.load_state_dict(self.trainer.best_weights)
        return self.trainer.kept.eval()

    def save(self, model: ConvWaveNet, results: dict[str, Any]) -> None:
        """Writes the checkpoint, and takes the state away."""
        names = {"names": sum(map(len, self.data.parts)), "split": "80/10/10, shuffled with seed 42"}
        save_trained(self.output, model, self.data.vocab, self.data.parts[0], names | self.identity | results)
        with suppress(FileNotFoundError):
            self.state.unlink()

    def _restore(self) -> None:
        found = _interrupted(self.data, self.output, self.identity)
        if found is None:
            return
        try:
            self.trainer.restore(*found)
            self.seconds = float(found[1]["seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self.state}: not of this training ({error}); delete it to start anew") from error
        self.data.say.print(f"going on after step {self.trainer.step:,}")

    def _record(self) -> None:
        if not _first():
            return
        tensors, numbers = self.trainer.state()
        metadata = {"run": json.dumps(self.identity), "numbers": json.dumps(numbers | {"seconds": self.seconds})}
        data = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
        try:
            write_whole(self.state, data)
        except OSError as error:
            raise OutputError(
                f"{self.state}: {error.strerror or error}; mend that and start again with --resume to go on"
            ) from error


def _interrupted(data: Data, output: str, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state that an interrupted run has left, if any; raises `UsageError` where it is not to be taken up."""
    path = Path(f"{output}.training")
    if not path.exists():
        return None
    if not data.options.resume:
        raise UsageError(f"{path}: this training was interrupted; add --resume, or delete this file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        before, numbers = json.loads(metadata["run"]), json.loads(metadata["numbers"])
    except Exception as error:  # safetensors raises its own error, and many others for a damaged file
        raise UsageError(f"{path}: not the state of a training ({error}); delete it to start anew") from error
    changed = [name for name in identity if identity[name] != before.get(name)]
    if changed:
        was = ", ".join(f"{name} was {before.get(name)!r} and is {identity[name]!r}" for name in changed)
        raise UsageError(f"{path}: of another run: {was}; use the same arguments, or delete it to start anew")
    return tensors, numbers


def _teacher(data: Data, preset: str, seed: int) -> tuple[Checkpoint, float]:
    """A teacher of a preset, and the seconds that its training took; one that is there already is read."""
    shape, recipe = PRESETS[preset]
    output, config = _teacher_path(data.options.output, seed), WaveNetConfig(vocab_size=len(data.vocab), **shape)
    run = Run(data, output, config, replace(recipe, seed=seed))
    if os.path.exists(output):
        with suppress(WaveNetConvError):
            checkpoint = load_checkpoint(output)
            if all(checkpoint.notes.get(name) == value for name, value in run.identity.items()):
                return checkpoint, checkpoint.notes["seconds"]
    data.say.print(f"training a teacher, {preset} with seed {seed}")
    run.train()
    model = run.best()
    if _first():
        run.save(model, {"seconds": run.seconds})
    return Checkpoint(model, data.vocab, {}, None), run.seconds


def _teacher_path(output: str, seed: int) -> str:
    return f"{output}.teacher-{seed}"


def _loaded(path: str, vocab: Vocabulary) -> Checkpoint:
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        raise UsageError(f"--teacher {error}") from error
    if checkpoint.vocab != vocab:
        raise UsageError(
            f"--teacher {path}: its characters are {checkpoint.vocab.characters!r} and the list's "
            f"{vocab.characters!r}; take one that was trained on names with the same"
        )
    return checkpoint


def _configured(options: Namespace, vocab_size: int, train_names: int) -> tuple[WaveNetConfig, Recipe]:
    """The preset with what the options change."""
    shape, recipe = PRESETS[options.preset]
    given = {name: value for name, value in vars(options).items() if value is not None}
    shape = shape | {name: given[name] for name in ("kernel_sizes", "n_embd", "n_hidden", "gated") if name in given}
    changes = {field.name: given[field.name] for field in fields(Recipe) if field.name in given}
    try:
        recipe = replace(recipe, **changes)
        if options.epochs is not None:
            recipe = replace(recipe, steps=options.epochs * -(-train_names // recipe.batch))
        return WaveNetConfig(vocab_size=vocab_size, **shape), recipe
    except WaveNetConvError as error:
        raise UsageError(str(error)) from error


def _check_output(options: Namespace) -> None:
    check_output(options.output, options.file, *(options.teacher or []))
    if options.seconds is not None and not options.seconds >= 0:
        raise UsageError(f"--seconds is {options.seconds}; it must be a number of at least 0")
    if options.seconds is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--seconds: ranks do not stop at the same step; give --steps under torchrun")
    if options.plot:
        from .plots import check_plot

        check_plot(options.plot)
        if os.path.realpath(options.plot) == os.path.realpath(options.output):
            raise UsageError(f"--plot {options.plot}: this is --output; give another file")


@contextmanager
def _ranks(device: str) -> Iterator[torch.device]:
    """The device to compute on; under torchrun inside a process group."""
    kind = device_of(device).type
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield torch.device(kind)
        return
    place = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
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


def _first() -> bool:
    """Whether this process is the one that writes: the only one, or rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _identity(data: Data, config: WaveNetConfig, recipe: Recipe, teachers: Sequence[Checkpoint]) -> dict[str, Any]:
    """All that decides about the bits of a training, as JSON has it; a run is only taken up by one with the same."""
    taught_by = [sha256(b"".join(_bytes(teacher.model))).hexdigest() for teacher in teachers]
    found = {
        "names_sha256": data.names_sha256,
        **asdict(config),
        **asdict(recipe),
        "teachers": taught_by,
        "dtype": data.options.dtype,
        "device": torch.cuda.get_device_name(data.device) if data.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "torch": torch.__version__,
    }
    return json.loads(json.dumps(found))


def _bytes(model: ConvWaveNet) -> Iterator[bytes]:
    for tensor in model.state_dict().values():
        yield tensor.cpu().contiguous().numpy().tobytes()


def _report_list(say: Console, path: str, names: list[str], parts: tuple[list[str], ...]) -> None:
    sizes = " / ".join(f"{len(part):,}" for part in parts)
    say.print(f"{path}: {len(names):,} names, split {sizes} to train, validate and test on")
    twice = sum(count - 1 for count in Counter(names).values())
    if twice:
        seen = set(parts[0])
        shared = sum(name in seen for name in parts[1] + parts[2])
        say.print(f"{twice:,} names are in the list more than once; {shared:,} held-out names are also trained on")
    unseen = sorted(set("".join(parts[1] + parts[2])) - set("".join(parts[0])))
    if unseen:
        say.print(f"characters that are never trained on: {' '.join(unseen)}")


@contextmanager
def _progress(say: Console, recipe: Recipe) -> Iterator[Any]:
    """Calls of what this gives show the losses: live on a terminal, else a line a validation."""
    columns = (
        TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=say, disable=not say.is_terminal) as progress:
        task = progress.add_task("training", total=recipe.steps, text="")

        def show(trainer: Trainer, loss: float) -> None:
            recent = float(torch.stack(trainer.losses[-recipe.every :]).mean())
            text = f"train {recent:.4f}, validation {loss:.4f}, best {trainer.best_loss:.4f}"
            progress.update(task, completed=trainer.step, text=text)
            if not say.is_terminal:
                say.print(f"step {trainer.step:,} of {recipe.steps:,}: {text}")

        yield show


def _finish(run: Run, before: float) -> None:
    """Measures the best weights, writes the checkpoint and the plot, and says what came out."""
    trainer, model, options = run.trainer, run.best(), run.data.options
    results: dict[str, Any] = {
        "train_loss": evaluate(model, trainer.train),
        "validation_loss": trainer.best_loss,
        "best_step": trainer.best_step,
        "steps_taken": trainer.step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(before + run.seconds, 1),
    }
    if options.test:
        results["test_loss"] = evaluate(model, Corpus(run.data.parts[2], run.data.vocab, model))
    run.save(model, {"preset": options.preset} | results)
    _say(results, options.json)
    if options.plot:
        from .plots import plot_losses

        table, losses = model.embedding.weight.detach().cpu(), torch.stack(trainer.losses).cpu()
        table = table if table.shape[1] == 2 else None
        plot_losses(options.plot, losses, trainer.validations, table, run.data.vocab.characters)


def _say(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(results))
    else:
        shown = (f"{name} {value:.4f}" if "loss" in name else f"{name} {value}" for name, value in results.items())
        print(", ".join(shown))
    sys.stdout.flush()


def save_trained(path: str, model: ConvWaveNet, vocab: Vocabulary, names: list[str], notes: dict[str, Any]) -> None:
    """Writes the checkpoint of a model trained on `names`, with their bits per character for `Scorer.percentile`.

    Raises `OutputError` where it cannot be written.
    """
    bits = Scorer(model, vocab).bits_per_character(names).double()
    places = torch.linspace(0, len(bits) - 1, QUANTILES, dtype=torch.float64).round().long()
    quantiles = bits.sort().values[places].float()
    try:
        save_checkpoint(path, model, vocab, notes, quantiles)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; mend that and start again, with --resume") from error
