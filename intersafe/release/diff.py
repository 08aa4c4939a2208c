"""Diff: rows added, removed and changed between two releases, by config, category and label.

Rows are matched by `id`. Shards that both releases have, byte for byte, are neither downloaded nor read.
"""

import contextlib
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from intersafe.errors import InputError
from intersafe.release.client import Hub
from intersafe.release.failures import redacted_line
from intersafe.release.manifest import PACKAGE_AGAIN, ReleaseManifest, Shard, read_manifest
from intersafe.release.pull import find_version, parse_source, remote_manifest
from intersafe.release.shards import need_pyarrow

Change = Literal["added", "removed", "changed"]
_SIGNS: dict[Change, str] = {"added": "+", "removed": "-", "changed": "~"}


class Side(NamedTuple):
    """One of the two releases."""

    name: str
    manifest: ReleaseManifest
    path_of: Callable[[Shard], Path]
    """The local file of a shard; downloads it if needed."""


class ComparedRow(NamedTuple):
    """What is compared of a row."""

    digest: bytes
    category: str
    labels: frozenset[str]
    """The verdicts of its turns."""


@dataclass
class ConfigDiff:
    """The number of rows of a config by change."""

    same: int = 0
    rows: Counter[Change] = field(default_factory=Counter)
    groups: dict[str, Counter[Change]] = field(default_factory=dict)
    """The same by `category fraud` or `label unsafe`; a changed row counts under its new category and labels."""

    def count(self, change: Change, row: ComparedRow) -> None:
        """Counts one row."""
        self.rows[change] += 1
        for name in (f"category {row.category}", *(f"label {label}" for label in sorted(row.labels))):
            self.groups.setdefault(name, Counter())[change] += 1


@contextlib.contextmanager
def open_sides(
    old: str, new: str, *, endpoint: str | None, xet: bool, deadline: float, say: Callable[[str], None]
) -> Iterator[tuple[Side, Side]]:
    """Opens two releases, each a folder or `ORG/NAME@vX.Y.Z`; `new` may be a bare version of the repository of `old`.

    `endpoint`, `xet`, `deadline` (seconds) and `say` are as for `Hub`. `InputError` for a release that does not exist.
    """
    if "@" in old and "/" not in new and not Path(new).is_dir():
        new = f"{old.partition('@')[0]}@{new}"
    hubs: dict[str, Hub] = {}
    with tempfile.TemporaryDirectory(prefix="intersafe-diff-") as scratch:

        def opened(text: str, subfolder: str) -> Side:
            if Path(text).is_dir() or "@" not in text:
                folder = Path(text)
                return Side(text, read_manifest(folder), lambda shard: folder / shard.path)
            repo, version = parse_source(text)
            if repo not in hubs:
                hubs[repo] = Hub(repo, endpoint=endpoint, xet=xet, deadline=deadline, say=say)
            hub = hubs[repo]
            version, commit = hub.within(lambda: find_version(hub, version))
            manifest, _ = hub.within(lambda: remote_manifest(hub, version, commit))

            def fetch(shard: Shard) -> Path:
                hub.within(lambda: hub.download(shard.path, commit, Path(scratch) / subfolder))
                return Path(scratch) / subfolder / shard.path

            return Side(f"{repo}@{version.tag}", manifest, fetch)

        yield opened(old, "old"), opened(new, "new")


def compare_releases(old: Side, new: Side) -> dict[str, ConfigDiff]:
    """The changes of each config; `InputError` for a shard that cannot be read."""
    found = {}
    for config in sorted({shard.config for shard in (*old.manifest.shards, *new.manifest.shards)}):
        before, after = _only_in(old, new, config), _only_in(new, old, config)
        rows, now = _read(old, before), _read(new, after)
        changes = ConfigDiff(same=sum(shard.rows for shard in _shards(new, config)) - len(now))
        for row_id in rows.keys() | now.keys():
            if row_id not in now:
                changes.count("removed", rows[row_id])
            elif row_id not in rows:
                changes.count("added", now[row_id])
            elif rows[row_id].digest != now[row_id].digest:
                changes.count("changed", now[row_id])
            else:
                changes.same += 1
        found[config] = changes
    return found


def diff_lines(found: dict[str, ConfigDiff]) -> list[str]:
    """The changes as lines for the user: a config, then every category and label with a change."""
    lines = []
    for config, changes in found.items():
        lines.append(f"{config}: {_counts(changes.rows) or 'nothing changed,'} {changes.same:,} unchanged")
        width = max(map(len, changes.groups), default=0)
        lines += [f"  {name:<{width}}  {_counts(counts)}" for name, counts in sorted(changes.groups.items())]
    return lines


def _counts(counts: Counter[Change]) -> str:
    return "  ".join(f"{sign}{counts[change]:,} {change}" for change, sign in _SIGNS.items() if counts[change])


def _shards(side: Side, config: str) -> list[Shard]:
    return [shard for shard in side.manifest.shards if shard.config == config]


def _only_in(side: Side, other: Side, config: str) -> list[Shard]:
    """The shards that the other release does not have in the same split."""
    known = {(shard.sha256, shard.split) for shard in _shards(other, config)}
    return [shard for shard in _shards(side, config) if (shard.sha256, shard.split) not in known]


def _read(side: Side, shards: list[Shard]) -> dict[str, ComparedRow]:
    """The rows of these shards by id; `InputError` names the shard."""
    need_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: dict[str, ComparedRow] = {}
    for shard in shards:
        path, at = side.path_of(shard), f"{side.name}: {shard.path}"
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        rows[_id_of(row, rows, at)] = _row(row, shard.split)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"cannot be read: {redacted_line(str(error))}", at=at, remedy="pull it, or package it again"
            ) from None
    return rows


def _id_of(row: dict[str, Any], known: dict[str, ComparedRow], at: str) -> str:
    row_id = row.get("id")
    if not isinstance(row_id, str) or row_id in known:
        raise InputError(f"a row without an id of its own ({row_id!r})", at=at, remedy=PACKAGE_AGAIN)
    return row_id


def _row(row: dict[str, Any], split: str) -> ComparedRow:
    data = msgspec.msgpack.encode([split, sorted(row.items())])
    labels = frozenset[str]()
    with contextlib.suppress(msgspec.DecodeError):
        turns = msgspec.json.decode(row.get("turn_labels") or "[]", type=list[_Turn])
        labels = frozenset(redacted_line(turn.safety) for turn in turns)
    return ComparedRow(hashlib.sha256(data).digest(), redacted_line(str(row.get("category"))), labels)


class _Turn(msgspec.Struct):
    safety: str
