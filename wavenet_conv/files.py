"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from .errors import OutputError


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file beside `path`, which replaces `path` when the `with` block ends without an error.

    A reader of `path` sees the old file or the new one. After an error, such as an `OSError` of the disk, the old file
    is as it was and the new one is removed. Raises `OutputError`, which names the folder, if the new file
    cannot be made there.
    """
    path = Path(path)
    temporary = path.with_name(f".{token_hex(8)}")  # short: the name of `path` may be as long as names can be
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(temporary):  # a name that says nothing to anybody
            found = f"{error.strerror} in the folder {str(path.parent.absolute())!r}"
            raised = OutputError(f"{path}: {found}; give a folder that exists and can be written to")
            raised.strerror = found  # for callers with advice of their own
            raise raised from error
        raise


def write_whole(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` as `whole_file` does; raises the `OSError` of whatever fails."""
    with whole_file(path) as file:
        file.write(data)
