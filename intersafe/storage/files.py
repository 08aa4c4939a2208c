"""Files: written whole or not at all, and read with a bound."""

import os
import secrets
from pathlib import Path

from intersafe.errors import InputError, StorageError

LARGEST = 4 * 2**20
"""Bytes of a recipe, a prompt or a list of texts."""


def write_whole(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all: temporary file beside it, fsync, rename. Raises `StorageError`."""
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
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free the disk or mend its rights") from error


def read_small(path: Path) -> bytes:
    """The bytes of a file that a person wrote; `InputError` for more than 4 MiB, `OSError` as when opening it."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise InputError(f"more than {LARGEST // 2**20} MiB", at=path, remedy="name the right file")
    return data
