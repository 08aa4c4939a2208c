"""Shards: Parquet files for datasets 3.6, 4.x and 5.x, pandas, polars and DuckDB; and the check of a release.

The bytes of a shard depend on its rows alone. Its footer names the columns in the notation of datasets 3 (a list is
`[...]`). Text is compressed, images are not. Row groups are small enough to stream, with page indexes. Pages are cut by
content, so a store of chunks uploads only the chunks that changed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from intersafe.errors import InputError
from intersafe.images.store import normalise
from intersafe.release.manifest import PACKAGE_AGAIN, Shard, check_files, read_manifest
from intersafe.release.rows import COLUMNS, PublishedRow, references_of

GROUP_IMAGE_ROWS = 100
GROUP_BYTES = 48_000_000
"""A row group ends at either limit. Writing one takes about three times its bytes of memory."""


def need_pyarrow() -> None:
    """`InputError` if pyarrow is not installed, or too old to cut pages by content."""
    try:
        import pyarrow as pa
    except ImportError:
        raise InputError("Parquet needs pyarrow", remedy="pip install 'intersafe[hub]'") from None
    if int(pa.__version__.partition(".")[0]) < 21:
        raise InputError(f"pyarrow {pa.__version__} is too old", remedy="pip install 'intersafe[hub]'")


# --- columns ---------------------------------------------------------------------------------------------------------

_STRING = {"dtype": "string", "_type": "Value"}
FEATURES: dict[str, Any] = {
    "string": _STRING,
    "int32": {"dtype": "int32", "_type": "Value"},
    "strings": [_STRING],
    "messages": [{"role": _STRING, "content": [{"type": _STRING, "text": _STRING}]}],
    "image": {"_type": "Image"},
    "images": [{"_type": "Image"}],
}
"""The type of each kind of column, in the notation of datasets 3, which 4 and 5 read too."""


def arrow_schema(config: str) -> Any:
    """The `pyarrow.Schema` of a config, with the footer metadata that datasets reads."""
    import pyarrow as pa

    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    part = pa.struct({"type": pa.string(), "text": pa.string()})
    kinds = {
        "string": pa.string(),
        "int32": pa.int32(),
        "strings": pa.list_(pa.string()),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(part)})),
        "image": image,
        "images": pa.list_(image),
    }
    features = {column.name: FEATURES[column.kind] for column in COLUMNS[config]}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([(column.name, kinds[column.kind]) for column in COLUMNS[config]], metadata=metadata)


def _leaves(config: str) -> dict[str, bool]:
    """The Parquet path of every leaf column of a config, and whether it holds image bytes."""
    leaves = {
        "strings": ("{}.list.element",),
        "messages": ("{0}.list.element.role", *(f"{{0}}.list.element.content.list.element.{k}" for k in _PART)),
        "image": ("{}.bytes", "{}.path"),
        "images": ("{}.list.element.bytes", "{}.list.element.path"),
    }
    paths = [path.format(c.name) for c in COLUMNS[config] for path in leaves.get(c.kind, ("{}",))]
    return {path: path.endswith(".bytes") for path in paths}


_PART = ("type", "text")


# --- write -----------------------------------------------------------------------------------------------------------


def write_shard(path: Path, config: str, rows: Iterable[PublishedRow], image: Callable[[str], bytes]) -> None:
    """Writes the rows of a config to a new file; `image` returns the bytes of a reference. `OSError` from the disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, leaves = arrow_schema(config), _leaves(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        options: dict[str, Any] = {
            "compression": {leaf: "none" if media else "zstd" for leaf, media in leaves.items()},
            "use_dictionary": [leaf for leaf, media in leaves.items() if not media],
            "write_statistics": [leaf for leaf, media in leaves.items() if not media],
            "use_content_defined_chunking": True,
            "write_page_index": True,
        }
        with pq.ParquetWriter(file, schema, **options) as writer:
            for group in _groups(rows, image):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        file.flush()
        os.fsync(file.fileno())


def _groups(rows: Iterable[PublishedRow], image: Callable[[str], bytes]) -> Iterator[list[PublishedRow]]:
    """The rows with the bytes of their images, in row groups."""
    group: list[PublishedRow] = []
    size = with_images = 0
    for row in rows:
        data = {reference: image(reference) for reference in references_of(row)}
        group.append(_with_bytes(row, data))
        size += len(msgspec.json.encode(row)) + sum(map(len, data.values()))
        with_images += bool(data)
        if with_images >= GROUP_IMAGE_ROWS or size >= GROUP_BYTES:
            yield group
            group, size, with_images = [], 0, 0
    if group:
        yield group


def _with_bytes(row: PublishedRow, data: dict[str, bytes]) -> PublishedRow:
    images = [{"bytes": data[reference], "path": reference} for reference in references_of(row)]
    return row | ({"images": images} if "images" in row else {"image": images[0] if images else None})


# --- read ------------------------------------------------------------------------------------------------------------


def read_rows(path: Path, config: str) -> Iterator[PublishedRow]:
    """The rows of a shard, with images as references; `InputError` for a damaged shard.

    Yields nothing for a shard whose columns differ from those that this version writes.
    """
    for group in _read(path, config, [leaf for leaf, media in _leaves(config).items() if not media]):
        for row in group:
            if "images" in row:
                row["images"] = [image["path"] for image in row["images"]]
            elif row["image"] is not None:
                row["image"] = row["image"]["path"]
            yield row


def _read(path: Path, config: str, leaves: list[str] | None) -> Iterator[list[PublishedRow]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            ours, theirs = arrow_schema(config), file.schema_arrow
            if not theirs.equals(ours) or (theirs.metadata or {}).get(b"huggingface") != ours.metadata[b"huggingface"]:
                return
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=leaves, use_threads=False).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"not a readable Parquet file: {reason}", at=path, remedy=PACKAGE_AGAIN) from None


# --- check -----------------------------------------------------------------------------------------------------------


def check_release(folder: Path, trusted: frozenset[str] = frozenset()) -> None:
    """Reads every file of a release; `InputError` for the first that does not match the manifest.

    Checks sha256 and size of each file, rows, columns, unique ids, one split for each seed, and that every image
    exists, hashes to its name and decodes. Images in shards whose sha256 is in `trusted` are not checked again.
    """
    need_pyarrow()
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    named = {folder / shard.path for shard in manifest.shards}
    for path in sorted((folder / "data").rglob("*")):
        if path.is_file() and path not in named:
            raise InputError("the manifest does not name it", at=path, remedy="remove it from the release")
    ids: set[tuple[str, str]] = set()
    splits: dict[str, str] = {}
    seen: set[str] = set()
    for shard in manifest.shards:
        for row in _checked(folder / shard.path, shard, None if shard.sha256 in trusted else seen):
            if (shard.config, row["id"]) in ids:
                raise InputError(f"the id {row['id']} occurs twice", at=folder / shard.path, remedy=PACKAGE_AGAIN)
            ids.add((shard.config, row["id"]))
            if splits.setdefault(row["seed_id"], shard.split) != shard.split:
                what = f"the seed {row['seed_id']} is in two splits"
                raise InputError(what, at=folder / shard.path, remedy=PACKAGE_AGAIN)


def _checked(path: Path, shard: Shard, seen: set[str] | None) -> Iterator[PublishedRow]:
    """The rows of a shard. With `seen`, its images are checked, and those not in `seen` are decoded."""
    if shard.config not in COLUMNS:
        raise InputError(f"unknown config {shard.config!r}", at=path, remedy="update intersafe")
    count = 0
    for row in read_rows(path, shard.config) if seen is None else _read_whole(path, shard.config, seen):
        count += 1
        yield row
    if count != shard.rows:
        raise InputError(
            f"{count} rows with the columns of this version, the manifest says {shard.rows}",
            at=path,
            remedy=PACKAGE_AGAIN,
        )


def _read_whole(path: Path, config: str, seen: set[str]) -> Iterator[PublishedRow]:
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # image decoders release the GIL
        for group in _read(path, config, None):
            found: list[tuple[str, dict[str, Any] | None]] = [
                (row["id"], image)
                for row in group
                for image in (row["images"] if "images" in row else filter(None, [row["image"]]))
            ]
            seen.update(pool.map(lambda item: _check_image(path, item[0], item[1], seen), found))
            yield from group


def _check_image(path: Path, row_id: str, image: dict[str, Any] | None, seen: set[str]) -> str:
    """The name of an image; it is decoded unless `seen` has it. `InputError` for a damaged one."""
    name: str | None = image["path"] if image else None
    if image is None or image["bytes"] is None or not name:
        raise InputError(f"row {row_id}: an image without bytes or name", at=path, remedy=PACKAGE_AGAIN)
    if hashlib.sha256(image["bytes"]).hexdigest() != name.partition(".")[0]:
        raise InputError(f"row {row_id}: image {name} does not hash to its name", at=path, remedy=PACKAGE_AGAIN)
    if name not in seen:
        normalise(image["bytes"], at=f"{path}: row {row_id}: {name}")
    return name
