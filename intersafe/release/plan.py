"""Which rows a release holds and which shard each goes to, worked out before a byte is written.

Append-only: a row that stands in a shard of the release before stays there. A shard of which every row is as it was is
taken over byte for byte; one of which a row was changed or removed is written again; new rows go to new shards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from intersafe.errors import InputError
from intersafe.images.store import ImageStore
from intersafe.records import Dialogue, RefusalSample, from_row
from intersafe.release.counts import Tally
from intersafe.release.manifest import Manifest, Shard, sha256_of
from intersafe.release.rows import (
    COLUMNS,
    TEST,
    TRAIN,
    UNSAFE,
    Row,
    dialogue_row,
    fingerprint,
    references_of,
    refusal_row,
    split_of,
    twin_row,
)
from intersafe.release.shards import read_rows
from intersafe.run.directory import Run
from intersafe.run.kinds import RECORDS
from intersafe.storage.jsonl import lines_of

SHARD_ROWS = 5_000


class Place(NamedTuple):
    """Where a row stands in the run's file, and what it takes to know it again."""

    offset: int
    fingerprint: bytes
    size: int
    """Bytes of its text and images."""


class Target(NamedTuple):
    """One shard to be: its rows in order, and the file that it is taken over from, if it is."""

    path: str
    config: str
    split: str
    rows: Sequence[Place]
    source: Path | None = None


class Changes(NamedTuple):
    """How many rows of a config differ from the release before."""

    added: int
    changed: int
    removed: int


class _Source(NamedTuple):
    kind: str
    record: type[Any]
    row: Callable[[Any], Row]


def _full_row(dialogue: Dialogue) -> Row:
    return dialogue_row(dialogue, full=True)


_SOURCES: dict[str, _Source] = {
    "dialogues": _Source("dialogues", Dialogue, dialogue_row),
    "refusal_vqa": _Source("refusals", RefusalSample, refusal_row),
    "twins": _Source("twins", Dialogue, twin_row),
    UNSAFE: _Source("dialogues", Dialogue, _full_row),
}

Found = dict[str, dict[str, Place]]
"""Of a config: split to id to place, in the order of the run."""


# --- what there is ---------------------------------------------------------------------------------------------------


def survey(run: Run, config: str, test_share: float, tally: Tally) -> Found:
    """Every row of a config, counted; `InputError` for a damaged row or a missing image."""
    source, store = _SOURCES[config], ImageStore(run.path / "images")
    file = run.path / RECORDS[source.kind].accepted
    found: Found = {TRAIN: {}, TEST: {}}
    sizes: dict[str, int] = {}
    for (offset, _), record in zip(lines_of(file), run.accepted(source.kind), strict=False):
        row = source.row(record)
        if config == UNSAFE and isinstance(record, Dialogue) and row == dialogue_row(record):
            continue  # nothing is withheld from it
        for reference in references_of(row):
            if reference not in sizes:
                path = store.path(reference)
                sizes[reference] = path.stat().st_size if path.is_file() else len(store.read(reference))
        split = split_of(row["seed_id"], test_share)
        if row["id"] in found[split]:
            raise InputError(f"the id {row['id']} is there twice", at=file, remedy="restore the file")
        size = len(msgspec.json.encode(row)) + sum(sizes[reference] for reference in references_of(row))
        found[split][row["id"]] = Place(offset, fingerprint(row), size)
        tally.add(row, split, size)
    return found


def rows_at(run: Run, config: str, places: Sequence[Place]) -> Iterator[Row]:
    """The rows of these places, read again; `InputError` if the run is no longer what was surveyed."""
    source = _SOURCES[config]
    path = run.path / RECORDS[source.kind].accepted
    with path.open("rb") as file:
        for place in places:
            file.seek(place.offset)
            row = source.row(from_row(msgspec.json.decode(file.readline(), type=dict[str, Any]), source.record))
            if fingerprint(row) != place.fingerprint:
                raise InputError("changed while it was read", at=path, remedy="package the run again")
            yield row


# --- where it goes ---------------------------------------------------------------------------------------------------


def plan_shards(
    found: Mapping[str, Found], base: Path | None, manifest: Manifest | None, max_bytes: int
) -> tuple[list[Target], dict[str, Changes]]:
    """The shards of a release that follows the one at `base`, and what changed in each config since then."""
    targets: list[Target] = []
    changes: dict[str, Changes] = {}
    before = manifest.shards if manifest else ()
    for config in COLUMNS:
        splits = found.get(config, {})
        shards = [shard for shard in before if shard.config == config]
        rows_before: dict[str, bytes] = {}
        for split in (TRAIN, TEST):
            left = dict(splits.get(split, {}))
            for shard in (shard for shard in shards if shard.split == split):
                assert base is not None
                listed = _listed(base / shard.path, shard)
                rows_before |= listed
                if target := _follow(shard, base / shard.path, listed, left):
                    targets.append(target)
            targets += _new_shards(config, split, list(left.values()), shards, max_bytes)
        if splits or shards:
            rows = {row_id: place for split in splits.values() for row_id, place in split.items()}
            changes[config] = _compare(rows_before, rows)
    return targets, {config: change for config, change in changes.items() if found.get(config) or any(change)}


def _listed(path: Path, shard: Shard) -> dict[str, bytes]:
    """Id and fingerprint of every row of a shard of the release before; `InputError` if it is not what it was."""
    if not path.is_file() or path.stat().st_size != shard.bytes or sha256_of(path) != shard.sha256:
        what = "missing, or not the bytes that its manifest names"
        raise InputError(what, at=path, remedy="restore that release, or remove its folder")
    return {row["id"]: fingerprint(row) for row in read_rows(path, shard.config)}


def _follow(shard: Shard, path: Path, listed: Mapping[str, bytes], left: dict[str, Place]) -> Target | None:
    """What becomes of a shard; its rows are taken out of `left`."""
    if len(listed) != shard.rows:  # written with other columns, by an earlier version
        return None
    rows = [left.pop(row_id) for row_id in listed if row_id in left]
    same = [row.fingerprint for row in rows] == list(listed.values())
    return Target(shard.path, shard.config, shard.split, rows, path if same else None) if rows else None


def _new_shards(
    config: str, split: str, places: Sequence[Place], before: Sequence[Shard], max_bytes: int
) -> list[Target]:
    """The rows in order, in shards that are numbered on from those before."""
    numbers = [int(Path(shard.path).stem.rpartition("-")[2]) for shard in before if shard.split == split]
    number, targets, start, size = max(numbers, default=-1) + 1, [], 0, 0
    for place, row in enumerate(places):
        if place > start and (size + row.size > max_bytes or place - start >= SHARD_ROWS):
            targets.append(places[start:place])
            start, size = place, 0
        size += row.size
    if places:
        targets.append(places[start:])
    return [
        Target(f"data/{config}/{split}-{i:05d}.parquet", config, split, rows) for i, rows in enumerate(targets, number)
    ]


def _compare(before: Mapping[str, bytes], after: Mapping[str, Place]) -> Changes:
    both = before.keys() & after.keys()
    changed = sum(before[row_id] != after[row_id].fingerprint for row_id in both)
    return Changes(len(after) - len(both), changed, len(before) - len(both))
