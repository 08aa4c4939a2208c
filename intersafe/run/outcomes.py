"""The outcome files of a job kind: accepted, rejected and failed jobs, each file in job order.

On opening, the three files are cut back to one common job, so that a kill between two writes leaves no gap. They are
read together, one row of each at a time: memory does not grow with the run.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from intersafe.records import Dialogue, Ended, to_row
from intersafe.run.kinds import RECORDS, Outcome
from intersafe.storage.jsonl import heal, lines_of


class _JobOnly(msgspec.Struct):
    job: int


_DECODER = msgspec.json.Decoder(_JobOnly)


def outcome_row(outcome: Outcome | Ended, kind: str = "dialogues") -> tuple[str, dict[str, Any]]:
    """The name of the file and the row of a decided job."""
    records = RECORDS[kind]
    if isinstance(outcome, Ended):
        return (records.rejected if outcome.kind == "rejected" else records.failed), to_row(outcome)
    row = to_row(outcome)
    if isinstance(outcome, Dialogue):
        row["first_unsafe_turn"] = outcome.first_unsafe_turn  # for readers who filter rows without our types
    return records.accepted, row


def align_outcomes(root: Path, kind: str = "dialogues") -> int:
    """Cuts the outcome files of a kind back to one common job; returns the first job that is not decided."""
    paths = [root / name for name in RECORDS[kind].files]
    for path in paths:
        heal(path)
    first, _, ends = _common(paths)
    for path, end in zip(paths, ends, strict=True):
        if end is not None:
            os.truncate(path, end)
    return first


def count_accepted(root: Path, kind: str = "dialogues") -> int:
    """Accepted outcomes of a kind that `align_outcomes` would keep; reads only, and only the job numbers."""
    _, (accepted, *_), _ = _common([root / name for name in RECORDS[kind].files])
    return accepted


def _common(paths: list[Path]) -> tuple[int, list[int], list[int | None]]:
    """The first job that is not decided; by file the rows before it, and the offset of the next row if there is one."""
    rows = [_jobs_and_offsets(path) for path in paths]
    heads = [next(each, None) for each in rows]
    first, counts = 0, [0] * len(paths)
    while here := [number for number, head in enumerate(heads) if head is not None and head[0] == first]:
        for number in here:
            heads[number] = next(rows[number], None)
            counts[number] += 1
        first += 1
    return first, counts, [head[1] if head else None for head in heads]


def _jobs_and_offsets(path: Path) -> Iterator[tuple[float, int]]:
    """Job and offset of every row; ends at a damaged row, with an infinite job number."""
    last = -1
    for offset, row in lines_of(path):
        if (job := _job_of(row)) <= last:
            yield float("inf"), offset  # damaged, for example by a power loss: the journal grows it again
            return
        yield job, offset
        last = job


def _job_of(row: bytes) -> int:
    try:
        return _DECODER.decode(row).job
    except msgspec.DecodeError:
        return -1


def count_sound(path: Path) -> int:
    """Rows of an outcome file, or -1 if a row cannot be read or occurs twice."""
    last, rows = -1, 0
    for _, row in lines_of(path):
        if (job := _job_of(row)) <= last:
            return -1
        last, rows = job, rows + 1
    return rows
