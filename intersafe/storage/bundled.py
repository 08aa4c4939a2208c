"""The prompts, seeds and recipes that ship with the package."""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from intersafe.errors import InputError
from intersafe.storage.files import write_whole


def bundled(name: str) -> Path:
    """The path of a shipped file or folder, for example `pipelines/demo.yaml`, in the wheel or in the repository."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "bundled", package.parent):
        if (root / name).exists():
            return root / name
    raise InputError(f"{name} is missing from this installation", at=package, remedy="install intersafe again")


def copy_bundled(directory: Path, names: Sequence[str]) -> int:
    """Copies shipped folders whole or not at all and returns the number of files; never overwrites anything."""
    staging = directory / f".{secrets.token_hex(8)}.tmp"
    files = [
        (path, staging / name / path.relative_to(bundled(name)))
        for name in names
        for path in sorted(bundled(name).rglob("*"))
        if path.is_file() and path.suffix in (".md", ".yaml", ".jsonl", ".png")
    ]
    for name in names:
        if (directory / name).exists():
            raise InputError("already exists", at=directory / name, remedy="name a new or empty folder")
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise InputError("not a folder", at=place, remedy="name a new or empty folder")
    try:
        for source, target in files:
            write_whole(target, source.read_bytes())
        for name in names:
            (staging / name).rename(directory / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return len(files)
