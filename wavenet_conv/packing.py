"""Names from lists, arrays, columns of tables, or already encoded: in chunks, as the tokens that engines read."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice, pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .chunks import CHUNK_TOKENS, Chunk, Codes, Limits, Packed, Text
from .errors import ConfigError, NamesError, ShapeError, UsageError
from .numbering import to_engine
from .vocabulary import Vocabulary, check_tokens, checked_names, lengths_of

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Names = Iterable[str] | tuple[Tensor, Tensor]

CHUNK_NAMES = 2**17

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ARROW_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


def packed(
    names: Names,
    vocab: Vocabulary,
    context: int,
    chunk: int,
    unknown: str,
    *,
    as_codes: bool = False,
    tokens: int | None = None,
) -> Iterator[Chunk]:
    """Names in chunks of at most `chunk`, as tokens or where that is possible as codes.

    A chunk of long names also ends at CHUNK_TOKENS tokens, or fewer `tokens`. `names` are what `Scorer.score` takes; a
    missing value is an unknown name.

    Raises:
        ConfigError: `chunk` or `unknown` is wrong. This, and a table in place of a column, is raised at the call.
        NamesError, ShapeError, UsageError: Names cannot be read; a library that reads them is missing.
    """
    if unknown not in ("error", "nan"):
        raise ConfigError(f"unknown is {unknown!r}; it is 'error' or 'nan'")
    if not isinstance(chunk, Integral) or chunk < 1:
        raise ConfigError(f"chunk is {chunk!r}; it must be an integer of at least 1")
    limits = Limits(int(chunk), CHUNK_TOKENS if tokens is None else min(tokens, CHUNK_TOKENS), context)
    if _encoded(names):
        return _repacked(*names, vocab, limits)
    texts = _texts(names, "" if as_codes else vocab.padding * context, limits)
    return _codes(texts, vocab, context, unknown) if as_codes else _tokens(texts, vocab, context, unknown)


def _tokens(texts: Iterable[Text], vocab: Vocabulary, context: int, unknown: str, first: int = 0) -> Iterator[Packed]:
    """first: The index of the first name."""
    for text, lengths, missing in texts:
        tokens, characters, known = vocab.pack_text(text, lengths, context)
        known = known if missing is None else known & ~missing
        if unknown == "error" and not known.all():
            row = int(known.byte().argmin())
            if missing is not None and missing[row]:
                found = f"name {first + row} is missing; leave it out, or get NaN with unknown='nan'"
                raise NamesError(found, index=first + row)
            start = int(lengths[:row].sum()) + context * (row + 1)
            raise vocab.unknown_character_error([text[start : start + int(lengths[row])]], first=first + row)
        yield Packed(tokens, characters, known)
        first += len(lengths)


def _codes(texts: Iterable[Text], vocab: Vocabulary, context: int, unknown: str) -> Iterator[Chunk]:
    """Chunks whose texts, without padding, are Latin-1 as `Codes`, others as tokens."""
    first = 0
    for part in texts:
        pack = partial(_pack, part, vocab, context, unknown, first)
        if unknown == "error" and part.missing is not None and part.missing.any():
            pack()  # raises for the first name that is wrong
        try:
            text = np.frombuffer(bytearray(part.text, "latin-1"), np.uint8)
        except UnicodeEncodeError:
            yield pack()
        else:
            known = torch.ones_like(part.lengths, dtype=torch.bool) if part.missing is None else ~part.missing
            yield Codes(torch.from_numpy(text), part.lengths, known, unknown, pack)
        first += len(part.lengths)


def _pack(part: Text, vocab: Vocabulary, context: int, unknown: str, first: int) -> Packed:
    """The names of a text without padding as tokens."""
    padding, ends = vocab.padding * context, [0, *part.lengths.cumsum(0).tolist()]
    names = ["", *[part.text[start:end] for start, end in pairwise(ends)]]
    text = part._replace(text=padding.join([*names, ""]))
    return next(_tokens([text], vocab, context, unknown, first))


def _texts(names: Any, padding: str, limits: Limits) -> Iterator[Text]:
    """The names as text, by the reader for their type."""
    kind = type(names)
    if kind is list:
        return _texts_of_strings(names, padding, limits)
    if isinstance(names, Mapping) or hasattr(kind, "columns"):
        raise NamesError(f"names is a table ({kind.__name__}); pass one of its columns, such as table['name']")
    if kind.__module__.partition(".")[0] == "pandas":
        dtype = getattr(names, "dtype", None)
        in_arrow = hasattr(dtype, "pyarrow_dtype") or "pyarrow" in str(getattr(dtype, "storage", ""))
        names = getattr(names, "array", names).__arrow_array__() if in_arrow else np.asarray(names)
        kind = type(names)
    if hasattr(kind, "__arrow_c_stream__") or hasattr(kind, "__arrow_c_array__"):
        return _texts_of_arrow(_arrow_column(names), padding, limits)
    if isinstance(names, np.ndarray):
        if isinstance(names, np.ma.MaskedArray):
            names = np.where(names.mask, np.array(None), names.data)
        if names.ndim != 1 or (names.size and names.dtype.kind not in "USOT"):  # np.array([]) has float64
            found = f"an array of shape {names.shape} and dtype {names.dtype}"
            raise NamesError(f"names is {found}; pass strings in one dimension")
        if names.dtype.kind in "US":
            return _texts_of_array(names, padding, limits)
    elif isinstance(names, str) or not isinstance(names, Iterable):
        checked_names(names)  # raises
    return _texts_of_strings(names, padding, limits)


def _texts_of_strings(names: Iterable[Any], padding: str, limits: Limits) -> Iterator[Text]:
    names, first = iter(names), 0
    while part := list(islice(names, limits.names)):
        missing = None
        try:
            lengths = lengths_of(part)
        except TypeError:
            missing = torch.tensor([_is_missing(name) for name in part], device="cpu")
            part = checked_names(["" if _is_missing(name) else name for name in part], first)
            lengths = lengths_of(part)
        for cut in limits.cuts(lengths.numpy()):
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


def _texts_of_array(names: np.ndarray, padding: str, limits: Limits) -> Iterator[Text]:
    """Of a NumPy array of strings of one width: UTF-32 (`U`), or UTF-8 (`S`)."""
    unit = np.dtype(np.uint32 if names.dtype.kind == "U" else np.uint8)
    width = names.dtype.itemsize // unit.itemsize
    size = limits.rows(width)
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


def _texts_of_arrow(column: Any, padding: str, limits: Limits) -> Iterator[Text]:
    import pyarrow
    from pyarrow import compute

    gap = padding.encode()
    for start in range(0, len(column), limits.names):
        names = column.slice(start, limits.names).cast(pyarrow.large_binary()).combine_chunks()
        missing = torch.from_numpy(np.array(names.is_null())) if names.null_count else None
        names = names.fill_null(b"")
        sizes = np.array(compute.binary_length(names))
        for cut in limits.cuts(sizes):
            data = _bytes_of_arrow(names[cut], gap)
            text = _decoded(data, sizes[cut], padding, start + cut.start)
            yield text._replace(missing=None if missing is None else missing[cut])


def _bytes_of_arrow(names: Any, gap: bytes) -> bytes:
    """The values of an array of type large_binary end to end, with this behind each."""
    import pyarrow
    from pyarrow import compute

    if not gap:
        _, offsets, values = names.buffers()
        first, last = np.frombuffer(offsets, np.int64)[[names.offset, names.offset + len(names)]]
        return memoryview(values or b"")[first:last].tobytes()
    part = names.cast(pyarrow.binary())
    whole = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(part)], pyarrow.int32()), part)
    return b"".join([compute.binary_join(whole, gap)[0].as_buffer(), gap])


def _decoded(data: bytes, sizes: np.ndarray, padding: str, first: int) -> Text:
    """From names in UTF-8 with padding after each; name `first + i` has `sizes[i]` bytes."""
    ends = np.cumsum(sizes + len(padding.encode()))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        index = first + int(ends.searchsorted(error.start, "right"))
        raise NamesError(f"name {index} has bytes that are not UTF-8; decode or drop it first", index=index) from error
    if len(text) < len(data):
        begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # a character
        before = np.cumsum(np.append(0, begins))[np.append(0, ends)]
        sizes = np.diff(before) - len(padding)
    return Text(padding + text, torch.from_numpy(sizes))


def _encoded(names: Names) -> TypeIs[tuple[Tensor, Tensor]]:
    return isinstance(names, tuple) and len(names) == 2 and all(isinstance(part, Tensor) for part in names)


def _repacked(tokens: Tensor, lengths: Tensor, vocab: Vocabulary, limits: Limits) -> Iterator[Packed]:
    """Of names that `Vocabulary.encode` has padded."""
    context = limits.context
    tokens, lengths = tokens.cpu(), lengths.cpu()
    fits = tokens.dtype in INTEGERS and lengths.dtype in INTEGERS and tokens.ndim == 2
    fits = fits and tokens.shape[:1] == lengths.shape
    if fits:
        check_tokens(tokens, len(vocab))
        lengths, place = lengths.long(), torch.arange(tokens.shape[1], device="cpu")
        inside = place < context + lengths[:, None]
        fits = bool(((lengths >= 0) & (lengths <= tokens.shape[1] - context)).all())
        fits = fits and bool(((tokens == vocab.end) == (place < context))[inside].all())
    if not fits:
        raise ShapeError(
            f"tokens {tuple(tokens.shape)} of {tokens.dtype} and lengths {tuple(lengths.shape)} of {lengths.dtype} are "
            f"not what vocab.encode(names, context={context}) returns"
        )
    gap = tokens.new_zeros(context, dtype=torch.int64)
    for first in range(0, len(tokens), limits.names):
        for cut in limits.cuts(lengths[first : first + limits.names].numpy()):
            rows = slice(first + cut.start, first + cut.stop)
            flat = torch.cat([to_engine(tokens[rows][inside[rows]].long(), vocab.end), gap])
            known = torch.ones_like(lengths[rows], dtype=torch.bool)
            yield Packed(flat.to(vocab.token_dtype), lengths[rows], known)
