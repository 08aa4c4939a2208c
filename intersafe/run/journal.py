"""The journal: every model reply is written before it is used, and is read back when a run resumes."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from intersafe.errors import InputError
from intersafe.recipe.sections import Price
from intersafe.records import Finish
from intersafe.storage.jsonl import GroupWriter, heal, lines_of


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a journal: the reply to one call. A painter's has the `image`, or its problem as text."""

    job: int
    key: str
    role: str
    text: str
    finish: Finish = "stop"
    tokens: tuple[int, int] = (0, 0)
    """Prompt and completion tokens."""
    ms: int = 0
    kind: str = msgspec.field(default="dialogues", name="line")
    """The job kind that `job` counts in. msgspec omits a default by identity: pass an interned text."""
    image: str = ""
    """Reference of the painted image."""


class RoleTally(msgspec.Struct):
    """What one role has cost so far."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost: float = 0.0
    """USD; 0 where no price is known."""


class Journal:
    """The replies of a run by the key of their call. Each reply is handed out once, to the job that asks for it."""

    def __init__(
        self, writer: GroupWriter, name: str = "journal/main.jsonl", prices: Mapping[str, Price] | None = None
    ) -> None:
        """`prices` by role, as they are charged."""
        self._writer, self._name, self.prices = writer, name, prices or {}
        self._replies: dict[str, Entry] = {}
        self.roles: dict[str, RoleTally] = {}

    def load(self, folder: Path, undecided: Mapping[str, int]) -> None:
        """Reads every journal in the folder: counts all entries, and holds the replies of undecided jobs.

        `undecided` is the first undecided job of each kind.
        """
        heal(folder.parent / self._name)  # no other file: a worker that was given up may still append to its own
        for path in sorted(folder.glob("*.jsonl")):
            for entry in entries_of(path):
                tally(self.roles, entry, self.prices)
                if entry.job >= undecided.get(entry.kind, 0):
                    self._replies[entry.key] = entry

    def take(self, key: str) -> Entry | None:
        """The entry of that call, if it was paid for before."""
        return self._replies.pop(key, None)

    def add(self, entry: Entry) -> None:
        """Appends an entry; the writer has it when this returns."""
        tally(self.roles, entry, self.prices)
        self._writer.add(self._name, entry)

    def hand_over(self) -> dict[tuple[str, int], list[Entry]]:
        """All replies that no job has taken yet, by kind and job; this journal then holds none."""
        found: dict[tuple[str, int], list[Entry]] = {}
        for entry in self._replies.values():
            found.setdefault((entry.kind, entry.job), []).append(entry)
        self._replies.clear()
        return found

    @contextlib.contextmanager
    def lent(self, entries: Sequence[Entry]) -> Iterator[None]:
        """Holds replies that another journal of the run has on disk while their job is grown here."""
        keys = [entry.key for entry in entries]
        self._replies.update((entry.key, entry) for entry in entries)
        try:
            yield
        finally:
            for key in keys:
                self._replies.pop(key, None)


def tally(roles: dict[str, RoleTally], entry: Entry, prices: Mapping[str, Price]) -> None:
    """Adds an entry to the tally of its role, at these prices."""
    role = roles.setdefault(entry.role, RoleTally())
    role.calls += 1
    role.prompt_tokens += entry.tokens[0]
    role.completion_tokens += entry.tokens[1]
    role.seconds += entry.ms / 1000
    if price := prices.get(entry.role):
        role.cost += price.of(entry.tokens)


class ReuseIndex:
    """Where the journals of an older run hold each reply, by key: some 200 bytes each; the texts stay on disk."""

    def __init__(self, run: Path) -> None:
        self._offsets: dict[bytes, tuple[int, int]] = {}
        self._paths = sorted((run / "journal").glob("*.jsonl"))
        if not self._paths:
            raise InputError("no journal there", at=run, remedy="give --reuse an older run")
        decoder = msgspec.json.Decoder(_KeyOnly)
        for number, path in enumerate(self._paths):
            for offset, line in lines_of(path):
                with contextlib.suppress(msgspec.DecodeError, ValueError):
                    self._offsets[bytes.fromhex(decoder.decode(line).key)] = (number, offset)

    def take(self, key: str) -> Entry | None:
        """The entry of that call in the older run."""
        found = self._offsets.get(bytes.fromhex(key))
        if found is None:
            return None
        number, offset = found
        with self._paths[number].open("rb") as file:
            file.seek(offset)
            try:
                return msgspec.json.decode(file.readline(), type=Entry)
            except msgspec.DecodeError:
                return None


class _KeyOnly(msgspec.Struct):
    key: str


def entries_of(path: Path) -> Iterator[Entry]:
    """Every entry of a journal file that can be read."""
    decoder = msgspec.json.Decoder(Entry)
    for _, line in lines_of(path):
        with contextlib.suppress(msgspec.DecodeError):  # a damaged line is a call to ask again, never a crash
            yield decoder.decode(line)
