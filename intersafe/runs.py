"""The run directory: written whole or not at all, resumable after any kill, read by everything that comes later.

    recipe.json         resolved recipe, digests of recipe, prompts and seeds, versions     written first
    seeds.jsonl         the seeds as they were used, images by reference
    prompts/  images/   the prompt files and images used
    journal/<writer>.jsonl      one line for each model reply, append only
    dialogues.jsonl     accepted, in job order          rejected.jsonl  failed.jsonl    the others, in job order
    refusals.jsonl  twins.jsonl     refusal VQA and benign twins, each with its own -rejected and -failed beside it
    summary.json        the funnels, tokens and time by role    written last: it means that the run is complete

The three outcome files of a line are cut back to one common job on opening, so a kill between two of them leaves
nothing out of order.
"""

import contextlib
import fcntl
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from intersafe.errors import InputError, StorageError
from intersafe.journal import Entry, RoleTally, entries_of, heal, lines_of, tally
from intersafe.records import Dialogue, Ended, RefusalSample, Seed, from_row, to_row
from intersafe.settings import digest_of

RUNS = Path("outputs")

_BARE = re.compile(r"^[A-Za-z0-9._-]+$")
LINES = ("", "refusals", "twins")
"""The kinds of job, by the name that their files and journal lines carry; dialogues have the empty one."""


class Manifest(msgspec.Struct, frozen=True):
    """What a run was made from (`recipe.json`)."""

    name: str
    recipe: dict[str, Any]
    """The part of the recipe that decides the outcome."""
    resolved: dict[str, Any]
    """The whole recipe as it was first run, with names of key variables and never a key."""
    digest: str
    prompts: dict[str, str]
    """File name to sha256."""
    seeds: str
    excluded: tuple[str, ...]
    """Ids of the seeds that were refused at the door."""
    versions: dict[str, str]
    v: int = 1


class Funnel(msgspec.Struct):
    """How many jobs of a line were kept, and where the others ended."""

    jobs: int = 0
    accepted: int = 0
    ended: dict[str, int] = {}
    """`kind stage reason` to count, for example `rejected gates near_duplicate`."""
    categories: dict[str, int] = {}
    turns: dict[int, int] = {}
    groups: dict[str, int] = {}
    """Refusal samples by group."""
    images: int = 0
    painted: int = 0
    """Of the images those that the painter drew."""
    unsafe: int = 0
    """Dialogues with an unsafe turn."""
    verdicts: dict[str, int] = {}
    """Turns by safety, and by refusal kind where the victim refused."""

    def count(self, outcome: Dialogue | RefusalSample | Ended) -> None:
        """Counts one decided job."""
        self.jobs += 1
        if isinstance(outcome, Ended):
            place = f"{outcome.kind} {outcome.stage} {outcome.reason}"
            self.ended[place] = self.ended.get(place, 0) + 1
            return
        self.accepted += 1
        self.images += len(outcome.images)
        if isinstance(outcome, RefusalSample):
            self.painted += sum(origin.source == "painted" for origin in outcome.origins)
            self.groups[outcome.group] = self.groups.get(outcome.group, 0) + 1
            return
        self.painted += sum(origin.source == "painted" for turn in outcome.turns for origin in turn.origins)
        self.unsafe += outcome.first_unsafe_turn is not None
        for turn in outcome.turns:
            verdict = turn.verdict
            for word in (verdict.safety, *((f"refusal {verdict.refusal}",) if verdict.refusal != "none" else ())):
                self.verdicts[word] = self.verdicts.get(word, 0) + 1
        category, turns = outcome.seed.category, len(outcome.turns)
        self.categories[category] = self.categories.get(category, 0) + 1
        self.turns[turns] = self.turns.get(turns, 0) + 1

    @property
    def mean_turns(self) -> float:
        """Turns a dialogue."""
        return sum(n * count for n, count in self.turns.items()) / self.accepted if self.accepted else 0.0


class Summary(msgspec.Struct):
    """`summary.json`."""

    n: int
    complete: bool
    """True if all lines have what was asked for; False if the jobs were used up before."""
    funnel: Funnel
    refusals: Funnel
    twins: Funnel
    short: tuple[str, ...]
    """The cells that stayed below their quota, in words, with what was lost there."""
    roles: dict[str, RoleTally]
    excluded_seeds: int
    scripted: bool
    v: int = 1


def run_path(run: str | Path) -> Path:
    """A bare name lives in `outputs/`; anything with a slash is a path. `InputError` for an empty text."""
    if run == "":
        raise InputError("a run without a name", remedy="give its name or its path")
    return RUNS / run if isinstance(run, str) and _BARE.match(run) and run not in (".", "..") else Path(run)


class _JobOnly(msgspec.Struct):
    job: int


def files_of(line: str) -> tuple[str, str, str]:
    """Names of a line's files: the kept outcomes, the rejected and the failed jobs."""
    return (f"{line}.jsonl", f"{line}-rejected.jsonl", f"{line}-failed.jsonl") if line else _DIALOGUE_FILES


_DIALOGUE_FILES = ("dialogues.jsonl", "rejected.jsonl", "failed.jsonl")


def align_outcomes(root: Path, line: str = "") -> int:
    """Cuts a line's outcome files back to one common point; returns the first job that is not decided yet."""
    decoder = msgspec.json.Decoder(_JobOnly)
    places: dict[str, list[tuple[int, int]]] = {}
    damaged: dict[str, int] = {}
    for name in files_of(line):
        heal(root / name)
        places[name] = []
        for offset, row in lines_of(root / name):
            try:
                job = decoder.decode(row).job
            except msgspec.DecodeError:
                job = -1
            if job <= (places[name][-1][0] if places[name] else -1):
                damaged[name] = offset  # by a power loss, say: from here on all is grown again from the journal
                break
            places[name].append((job, offset))
    decided = {job for rows in places.values() for job, _ in rows}
    first = next(job for job in range(len(decided) + 1) if job not in decided)
    for name, rows in places.items():
        cut = next((offset for job, offset in rows if job >= first), damaged.get(name))
        if cut is not None:
            os.truncate(root / name, cut)
    return first


def lock(root: Path) -> int:
    """Takes the run for this process until it ends; `InputError` if another one has it, or the place holds no run."""
    try:
        if root.is_dir() and not (root / "recipe.json").exists() and not all(e.name[0] == "." for e in root.iterdir()):
            raise InputError("the folder is not empty and no run", at=root, remedy="name another --run")
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except (FileExistsError, NotADirectoryError):
        raise InputError("not a folder", at=root, remedy="name another --run") from None
    except OSError as error:
        raise StorageError(f"{root}: cannot be written ({error.strerror}); mend it, or name another --run") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            "another process is writing this run", at=root, remedy="wait for it, or name another --run"
        ) from None
    except OSError:
        pass  # a file system without locks (some NFS and Lustre mounts): better unlocked than not at all
    return handle


def differences(old: Manifest, new: Manifest) -> list[str]:
    """What changed between two manifests, in words: keys of the recipe, prompt files, seeds."""
    before, after = dict(_leaves(old.recipe)), dict(_leaves(new.recipe))
    changed = [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before | after)
        if before.get(key, "absent") != after.get(key, "absent")
    ]
    changed += [
        f"prompts/{name}"
        for name in sorted(old.prompts | new.prompts)
        if old.prompts.get(name) != new.prompts.get(name)
    ]
    return changed + ([] if old.seeds == new.seeds else ["seeds"])


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value if not isinstance(value, tuple) else list(value)


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


def _count_sound(path: Path) -> int:
    """Rows of an outcome file, or -1 where one cannot be read or stands twice."""
    decoder, last, rows = msgspec.json.Decoder(_JobOnly), -1, 0
    for _, line in lines_of(path):
        try:
            job = decoder.decode(line).job
        except msgspec.DecodeError:
            return -1
        if job <= last:
            return -1
        last, rows = job, rows + 1
    return rows


class Run:
    """A run that was made before, or is being made: read-only."""

    def __init__(self, path: str | Path) -> None:
        """`InputError` if there is no run at that place."""
        self.path = run_path(path)
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
        for number, (_, line) in enumerate(lines_of(self.path / name), 1):
            try:
                yield from_row(msgspec.json.decode(line, type=dict[str, Any]), kind)
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
        try:
            summary = msgspec.json.decode((self.path / "summary.json").read_bytes(), type=Summary)
        except (OSError, msgspec.DecodeError):
            return None
        funnels = (summary.funnel, summary.refusals, summary.twins)
        rows = [_count_sound(self.path / files_of(line)[0]) for line in LINES]
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
        """Calls, tokens and seconds by role, from the journals."""
        if summary := self.summary:
            return summary.roles
        roles: dict[str, RoleTally] = {}
        for path in sorted((self.path / "journal").glob("*.jsonl")):
            for entry in entries_of(path):
                tally(roles, entry)
        return roles

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
        folder = self.path / "images"
        have = {file.name for file in folder.glob("??/*") if file.stat().st_size}
        lost: dict[str, None] = {}
        for name, kind in (("dialogues.jsonl", _Images), ("twins.jsonl", _Images), ("refusals.jsonl", _Origins)):
            decoder: msgspec.json.Decoder[_Images | _Origins] = msgspec.json.Decoder(kind)
            for _, line in lines_of(self.path / name):
                with contextlib.suppress(msgspec.DecodeError):  # whoever reads the row says what is wrong with it
                    lost.update(dict.fromkeys(image for image in decoder.decode(line).images if image not in have))
        return list(lost)

    def image(self, reference: str) -> bytes:
        """The bytes of an image of this run; checked against its name."""
        from intersafe.images import ImageStore

        return ImageStore(self.path / "images").read(reference)


def open_run(run: str | Path) -> Run:
    """The run of that name in `outputs/`, or at that path; `InputError` if there is none."""
    return Run(run)


def outcome_row(outcome: Dialogue | RefusalSample | Ended, line: str = "") -> tuple[str, dict[str, Any]]:
    """The file and the row of a decided job."""
    kept, rejected, failed = files_of(line)
    name = kept if not isinstance(outcome, Ended) else rejected if outcome.kind == "rejected" else failed
    row = to_row(outcome)
    if isinstance(outcome, Dialogue):
        row["first_unsafe_turn"] = outcome.first_unsafe_turn  # for readers who filter rows without our types
    return name, row


def count(values: Iterable[str]) -> dict[str, int]:
    """How often each value stands, most frequent first."""
    return dict(Counter(values).most_common())
