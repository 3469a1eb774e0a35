"""Lines of text from a file or standard input, in chunks of bounded size."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate, islice
from typing import BinaryIO

from .errors import NamesError, OutputError, UsageError, WaveNetConvError

CHUNK_LINES = 2**17  # lines that are read together
CHUNK_BYTES = 2**20  # a chunk of longer lines ends here; no line may be longer, so that memory is bounded
BOM = b"\xef\xbb\xbf"


class Lines:
    """The lines of a UTF-8 file, or of standard input for "-", without their ends (`\\n` or `\\r\\n`).

    label: The name of the input in messages. size: The file's bytes; None for a pipe. count, offset: How many lines and
    bytes have been read. starts: The offset in bytes of each line of the last chunk.
    """

    def __init__(self, path: str):
        self.label, self.count, self.offset, self.starts = path, 0, 0, list[int]()
        self._owned = path != "-"
        if not self._owned:
            self.label = "standard input"
            if sys.stdin is None:
                raise UsageError("standard input is closed; give a file")
        try:
            self._file: BinaryIO = open(path, "rb") if self._owned else sys.stdin.buffer  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; give a text file with one name per line, or -") from error
        about = os.fstat(self._file.fileno())
        self.size = about.st_size if stat.S_ISREG(about.st_mode) else None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._owned:
            self._file.close()

    def read(self, limit: int = CHUNK_LINES) -> list[str]:
        """Return the next lines, at most `limit`; none after the last. An error names the line."""
        try:
            raw = _gather(iter(partial(self._file.readline, CHUNK_BYTES + 1), b""), min(limit, CHUNK_LINES))
        except OSError as error:
            raise WaveNetConvError(f"{self.label}: {error.strerror}, after line {self.count:,}") from error
        start, self.offset = self.offset, self.offset + sum(map(len, raw))
        if not start and raw and raw[0].startswith(BOM):
            start, raw[0] = len(BOM), raw[0].removeprefix(BOM)
            raw = raw if raw[0] else []
        self.starts = list(accumulate(map(len, raw), initial=start))[:-1]
        first, self.count = self.count + 1, self.count + len(raw)
        if raw and len(raw[-1]) > CHUNK_BYTES:
            raise NamesError(
                f"{self.label}, line {self.count}: longer than {CHUNK_BYTES:,} bytes; give text with one name per line"
            )
        return self._decoded(raw, first)

    def make_seekable(self) -> None:
        """Copy standard input or a pipe to a temporary file, so that `read_at` can read it again."""
        if self._owned and self.size is not None:
            return
        try:
            file = tempfile.TemporaryFile()  # noqa: SIM115
            shutil.copyfileobj(self._file, file, CHUNK_BYTES)
            self.size = file.tell()
            file.seek(0)
        except OSError as error:
            raise OutputError(f"the copy of {self.label} in {tempfile.gettempdir()}: {error.strerror}") from error
        self.__exit__()
        self._file, self._owned = file, True

    def read_at(self, starts: Iterable[int]) -> Iterator[list[str]]:
        """The lines that start at these offsets in bytes, in chunks."""
        lines = map(self._line_at, starts)
        while raw := _gather(lines, CHUNK_LINES):
            yield self._decoded(raw, 1)

    def _line_at(self, start: int) -> bytes:
        self._file.seek(start)
        line = self._file.readline()
        return line if line.endswith(b"\n") else line + b"\r\n"  # so that a bare CR before it stays

    def _decoded(self, raw: list[bytes], first: int) -> list[str]:
        data = b"".join(raw)
        try:
            return data.decode().replace("\r\n", "\n").split("\n")[: len(raw)]
        except UnicodeDecodeError as error:
            line, start = data.count(b"\n", 0, error.start), data.rfind(b"\n", 0, error.start) + 1
            raise NamesError(
                f"{self.label}, line {first + line}: byte 0x{data[error.start]:02x} at byte {error.start - start} "
                f"of the line is not UTF-8; save the file as UTF-8"
            ) from error


def _gather(lines: Iterator[bytes], count: int) -> list[bytes]:
    """The next lines: at most `count`, and no more after `CHUNK_BYTES`."""
    raw, size = [], 0
    for line in islice(lines, count):
        raw.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            break
    return raw
