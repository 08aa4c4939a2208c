"""What the batch lane stores on the disk, in `batches/` of the run directory, so that nothing is paid for twice.

| file                   | holds                                                   | there                            |
|------------------------|---------------------------------------------------------|----------------------------------|
| `<nonce>.jsonl`        | the requests, written as the calls come                 | until the provider has the batch |
| `<nonce>.json`         | `State`: whose it is, its keys, the ids at the provider | from the upload to the end       |
| `<nonce>-output.jsonl` | the results, whole                                      | until all are in the journal     |

The nonce goes into the batch's metadata: by it a batch is found again whose id never came back. Results stay in their
file, where they are looked up by key; each one that nobody has taken yet needs some 200 bytes of memory. Opening the
folder deletes results that the journal has; all are deleted once the run's jobs are decided.
"""

import contextlib
import os
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from intersafe.errors import InputError
from intersafe.models.base import Reply
from intersafe.models.http.completions import read_reply
from intersafe.models.http.faults import UNREADABLE, Transient, is_refusal, message_in, refusal_of
from intersafe.models.http.quirks import FILTER_CODES
from intersafe.run.journal import entries_of
from intersafe.storage.files import write_whole
from intersafe.storage.jsonl import lines_of

LINGER = 60.0
"""Seconds after the last result of a file was taken until the file is deleted: by then the journal is synced."""


class State(msgspec.Struct, frozen=True):
    """A batch from before it is sent until its results are fetched."""

    nonce: str
    lane: str
    made: float
    """Unix time."""
    keys: list[str]
    """Of its calls, in the order of the lines of the file."""
    file: str = ""
    """Id of the input file at the provider, recorded before the batch is created."""
    batch: str = ""
    """Id of the batch at the provider."""


class StoredReply(msgspec.Struct, frozen=True):
    """A line with a result; `old` if an earlier process fetched it."""

    line: bytes
    old: bool


class _Response(msgspec.Struct, frozen=True):
    status_code: int | None = None
    body: msgspec.Raw = msgspec.Raw(b"")


class _Status(msgspec.Struct, frozen=True):
    status_code: int | None = None


class _Line(msgspec.Struct, frozen=True):
    response: _Response | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


class _Head(msgspec.Struct, frozen=True):
    custom_id: str
    response: _Status | None = None


class _File(msgspec.Struct):
    path: Path
    old: bool
    left: int
    """Results that nobody has taken yet."""
    drained: float = 0.0
    """When the last one was taken."""


class BatchFolder:
    """The files of all lanes of a run."""

    def __init__(self, path: Path) -> None:
        """`batches/` beside `journal/`. Reads what an earlier process left; `InputError` for an unreadable state."""
        self._path = path
        self._files: dict[int, _File] = {}
        self._offsets: dict[bytes, tuple[int, int]] = {}
        self.states: list[State] = []
        """Batches that an earlier process may have left unfinished."""
        if not path.exists():
            return
        for output in sorted(path.glob("*-output.jsonl"), key=lambda output: output.stat().st_mtime):
            self._state_path(output.name.removesuffix("-output.jsonl")).unlink(missing_ok=True)
            offsets, answered = _index(output)
            self._merge(output, {key: offsets[key] for key in answered}, old=True)
        self._drop_written(path.parent / "journal")
        for left in (*path.glob(".*.tmp"), *path.glob("*.part")):
            left.unlink()
        self.states = [_read_state(file) for file in sorted(path.glob("*.json"))]
        for requests in path.glob("*.jsonl"):
            if not requests.name.endswith("-output.jsonl"):
                requests.unlink()  # never sent, or sent and found by its nonce; calls still due are written anew

    def _drop_written(self, journal: Path) -> None:
        """Deletes the results that the journal has."""
        for key in _written(journal, {key.hex() for key in self._offsets}) if self._offsets else ():
            number, _ = self._offsets.pop(bytes.fromhex(key))
            self._files[number].left -= 1
        self._delete_drained(linger=0.0)

    # --- a batch in progress -----------------------------------------------------------------------------------------

    def requests(self, nonce: str) -> Path:
        """The file for the requests of a batch."""
        self._path.mkdir(parents=True, exist_ok=True)
        return self._path / f"{nonce}.jsonl"

    def record(self, state: State) -> None:
        """Writes the state to the disk, whole."""
        write_whole(self._state_path(state.nonce), msgspec.json.encode(state))

    def forget(self, state: State) -> None:
        """Deletes what is recorded of a batch that is over."""
        self._state_path(state.nonce).unlink(missing_ok=True)
        (self._path / f"{state.nonce}.jsonl").unlink(missing_ok=True)

    def part(self, nonce: str) -> Path:
        """The file for results until they are whole."""
        return self._path / f"{nonce}.part"

    def _state_path(self, nonce: str) -> Path:
        return self._path / f"{nonce}.json"

    # --- results -----------------------------------------------------------------------------------------------------

    def index(self, state: State) -> tuple[dict[bytes, int], int]:
        """Offsets in the part of the results of the batch's own keys, and how many are answers; may run in a thread."""
        own = {bytes.fromhex(key) for key in state.keys}
        offsets, answered = _index(self.part(state.nonce))
        return {key: offset for key, offset in offsets.items() if key in own}, len(answered & own)

    def keep(self, state: State, offsets: dict[bytes, int]) -> None:
        """Serves the results from now on, also after a kill; deletes old files whose results were all taken."""
        output = self._path / f"{state.nonce}-output.jsonl"
        self.part(state.nonce).replace(output)
        self.forget(state)
        self.sweep()
        self._merge(output, offsets, old=False)

    def _merge(self, path: Path, offsets: dict[bytes, int], *, old: bool) -> None:
        """Adds a file; of two results of a key the later one counts, since the first was no answer."""
        number = max(self._files, default=-1) + 1
        for key in offsets.keys() & self._offsets.keys():
            self._files[self._offsets[key][0]].left -= 1
        self._files[number] = _File(path, old, len(offsets), time.monotonic())
        self._offsets.update((key, (number, offset)) for key, offset in offsets.items())

    def take(self, key: str) -> StoredReply | None:
        """The result of that call; only the first caller gets it."""
        found = self._offsets.pop(bytes.fromhex(key), None)
        if found is None:
            return None
        number, offset = found
        file = self._files[number]
        file.left -= 1
        file.drained = time.monotonic()
        with file.path.open("rb") as opened:
            opened.seek(offset)
            return StoredReply(opened.readline(), file.old)

    def sweep(self) -> None:
        """Deletes the files whose results were all taken a while ago."""
        self._delete_drained(LINGER)

    def _delete_drained(self, linger: float) -> None:
        now = time.monotonic()
        for number, file in list(self._files.items()):
            if not file.left and now - file.drained >= linger:
                file.path.unlink(missing_ok=True)
                del self._files[number]


def close(file: BinaryIO) -> None:
    """Closes the file after an fsync."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def clear(path: Path) -> None:
    """Deletes what a run no longer needs once its jobs are decided: everything but the states of sent batches."""
    never_sent = [state for state in path.glob("*.json") if not _read_state(state).file]
    for file in (*never_sent, *path.glob("*.jsonl"), *path.glob("*.part"), *path.glob(".*.tmp")):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # batches are in progress, or there are files that are not ours
        path.rmdir()


def _written(journal: Path, keys: Container[str]) -> set[str]:
    """Which of the keys the journal has, safely on the disk."""
    found: set[str] = set()
    for path in journal.glob("*.jsonl"):
        found.update(entry.key for entry in entries_of(path) if entry.key in keys)
        with path.open("rb+") as file:  # the process that wrote it may have been killed before it was synced
            os.fsync(file.fileno())
    return found


def _read_state(path: Path) -> State:
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except msgspec.DecodeError as error:
        raise InputError(
            f"cannot be read: {error}", at=path, remedy="restore the file; without it its calls are paid for again"
        ) from None


def _index(path: Path) -> tuple[dict[bytes, int], set[bytes]]:
    """Offsets of the results by key, and the keys with an answer; of several results the first answer counts."""
    offsets: dict[bytes, int] = {}
    answered: set[bytes] = set()
    for key, status, offset in _heads(path):
        if key not in offsets or (status == 200 and key not in answered):
            offsets[key] = offset
        if status == 200:
            answered.add(key)
    return offsets, answered


def _heads(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Key, status and offset of every readable line whose key has our form."""
    decoder = msgspec.json.Decoder(_Head)
    for offset, line in lines_of(path):
        with contextlib.suppress(*UNREADABLE, ValueError):
            head = decoder.decode(line)
            yield bytes.fromhex(head.custom_id), (head.response.status_code or 0) if head.response else 0, offset


def reply_in(line: bytes, clean: Callable[[str], str]) -> Reply:
    """The reply in a line of results; `CallFailed` if the request is at fault, `Transient` if it may be asked again.

    `clean` makes one printable line of the provider's text, without the key.
    """
    try:
        result = msgspec.json.decode(line, type=_Line)
    except UNREADABLE as error:
        raise Transient(f"unreadable result: {error}") from None
    status = (result.response.status_code or 0) if result.response else 0
    body = bytes(result.response.body) if result.response else b""
    if status == 200:
        return read_reply(body)
    message, code = message_in(status, body if status else bytes(result.error) or b"{}")
    what = clean(" ".join((f"HTTP {status} {message}" if status else f"{code} {message}").split()))
    if status == 400 and code in FILTER_CODES:
        return Reply("", "blocked")
    if not is_refusal(status):
        raise Transient(what or "no answer")
    raise refusal_of(what)
