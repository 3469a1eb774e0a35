"""Where rows go: standard output, or a file that appears when it is whole."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import OutputError, WaveNetConvError
from ..files import whole_file

Write = Callable[[bytes], object]


@contextmanager
def open_output(path: str | None) -> Iterator[Write]:
    """Open a sink for bytes.

    Args:
        path: A file, which is replaced when the `with` block ends without an error and else stays as it was; None for
            standard output, which is flushed after each write.

    Yields:
        A function that writes bytes.

    Raises:
        OutputError: If the bytes cannot be written.
        BrokenPipeError: If the reader of standard output closed the pipe.
    """
    if path is None:
        if sys.stdout is None:
            raise OutputError("standard output is closed; redirect it to a file")
        yield _write_to_standard_output
        return
    try:
        with whole_file(os.path.realpath(path)) as file:
            yield file.write
    except OSError as error:
        if isinstance(error, WaveNetConvError):
            raise
        raise OutputError(f"{path}: {error.strerror or error}; the file is as it was before") from error


def shares_terminal(path: str | None) -> bool:
    """Whether rows that go to `path`, as in `open_output`, are themselves seen on the terminal."""
    return path is None and sys.stdout is not None and sys.stdout.isatty()


def flush_output() -> None:
    """Flush standard output; raises as `open_output` does."""
    if sys.stdout is None:
        return
    with _output_errors():
        sys.stdout.flush()


def _write_to_standard_output(data: bytes) -> None:
    with _output_errors():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


@contextmanager
def _output_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # What is still buffered goes nowhere, so that the interpreter does not complain about it when it exits.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
            raise BrokenPipeError from error
        raise OutputError(f"standard output: {error.strerror or error}; the rows are not complete") from error
