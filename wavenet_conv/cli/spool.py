"""Names in a temporary file, to be read again in another order."""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence

from ..errors import OutputError
from ..lines import CHUNK_BYTES, CHUNK_LINES
from .reading import Name

MISSING = b"\xff"  # is not UTF-8


class Spool:
    """A list on disk, in a `with` statement; in memory it takes 8 bytes per name."""

    def __init__(self) -> None:
        self._file, self._ends = tempfile.TemporaryFile(), array("q", [1])  # noqa: SIM115
        self._file.write(b"\n")  # an empty file cannot be mapped

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def extend(self, names: Sequence[Name]) -> None:
        """Add names at the end."""
        raw = [MISSING if name is None else name.encode() for name in names]
        end = self._ends[-1]
        self._ends.extend([end := end + len(data) for data in raw])
        try:
            self._file.write(b"".join(raw))
        except OSError as error:
            raise OutputError(f"the copy of the names in {tempfile.gettempdir()}: {error.strerror}") from error

    def read(self, order: Iterable[int]) -> Iterator[Sequence[Name]]:
        """The names with these indices, in chunks of bounded size."""
        self._file.flush()
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            chunk, size = list[Name](), 0
            for index in order:
                raw = data[self._ends[index] : self._ends[index + 1]]
                chunk.append(None if raw == MISSING else raw.decode())
                size += len(raw)
                if len(chunk) == CHUNK_LINES or size >= CHUNK_BYTES:
                    yield chunk
                    chunk, size = [], 0
            yield chunk
