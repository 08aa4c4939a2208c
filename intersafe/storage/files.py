"""Files: written atomically, read with a size limit."""

import os
import secrets
from pathlib import Path

from intersafe.errors import InputError, StorageError

LARGEST = 4 * 2**20
"""Most bytes of a recipe, a prompt or a list of texts."""


def write_whole(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all: a temporary file in its folder, fsync, rename. Raises `StorageError`."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        remedy = "free disk space or correct its permissions"
        raise StorageError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error


def read_small(path: Path) -> bytes:
    """The bytes of a small file; `InputError` for more than 4 MiB, `OSError` if it cannot be read."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise InputError(f"more than {LARGEST // 2**20} MiB", at=path, remedy="pass the right file")
    return data
