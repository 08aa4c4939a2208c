"""The outcome files of a line of jobs: kept, rejected and failed jobs, each file in job order.

On opening they are cut back to one common job, so a kill between two of them leaves nothing out of order. They are
read side by side, one row of each at a time: memory does not grow with a run.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from intersafe.records import Dialogue, Ended, RefusalSample, to_row
from intersafe.storage.jsonl import heal, lines_of

LINES = ("", "refusals", "twins")
"""The kinds of job, by the name that their files and journal lines carry; dialogues have the empty one."""

_DIALOGUE_FILES = ("dialogues.jsonl", "rejected.jsonl", "failed.jsonl")


class _JobOnly(msgspec.Struct):
    job: int


_DECODER = msgspec.json.Decoder(_JobOnly)


def files_of(line: str) -> tuple[str, str, str]:
    """Names of a line's files: the kept outcomes, the rejected and the failed jobs."""
    return (f"{line}.jsonl", f"{line}-rejected.jsonl", f"{line}-failed.jsonl") if line else _DIALOGUE_FILES


def outcome_row(outcome: Dialogue | RefusalSample | Ended, line: str = "") -> tuple[str, dict[str, Any]]:
    """The file and the row of a decided job."""
    kept, rejected, failed = files_of(line)
    name = kept if not isinstance(outcome, Ended) else rejected if outcome.kind == "rejected" else failed
    row = to_row(outcome)
    if isinstance(outcome, Dialogue):
        row["first_unsafe_turn"] = outcome.first_unsafe_turn  # for readers who filter rows without our types
    return name, row


def align_outcomes(root: Path, line: str = "") -> int:
    """Cuts a line's outcome files back to one common point; returns the first job that is not decided yet."""
    paths = [root / name for name in files_of(line)]
    for path in paths:
        heal(path)
    rows = [_places(path) for path in paths]
    heads = [next(places, None) for places in rows]
    first = 0
    while here := [place for place, head in enumerate(heads) if head is not None and head[0] == first]:
        for place in here:
            heads[place] = next(rows[place], None)
        first += 1
    for path, head in zip(paths, heads, strict=True):
        if head is not None:
            os.truncate(path, head[1])
    return first


def _places(path: Path) -> Iterator[tuple[float, int]]:
    """Job and offset of every row; ends with that of a damaged one, as of a job that never comes."""
    last = -1
    for offset, row in lines_of(path):
        if (job := _job_of(row)) <= last:
            yield float("inf"), offset  # by a power loss, say: from here on all is grown again from the journal
            return
        yield job, offset
        last = job


def _job_of(row: bytes) -> int:
    try:
        return _DECODER.decode(row).job
    except msgspec.DecodeError:
        return -1


def count_sound(path: Path) -> int:
    """Rows of an outcome file, or -1 where one cannot be read or stands twice."""
    last, rows = -1, 0
    for _, row in lines_of(path):
        if (job := _job_of(row)) <= last:
            return -1
        last, rows = job, rows + 1
    return rows
