"""One safetensors file per model: weights, config, vocabulary and notes. Nothing is unpickled.

The metadata of the file are `format` ("wavenet-conv"), `version` ("1", or "2" for a gated model), `config` (JSON: the
fields of `WaveNetConfig`, where a missing `gated` means false, and `norms`, an eps and a momentum per layer),
`vocabulary` (the characters in order) and `notes` (JSON). The tensors are the model's `state_dict` and, in a file that
has them, `quantiles`. Both versions keep the names of the first release: `levels` for `layers` in the names of tensors,
and `fan_ins` for `kernel_sizes` in the config. Error messages use today's names.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from .errors import CheckpointError, WaveNetConvError
from .files import write_whole
from .model import ConvWaveNet, WaveNetConfig
from .vocabulary import Vocabulary

FORMAT = "wavenet-conv"
VERSIONS = {False: "1", True: "2"}  # by config.gated: releases without gates reject version 2 and ask to be upgraded
DEFAULT = Path(__file__).parent / "default.safetensors"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

_DAMAGED = "the file is damaged; copy it again from an undamaged one"
_SAVE_AGAIN = "write it again with save_checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        model: The model, in evaluation mode and on the CPU.
        vocab: Its vocabulary.
        notes: What `save_checkpoint` was given, after a round trip through JSON.
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
    """Writes a model to one file. A previous file at `path` stays until the new one is complete.

    Args:
        path: The file to write.
        model: The model, in any mode and on any device.
        vocab: Its vocabulary.
        notes: Anything that JSON can hold.
        quantiles: See `Checkpoint`.

    Raises:
        CheckpointError: `load_checkpoint` would reject the file, for example because a weight is NaN.
        OSError: The file cannot be written.
    """
    for value, kind in ((model, ConvWaveNet), (vocab, Vocabulary)):
        if not isinstance(value, kind):
            raise CheckpointError(f"{path}: a checkpoint holds a {kind.__name__}, not a {type(value).__name__}")
    norms: list[Any] = [layer.norm for layer in model.layers if model.config.batch_norm]
    tensors = model.state_dict() | ({} if quantiles is None else {"quantiles": quantiles})
    # safetensors takes contiguous tensors only, and none that share memory.
    in_file = {_renamed(name): tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    config = {name: value for name, value in asdict(model.config).items() if name != "gated" or value}
    config["fan_ins"] = config.pop("kernel_sizes")
    try:
        metadata = {
            "format": FORMAT,
            "version": VERSIONS[model.config.gated],
            "config": json.dumps(config | {"norms": [[float(norm.eps), float(norm.momentum)] for norm in norms]}),
            "vocabulary": vocab.characters,
            "notes": json.dumps(dict(notes or {})),
        }
        data = _ordered(safetensors.torch.save(in_file, metadata))
    except (TypeError, ValueError, RecursionError) as error:  # notes of other things; half a surrogate pair
        raise CheckpointError(f"{path}: {error}; notes hold what JSON can, and a vocabulary is Unicode text") from error
    _read(io.BytesIO(data), path)
    write_whole(path, data)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint, bit for bit as it was saved; draws no random numbers.

    Args:
        path: The file, or "default" for the checkpoint that ships with this package.

    Returns:
        The checkpoint, its model in the dtype that it was saved in.

    Raises:
        CheckpointError: The file is missing, damaged, a pickle, of another model or of a newer version, or its parts do
            not fit each other, or a weight is NaN or infinite. The message names the file and the fix.
    """
    try:
        with open(DEFAULT if path == "default" else path, "rb") as file:
            return _read(file, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror or error}; give a file that save_checkpoint wrote, or 'default'"
        ) from error


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
    metadata: dict[str, str] = header.get("__metadata__") or {}
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"a safetensors file of another model: its format is {found!r:.40}, not {FORMAT!r}")
    if metadata.get("version") not in VERSIONS.values():
        raise CheckpointError(
            f"its version is {metadata.get('version')!r:.40} and this library reads "
            f"{' and '.join(map(repr, VERSIONS.values()))}; install a newer wavenet-conv"
        )
    for key in ("config", "vocabulary", "notes"):
        if not isinstance(metadata.get(key), str):
            raise CheckpointError(f"there is no {key} in its metadata; {_SAVE_AGAIN}")
    config, norms = _config(metadata["config"])
    vocab = _vocabulary(metadata["vocabulary"], config.vocab_size)
    notes = _object("notes", metadata["notes"])
    tensors = {_renamed(name): tensor for name, tensor in _tensors(file, head, header).items()}
    quantiles = tensors.pop("quantiles", None)
    _check_quantiles(quantiles)
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
    try:
        header = json.loads(head[8:])
    except (ValueError, RecursionError):
        header = None
    if isinstance(header, dict) and len(head) == 8 + length:
        return head, header
    # The length of a short header may start as a pickle does, with 0x80, but `{` follows it.
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:9] not in (b"", b"{")):
        raise CheckpointError(
            "a pickle, as torch.save writes them; reading one can run any code, so it is not read: "
            "load it yourself if you trust it, and write the model with save_checkpoint"
        )
    if len(head) < 8 or (len(head) < 8 + length <= 8 + LONGEST_HEADER and head[8:9] in (b"", b"{")):
        raise CheckpointError(f"truncated: it ends inside its header, after {len(head):,} bytes; {_DAMAGED}")
    if head[8:9] == b"{" and length <= LONGEST_HEADER:
        raise CheckpointError(f"its header is not JSON; {_DAMAGED}")
    raise CheckpointError("not a safetensors file; give one that save_checkpoint wrote, or 'default'")


def _object(key: str, text: str) -> dict[str, Any]:
    """The JSON object in the metadata's `key`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {key} is not JSON ({error}); {_DAMAGED}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"its {key} is not a JSON object but {text!r:.40}; {_SAVE_AGAIN}")
    return value


def _config(text: str) -> tuple[WaveNetConfig, list[tuple[float, float]]]:
    """The config, and eps and momentum of every layer's batch norm."""
    found = _object("config", text)
    norms = found.pop("norms", None)
    values = {"gated": False} | {"kernel_sizes" if name == "fan_ins" else name: found[name] for name in found}
    if set(values) != {field.name for field in fields(WaveNetConfig)} or "kernel_sizes" in found:
        raise CheckpointError(f"its config has other fields than this library's: {', '.join(found):.80}; {_SAVE_AGAIN}")
    for name in ("batch_norm", "bias", "gated"):
        if not isinstance(values[name], bool):
            raise CheckpointError(f"{name} in its config is {values[name]!r:.40}, not true or false; {_SAVE_AGAIN}")
    config = WaveNetConfig(**values)
    layers = len(config.kernel_sizes) if config.batch_norm else 0
    fit = isinstance(norms, list) and len(norms) == layers and all(isinstance(n, list) and len(n) == 2 for n in norms)
    if not fit or not all(isinstance(number, float) and isfinite(number) for norm in norms for number in norm):
        raise CheckpointError(
            f"norms in its config are {norms!r:.80}; it needs an eps and a momentum for each of {layers} layers with "
            f"batch norm; {_SAVE_AGAIN}"
        )
    return config, [(eps, momentum) for eps, momentum in norms]


def _vocabulary(characters: str, size: int) -> Vocabulary:
    vocab = Vocabulary(characters)
    if vocab.characters != characters:
        raise CheckpointError(f"its vocabulary {characters!r:.80} is not sorted, or has a character twice; {_DAMAGED}")
    if len(vocab) != size:
        raise CheckpointError(
            f"a vocabulary of {len(vocab):,} tokens ('.' and {len(characters):,} characters) for a model of {size:,}; "
            "save the model with the vocabulary that it was made for"
        )
    return vocab


def _tensors(file: BinaryIO, head: bytes, header: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, on the CPU; nothing else may follow the header."""
    data = file.read()
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        missing = (expected := max(ends, default=0)) - len(data)
    except (IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"its header does not say where its tensors are; {_DAMAGED}") from error
    if missing > 0:
        raise CheckpointError(f"truncated: {missing:,} of {expected:,} bytes of its tensors are missing; {_DAMAGED}")
    if missing < 0:
        raise CheckpointError(f"{-missing:,} bytes follow its last tensor; {_DAMAGED}")
    try:
        return safetensors.torch.load(head + data)
    except Exception as error:  # safetensors raises its own error, KeyError and torch's errors for bad headers
        raise CheckpointError(f"its header and its tensors do not agree ({error}); {_DAMAGED}") from error


def _check_quantiles(quantiles: Tensor | None) -> None:
    if quantiles is None:
        return
    if quantiles.dtype != torch.float32 or quantiles.ndim != 1 or not len(quantiles):
        raise CheckpointError(
            f"quantiles are {quantiles.dtype} of shape {tuple(quantiles.shape)}; they must be torch.float32 (q,)"
        )
    if not quantiles.isfinite().all() or (quantiles.diff() < 0).any():
        raise CheckpointError("quantiles must be finite and ascending; sort them before saving")


def _model(config: WaveNetConfig, norms: list[tuple[float, float]], tensors: dict[str, Tensor]) -> ConvWaveNet:
    """The model with these weights, in evaluation mode; allocates nothing before every shape is known to fit."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        listed = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(
            f"its weights are of {listed}; convert the model to one floating-point dtype and {_SAVE_AGAIN}"
        )
    try:
        model = ConvWaveNet(config, device="meta", dtype=next(iter(dtypes), None))  # draws no random numbers
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"its config asks for a model that cannot be built: {config}; {_DAMAGED}") from error
    asked = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*asked, *tensors]:
        if name not in tensors:
            raise CheckpointError(f"there is no tensor {name}, which its config asks for; {_SAVE_AGAIN}")
        if name not in asked:
            raise CheckpointError(f"there is a tensor {name!r:.80}, which its config has no place for; {_SAVE_AGAIN}")
        if tensors[name].shape != asked[name]:
            raise CheckpointError(
                f"{name} is of shape {tuple(tensors[name].shape)} and its config asks for {asked[name]}; {_SAVE_AGAIN}"
            )
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise CheckpointError(
                f"{name} has {bad:,} values that are NaN or infinite, so no score could be trusted; "
                "take a checkpoint from before the training broke down"
            )
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(tensors)
    for layer, constants in zip(model.layers, norms):
        norm: Any = layer.norm
        norm.eps, norm.momentum = constants
    return model
