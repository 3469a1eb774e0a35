"""How a notebook numbers its characters, and how the engines do: there the end is 0 and the others follow in order."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import NamesError


def to_engine(tokens: Tensor, end: int) -> Tensor:
    """Tokens, integers of any shape, in the engines' numbers; `end` is the token that ends a name."""
    return tokens if end == 0 else torch.where(tokens == end, 0, torch.where(tokens < end, tokens + 1, tokens))


def from_engine(tokens: Tensor, end: int) -> Tensor:
    """The inverse of `to_engine`."""
    return tokens if end == 0 else torch.where(tokens == 0, end, torch.where(tokens <= end, tokens - 1, tokens))


class CharacterTable:
    """From a text to the engines' numbers: `characters[i]` is i + 1, every other character 0.

    dtype: Of the numbers: uint8 for fewer than 256 characters, otherwise int64.
    """

    def __init__(self, characters: str):
        self.dtype = torch.uint8 if len(characters) < 256 else torch.int64
        codes = [ord(c) for c in characters]
        self._numbers = torch.zeros(
            max(codes) + 2, dtype=self.dtype, device="cpu"
        ).numpy()  # the last: every later character
        self._numbers[codes] = np.arange(1, len(characters) + 1)
        self._bytes = bytes(self._numbers[:256]).ljust(256, b"\0") if self.dtype == torch.uint8 else None

    @property
    def latin1(self) -> Tensor | None:
        """The number of each character of Latin-1, int32 `(256,)`; None for 256 characters and more."""
        return None if self._bytes is None else torch.tensor([*self._bytes], dtype=torch.int32, device="cpu")

    def __call__(self, text: str) -> Tensor:
        """The number of each character: `(characters,)`."""
        if self._bytes:
            try:
                return torch.frombuffer(bytearray(text, "latin-1").translate(self._bytes), dtype=torch.uint8)
            except UnicodeEncodeError:
                pass
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
        return torch.from_numpy(self._numbers[np.minimum(codes, len(self._numbers) - 1)])


def read_mapping(mapping: Any, end: str) -> tuple[str, int]:
    """The characters of a `stoi` or `itos` in the order of their tokens, and the token of its key `end`.

    Raises:
        NamesError: The arguments are not what `Vocabulary.from_mapping` takes.
    """
    missing = NamesError(f"no {end!r} in the mapping; add the token that ends a name, or say its key with end=...")
    if isinstance(mapping, Mapping) and mapping and end not in [*mapping, *mapping.values()]:
        raise missing  # rather than a gap in the numbers
    keys = _keys_in_order(mapping)
    if end not in keys:
        raise missing
    token = keys.index(end)
    characters = keys[:token] + keys[token + 1 :]
    for key in characters:
        if len(key) != 1:
            fix = f"only the end, {end!r}, may be longer; a model with one token for the start and another for the end"
            raise NamesError(
                f"the key {key!r} is not a single character; {fix} has to be trained again with one for both"
            )
    return "".join(characters), token


def _keys_in_order(mapping: Any) -> list[str]:
    """The keys in the order of their tokens, which are 0, 1, ..., each once."""
    if not isinstance(mapping, (Mapping, list, tuple)):
        found = f"{type(mapping).__name__}, {mapping!r:.40}"
        raise NamesError(f"the mapping is a {found}; pass the notebook's stoi or itos, such as {{'.': 0, 'a': 1}}")
    entries = list(mapping.items() if isinstance(mapping, Mapping) else enumerate(mapping))
    if not all(isinstance(key, str) for key, _ in entries):  # itos
        entries = [(key, token) for token, key in entries]
    for key, token in entries:
        if not isinstance(key, str) or not isinstance(token, Integral) or isinstance(token, bool):
            raise NamesError(f"the key {key!r} has the token {token!r}; keys are strings and tokens are integers")
    entries.sort(key=lambda entry: entry[1])
    tokens: dict[str, Any] = {}
    for expected, (key, token) in enumerate(entries):
        if token != expected:
            found = f"the key {key!r} has the token {token} where {expected} is expected"
            raise NamesError(f"{found}; the tokens of {len(entries)} keys are 0 to {len(entries) - 1}, each once")
        if key in tokens:
            raise NamesError(f"the key {key!r} has the tokens {tokens[key]} and {token}; give each key one token")
        tokens[key] = token
    return list(tokens)
