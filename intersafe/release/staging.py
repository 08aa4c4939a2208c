"""The folder in which a release is built before it is renamed: lock, cleaning up, reused files, fsync."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intersafe.errors import InputError, StorageError

STAGING = ".staging"
"""Name of the folder, in the folder of a run's releases."""


@contextlib.contextmanager
def packaging_lock(run: Path) -> Iterator[None]:
    """Keeps other processes from packaging a run; generating is not affected. `InputError` if one packages it now."""
    handle: Any = os.open(run, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: package without one
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError("another process is packaging this run", at=run, remedy="wait for it") from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def clean_staging(releases: Path) -> Iterator[Path]:
    """Yields the folder of releases without a staging folder, and removes what is left unfinished after the block.

    An `OSError` of the block becomes a `StorageError`. An empty folder of releases is removed too.
    """
    try:
        shutil.rmtree(releases / STAGING, ignore_errors=True)
        yield releases
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        raise StorageError(f"{releases}: cannot be written ({why}); free the disk, then package again") from None
    finally:
        shutil.rmtree(releases / STAGING, ignore_errors=True)
        with contextlib.suppress(OSError):
            releases.rmdir()


def reuse_file(source: Path, path: Path) -> None:
    """Links a file under another name; copies it where hard links do not work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), path)
    except OSError:
        shutil.copyfile(source, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Writes the entries of a folder to the disk (fsync)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
