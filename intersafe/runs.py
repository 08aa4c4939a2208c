"""The run directory: written whole or not at all, resumable after any kill, read by everything that comes later.

    recipe.json         resolved recipe, digests of recipe, prompts and seeds, versions     written first
    seeds.jsonl         the seeds as they were used, images by reference
    prompts/  images/   the prompt files and images used
    journal/<writer>.jsonl      one line for each model reply, append only
    dialogues.jsonl     accepted, in job order          rejected.jsonl  failed.jsonl    the others, in job order
    summary.json        the funnel, tokens and time by role     written last: it means that the run is complete

Appends are grouped (`GroupWriter`): at most 64 lines or 50 ms wait in memory, and fsync runs beside the event loop.
The three outcome files are cut back to one common job on opening, so a kill between two of them leaves nothing out of
order.
"""

import asyncio
import contextlib
import fcntl
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from intersafe.errors import InputError, StorageError
from intersafe.records import Dialogue, Ended, Finish, Seed, from_row, to_row

RUNS = Path("outputs")
GROUP_LINES = 64
GROUP_SECONDS = 0.05

_BARE = re.compile(r"^[A-Za-z0-9._-]+$")
_OUTCOMES = ("dialogues.jsonl", "rejected.jsonl", "failed.jsonl")


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


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a journal: a model's reply to one call, or why the call failed for good."""

    job: int
    key: str
    role: str
    text: str
    finish: Finish = "stop"
    tokens: tuple[int, int] = (0, 0)
    """Prompt and completion."""
    ms: int = 0
    failed: str = ""
    """Reason word of a call that failed for good; `text` holds the detail."""


class RoleTally(msgspec.Struct):
    """What one role has cost so far."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class Funnel(msgspec.Struct):
    """How many jobs became dialogues, and where the others ended."""

    jobs: int = 0
    accepted: int = 0
    ended: dict[str, int] = {}
    """`kind stage reason` to count, for example `rejected gates near_duplicate`."""
    categories: dict[str, int] = {}
    turns: dict[int, int] = {}
    images: int = 0

    def count(self, outcome: Dialogue | Ended) -> None:
        """Counts one decided job."""
        self.jobs += 1
        if isinstance(outcome, Ended):
            place = f"{outcome.kind} {outcome.stage} {outcome.reason}"
            self.ended[place] = self.ended.get(place, 0) + 1
            return
        self.accepted += 1
        self.images += len(outcome.images)
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
    """True if `n` dialogues were kept; False if the jobs were used up before."""
    funnel: Funnel
    roles: dict[str, RoleTally]
    excluded_seeds: int
    scripted: bool
    v: int = 1


def run_path(run: str | Path) -> Path:
    """A bare name lives in `outputs/`; anything with a slash is a path."""
    return RUNS / run if isinstance(run, str) and _BARE.match(run) and run not in (".", "..") else Path(run)


class GroupWriter:
    """Appends lines to files of one directory in groups; a failed write or fsync ends the run as `StorageError`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, int] = {}
        self._lines: list[tuple[str, bytes]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fsync")
        self._syncing: asyncio.Future[None] | None = None
        self._unsynced: set[str] = set()
        self._problem: OSError | None = None

    def add(self, name: str, record: msgspec.Struct | dict[str, Any]) -> None:
        """Appends one record as a line of JSON to the file `name`."""
        self._lines.append((name, msgspec.json.encode(record) + b"\n"))
        if len(self._lines) >= GROUP_LINES:
            self._write()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GROUP_SECONDS, self._write_quietly)

    def _write_quietly(self) -> None:
        with contextlib.suppress(StorageError):  # kept as `_problem`; the next `add` raises it inside the run
            self._write()

    def _write(self) -> None:
        """Hands the waiting lines to the operating system: from here on a kill of the process loses none of them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._problem is not None:
            raise self._storage_error(self._problem)
        groups: dict[str, list[bytes]] = {}
        for name, line in self._lines:
            groups.setdefault(name, []).append(line)
        self._lines.clear()
        try:
            for name, lines in groups.items():
                _append(self._file(name), b"".join(lines))
                self._unsynced.add(name)
        except OSError as error:
            self._problem = error
            raise self._storage_error(error) from None
        if self._syncing is None and self._unsynced:
            self._sync()

    def _sync(self) -> None:
        files = [self._files[name] for name in sorted(self._unsynced)]
        self._unsynced.clear()
        loop = asyncio.get_running_loop()
        self._syncing = loop.run_in_executor(self._thread, _fsync, files)
        self._syncing.add_done_callback(self._synced)

    def _synced(self, future: "asyncio.Future[None]") -> None:
        self._syncing = None
        if not future.cancelled() and isinstance(error := future.exception(), OSError):
            self._problem = error

    def _file(self, name: str) -> int:
        if name not in self._files:
            path = self._root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        return self._files[name]

    def _storage_error(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._root}: cannot write ({error.strerror}); "
            "free the disk or mend its rights, then run the same command again"
        )

    async def close(self) -> None:
        """Writes and syncs what waits, then closes the files; raises `StorageError` if that cannot be done."""
        try:
            self._write()
            while self._syncing is not None:
                await asyncio.wait([self._syncing])
            await asyncio.get_running_loop().run_in_executor(self._thread, _fsync, list(self._files.values()))
            if self._problem is not None:
                raise self._storage_error(self._problem)
        except OSError as error:
            raise self._storage_error(error) from None
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._thread.shutdown(wait=True)
            for file in self._files.values():
                os.close(file)
            self._files.clear()


def _append(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _fsync(files: list[int]) -> None:
    for file in files:
        os.fsync(file)


class Journal:
    """The replies of a run by the key of their call; each is handed out once, to the job that owes it."""

    def __init__(self, writer: GroupWriter, name: str = "journal/main.jsonl") -> None:
        self._writer, self._name = writer, name
        self._replies: dict[str, Entry] = {}
        self.roles: dict[str, RoleTally] = {}

    def load(self, folder: Path, first_job: int) -> None:
        """Reads every journal of the folder: all entries are tallied, those of jobs from `first_job` on are kept."""
        for path in sorted(folder.glob("*.jsonl")):
            heal(path)
            for entry in _entries(path):
                _tally(self.roles, entry)
                if entry.job >= first_job:
                    self._replies[entry.key] = entry

    def take(self, key: str) -> Entry | None:
        """The entry of that call, if it was paid for before."""
        return self._replies.pop(key, None)

    def add(self, entry: Entry) -> None:
        """Appends an entry; it is on its way to the disk when this returns."""
        _tally(self.roles, entry)
        self._writer.add(self._name, entry)


def _tally(roles: dict[str, RoleTally], entry: Entry) -> None:
    role = roles.setdefault(entry.role, RoleTally())
    role.calls += 1
    role.prompt_tokens += entry.tokens[0]
    role.completion_tokens += entry.tokens[1]
    role.seconds += entry.ms / 1000


class ReuseIndex:
    """Where the replies of an older run stand, by key: 16 bytes and a place for each, the texts stay on the disk."""

    def __init__(self, run: Path) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}
        self._paths = sorted((run / "journal").glob("*.jsonl"))
        if not self._paths:
            raise InputError("no journal there", at=run, remedy="give --reuse an older run")
        decoder = msgspec.json.Decoder(_KeyOnly)
        for number, path in enumerate(self._paths):
            for offset, line in _lines(path):
                with contextlib.suppress(msgspec.DecodeError):
                    self._places[bytes.fromhex(decoder.decode(line).key)] = (number, offset)

    def take(self, key: str) -> Entry | None:
        """The entry of that call in the older run."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        with self._paths[place[0]].open("rb") as file:
            file.seek(place[1])
            return msgspec.json.decode(file.readline(), type=Entry)


class _KeyOnly(msgspec.Struct):
    key: str


class _JobOnly(msgspec.Struct):
    job: int


def heal(path: Path) -> None:
    """Cuts off a torn last line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        at = end
        while at > 0:
            start = max(0, at - 65_536)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < end:
            file.truncate(at)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of every whole line."""
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield offset, line
            offset += len(line)


def _entries(path: Path) -> Iterator[Entry]:
    decoder = msgspec.json.Decoder(Entry)
    for _, line in _lines(path):
        with contextlib.suppress(msgspec.DecodeError):  # a damaged line is a call owed again, never a crash
            yield decoder.decode(line)


def align_outcomes(root: Path) -> int:
    """Cuts the outcome files back to one common point; returns the first job that is not decided yet."""
    decoder = msgspec.json.Decoder(_JobOnly)
    places: dict[str, list[tuple[int, int]]] = {}
    for name in _OUTCOMES:
        heal(root / name)
        places[name] = []
        for number, (offset, line) in enumerate(_lines(root / name), 1):
            try:
                places[name].append((decoder.decode(line).job, offset))
            except msgspec.DecodeError:
                raise InputError(
                    "not a row of a run", at=root / name, line=number, remedy="restore the file, or start another --run"
                ) from None
    decided = {job for rows in places.values() for job, _ in rows}
    first = next(job for job in range(len(decided) + 1) if job not in decided)
    for name, rows in places.items():
        cut = next((offset for job, offset in rows if job >= first), None)
        if cut is not None:
            os.truncate(root / name, cut)
    return first


def lock(root: Path) -> int:
    """Takes the run for this process until it ends; `InputError` if another one has it."""
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise InputError(
            "another process is writing this run", at=root, remedy="wait for it, or name another --run"
        ) from None
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


class Run:
    """A run that was made before, or is being made: read-only."""

    def __init__(self, path: str | Path) -> None:
        """`InputError` if there is no run at that place."""
        self.path = run_path(path)
        try:
            self.manifest = msgspec.json.decode((self.path / "recipe.json").read_bytes(), type=Manifest)
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

    def ended(self) -> Iterator[Ended]:
        """The rejected jobs, then the failed ones."""
        yield from self._rows("rejected.jsonl", Ended)
        yield from self._rows("failed.jsonl", Ended)

    def _rows(self, name: str, kind: type[Any]) -> Iterator[Any]:
        for number, (_, line) in enumerate(_lines(self.path / name), 1):
            try:
                yield from_row(msgspec.json.decode(line), kind)
            except (msgspec.DecodeError, ValueError) as error:
                raise InputError(
                    f"not a row: {error}", at=self.path / name, line=number, remedy="restore the file"
                ) from None

    def seeds(self) -> tuple[Seed, ...]:
        """The seeds as they were used, images by reference."""
        return tuple(from_row(msgspec.json.decode(line), Seed) for _, line in _lines(self.path / "seeds.jsonl"))

    @property
    def summary(self) -> Summary | None:
        """The summary of a complete run; None while it is owed."""
        try:
            return msgspec.json.decode((self.path / "summary.json").read_bytes(), type=Summary)
        except OSError:
            return None

    def funnel(self) -> Funnel:
        """Counted from the outcome files."""
        if summary := self.summary:
            return summary.funnel
        funnel = Funnel()
        for outcome in self.outcomes():
            funnel.count(outcome)
        return funnel

    def outcomes(self) -> Iterator[Dialogue | Ended]:
        """Every decided job: the accepted ones in job order, then the rejected, then the failed."""
        yield from self.dialogues()
        yield from self.ended()

    def roles(self) -> dict[str, RoleTally]:
        """Calls, tokens and seconds by role, from the journals."""
        if summary := self.summary:
            return summary.roles
        roles: dict[str, RoleTally] = {}
        for path in sorted((self.path / "journal").glob("*.jsonl")):
            for entry in _entries(path):
                _tally(roles, entry)
        return roles

    def entries(self, job: int) -> dict[str, Entry]:
        """The journal's entries of one job, by key."""
        return {
            entry.key: entry
            for path in sorted((self.path / "journal").glob("*.jsonl"))
            for entry in _entries(path)
            if entry.job == job
        }

    def image(self, reference: str) -> bytes:
        """The bytes of an image of this run; checked against its name."""
        from intersafe.images import ImageStore

        return ImageStore(self.path / "images").read(reference)


def outcome_row(outcome: Dialogue | Ended) -> tuple[str, dict[str, Any]]:
    """The file and the row of a decided job."""
    name = "dialogues.jsonl" if isinstance(outcome, Dialogue) else f"{outcome.kind}.jsonl"
    return name, to_row(outcome)


def count(values: Iterable[str]) -> dict[str, int]:
    """How often each value stands, most frequent first."""
    return dict(Counter(values).most_common())
