"""One safetensors file per model: weights, config, vocabulary and notes. Nothing is unpickled.

The metadata of the file are `format` ("wavenet-conv"), `version`, `config` (JSON: the fields of
`WaveNetConfig`, and `norms`, per norm in order `[eps, momentum]` of a batch norm or `[eps]` of a layer norm),
`vocabulary` (the characters in order), in a file whose vocabulary is not standard `end` (the token that ends a name),
and `notes` (JSON). The tensors are the model's `state_dict` and, in a file that has them, `quantiles`. All versions
keep the names of the first release: `levels` for `layers` in the names of tensors, and `fan_ins` for `kernel_sizes` in
the config. Error messages use today's names. `metadata` reads and writes this text.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from .config import WaveNetConfig
from .errors import CheckpointError, WaveNetConvError
from .files import write_whole
from .metadata import FORMAT, SAVE_AGAIN, VERSIONS, config_of, json_in, metadata_of, norms_of, object_in, vocabulary_of
from .model import ConvWaveNet
from .vocabulary import Vocabulary, checked_names

DEFAULT = Path(__file__).parent / "default.safetensors"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

_DAMAGED = "the file is damaged; copy it again from an undamaged one"
_GIVE = "give a file that save_checkpoint wrote, or 'default'"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: a model in evaluation mode on the CPU, its vocabulary, notes and quantiles.

    Attributes:
        model: The model.
        vocab: Its vocabulary.
        notes: What was saved with it, such as its losses.
        quantiles: None, or float32 `(q,)`, ascending: the scores in bits per character, at evenly spaced ranks from the
            smallest to the largest, of the names that the model was trained on.
    """

    model: ConvWaveNet
    vocab: Vocabulary
    notes: dict[str, Any]
    quantiles: Tensor | None


def save_checkpoint(
    path: str | Path,
    model: ConvWaveNet,
    vocab: Vocabulary,
    notes: Mapping[str, Any] | None = None,
    *,
    names: Iterable[str] | None = None,
) -> None:
    """Writes a model, in any mode and on any device, to one file; a previous file stays until the new one is complete.

    Args:
        path: Where to write.
        model: What to write.
        vocab: The vocabulary of the model.
        notes: Anything that JSON can hold.
        names: The list that the model was trained on. The file then holds quantiles of its bits per character, for
            `Scorer.percentile`, and for `wavenet-conv sample --novel --list FILE` the SHA-256 of the sorted list, not
            the list itself, as the note `names_sha256` if `notes` have none.

    Raises:
        CheckpointError: `load_checkpoint` would reject the file, for example because a weight is NaN; `names` are
            empty or have a character that is not in the vocabulary.
        OSError: The file cannot be written: `OutputError` if its folder is missing.
    """
    for value, kind in ((model, ConvWaveNet), (vocab, Vocabulary)):
        if not isinstance(value, kind):
            raise CheckpointError(f"{path}: a checkpoint holds a {kind.__name__}, not a {type(value).__name__}")
    if not isinstance(notes, (Mapping, type(None))):
        raise CheckpointError(f"{path}: notes are a {type(notes).__name__}; give a dict, and a training list as names=")
    tensors = model.state_dict()
    with _naming(path):
        if names is not None:
            from .scoring import training_quantiles  # scoring imports this module

            names = checked_names(names)
            tensors["quantiles"] = training_quantiles(model, vocab, names)
        # safetensors takes contiguous tensors only, and none that share memory.
        in_file = {_renamed(name): tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            data = _ordered(safetensors.torch.save(in_file, metadata_of(model, vocab, notes, names)))
        except (TypeError, ValueError, RecursionError) as error:  # notes of other things; half a surrogate pair
            raise CheckpointError(f"{error}; notes hold what JSON can, and a vocabulary is Unicode text") from error
        _checkpoint(io.BytesIO(data))
    write_whole(path, data)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint, bit for bit as it was saved; "default" is the one that ships with this package.

    Raises:
        CheckpointError: The file is missing, damaged, a pickle, of another model or of a newer version, its parts do
            not fit each other, or a weight is NaN or infinite. The message names the file and the fix.
    """
    try:
        with open(DEFAULT if path == "default" else path, "rb") as file, _naming(path):
            return _checkpoint(file)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}; {_GIVE}") from error


def _ordered(data: bytes) -> bytes:
    """The same file with sorted metadata: safetensors writes them in a random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}
    text = json.dumps(metadata | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Raises errors, also those of a config or a vocabulary, as `CheckpointError` with the file."""
    try:
        yield
    except WaveNetConvError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _checkpoint(file: BinaryIO) -> Checkpoint:
    head, header = _header(file)
    metadata: Any = header.get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"a safetensors file of another model: its format is not {FORMAT!r}")
    version = metadata.get("version")
    if version not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise CheckpointError(f"its version is {version!r:.40}, not one of {known}; install a newer wavenet-conv")
    config, norms = config_of(object_in("config", metadata), version)
    vocab, notes = vocabulary_of(metadata, config.vocab_size), object_in("notes", metadata)
    try:
        tensors = {_renamed(name): tensor for name, tensor in safetensors.torch.load(head + file.read()).items()}
    except Exception as error:  # safetensors raises its own error, KeyError and torch's errors for bad headers
        raise CheckpointError(f"its header and its tensors do not agree ({error}); {_DAMAGED}") from error
    quantiles = tensors.pop("quantiles", None)
    model = _model(config, norms, tensors)
    if quantiles is not None:
        right = quantiles.ndim == 1 and quantiles.dtype == torch.float32 and len(quantiles)
        if not right or not quantiles.isfinite().all() or (quantiles.diff() < 0).any():
            raise CheckpointError("quantiles must be torch.float32 of shape (q,), finite and ascending")
    return Checkpoint(model, vocab, notes, quantiles)


def _renamed(name: str) -> str:
    """A tensor's name in the model to that in the file, and back."""
    first, dot, rest = name.partition(".")
    return {"layers": "levels", "levels": "layers"}.get(first, first) + dot + rest


def _header(file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the file up to its tensors, and the JSON object in them; reads no further."""
    head = file.read(8)
    length = int.from_bytes(head, "little")
    head += file.read(min(length, LONGEST_HEADER))
    header = json_in(head[8:])
    if isinstance(header, dict):
        return head, header
    # The length of a short header may start as a pickle does, with 0x80, but `{` follows it.
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:9] not in (b"", b"{")):
        raise CheckpointError(
            "a pickle, as torch.save writes them; reading one can run any code, so it is not read: load it yourself if "
            "you trust it, and write the model with save_checkpoint"
        )
    if head[8:9] in (b"", b"{") and length <= LONGEST_HEADER:
        raise CheckpointError(f"its header ends too early or is not JSON; {_DAMAGED}")
    raise CheckpointError(f"not a safetensors file; {_GIVE}")


def _model(config: WaveNetConfig, norms: list[list[float]], tensors: dict[str, Tensor]) -> ConvWaveNet:
    """The model with these weights, in evaluation mode; allocates nothing before every shape is known to fit."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        raise CheckpointError(f"its weights are of {sorted(map(str, dtypes))}, not one floating type; {SAVE_AGAIN}")
    try:
        model = ConvWaveNet(config, device="meta", dtype=next(iter(dtypes), None))  # draws no random numbers
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"its config asks for a model that cannot be built: {config}; {_DAMAGED}") from error
    asked = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in asked | shapes:
        if shapes.get(name) != asked.get(name):
            found, needed = shapes.get(name, "missing"), asked.get(name, "missing")
            raise CheckpointError(f"tensor {name!r:.80} is {found} in the file and {needed} in the model; {SAVE_AGAIN}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} has values that are NaN or infinite; take an earlier checkpoint")
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(tensors)
    for norm, settings in zip(norms_of(model), norms):
        vars(norm).update(zip(("eps", "momentum"), settings))
    return model
