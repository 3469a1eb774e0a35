"""The metadata of a checkpoint: a model's config, its vocabulary and notes, as text and back. `checkpoint` says what.

Versions 1 and 2 have `batch_norm`, true or false, in place of the fields that came later, and a missing `gated` means
false. A standard vocabulary is its characters; any other one has beside them `end`, the token that ends a name, and
`padding`, the character that stands for it, which older releases do not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from itertools import chain
from math import isfinite
from typing import Any

from .config import WaveNetConfig
from .errors import CheckpointError
from .model import BatchNorm, ConvWaveNet
from .names import sha256_of
from .vocabulary import Vocabulary

FORMAT = "wavenet-conv"
VERSIONS = ("1", "2", "3")  # each release rejects those that came later, and asks to be upgraded
LATER_FIELDS = ("norm", "activation", "head_kernel_size", "head_norm")  # of version 3
SAVE_AGAIN = "write it again with save_checkpoint"


def metadata_of(
    model: ConvWaveNet, vocab: Vocabulary, notes: Mapping[str, Any] | None, names: list[str] | None
) -> dict[str, str]:
    """The metadata of a file with this model; `names` is its training list."""
    version = _version(model.config, vocab)
    notes = dict(notes or {})
    if names is not None:
        notes.setdefault("names_sha256", sha256_of(sorted(names)))  # notebooks shuffle
    metadata = {
        "format": FORMAT,
        "version": version,
        "config": json.dumps(_fields_of(model, version)),
        "vocabulary": vocab.characters,
        "notes": json.dumps(notes),
    }
    return metadata if vocab.is_standard else metadata | {"end": str(vocab.end), "padding": vocab.padding}


def _version(config: WaveNetConfig, vocab: Vocabulary) -> str:
    """The first version that can hold both: 2 has gated models; 3 other norms, activations, heads, vocabularies."""
    one_norm = set(config.norms) in ({"batch"}, {"none"})
    plain_head = (config.head_kernel_size, config.head_norm) == (1, "none")
    if vocab.is_standard and one_norm and plain_head and set(config.activations) == {"tanh"}:
        return "2" if config.gated else "1"
    return "3"


def json_in(text: str | bytes) -> Any:
    """The value of a JSON text, None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def object_in(key: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in the metadata's `key`."""
    text = metadata.get(key)
    value = json_in(text) if isinstance(text, str) else None
    if not isinstance(value, dict):
        raise CheckpointError(f"its {key} is not a JSON object but {text!r:.40}; {SAVE_AGAIN}")
    return value


def norms_of(model: ConvWaveNet) -> list[Any]:
    """The norms of a model in order, the head's last."""
    norms = [getattr(layer, "norm", None) for layer in model.layers] + [model.head_norm]
    return [norm for norm in norms if norm is not None]


def _fields_of(model: ConvWaveNet, version: str) -> dict[str, Any]:
    """What `config` in the metadata holds; the order decides the bytes of the file."""
    config, names = model.config, ["vocab_size", "n_embd", "n_hidden"]
    if version == "3":
        found = {name: getattr(config, name) for name in [*names, *LATER_FIELDS, "bias", "gated"]}
    else:
        found = {name: getattr(config, name) for name in names}
        found |= {"batch_norm": config.norms[0] == "batch", "bias": config.bias}
        found |= {"gated": True} if config.gated else {}
    norms = [[norm.eps, norm.momentum] if isinstance(norm, BatchNorm) else [norm.eps] for norm in norms_of(model)]
    return found | {"fan_ins": config.kernel_sizes, "norms": [list(map(float, numbers)) for numbers in norms]}


def vocabulary_of(metadata: dict[str, Any], vocab_size: int) -> Vocabulary:
    """The vocabulary of a model: the standard one of its characters, or with an `end` that of any other order."""
    found, end = metadata.get("vocabulary"), metadata.get("end")
    characters = found if isinstance(found, str) else ""
    if end is None:
        vocab = Vocabulary(characters)
    elif metadata["version"] == "3" and end in map(str, range(len(characters) + 1)):
        place, padding = int(end), metadata.get("padding", "")
        vocab = Vocabulary.from_mapping([*characters[:place], padding, *characters[place:]], end=padding)
    else:
        raise CheckpointError(f"its end is {end!r:.40}, which is not a token of a version 3 file; {SAVE_AGAIN}")
    if vocab.characters != found or len(vocab) != vocab_size:
        raise CheckpointError(
            f"its vocabulary {found!r:.80} is not the {vocab_size - 1:,} characters of the model in order"
        )
    return vocab


def config_of(found: dict[str, Any], version: str) -> tuple[WaveNetConfig, list[list[float]]]:
    """The config, and eps and momentum of every norm."""
    norms = found.pop("norms", None)
    values = {"kernel_sizes" if name == "fan_ins" else name: found[name] for name in found}
    asked, flags = {field.name for field in fields(WaveNetConfig)}, ["gated"]
    if version != "3":
        values, asked = {"gated": False} | values, asked - {*LATER_FIELDS} | {"batch_norm"}
        flags += ["batch_norm", "bias"]
    if values.keys() != asked or {type(values[name]) for name in flags} != {bool} or values.get("norm", "") is None:
        raise CheckpointError(f"its config has other fields or types than this library's: {found!r:.80}; {SAVE_AGAIN}")
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
        raise CheckpointError(f"its norms are {norms!r:.80}, {complaint}; {SAVE_AGAIN}")
    return config, settings
