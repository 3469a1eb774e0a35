"""Files that are there whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: two runs with one output are not kept apart there
    fcntl = None


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes `data` beside `path`, on to the disk, and renames it; a reader sees the old file or the new one.

    Raises the `OSError` of whatever fails; the previous file is then as it was and nothing is left beside it.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are their owner's alone
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


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


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask
