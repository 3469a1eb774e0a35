"""Lines of a file or a stream, read in chunks of bounded size."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate, islice
from types import TracebackType
from typing import BinaryIO

from ..errors import NamesError, OutputError, UsageError, WaveNetConvError

CHUNK_LINES = 2**17  # lines that are read together
CHUNK_BYTES = 2**20  # a chunk of longer lines ends here; no line may be longer, so that memory is bounded
BOM = b"\xef\xbb\xbf"


class Lines:
    """The lines of a file or of standard input, used in a `with` statement.

    Args:
        path: A file, or "-" for standard input.

    Attributes:
        label: What messages call the input.
        size: The file's bytes; None for a stream.
        first: The number of the first line of the last chunk, from 1.
        count: How many lines have been read.
        offset: How many bytes have been read.

    Raises:
        UsageError: If the file cannot be opened.
    """

    def __init__(self, path: str):
        self.label = "standard input" if path == "-" else path
        self.first, self.count, self.offset = 1, 0, 0
        if path == "-" and sys.stdin is None:
            raise UsageError("standard input is closed; give a file")
        try:
            self._file: BinaryIO = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; give a text file with one name per line, or -") from error
        self._standard_input = self._file if path == "-" else None
        about = os.fstat(self._file.fileno())
        self.size = about.st_size if stat.S_ISREG(about.st_mode) else None

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not self._standard_input:
            self._file.close()

    def read(self, limit: int | None = None) -> list[bytes]:
        """Return the next lines with their ends, at most `limit`; none after the last line."""
        self.first = self.count + 1
        count = CHUNK_LINES if limit is None else min(limit, CHUNK_LINES)
        try:
            raw = gather(iter(partial(self._file.readline, CHUNK_BYTES + 1), b""), count)
        except OSError as error:
            raise WaveNetConvError(f"{self.label}: {error.strerror or error}, after line {self.count:,}") from error
        begin, self.offset = self.offset, self.offset + sum(map(len, raw))
        if not begin and raw and raw[0].startswith(BOM):
            raw[0] = raw[0].removeprefix(BOM)
            raw = raw if raw[0] else []
        self.count += len(raw)
        if raw and len(raw[-1]) > CHUNK_BYTES:
            raise NamesError(
                f"{self.label}, line {self.count}: longer than {CHUNK_BYTES:,} bytes; give text with one name per line"
            )
        return raw

    def starts(self, raw: list[bytes]) -> Iterator[int]:
        """The offsets at which the lines of the last chunk start."""
        begin = self.offset - sum(map(len, raw))
        return islice(accumulate(map(len, raw), initial=begin), len(raw))

    def make_seekable(self) -> None:
        """Copy a stream to a temporary file, so that `read_at` can read its lines again."""
        if self._standard_input is None and self.size is not None:
            return
        try:
            file = tempfile.TemporaryFile()  # noqa: SIM115
            shutil.copyfileobj(self._file, file, CHUNK_BYTES)
            file.flush()
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"the copy of {self.label} in {tempfile.gettempdir()}: {reason}") from error
        self.__exit__(None, None, None)
        self._file, self.size = file, file.tell()
        file.seek(0)

    def read_at(self, starts: Iterable[int]) -> Iterator[bytes]:
        """The lines that start at these offsets, each with an end."""
        for start in starts:
            self._file.seek(start)
            yield self._file.readline(CHUNK_BYTES + 1).removesuffix(b"\n") + b"\n"

    def decode(self, raw: list[bytes]) -> list[str]:
        """Return lines without their ends, `\\n` or `\\r\\n`; nothing else is removed."""
        data = b"".join(raw)
        try:
            names = data.decode().replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            line, start = data.count(b"\n", 0, error.start), data.rfind(b"\n", 0, error.start) + 1
            raise NamesError(
                f"{self.label}, line {self.first + line}: byte 0x{data[error.start]:02x} at byte {error.start - start} "
                f"of the line is not UTF-8; save the file as UTF-8"
            ) from error
        return names[: len(raw)]


def gather(lines: Iterator[bytes], count: int) -> list[bytes]:
    """Return the next lines: at most `count`, and no more after `CHUNK_BYTES`."""
    raw, size = [], 0
    for line in islice(lines, count):
        raw.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            break
    return raw
