"""Lines of text, from a file, a gzip file or standard input, in chunks of bounded size: what a line of a list is."""

from __future__ import annotations

import gzip
import os
import stat
import sys
import zlib
from io import BufferedReader
from select import select
from time import monotonic
from typing import BinaryIO, cast

from .errors import NamesError, UsageError, WaveNetConvError

CHUNK_LINES = 2**17  # lines that are read together
CHUNK_BYTES = 2**20  # a chunk of longer lines ends here; no line may be longer, so that memory is bounded
BLOCK_BYTES = 2**18  # what one call of the system reads
PAUSE = 0.1  # seconds after which the lines that a pipe or a terminal has sent are handed on
BOM = b"\xef\xbb\xbf"
FOREIGN = {  # no text begins like this
    b"PAR1\x15": "a Parquet file; give it as FILE, with the ending .parquet",
    b"\x1f\x8b": "gzip data; give a FILE with the ending .gz, or unpack it with gunzip",
}


class Lines:
    """The text of a UTF-8 file, a `.gz` file, or of standard input for "-", a number of lines at a time.

    label: The name of the input in messages. size: The file's bytes; None for a pipe. count: How many lines have been
    read.
    """

    def __init__(self, path: str):
        self.label, self.count, self._buffer, self._ended = path, 0, b"", False
        self._owned = path != "-"
        if not self._owned:
            self.label = "standard input"
            if sys.stdin is None:
                raise UsageError("standard input is closed; give a file")
        try:
            self._raw = cast(BufferedReader, open(path, "rb") if self._owned else sys.stdin.buffer)  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; give a text file with one name per line, or -") from error
        self._file = gzip.GzipFile(fileobj=self._raw) if path.lower().endswith(".gz") else self._raw
        about = os.fstat(self._raw.fileno())
        self.size = about.st_size if stat.S_ISREG(about.st_mode) else None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._owned:
            self._raw.close()

    def position(self) -> int:
        """How many bytes of `size` have been read."""
        return 0 if self.size is None else self._raw.tell()

    def read(self, limit: int = CHUNK_LINES) -> str:
        """Return the next lines with their ends, at most `limit`; "" after the last. An error names the line.

        From a pipe or a terminal it returns fewer lines rather than wait for more.
        """
        limit = min(limit, CHUNK_LINES)
        try:
            self._fill(limit)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or f"{error}; give a whole gzip file, or remove the ending .gz"
            raise WaveNetConvError(f"{self.label}, after line {self.count:,}: {reason}") from error
        data = self._take(limit)
        if not self.count:
            self._check_kind(data)
            data = data.removeprefix(BOM)
        if len(data) > CHUNK_BYTES:
            self._check_lengths(data)
        text = decoded(data, self.label, self.count + 1)
        self.count += data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
        return text

    def _fill(self, limit: int) -> None:
        """Read until the buffer has `limit` lines or more than `CHUNK_BYTES`, or the input pauses or ends."""
        count, end = self._buffer.count(b"\n"), monotonic() + PAUSE
        while count < limit and len(self._buffer) <= CHUNK_BYTES and not self._ended:
            if count and self.size is None and not _has_input(self._raw, end - monotonic()):
                return
            block = self._file.read1(BLOCK_BYTES)
            self._buffer, self._ended, count = self._buffer + block, not block, count + block.count(b"\n")

    def _take(self, limit: int) -> bytes:
        """Remove at most `limit` lines from the buffer; a line without an end is one at the end of the input."""
        data, rest = self._buffer, b""
        if data.count(b"\n") >= limit:
            rest = data.split(b"\n", limit)[-1]
        elif not self._ended and len(data) - data.rfind(b"\n") <= CHUNK_BYTES:
            rest = data[data.rfind(b"\n") + 1 :]
        self._buffer = rest
        return data[: len(data) - len(rest)]

    def _check_kind(self, data: bytes) -> None:
        for start, kind in FOREIGN.items():
            if data.startswith(start):
                raise UsageError(f"{self.label} is {kind}")

    def _check_lengths(self, data: bytes) -> None:
        for line, text in enumerate(data.split(b"\n"), self.count + 1):
            if len(text) > CHUNK_BYTES:
                fix = "give text with one name per line"
                raise NamesError(f"{self.label}, line {line}: longer than {CHUNK_BYTES:,} bytes; {fix}")


def decoded(data: bytes, label: object, first: int = 1) -> str:
    """Decode UTF-8; raises `NamesError` with the label of the input and the line, where the first one has a number."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line, start = data.count(b"\n", 0, error.start), data.rfind(b"\n", 0, error.start) + 1
        raise NamesError(
            f"{label}, line {first + line}: byte 0x{data[error.start]:02x} at byte {error.start - start} "
            f"of the line is not UTF-8; save the file as UTF-8"
        ) from error


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends, `\\n` or `\\r\\n`; every other character belongs to its line."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _has_input(file: BinaryIO, timeout: float) -> bool:
    """Whether a pipe or a terminal can be read without waiting longer than this; False where that cannot be asked."""
    try:
        return bool(select([file], [], [], max(timeout, 0))[0])
    except (OSError, ValueError):  # Windows asks only sockets
        return False
