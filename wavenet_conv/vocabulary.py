"""Characters to tokens and back; names to padded sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, NamesError, ShapeError, TokenError
from .numbering import CharacterTable, from_engine, read_mapping

END = "."  # what a text has in place of the token that pads before a name and ends it


class Vocabulary:
    """The characters of a list of names; the end is token 0, the characters are 1, 2, ... in sorted order.

    `from_mapping` numbers them as a notebook does.

    Args:
        characters: The characters themselves, such as "abc", in any order; `from_names` collects them from names.
        end: The character that stands for the end. It cannot be in a name. Host names need another one than `.`.

    Raises:
        NamesError: There are no characters, `end` is one of them, or `end` is not a single character.

    Attributes:
        characters: The characters in the order of their tokens, without the end.
        end: The token that pads before a name and ends it.
        padding: A character that is not in `characters`: the one given as `end`, or else `.` if possible. It stands for
            the end in a text.
        token_dtype: Of the tokens that engines read: uint8 for fewer than 256 characters, otherwise int64.
        is_standard: Whether `Vocabulary(characters)` is the same vocabulary.
    """

    def __init__(self, characters: Iterable[str], *, end: str = END):
        characters = "".join(sorted(set(characters)))
        if not isinstance(end, str) or len(end) != 1:
            raise NamesError(f"end is {end!r}; it must be a single character, such as '$'")
        if end in characters:
            found = f"{end!r} is the end of every name (token 0) and cannot be one of its characters"
            raise NamesError(f"{found}; say another end with end=...")
        self._number(characters, 0, end)

    def _number(self, characters: str, end: int, key: str) -> None:
        if not characters:
            raise NamesError("a vocabulary needs at least one character; none was given")
        self.characters, self.end, known = characters, end, set(characters)
        spare = (key if len(key) == 1 else END, END, *map(chr, range(len(known) + 1)))
        self.padding = next(c for c in spare if c not in known)
        self._alphabet = characters[:end] + self.padding + characters[end:]  # in the order of the tokens
        self.is_standard = end == 0 and END not in known and characters == "".join(sorted(characters))
        self._tokens = CharacterTable(characters)
        self.token_dtype = self._tokens.dtype

    @classmethod
    def from_mapping(cls, mapping: Mapping[Any, Any] | Sequence[str], *, end: str = ".") -> Vocabulary:
        """The vocabulary of a notebook's own dictionary; raises `NamesError`, which names the key and the fix.

        Args:
            mapping: The notebook's `stoi`, from characters to tokens, or its `itos`, from tokens to characters: a dict
                or a list. Tokens are 0, 1, ..., each once, in any order.
            end: The key whose token ends a name and pads before it: a string of any length, such as "<E>" or "".
        """
        vocab = cls.__new__(cls)
        cls._number(vocab, *read_mapping(mapping, end), end)
        return vocab

    @classmethod
    def from_names(cls, names: Iterable[str], *, end: str = END) -> Vocabulary:
        """The vocabulary of all characters in `names`; raises `NamesError` for a name with `end`, with its place."""
        names = checked_names(names)
        vocab = cls({*"".join(names)} - {end}, end=end)
        for index, name in enumerate(names):
            if end in name:
                complaint = "marks the end of a name; remove it, or say another end with end=..."
                raise _names_error(name, index, name.index(end), complaint)
        return vocab

    def __len__(self) -> int:
        return len(self.characters) + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (other.characters, other.end) == (self.characters, self.end)

    def __hash__(self) -> int:
        return hash((self.characters, self.end))

    def __repr__(self) -> str:
        if self.is_standard:
            return f"Vocabulary({self.characters!r})"
        return f"Vocabulary.from_mapping(list({self._alphabet!r}), end={self.padding!r})"

    def encode(self, names: Iterable[str], *, context: int) -> tuple[Tensor, Tensor]:
        """The sequences of `names`, padded to the longest.

        Args:
            names: The names, `batch` of them.
            context: The tokens that one prediction sees, such as `conv.context`.

        Returns:
            `(tokens, lengths)`, both int64 on the CPU. tokens `(batch, context + longest)`: `end` (0 unless the mapping
            says otherwise) `context` times before each name, and after it up to the longest. lengths `(batch,)`:
            characters per name; L characters have L + 1 outputs.

        Raises:
            NamesError: A character is not in the vocabulary; the message and the attributes say which and where.
            ShapeError: The context is not an integer of at least 1.
        """
        names = checked_names(names)
        if not isinstance(context, int) or context < 1:
            raise ShapeError(f"context is {context!r}; it must be an integer of at least 1, such as conv.context")
        lengths = lengths_of(names)
        longest = int(lengths.max()) if names else 0
        tokens = torch.full((len(names), context + longest), self.end, dtype=torch.int64, device="cpu")
        if longest:
            inside = torch.arange(longest, device="cpu") < lengths[:, None]
            found = self._tokens("".join(names)).long()
            if not found.all():
                raise self.unknown_character_error(names)
            tokens[:, context:][inside] = from_engine(found, self.end)
        return tokens, lengths

    def pack(self, names: Iterable[str], *, context: int) -> tuple[Tensor, Tensor, Tensor]:
        """The sequences of `names` end to end, in the engines' numbers (`to_engine`).

        Returns:
            `(tokens, lengths, known)`, all on the CPU. tokens `(time,)` of `token_dtype`: `context` zeros before each
            name and after the last, `characters[i]` as i + 1. lengths int64 `(names,)`. known bool `(names,)`: false
            for a name with an unknown character, which is packed as an empty name.
        """
        names, padding = checked_names(names), self.padding * context
        return self.pack_text(padding.join(["", *names, ""]), lengths_of(names), context)

    def pack_text(self, text: str, lengths: Tensor, context: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `pack` returns, from the names' text: `padding` `context` times before each and after the last."""
        tokens = self._tokens(text)
        known = torch.ones_like(lengths, dtype=torch.bool)
        # The zeros between names are known, so every other zero is an unknown character.
        if len(tokens) - int(np.count_nonzero(tokens.numpy())) > context * (len(lengths) + 1):
            found = run_sums(tokens.numpy()[context:] != 0, lengths.numpy() + context)
            known = torch.from_numpy(found) == lengths
            kept = torch.stack([known, torch.ones_like(known)], 1).flatten()
            runs = torch.stack([lengths, torch.full_like(lengths, context)], 1).flatten()
            tokens = torch.cat([tokens[:context], tokens[context:][kept.repeat_interleave(runs)]])
            lengths = lengths.masked_fill(~known, 0)
        return tokens, lengths, known

    @property
    def latin1(self) -> Tensor | None:
        """The engines' number of each code of Latin-1, int32 `(256,)`, 0 for one that is unknown.

        None for 256 characters and more.
        """
        return self._tokens.latin1

    def check_size(self, vocab_size: int) -> None:
        """Raises `ConfigError` unless this vocabulary has as many tokens as a model."""
        if len(self) != vocab_size:
            found = f"the vocabulary has {len(self)} tokens and the model {vocab_size}"
            raise ConfigError(f"{found}; use the vocabulary that the model was trained with")

    def unknown_character_error(self, names: Sequence[str], *, first: int = 0) -> NamesError:
        """The error, to be raised, for the first character of `names` that is not in the vocabulary.

        first: The index of `names[0]` for the message.
        """
        places = ((index, position) for index, name in enumerate(names) for position in range(len(name)))
        index, position = next(place for place in places if names[place[0]][place[1]] not in self.characters)
        return _names_error(names[index], first + index, position, f"is not in the vocabulary {self.characters!r}")

    def decode(self, tokens: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> str | list[str]:
        """The name in a sequence of integers `(time,)`, or the names in a batch `(batch, time)`.

        Leading tokens `end` are padding; the first one after a character ends the name, and the rest is not read.
        Raises `TokenError` for a token outside the vocabulary, `ShapeError` for another shape or other than integers.
        """
        tokens = tokens if isinstance(tokens, Tensor) else torch.as_tensor(tokens, device="cpu")
        tokens = tokens if tokens.numel() else tokens.long()
        if tokens.ndim not in (1, 2) or tokens.is_floating_point():
            found = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
            raise ShapeError(f"decode takes integers (time,) or (batch, time), not {found}")
        check_tokens(tokens, len(self))
        alphabet, end = self._alphabet, self.padding
        rows = tokens if tokens.ndim == 2 else tokens[None]
        names = ["".join(alphabet[t] for t in row).lstrip(end).partition(end)[0] for row in rows.tolist()]
        return names if tokens.ndim == 2 else names[0]


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises `TokenError` for the first token outside `[0, vocab_size)`, with its indices."""
    if tokens.numel() == 0:
        return
    low, high = torch.stack(tokens.aminmax()).tolist()  # one kernel and one wait for the device
    if low < 0 or high >= vocab_size:
        place = ((tokens < 0) | (tokens >= vocab_size)).nonzero()[0].tolist()
        raise TokenError(
            f"token {int(tokens[tuple(place)])} at {place} is outside the vocabulary of {vocab_size} tokens "
            f"(0 to {vocab_size - 1}); encode names with the model's own vocabulary"
        )


def checked_sequences(
    tokens: Tensor, context: int, vocab_size: int, device: torch.device, *, values: bool = True
) -> Tensor:
    """Tokens int64 `(batch, time)` on a model's device; raises `ShapeError` or `TokenError` if it cannot read them.

    On CUDA this does not wait for the device, except for tokens in pinned memory: tokens on the host are checked there
    and then copied. Of tokens on the device, the kernel that looks up their embedding checks the values.

    values: Whether to check the tokens themselves. A caller whose lookup checks them on the CPU leaves that out.
    """
    if not isinstance(tokens, Tensor):
        raise ShapeError(f"tokens are a {type(tokens).__name__}; pass an int64 tensor, as Vocabulary.encode returns")
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"tokens must be int64 (batch, time), not {tokens.dtype} of shape {tuple(tokens.shape)}")
    if tokens.shape[1] < context:
        raise ShapeError(
            f"a sequence of {tokens.shape[1]} tokens is shorter than the context of {context}; "
            f"put {context} tokens of padding before each name, as Vocabulary.encode does"
        )
    if tokens.device != device and not (tokens.device.type == "cpu" and device.type == "cuda"):
        raise ShapeError(f"tokens are on {tokens.device} and the model on {device}; move them with .to(...)")
    # A graph that is compiled or exported cannot depend on values.
    if values and not tokens.is_cuda and not torch.compiler.is_compiling():
        check_tokens(tokens, vocab_size)
    return tokens_on(device, tokens)


def tokens_on(device: torch.device, tokens: Tensor) -> Tensor:
    """Tokens on a device, which may be changed after the call.

    Does not wait for the device, unless they lie in pinned memory: that is read only later.
    """
    return tokens if tokens.device == device else tokens.to(device, non_blocking=not tokens.is_pinned())


def checked_names(names: Iterable[str], first: int = 0) -> list[str]:
    """`names` as a list; raises `NamesError` for one string instead of a list, and for items that are no strings.

    first: The index of the first name for the message.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        kind = "one string, " if isinstance(names, str) else ""
        raise NamesError(f"names is {kind}{names!r:.40}; pass a list of strings, such as ['emma', 'olivia']")
    names = list(names)
    for index, name in enumerate(names if set(map(type, names)) != {str} else (), first):
        if not isinstance(name, str):
            raise NamesError(f"name {index} is {name!r}, of type {type(name).__name__}; names are strings", index=index)
    return names


def lengths_of(names: Sequence[str]) -> Tensor:
    """Characters per name, int64 `(names,)`."""
    # numpy is five times as fast as torch.tensor
    return torch.from_numpy(np.fromiter(map(len, names), np.int64, len(names)))


def run_sums(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The sum of each run of `values`, int64; the runs have `sizes`, at least 1 each."""
    return np.add.reduceat(values, sizes.cumsum() - sizes, dtype=np.int64)


def _names_error(name: str, index: int, position: int, complaint: str) -> NamesError:
    shown, character = name if len(name) <= 40 else f"{name[:37]}...", name[position]
    message = f"name {index} ({shown!r}): character {character!r} at position {position} {complaint}"
    return NamesError(message, index=index, position=position, character=character)
