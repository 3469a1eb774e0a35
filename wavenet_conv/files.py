"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from .errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: two runs with one output are not kept apart there
    fcntl = None


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file beside `path`, which replaces `path` when the `with` block ends without an error.

    A reader of `path` sees the old file or the new one. After an error the old file is as it was, and the new one is
    removed.

    Args:
        path: The file to write; its folder must exist.

    Yields:
        The new file, open for writing bytes.

    Raises:
        OSError: Whatever fails.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` as `whole_file` does; raises the `OSError` of whatever fails."""
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Holds the lock file at `path` for the `with`, and takes it away afterwards; a killed process leaves no lock.

    Raises `OutputError` where another process holds it, or where it cannot be made.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise BlockingIOError  # its holder took it away between the opening and the lock
        except BaseException:
            os.close(descriptor)
            raise
    except BlockingIOError as error:
        raise OutputError(f"{path}: another process is writing there; wait until it ends") from error
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; give another output") from error
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(descriptor)
