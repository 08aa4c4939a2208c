"""Files: written whole or not at all, and where the prompts, seeds and recipes that ship with the package lie."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from intersafe.errors import InputError, StorageError


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


def bundled(name: str) -> Path:
    """The shipped file or folder, for example `pipelines/demo.yaml`: in the wheel, or in the repository beside it."""
    package = Path(__file__).resolve().parent
    for root in (package / "bundled", package.parent):
        if (root / name).exists():
            return root / name
    raise InputError(f"{name} is not part of this installation", at=package, remedy="install intersafe again")


def copy_bundled(directory: Path, names: Sequence[str]) -> int:
    """Copies shipped folders; returns how many files. Refuses to write over anything that is there."""
    files = [
        (path, directory / name / path.relative_to(bundled(name)))
        for name in names
        for path in sorted(bundled(name).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    for _, target in files:
        if target.exists():
            raise InputError("is there already", at=target, remedy="name an empty folder")
    for source, target in files:
        write_whole(target, source.read_bytes())
    return len(files)
