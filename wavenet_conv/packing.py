"""Names from lists, arrays, columns of tables, or already encoded: in chunks, as the tokens that engines read."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, NamesError, ShapeError, UsageError
from .numbering import to_engine
from .vocabulary import Vocabulary, check_tokens, checked_names, lengths_of, run_sums

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Names = Iterable[str] | tuple[Tensor, Tensor]
Packed = tuple[Tensor, Tensor, Tensor]

# Tokens that get their ids together, which takes some hundred bytes each. Below 2**22, so that an int64 for each is
# less than the 32 MiB from which glibc gives fresh pages at every allocation.
CHUNK_TOKENS = 4_000_000
CHUNK_NAMES = 2**17

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ARROW_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


class Text(NamedTuple):
    """Names end to end, with `context` characters of padding before each and after the last."""

    text: str
    lengths: Tensor  # characters per name, int64
    missing: Tensor | None = None  # bool; a missing name is empty in the text. None: all are there


def packed(names: Names, vocab: Vocabulary, context: int, chunk: int, unknown: str) -> Iterator[Packed]:
    """Per chunk of at most `chunk` names: `(tokens, lengths, known)`, as `Vocabulary.pack` returns them.

    A chunk of long names also ends at CHUNK_TOKENS tokens. `names` are what `Scorer.score` takes; a missing value is an
    unknown name.

    Raises:
        ConfigError: `chunk` or `unknown` is wrong. This, and a table in place of a column, is raised at the call.
        NamesError, ShapeError, UsageError: Names cannot be read; a library that reads them is missing.
    """
    if unknown not in ("error", "nan"):
        raise ConfigError(f"unknown is {unknown!r}; it is 'error' or 'nan'")
    if not isinstance(chunk, Integral) or chunk < 1:
        raise ConfigError(f"chunk is {chunk!r}; it must be an integer of at least 1")
    if _encoded(names):
        return _repacked(*names, vocab, context, int(chunk))
    return _tokens(_texts(names, vocab.padding * context, chunk), vocab, context, unknown)


def _tokens(texts: Iterator[Text], vocab: Vocabulary, context: int, unknown: str) -> Iterator[Packed]:
    first = 0  # index of the chunk's first name
    for text, lengths, missing in texts:
        if unknown == "error" and missing is not None and missing.any():
            index = first + int(missing.byte().argmax())
            raise NamesError(f"name {index} is missing; leave it out, or get NaN with unknown='nan'", index=index)
        tokens, characters, known = vocab.pack_text(text, lengths, context)
        if unknown == "error" and not known.all():
            row = int(known.byte().argmin())
            start = int(lengths[:row].sum()) + context * (row + 1)
            raise vocab.unknown_character_error([text[start : start + int(lengths[row])]], first=first + row)
        yield tokens, characters, known if missing is None else known & ~missing
        first += len(lengths)


def _texts(names: Any, padding: str, chunk: int) -> Iterator[Text]:
    """The names as text, by the reader for their type."""
    kind = type(names)
    if kind is list:
        return _texts_of_strings(names, padding, chunk)
    if isinstance(names, Mapping) or hasattr(kind, "columns"):
        raise NamesError(f"names is a table ({kind.__name__}); pass one of its columns, such as table['name']")
    if kind.__module__.partition(".")[0] == "pandas":
        dtype = getattr(names, "dtype", None)
        in_arrow = hasattr(dtype, "pyarrow_dtype") or "pyarrow" in str(getattr(dtype, "storage", ""))
        names = getattr(names, "array", names).__arrow_array__() if in_arrow else np.asarray(names)
        kind = type(names)
    if hasattr(kind, "__arrow_c_stream__") or hasattr(kind, "__arrow_c_array__"):
        return _texts_of_arrow(_arrow_column(names), padding, chunk)
    if isinstance(names, np.ndarray):
        if isinstance(names, np.ma.MaskedArray):
            names = np.where(names.mask, np.array(None), names.data)
        if names.ndim != 1 or (names.size and names.dtype.kind not in "USOT"):  # np.array([]) has float64
            found = f"an array of shape {names.shape} and dtype {names.dtype}"
            raise NamesError(f"names is {found}; pass strings in one dimension")
        if names.dtype.kind in "US":
            return _texts_of_array(names, padding, chunk)
    elif isinstance(names, str) or not isinstance(names, Iterable):
        checked_names(names)  # raises
    return _texts_of_strings(names, padding, chunk)


def _texts_of_strings(names: Iterable[Any], padding: str, chunk: int) -> Iterator[Text]:
    names, first = iter(names), 0
    while part := list(islice(names, chunk)):
        missing = None
        try:
            lengths = lengths_of(part)
        except TypeError:
            missing = torch.tensor([_is_missing(name) for name in part])
            part = checked_names(["" if _is_missing(name) else name for name in part], first)
            lengths = lengths_of(part)
        for cut in _cuts(lengths.numpy(), len(padding)):
            try:  # checking each name's type first would take longer than joining them
                text = f"{padding}{padding.join(part[cut])}{padding}"
            except TypeError:
                checked_names(part, first)  # raises
                raise
            yield Text(text, lengths[cut], None if missing is None else missing[cut])
        first += len(part)


def _is_missing(value: Any) -> bool:
    """Whether it is None, NaN, or what pandas has for them, which is not imported for this."""
    is_nan = isinstance(value, (float, np.floating)) and bool(value != value)
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def _texts_of_array(names: np.ndarray, padding: str, chunk: int) -> Iterator[Text]:
    """Of a NumPy array of strings of one width: UTF-32 (`U`), or UTF-8 (`S`)."""
    unit = np.dtype(np.uint32 if names.dtype.kind == "U" else np.uint8)
    width = names.dtype.itemsize // unit.itemsize
    size = max(1, min(chunk, CHUNK_TOKENS // (width + len(padding))))
    for first in range(0, len(names), size):
        part = np.ascontiguousarray(names[first : first + size]).astype(names.dtype.newbyteorder("="), copy=False)
        sizes, codes = np.char.str_len(part), part.view(unit).reshape(len(part), width)
        if unit == np.uint32 and codes.max(initial=0) < 128:
            codes = codes.astype(np.uint8)
        codec = "utf-8" if codes.dtype == np.uint8 else f"utf-32-{sys.byteorder[0]}e"
        gap = np.frombuffer(padding.encode(codec), codes.dtype)
        rows = np.empty((len(part), width + len(gap)), codes.dtype)
        rows[:, :width], rows[:, width:] = codes, gap
        kept = np.ones(rows.shape, bool)
        np.less(np.arange(width, dtype=np.int32), sizes.astype(np.int32)[:, None], out=kept[:, :width])
        data = rows[kept].tobytes()
        if codec == "utf-8":
            yield _decoded(data, sizes, padding, first)
        else:
            yield Text(padding + data.decode(codec, "surrogatepass"), torch.from_numpy(sizes))


def _arrow_column(names: Any) -> Any:
    """A `pyarrow.ChunkedArray` of strings or bytes, from any object with the Arrow PyCapsule protocol."""
    try:
        import pyarrow
    except ImportError as error:
        fix = "pip install 'wavenet-conv[arrow]', or pass a list"
        raise UsageError(f"names of type {type(names).__name__} are read with pyarrow: {fix}") from error
    streamed = hasattr(type(names), "__arrow_c_stream__")
    column = pyarrow.chunked_array(names if streamed else [pyarrow.array(names)])
    encoded = pyarrow.types.is_dictionary(column.type)
    kind = column.type.value_type if encoded else column.type
    if str(kind) not in ARROW_STRINGS:
        raise NamesError(f"names is a column of type {kind}; pass a column of strings")
    if encoded:  # Arrow decodes no dictionaries of views
        to = pyarrow.large_binary()
        parts = [pyarrow.DictionaryArray.from_arrays(part.indices, part.dictionary.cast(to)) for part in column.chunks]
        column = pyarrow.chunked_array(parts, pyarrow.dictionary(column.type.index_type, to))
    return column


def _texts_of_arrow(column: Any, padding: str, chunk: int) -> Iterator[Text]:
    import pyarrow
    from pyarrow import compute

    gap = padding.encode()
    for start in range(0, len(column), chunk):
        names = column.slice(start, chunk).cast(pyarrow.large_binary()).combine_chunks()
        missing = torch.from_numpy(np.array(names.is_null())) if names.null_count else None
        names = names.fill_null(b"")
        sizes = np.array(compute.binary_length(names))
        for cut in _cuts(sizes, len(padding)):
            part = names[cut].cast(pyarrow.binary())
            whole = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(part)], pyarrow.int32()), part)
            data = b"".join([compute.binary_join(whole, gap)[0].as_buffer(), gap])
            text = _decoded(data, sizes[cut], padding, start + cut.start)
            yield text._replace(missing=None if missing is None else missing[cut])


def _decoded(data: bytes, sizes: np.ndarray, padding: str, first: int) -> Text:
    """From names in UTF-8 with padding after each; name `first + i` has `sizes[i]` bytes."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        index = first + int(np.cumsum(sizes + len(padding.encode())).searchsorted(error.start, "right"))
        raise NamesError(f"name {index} has bytes that are not UTF-8; decode or drop it first", index=index) from error
    if len(text) < len(data):
        begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # a character
        sizes = run_sums(begins, sizes + len(padding.encode())) - len(padding)
    return Text(padding + text, torch.from_numpy(sizes))


def _cuts(lengths: np.ndarray, context: int) -> Iterator[slice]:
    """Slices of the names: at most CHUNK_TOKENS tokens, or one name."""
    ends, start, before = (lengths + context).cumsum(), 0, 0
    while start < len(ends):
        stop = max(start + 1, int(ends.searchsorted(before + CHUNK_TOKENS, "right")))
        yield slice(start, stop)
        start, before = stop, int(ends[stop - 1])


def _encoded(names: Names) -> TypeIs[tuple[Tensor, Tensor]]:
    return isinstance(names, tuple) and len(names) == 2 and all(isinstance(part, Tensor) for part in names)


def _repacked(tokens: Tensor, lengths: Tensor, vocab: Vocabulary, context: int, chunk: int) -> Iterator[Packed]:
    """Of names that `Vocabulary.encode` has padded."""
    tokens, lengths = tokens.cpu(), lengths.cpu()
    fits = tokens.dtype in INTEGERS and lengths.dtype in INTEGERS and tokens.ndim == 2
    fits = fits and tokens.shape[:1] == lengths.shape
    if fits:
        check_tokens(tokens, len(vocab))
        lengths, place = lengths.long(), torch.arange(tokens.shape[1])
        inside = place < context + lengths[:, None]
        fits = bool(((lengths >= 0) & (lengths <= tokens.shape[1] - context)).all())
        fits = fits and bool(((tokens == vocab.end) == (place < context))[inside].all())
    if not fits:
        raise ShapeError(
            f"tokens {tuple(tokens.shape)} of {tokens.dtype} and lengths {tuple(lengths.shape)} of {lengths.dtype} are "
            f"not what vocab.encode(names, context={context}) returns"
        )
    for part, within, characters in zip(*(whole.split(chunk) for whole in (tokens, inside, lengths))):
        flat = torch.cat([to_engine(part[within].long(), vocab.end), torch.zeros(context, dtype=torch.int64)])
        yield flat.to(vocab.token_dtype), characters, torch.ones(len(characters), dtype=torch.bool)
