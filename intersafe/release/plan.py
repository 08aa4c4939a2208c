"""Plans a release before a byte is written: which rows it holds, and which shard each row goes to.

Append-only: a row in a shard of the earlier release stays in that shard. A shard without changes is reused byte for
byte. A shard in which a row was changed or removed is written again. New rows go to new shards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from intersafe.errors import InputError
from intersafe.images.store import ImageStore
from intersafe.records import Dialogue, RefusalSample, from_row
from intersafe.release.counts import Tally
from intersafe.release.manifest import PACKAGE_AGAIN, ReleaseManifest, Shard, sha256_of
from intersafe.release.rows import (
    COLUMNS,
    TEST,
    TRAIN,
    UNSAFE,
    PublishedRow,
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
"""Most rows of a shard."""


class RowSource(NamedTuple):
    """Where a row is in the run's file, and its hash, by which a later read recognises it."""

    offset: int
    """Byte at which its line begins."""
    fingerprint: bytes
    size: int
    """Size of its text and images, in bytes."""


class ShardPlan(NamedTuple):
    """A shard to write: its rows in order, and the file of the earlier release that it reuses, if any."""

    path: str
    config: str
    split: str
    rows: Sequence[RowSource]
    source: Path | None = None


class RowChanges(NamedTuple):
    """Numbers of rows of a config that differ from the earlier release."""

    added: int
    changed: int
    removed: int


class _Source(NamedTuple):
    """Where the rows of a config come from."""

    job_kind: str
    record: type[Any]
    row: Callable[[Any], PublishedRow]


def _full_row(dialogue: Dialogue) -> PublishedRow:
    return dialogue_row(dialogue, full=True)


_SOURCES: dict[str, _Source] = {
    "dialogues": _Source("dialogues", Dialogue, dialogue_row),
    "refusal_vqa": _Source("refusals", RefusalSample, refusal_row),
    "twins": _Source("twins", Dialogue, twin_row),
    UNSAFE: _Source("dialogues", Dialogue, _full_row),
}

SurveyedRows = dict[str, dict[str, RowSource]]
"""The rows of a config by split and id, in the order of the run."""


# --- the rows of the run ---------------------------------------------------------------------------------------------


def survey(run: Run, config: str, test_share: float, tally: Tally) -> SurveyedRows:
    """Reads every row of a config and counts it in `tally`; `InputError` for a damaged row or a missing image.

    `test_share` is the share of the seeds in the split `test`, 0 to 1.
    """
    source, store = _SOURCES[config], ImageStore(run.path / "images")
    file = run.path / RECORDS[source.job_kind].accepted
    found: SurveyedRows = {TRAIN: {}, TEST: {}}
    sizes: dict[str, int] = {}
    for (offset, _), record in zip(lines_of(file), run.accepted(source.job_kind), strict=False):
        row = source.row(record)
        if config == UNSAFE and isinstance(record, Dialogue) and row == dialogue_row(record):
            continue  # nothing of it is withheld
        for reference in references_of(row):
            if reference not in sizes:
                path = store.path(reference)
                sizes[reference] = path.stat().st_size if path.is_file() else len(store.read(reference))
        split = split_of(row["seed_id"], test_share)
        if row["id"] in found[split]:
            raise InputError(f"the id {row['id']} occurs twice", at=file, remedy="restore the file")
        size = len(msgspec.json.encode(row)) + sum(sizes[reference] for reference in references_of(row))
        found[split][row["id"]] = RowSource(offset, fingerprint(row), size)
        tally.add(row, split, size)
    return found


def rows_at(run: Run, config: str, sources: Sequence[RowSource]) -> Iterator[PublishedRow]:
    """Reads these rows again; `InputError` if the run was changed since `survey`."""
    source = _SOURCES[config]
    path = run.path / RECORDS[source.job_kind].accepted
    with path.open("rb") as file:
        for row_source in sources:
            file.seek(row_source.offset)
            row = source.row(from_row(msgspec.json.decode(file.readline(), type=dict[str, Any]), source.record))
            if fingerprint(row) != row_source.fingerprint:
                raise InputError("changed while it was read", at=path, remedy=PACKAGE_AGAIN)
            yield row


# --- the shards of the release ---------------------------------------------------------------------------------------


def plan_shards(
    found: Mapping[str, SurveyedRows], base: Path | None, manifest: ReleaseManifest | None, max_bytes: int
) -> tuple[list[ShardPlan], dict[str, RowChanges]]:
    """The shards of a release, and how many rows changed in each config since the earlier release at `base`.

    `manifest` is that of `base`; both are None for a first release. `max_bytes` limits the texts and images of a shard.
    `InputError` if a shard of `base` is damaged.
    """
    plans: list[ShardPlan] = []
    changes: dict[str, RowChanges] = {}
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
                if plan := _follow(shard, base / shard.path, listed, left):
                    plans.append(plan)
            plans += _new_shards(config, split, list(left.values()), shards, max_bytes)
        if splits or shards:
            rows = {row_id: row for split in splits.values() for row_id, row in split.items()}
            changes[config] = _changes(rows_before, rows)
    return plans, {config: change for config, change in changes.items() if found.get(config) or any(change)}


def _listed(path: Path, shard: Shard) -> dict[str, bytes]:
    """Id and fingerprint of every row of a shard of the earlier release; `InputError` if the shard is damaged."""
    if not path.is_file() or path.stat().st_size != shard.bytes or sha256_of(path) != shard.sha256:
        what = "missing, or not the bytes that its manifest names"
        raise InputError(what, at=path, remedy="restore that release, or remove its folder")
    return {row["id"]: fingerprint(row) for row in read_rows(path, shard.config)}


def _follow(shard: Shard, path: Path, listed: Mapping[str, bytes], left: dict[str, RowSource]) -> ShardPlan | None:
    """The new plan of an earlier shard, None if no row of it is left; removes its rows from `left`."""
    if len(listed) != shard.rows:  # written with other columns, by an earlier version
        return None
    rows = [left.pop(row_id) for row_id in listed if row_id in left]
    same = [row.fingerprint for row in rows] == list(listed.values())
    return ShardPlan(shard.path, shard.config, shard.split, rows, path if same else None) if rows else None


def _new_shards(
    config: str, split: str, rows: Sequence[RowSource], before: Sequence[Shard], max_bytes: int
) -> list[ShardPlan]:
    """The rows in order, in shards whose numbers follow the earlier ones."""
    numbers = [int(Path(shard.path).stem.rpartition("-")[2]) for shard in before if shard.split == split]
    shards, start, size = [], 0, 0
    for i, row in enumerate(rows):
        if i > start and (size + row.size > max_bytes or i - start >= SHARD_ROWS):
            shards.append(rows[start:i])
            start, size = i, 0
        size += row.size
    if rows:
        shards.append(rows[start:])
    first = max(numbers, default=-1) + 1
    return [
        ShardPlan(f"data/{config}/{split}-{number:05d}.parquet", config, split, shard)
        for number, shard in enumerate(shards, first)
    ]


def _changes(before: Mapping[str, bytes], after: Mapping[str, RowSource]) -> RowChanges:
    both = before.keys() & after.keys()
    changed = sum(before[row_id] != after[row_id].fingerprint for row_id in both)
    return RowChanges(len(after) - len(both), changed, len(before) - len(both))
