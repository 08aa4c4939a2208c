"""The run directory: written whole or not at all, resumable after any kill, read by everything that comes later.

recipe.json         resolved recipe, digests of recipe, prompts and seeds, versions     written first
seeds.jsonl         the seeds as they were used, images by reference
prompts/  images/   the prompt files and images used
journal/<writer>.jsonl      one line for each model reply, append only
dialogues.jsonl     accepted, in job order          rejected.jsonl  failed.jsonl    the others, in job order
refusals.jsonl  twins.jsonl     refusal VQA and benign twins, each with its own -rejected and -failed beside it
index/  batches/    signatures of the accepted dialogues, a cache; batches under way at a provider
summary.json        the funnels, tokens and time by role    written last: it means that the run is complete
"""

import contextlib
import functools
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
from intersafe.run.journal import Entry, RoleTally, entries_of, tally
from intersafe.run.manifest import Manifest
from intersafe.run.outcomes import LINES, count_sound, files_of
from intersafe.storage.jsonl import lines_of

RUNS = Path("outputs")

_BARE = re.compile(r"^[A-Za-z0-9._-]+$")
_State = tuple[tuple[int, int] | None, ...]


def run_path(run: str | Path) -> Path:
    """A bare name lives in `outputs/`; anything with a slash is a path. `InputError` for an empty text."""
    if run == "":
        raise InputError("a run without a name", remedy="give its name or its path")
    return RUNS / run if isinstance(run, str) and _BARE.match(run) and run not in (".", "..") else Path(run)


class _Origin(msgspec.Struct):
    image: str


class _Origins(msgspec.Struct):
    """Of a turn or a refusal sample no more than the images."""

    origins: tuple[_Origin, ...] = ()

    @property
    def images(self) -> list[str]:
        return [origin.image for origin in self.origins]


class _Images(msgspec.Struct):
    turns: tuple[_Origins, ...]

    @property
    def images(self) -> list[str]:
        return [image for turn in self.turns for image in turn.images]


def _has_bytes(path: Path) -> bool:
    return bool((_size_and_time(path) or (0, 0))[0])


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class Run:
    """A run that was made before, or is being made: read-only."""

    def __init__(self, path: str | Path) -> None:
        """`InputError` if there is no run at that place."""
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
        """The kept refusal samples in job order."""
        yield from self._rows("refusals.jsonl", RefusalSample)

    def twins(self) -> Iterator[Dialogue]:
        """The kept benign twins in the order of the dialogues that they belong to."""
        yield from self._rows("twins.jsonl", Dialogue)

    def ended(self, line: str = "") -> Iterator[Ended]:
        """The rejected jobs of a line, then the failed ones."""
        for name in files_of(line)[1:]:
            yield from self._rows(name, Ended)

    def _rows(self, name: str, kind: type[Any]) -> Iterator[Any]:
        decode = row_decoder(kind)
        for number, (_, line) in enumerate(lines_of(self.path / name), 1):
            try:
                yield decode(line)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                raise InputError(
                    f"not a row: {error}",
                    at=self.path / name,
                    line=number,
                    remedy="restore the file, or let the run's own `intersafe generate` command grow it again",
                ) from None

    def seeds(self) -> tuple[Seed, ...]:
        """The seeds as they were used, images by reference."""
        return tuple(self._rows("seeds.jsonl", Seed))

    @property
    def summary(self) -> Summary | None:
        """The summary of a complete run; None while it is owed. A damaged one is owed again."""
        state = tuple(_size_and_time(self.path / name) for name in ("summary.json", *(files_of(x)[0] for x in LINES)))
        if self._summary is None or self._summary[0] != state:
            self._summary = state, self._read_summary()  # a look through every outcome: once, unless a file changes
        return self._summary[1]

    def _read_summary(self) -> Summary | None:
        try:
            summary = msgspec.json.decode((self.path / "summary.json").read_bytes(), type=Summary)
            rows = [count_sound(self.path / files_of(line)[0]) for line in LINES]
        except (OSError, msgspec.DecodeError):
            return None
        funnels = (summary.funnel, summary.refusals, summary.twins)
        return summary if rows == [f.accepted for f in funnels] else None  # rows were lost since: it is owed again

    def funnel(self, line: str = "") -> Funnel:
        """Counted from the outcome files of a line."""
        if summary := self.summary:
            return {"": summary.funnel, "refusals": summary.refusals, "twins": summary.twins}[line]
        funnel = Funnel()
        for outcome in self.outcomes(line):
            funnel.count(outcome)
        return funnel

    def outcomes(self, line: str = "") -> Iterator[Dialogue | RefusalSample | Ended]:
        """Every decided job of a line: the kept ones in job order, then the rejected, then the failed."""
        yield from self.kept(line)
        yield from self.ended(line)

    def kept(self, line: str = "") -> Iterator[Dialogue | RefusalSample]:
        """The kept outcomes of a line in job order."""
        yield from self._rows(files_of(line)[0], RefusalSample if line == "refusals" else Dialogue)

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
        """By role, as charged: those of the last command that completed the run, or else of the one that began it."""
        if summary := self.summary:
            return summary.prices
        try:
            return prices_of(msgspec.convert(self.manifest.resolved, Recipe).cast)
        except msgspec.ValidationError:  # by another version, with settings that this one does not know
            return {}

    def entries(self, job: int, line: str = "") -> dict[str, Entry]:
        """The journal's entries of one job, by key."""
        return {
            entry.key: entry
            for path in sorted((self.path / "journal").glob("*.jsonl"))
            for entry in entries_of(path)
            if entry.job == job and entry.line == line
        }

    def lost_images(self) -> list[str]:
        """References that the records name and the run does not have, or has as empty files."""
        folder, have = self.path / "images", functools.lru_cache(65_536)(_has_bytes)
        lost: dict[str, None] = {}
        for name, kind in (("dialogues.jsonl", _Images), ("twins.jsonl", _Images), ("refusals.jsonl", _Origins)):
            decoder: msgspec.json.Decoder[_Images | _Origins] = msgspec.json.Decoder(kind)
            for _, line in lines_of(self.path / name):
                with contextlib.suppress(msgspec.DecodeError):  # whoever reads the row says what is wrong with it
                    lost.update(
                        dict.fromkeys(
                            image for image in decoder.decode(line).images if not have(folder / image[:2] / image)
                        )
                    )
        return list(lost)

    def image(self, reference: str) -> bytes:
        """The bytes of an image of this run; checked against its name."""
        from intersafe.images.store import ImageStore

        return ImageStore(self.path / "images").read(reference)


def open_run(run: str | Path) -> Run:
    """The run of that name in `outputs/`, or at that path; `InputError` if there is none."""
    return Run(run)
