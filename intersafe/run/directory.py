"""The run directory: written whole or not at all, resumable after any kill, read by everything that comes later.

recipe.json         resolved recipe, digests of recipe, prompts and seeds, versions     written first
seeds.jsonl         the seeds as they were used, images by reference
prompts/  images/   the prompt files and images used
journal/<writer>.jsonl      one line per model reply, append only
dialogues.jsonl     accepted, in job order          rejected.jsonl  failed.jsonl    the others, in job order
refusals.jsonl  twins.jsonl     refusal VQA and benign twins, each with its own -rejected and -failed file
index/  batches/    signatures of the accepted dialogues, a cache; batches in progress at a provider
incidents.json      retries, throttling and outages by role, once there are any     written at the end of a command
summary.json        the funnels, tokens and time by role    written last: it means that the run is complete
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from intersafe.errors import InputError
from intersafe.recipe.sections import Price, Recipe, digest_of
from intersafe.records import Dialogue, Ended, RefusalSample, Seed, row_decoder
from intersafe.run.budget import prices_of
from intersafe.run.funnel import Funnel, Summary
from intersafe.run.incidents import Incidents, read_incidents
from intersafe.run.journal import Entry, RoleTally, entries_of, tally
from intersafe.run.kinds import RECORDS, Outcome
from intersafe.run.manifest import Manifest
from intersafe.run.outcomes import count_sound
from intersafe.storage.jsonl import lines_of

RUNS = Path("outputs")

_BARE = re.compile(r"^[A-Za-z0-9._-]+$")
_State = tuple[tuple[int, int] | None, ...]


def run_path(run: str | Path) -> Path:
    """The path of a run: a bare name is in `outputs/`, a text with a slash is a path. `InputError` if it is empty."""
    if run == "":
        raise InputError("a run without a name", remedy="give its name or its path")
    return RUNS / run if isinstance(run, str) and _BARE.match(run) and run not in (".", "..") else Path(run)


class _Origin(msgspec.Struct):
    image: str


class _Turn(msgspec.Struct):
    origins: tuple[_Origin, ...] = ()


class _Images(msgspec.Struct):
    """The images of an outcome of any kind, and nothing else."""

    turns: tuple[_Turn, ...] = ()
    origins: tuple[_Origin, ...] = ()

    @property
    def references(self) -> list[str]:
        of_turns = [origin.image for turn in self.turns for origin in turn.origins]
        return of_turns + [origin.image for origin in self.origins]


def _has_bytes(path: str) -> bool:
    return (_size_and_time(path) or (0, 0))[0] > 0


def _size_and_time(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116  thousands of images: a `Path` each would take longer than the disk
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class Run:
    """A run, finished or in progress: read-only."""

    def __init__(self, path: str | Path) -> None:
        """`InputError` if there is no run at that path."""
        self.path = run_path(path)
        self._summary: tuple[_State, Summary | None] | None = None
        try:
            self.manifest = msgspec.json.decode((self.path / "recipe.json").read_bytes(), type=Manifest)
            if digest_of(self.manifest.recipe) != self.manifest.digest:
                raise msgspec.ValidationError("the digest is that of another recipe")
        except OSError:
            have = sorted(p.parent.name for p in RUNS.glob("*/recipe.json"))
            remedy = f"runs in {RUNS}/: {', '.join(have)}" if have else "make one with `intersafe generate`"
            raise InputError("no run there", at=self.path, remedy=remedy) from None
        except msgspec.DecodeError as error:
            raise InputError(
                f"not a manifest: {error}", at=self.path / "recipe.json", remedy="restore it, or start another --run"
            ) from None

    def dialogues(self) -> Iterator[Dialogue]:
        """The accepted dialogues in job order."""
        yield from self._rows("dialogues.jsonl", Dialogue)

    def refusals(self) -> Iterator[RefusalSample]:
        """The accepted refusal samples in job order."""
        yield from self._rows("refusals.jsonl", RefusalSample)

    def twins(self) -> Iterator[Dialogue]:
        """The accepted benign twins in the order of the dialogues that they belong to."""
        yield from self._rows("twins.jsonl", Dialogue)

    def accepted(self, kind: str = "dialogues") -> Iterator[Any]:
        """The accepted outcomes of a kind in job order."""
        yield from self._rows(RECORDS[kind].accepted, RECORDS[kind].outcome)

    def ended(self, kind: str = "dialogues") -> Iterator[Ended]:
        """The rejected jobs of a kind, then the failed ones."""
        for name in (RECORDS[kind].rejected, RECORDS[kind].failed):
            yield from self._rows(name, Ended)

    def outcomes(self, kind: str = "dialogues") -> Iterator[Outcome | Ended]:
        """Every decided job of a kind: the accepted ones in job order, then the rejected, then the failed."""
        yield from self.accepted(kind)
        yield from self.ended(kind)

    def _rows(self, name: str, record: type[Any]) -> Iterator[Any]:
        decode = row_decoder(record)
        for number, (_, line) in enumerate(lines_of(self.path / name), 1):
            try:
                yield decode(line)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                raise InputError(
                    f"not a row: {error}",
                    at=self.path / name,
                    line=number,
                    remedy="restore the file, or run the same `intersafe generate` command again to grow it anew",
                ) from None

    def seeds(self) -> tuple[Seed, ...]:
        """The seeds as they were used, images by reference."""
        return tuple(self._rows("seeds.jsonl", Seed))

    @property
    def summary(self) -> Summary | None:
        """The summary of a complete run; None if the run is not complete, or if rows were lost since."""
        names = ("summary.json", *(records.accepted for records in RECORDS.values()))
        state = tuple(_size_and_time(self.path / name) for name in names)
        if self._summary is None or self._summary[0] != state:
            self._summary = state, self._read_summary()  # reads every outcome: once, unless a file changes
        return self._summary[1]

    def _read_summary(self) -> Summary | None:
        try:
            summary = msgspec.json.decode((self.path / "summary.json").read_bytes(), type=Summary)
            rows = {name: count_sound(self.path / records.accepted) for name, records in RECORDS.items()}
        except (OSError, msgspec.DecodeError):
            return None
        counted = {name: summary.funnels[name].accepted if name in summary.funnels else 0 for name in rows}
        return summary if rows == counted else None

    def funnel(self, kind: str = "dialogues") -> Funnel:
        """The funnel of a kind: from the summary, or counted from the outcome files."""
        if summary := self.summary:
            return summary.funnels.get(kind, Funnel())
        funnel = Funnel()
        for outcome in self.outcomes(kind):
            funnel.count(outcome)
        return funnel

    def incidents(self) -> dict[str, Incidents]:
        """Retries, throttling and outages by role, of the commands that have ended."""
        summary = self.summary
        return summary.incidents if summary else read_incidents(self.path)

    def roles(self) -> dict[str, RoleTally]:
        """Calls, tokens, seconds and cost by role, from the journals."""
        if summary := self.summary:
            return summary.roles
        roles: dict[str, RoleTally] = {}
        prices = self.prices()
        for path in sorted((self.path / "journal").glob("*.jsonl")):
            for entry in entries_of(path):
                tally(roles, entry, prices)
        return roles

    def prices(self) -> dict[str, Price]:
        """By role, as charged: of the command that completed the run last, or else of the one that began it."""
        if summary := self.summary:
            return summary.prices
        try:
            return prices_of(msgspec.convert(self.manifest.resolved, Recipe).cast)
        except msgspec.ValidationError:  # written by another version, with settings unknown to this one
            return {}

    def entries(self, job: int) -> dict[str, Entry]:
        """The journal's entries of the job of one dialogue, by key."""
        return {
            entry.key: entry
            for path in sorted((self.path / "journal").glob("*.jsonl"))
            for entry in entries_of(path)
            if entry.job == job and entry.kind == "dialogues"
        }

    def lost_images(self) -> list[str]:
        """References that the records name and whose files are missing or empty."""
        decoder = msgspec.json.Decoder(_Images)
        named: dict[str, None] = {}
        for records in RECORDS.values():
            for _, line in lines_of(self.path / records.accepted):
                with contextlib.suppress(msgspec.DecodeError):  # reported by whoever reads the row itself
                    named.update(dict.fromkeys(decoder.decode(line).references))
        folder = str(self.path / "images")
        return [reference for reference in named if not _has_bytes(f"{folder}/{reference[:2]}/{reference}")]

    def image(self, reference: str) -> bytes:
        """The bytes of an image of this run; checked against its name."""
        from intersafe.images.store import ImageStore

        return ImageStore(self.path / "images").read(reference)


def open_run(run: str | Path) -> Run:
    """The run of that name in `outputs/`, or at that path; `InputError` if there is none."""
    return Run(run)
