"""Compares shards with the manifest: row counts from the footers, here and on the Hub, or every byte on the Hub."""

import tempfile
from pathlib import Path

from intersafe.errors import InputError
from intersafe.release.client import Hub
from intersafe.release.failures import RemoteChanged
from intersafe.release.manifest import PACKAGE_AGAIN, ReleaseManifest, sha256_of
from intersafe.release.shards import need_pyarrow
from intersafe.release.staged import Release

TAIL = 64 * 1024
"""Bytes from the end of a shard that are read first; they usually hold the whole footer."""


def check_local_rows(release: Release) -> None:
    """`InputError` if a shard is not a Parquet file with as many rows as the manifest says."""
    for shard in release.manifest.shards:
        path = release.folder / shard.path
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - TAIL))
            tail = file.read()
            if (more := _footer_bytes(tail)) > len(tail):
                file.seek(max(0, end - more))
                tail = file.read()
        rows = _rows(tail)
        if rows != shard.rows:
            said = "not a Parquet file" if rows is None else f"{rows} rows, {shard.rows} in the manifest"
            raise InputError(said, at=path, remedy=PACKAGE_AGAIN)


def check_rows(hub: Hub, manifest: ReleaseManifest, revision: str) -> None:
    """As `check_local_rows`, for the shards on the Hub; reads the footers alone. `RemoteChanged` for a wrong one."""
    for shard in manifest.shards:
        tail = hub.read(shard.path, revision, tail=TAIL)
        if (more := _footer_bytes(tail)) > len(tail):
            tail = hub.read(shard.path, revision, tail=more)
        rows = _rows(tail)
        if rows != shard.rows:
            said = "not a Parquet file" if rows is None else f"{rows} rows instead of {shard.rows}"
            raise RemoteChanged(f"{hub.repo_id}: {shard.path} arrived as {said}, so this version got no tag")


def check_bytes(hub: Hub, manifest: ReleaseManifest, revision: str, parent: Path) -> None:
    """Downloads the shards to a temporary folder in `parent`, one by one; `RemoteChanged` for another sha256."""
    for shard in manifest.shards:
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=parent) as folder:
            hub.download(shard.path, revision, Path(folder))
            if sha256_of(Path(folder) / shard.path) != shard.sha256:
                raise RemoteChanged(f"{hub.repo_id}: {shard.path} arrived damaged, so this version got no tag")


def _footer_bytes(tail: bytes) -> int:
    """Size of the footer from the end of a file, with its length field and `PAR1`; 0 if there is none."""
    return int.from_bytes(tail[-8:-4], "little") + 8 if tail[-4:] == b"PAR1" else 0


def _rows(tail: bytes) -> int | None:
    """The number of rows by the footer of a shard; None if it cannot be read."""
    need_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer = tail[-_footer_bytes(tail) :] if _footer_bytes(tail) else b""
    try:
        return int(pq.read_metadata(pa.BufferReader(b"PAR1" + footer)).num_rows)
    except (pa.ArrowException, OSError):
        return None
