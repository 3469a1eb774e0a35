"""One safetensors file per model: weights, config, vocabulary and notes. Nothing is unpickled.

The metadata of the file are `format` ("wavenet-conv"), `version` (see `_version`), `config` (JSON: the fields of
`WaveNetConfig`, and `norms`, per norm in order `[eps, momentum]` of a batch norm or `[eps]` of a layer norm),
`vocabulary` (the characters in order) and `notes` (JSON). The tensors are the model's `state_dict` and, in a file that
has them, `quantiles`. All versions keep the names of the first release: `levels` for `layers` in the names of tensors,
and `fan_ins` for `kernel_sizes` in the config. Versions 1 and 2 have `batch_norm`, true or false, in place of the
fields that came later, and a missing `gated` means false. Error messages use today's names.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from .config import WaveNetConfig
from .errors import CheckpointError, WaveNetConvError
from .files import write_whole
from .model import BatchNorm, ConvWaveNet
from .vocabulary import Vocabulary

FORMAT = "wavenet-conv"
VERSIONS = ("1", "2", "3")  # each release rejects those that came later, and asks to be upgraded
LATER_FIELDS = ("norm", "activation", "head_kernel_size", "head_norm")  # of version 3
DEFAULT = Path(__file__).parent / "default.safetensors"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

_DAMAGED = "the file is damaged; copy it again from an undamaged one"
_GIVE = "give a file that save_checkpoint wrote, or 'default'"
_SAVE_AGAIN = "write it again with save_checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: a model in evaluation mode on the CPU, its vocabulary, notes and quantiles.

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
    quantiles: Tensor | None = None,
) -> None:
    """Writes a model, in any mode and on any device, to one file; a previous file stays until the new one is complete.

    `notes` are anything that JSON can hold; `Checkpoint` says what `quantiles` are.

    Raises:
        CheckpointError: `load_checkpoint` would reject the file, for example because a weight is NaN.
        OSError: The file cannot be written.
    """
    for value, kind in ((model, ConvWaveNet), (vocab, Vocabulary)):
        if not isinstance(value, kind):
            raise CheckpointError(f"{path}: a checkpoint holds a {kind.__name__}, not a {type(value).__name__}")
    tensors = model.state_dict() | ({} if quantiles is None else {"quantiles": quantiles})
    # safetensors takes contiguous tensors only, and none that share memory.
    in_file = {_renamed(name): tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        metadata = {
            "format": FORMAT,
            "version": _version(model.config),
            "config": json.dumps(_fields_of(model)),
            "vocabulary": vocab.characters,
            "notes": json.dumps(dict(notes or {})),
        }
        data = _ordered(safetensors.torch.save(in_file, metadata))
    except (TypeError, ValueError, RecursionError) as error:  # notes of other things; half a surrogate pair
        raise CheckpointError(f"{path}: {error}; notes hold what JSON can, and a vocabulary is Unicode text") from error
    _read(io.BytesIO(data), path)
    write_whole(path, data)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint, bit for bit as it was saved; "default" is the one that ships with this package.

    Raises:
        CheckpointError: The file is missing, damaged, a pickle, of another model or of a newer version, its parts do
            not fit each other, or a weight is NaN or infinite. The message names the file and the fix.
    """
    try:
        with open(DEFAULT if path == "default" else path, "rb") as file:
            return _read(file, path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; {_GIVE}") from error


def _ordered(data: bytes) -> bytes:
    """The same file with sorted metadata: safetensors writes them in a random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}
    text = json.dumps(metadata | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _read(file: BinaryIO, path: str | Path) -> Checkpoint:
    try:
        return _checkpoint(file)
    except WaveNetConvError as error:  # from a config or a vocabulary, too
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
    config, norms = _config(_object("config", metadata), version)
    characters = metadata.get("vocabulary")
    vocab = Vocabulary(characters if isinstance(characters, str) else "")
    if vocab.characters != characters or len(vocab) != config.vocab_size:
        raise CheckpointError(
            f"its vocabulary {characters!r:.80} is not the {config.vocab_size - 1:,} characters of the model in order"
        )
    notes = _object("notes", metadata)
    try:
        tensors = {_renamed(name): tensor for name, tensor in safetensors.torch.load(head + file.read()).items()}
    except Exception as error:  # safetensors raises its own error, KeyError and torch's errors for bad headers
        raise CheckpointError(f"its header and its tensors do not agree ({error}); {_DAMAGED}") from error
    quantiles = tensors.pop("quantiles", None)
    if quantiles is not None:
        right = quantiles.ndim == 1 and quantiles.dtype == torch.float32 and len(quantiles)
        if not right or not quantiles.isfinite().all() or (quantiles.diff() < 0).any():
            raise CheckpointError("quantiles must be torch.float32 of shape (q,), finite and ascending")
    return Checkpoint(_model(config, norms, tensors), vocab, notes, quantiles)


def _renamed(name: str) -> str:
    """A tensor's name in the model to that in the file, and back."""
    first, dot, rest = name.partition(".")
    return {"layers": "levels", "levels": "layers"}.get(first, first) + dot + rest


def _header(file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the file up to its tensors, and the JSON object in them; reads no further."""
    head = file.read(8)
    length = int.from_bytes(head, "little")
    head += file.read(min(length, LONGEST_HEADER))
    header = _json(head[8:])
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


def _json(text: str | bytes) -> Any:
    """The value of a JSON text, None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _object(key: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in the metadata's `key`."""
    text = metadata.get(key)
    value = _json(text) if isinstance(text, str) else None
    if not isinstance(value, dict):
        raise CheckpointError(f"its {key} is not a JSON object but {text!r:.40}; {_SAVE_AGAIN}")
    return value


def _version(config: WaveNetConfig) -> str:
    """The first version that can express a model: 1, or 2 for a gated one, or 3 for other norms, activations, heads."""
    one_norm = set(config.norms) in ({"batch"}, {"none"})
    if one_norm and set(config.activations) == {"tanh"} and (config.head_kernel_size, config.head_norm) == (1, "none"):
        return "2" if config.gated else "1"
    return "3"


def _norms_of(model: ConvWaveNet) -> list[Any]:
    """The norms of a model in order, the head's last."""
    norms = [getattr(layer, "norm", None) for layer in model.layers] + [model.head_norm]
    return [norm for norm in norms if norm is not None]


def _fields_of(model: ConvWaveNet) -> dict[str, Any]:
    """What `config` in the metadata holds; the order decides the bytes of the file."""
    config, names = model.config, ["vocab_size", "n_embd", "n_hidden"]
    if _version(config) == "3":
        found = {name: getattr(config, name) for name in [*names, *LATER_FIELDS, "bias", "gated"]}
    else:
        found = {name: getattr(config, name) for name in names}
        found |= {"batch_norm": config.norms[0] == "batch", "bias": config.bias}
        found |= {"gated": True} if config.gated else {}
    norms = [[norm.eps, norm.momentum] if isinstance(norm, BatchNorm) else [norm.eps] for norm in _norms_of(model)]
    return found | {"fan_ins": config.kernel_sizes, "norms": [list(map(float, numbers)) for numbers in norms]}


def _config(found: dict[str, Any], version: str) -> tuple[WaveNetConfig, list[list[float]]]:
    """The config, and eps and momentum of every norm."""
    norms = found.pop("norms", None)
    values = {"kernel_sizes" if name == "fan_ins" else name: found[name] for name in found}
    asked, flags = {field.name for field in fields(WaveNetConfig)}, ["gated"]
    if version != "3":
        values, asked = {"gated": False} | values, asked - {*LATER_FIELDS} | {"batch_norm"}
        flags += ["batch_norm", "bias"]
    if values.keys() != asked or {type(values[name]) for name in flags} != {bool} or values.get("norm", "") is None:
        raise CheckpointError(f"its config has other fields or types than this library's: {found!r:.80}; {_SAVE_AGAIN}")
    if version != "3":
        values["norm"] = "batch" if values.pop("batch_norm") else "none"
    config = WaveNetConfig(**values)
    kinds = [kind for kind in (*config.norms, config.head_norm) if kind != "none"]
    try:
        settings = [[number * 1.0 for number in numbers] for numbers in norms]
    except (TypeError, ValueError, OverflowError):
        settings = []
    right = [len(numbers) for numbers in settings] == [2 if kind == "batch" else 1 for kind in kinds]
    if not right or not all(map(isfinite, chain(*settings))):
        complaint = f"not eps, and momentum of batch norms, of {len(kinds)} norms"
        raise CheckpointError(f"its norms are {norms!r:.80}, {complaint}; {_SAVE_AGAIN}")
    return config, settings


def _model(config: WaveNetConfig, norms: list[list[float]], tensors: dict[str, Tensor]) -> ConvWaveNet:
    """The model with these weights, in evaluation mode; allocates nothing before every shape is known to fit."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        raise CheckpointError(f"its weights are of {sorted(map(str, dtypes))}, not one floating type; {_SAVE_AGAIN}")
    try:
        model = ConvWaveNet(config, device="meta", dtype=next(iter(dtypes), None))  # draws no random numbers
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"its config asks for a model that cannot be built: {config}; {_DAMAGED}") from error
    asked = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in asked | shapes:
        if shapes.get(name) != asked.get(name):
            found, needed = shapes.get(name, "missing"), asked.get(name, "missing")
            raise CheckpointError(
                f"tensor {name!r:.80} is {found} in the file and {needed} in the model; {_SAVE_AGAIN}"
            )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} has values that are NaN or infinite; take an earlier checkpoint")
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(tensors)
    for norm, settings in zip(_norms_of(model), norms):
        vars(norm).update(zip(("eps", "momentum"), settings))
    return model
