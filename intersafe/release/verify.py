"""What lies on the Hub against the manifest: row counts by the footers of the shards, or every byte."""

import tempfile
from pathlib import Path

from intersafe.errors import InputError
from intersafe.release.client import Hub, RemoteChanged
from intersafe.release.manifest import Manifest, sha256_of
from intersafe.release.shards import need_pyarrow
from intersafe.release.staged import AGAIN, Release

TAIL = 64 * 1024
"""Bytes from the end of a shard that are asked for first; its footer is most often among them."""


def check_local_rows(release: Release) -> None:
    """`InputError` if a shard has another number of rows than the manifest says, or is no Parquet file."""
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
            raise InputError(said, at=path, remedy=AGAIN)


def check_rows(hub: Hub, manifest: Manifest, revision: str) -> None:
    """The same of what lies on the Hub, by the footers alone; `RemoteChanged`."""
    for shard in manifest.shards:
        tail = hub.read(shard.path, revision, tail=TAIL)
        if (more := _footer_bytes(tail)) > len(tail):
            tail = hub.read(shard.path, revision, tail=more)
        rows = _rows(tail)
        if rows != shard.rows:
            said = "no Parquet file" if rows is None else f"{rows} rows instead of {shard.rows}"
            raise RemoteChanged(f"{hub.repo_id}: {shard.path} arrived with {said}, so this version got no tag")


def check_bytes(hub: Hub, manifest: Manifest, revision: str, beside: Path) -> None:
    """Downloads every shard into a folder `beside`, one at a time, and compares its sha256; `RemoteChanged`."""
    for shard in manifest.shards:
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=beside) as folder:
            hub.download(shard.path, revision, Path(folder))
            if sha256_of(Path(folder) / shard.path) != shard.sha256:
                raise RemoteChanged(f"{hub.repo_id}: {shard.path} did not arrive whole, so this version got no tag")


def _footer_bytes(tail: bytes) -> int:
    """Bytes from the end that hold the footer: itself, four bytes for its length, `PAR1`."""
    return int.from_bytes(tail[-8:-4], "little") + 8 if tail[-4:] == b"PAR1" else 0


def _rows(tail: bytes) -> int | None:
    """Rows by the footer at the end of a shard; None if there is none."""
    need_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer = tail[-_footer_bytes(tail) :] if _footer_bytes(tail) else b""
    try:
        return int(pq.read_metadata(pa.BufferReader(b"PAR1" + footer)).num_rows)
    except (pa.ArrowException, OSError):
        return None
