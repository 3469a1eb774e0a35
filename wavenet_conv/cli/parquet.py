"""Names from a column of a Parquet file, and rows of scores as one. pyarrow is imported when one is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import NamesError, UsageError, WaveNetConvError
from ..lines import CHUNK_BYTES, CHUNK_LINES
from .reading import Name, index_of
from .rows import Column, Names, open_file

BATCH_BYTES = 4 * CHUNK_BYTES  # of the names that are scored together
TEXTS = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}


class ParquetNames:
    """A column of strings, or of bytes that are UTF-8; a null is None."""

    def __init__(self, path: str, column: str | None):
        pa, parquet = _pyarrow(path)
        self._path, self.count, self._first = path, 0, 1
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
            raise UsageError(f"{path}: {reason}") from error
        types = {field.name: str(getattr(field.type, "value_type", field.type)) for field in self._file.schema_arrow}
        texts = [name for name in types if types[name] in TEXTS]
        name = self._file.schema_arrow.names[index_of(column, self._file.schema_arrow.names, path, texts)]
        if types[name] not in TEXTS:
            raise UsageError(f"{path}: column {name!r} is {types[name]}; give one of strings: {', '.join(texts)}")
        self.size, self._parts = self._file.metadata.num_rows, self._arrays(name)
        self._rest: Any = pa.array([], pa.string())

    def __enter__(self) -> ParquetNames:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def position(self) -> int:
        """How many rows have been read."""
        return self.count

    def place(self, index: int) -> str:
        """The file and the row of a name of the last chunk; the first row is 1."""
        return f"{self._path}, row {self._first + index}"

    def read(self, limit: int = CHUNK_LINES) -> list[Name]:
        """Return the next names, at most `limit`; none after the last. An error names the row."""
        pa, _ = _pyarrow(self._path)
        try:
            array = self._rest or next(self._parts, self._rest)
        except (OSError, pa.ArrowException) as error:
            raise WaveNetConvError(f"{self._path}, after row {self.count:,}: {error}") from error
        array, self._rest = array[:limit], array[limit:]
        self._first, self.count = self.count + 1, self.count + len(array)
        try:
            return array.cast(pa.large_string()).to_pylist()
        except (UnicodeDecodeError, pa.ArrowInvalid):
            for row, value in enumerate(array.cast(pa.large_binary()).to_pylist()):
                _checked(value or b"", self.place(row))
            raise

    def _arrays(self, name: str) -> Iterator[Any]:
        """The column, in parts of bounded size that are not empty."""
        for batch in self._file.iter_batches(CHUNK_LINES, columns=[name]):
            array = batch.column(0)
            step = max(1, len(array) * BATCH_BYTES // max(array.nbytes, 1))
            yield from (array[start : start + step] for start in range(0, len(array), step))


def _checked(value: bytes, place: str) -> None:
    try:
        value.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{value[error.start]:02x} at byte {error.start} is not UTF-8"
        raise NamesError(f"{place}: {byte}; write the column as strings") from error


@contextmanager
def parquet_rows(path: str, header: dict[str, Column]) -> Iterator[Callable[[Names, dict[str, Column]], object]]:
    """Give a function that writes rows to a Parquet file, of the columns and dtypes of `header`, which has no rows."""
    pa, parquet = _pyarrow(path)

    def table(names: Names, columns: dict[str, Column]) -> Any:
        arrays = [pa.array(names, pa.string()), *map(array, columns.values())]
        return pa.table(arrays, ["name", *columns])

    def array(column: Column) -> Any:
        if isinstance(column, tuple):
            values, offsets = column
            return pa.LargeListArray.from_arrays(pa.array(offsets.numpy()), pa.array(values.numpy()))
        return pa.array(column.numpy())

    with open_file(path) as file, parquet.ParquetWriter(file, table([], header).schema) as writer:
        yield lambda names, columns: writer.write_table(table(names, columns))


def _pyarrow(path: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        fix = "pip install 'wavenet-conv[arrow]'"
        raise UsageError(f"{path}: Parquet files need pyarrow; {fix}") from error
    return pyarrow, parquet
