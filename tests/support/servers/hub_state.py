"""What the test Hub knows: repos with commits and tags, large objects on disk, planned faults and a log of requests.

It keeps what the real one keeps (a tree for each commit, objects by sha256), and it watches two things while it runs:
`exposed` lists every request that sent something to a repo that was not private and gated, `unknown` every request that
it has no route for.
"""

import hashlib
import json
import re
import struct
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

PATTERNS = ("*.parquet", "*.arrow", "*.bin", "*.zip", "*.png", "*.jpg", "*.jpeg", "*.webp", "*.gif")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in PATTERNS).encode()
DATE = "2026-01-01T00:00:00.000Z"
TOKENS = {"hf_writer": ("alice", "write"), "hf_other": ("carol", "write"), "hf_reader": ("alice", "read")}


def git_sha(data: bytes) -> str:
    """The name that git gives to a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubError(Exception):
    """An answer that is no success."""

    def __init__(
        self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


class Entry(NamedTuple):
    """One file of a tree; `sha256` is empty unless it is a large object."""

    oid: str
    size: int
    sha256: str = ""


Tree = dict[str, Entry]


@dataclass
class Commit:
    oid: str
    parent: str
    tree: Tree
    title: str


@dataclass
class Repo:
    """A dataset repo with one branch, `main`."""

    id: str
    private: bool
    gated: str | bool = False
    head: str = ""
    commits: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add_commit(self, tree: Tree, title: str) -> str:
        """Moves `main` by one commit."""
        oid = hashlib.sha1(f"{self.head} {title} {uuid.uuid4().hex}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, self.head, tree, title)
        self.head = oid
        return oid

    def find(self, revision: str) -> Commit:
        """A commit by branch, tag or oid."""
        revision = re.sub(r"^refs/(heads|tags)/", "", revision)
        oid = self.head if revision == "main" else self.tags.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def tree(self, revision: str = "main") -> Tree:
        return self.find(revision).tree


@dataclass
class Fault:
    """What goes wrong at requests whose `METHOD path` holds `match`: the first `after` pass, the next `times` do not.

    `reset` drops the connection before anything is done, `lose` does the thing and then drops the connection, `hang`
    answers never, `answer` sends `status` and `headers`. `call` runs first, for example to kill the client.
    """

    how: Literal["reset", "lose", "hang", "answer", "pass"] = "answer"
    match: str = "."
    after: int = 0
    times: int = 1
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    call: Callable[[], None] | None = None
    seen: int = 0
    used: int = 0


class Seen(NamedTuple):
    """One request of the log."""

    who: str
    """`hub` or `store`."""
    method: str
    path: str
    status: int
    """0 if the connection was dropped."""


class State:
    """All that a running test Hub knows; `xet=True` hands out `local://` addresses, which hf_xet understands."""

    def __init__(self, root: Path, xet: bool = False, page: int = 1000) -> None:
        self.xet, self.page = xet, page
        self.objects, self.cas = root / "objects", root / "cas"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.cas.mkdir(exist_ok=True)
        self.tokens = dict(TOKENS)
        self.repos: dict[str, Repo] = {}
        self.blobs = {git_sha(GITATTRIBUTES): GITATTRIBUTES}
        self.faults: list[Fault] = []
        self.log: list[Seen] = []
        self.exposed: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self.hub_url = self.store_url = ""

    def create(self, repo_id: str, private: bool, gated: str | bool = False) -> Repo:
        """A new repo as the real Hub makes it: with a `.gitattributes`."""
        repo = Repo(repo_id, private, gated)
        repo.add_commit({".gitattributes": Entry(git_sha(GITATTRIBUTES), len(GITATTRIBUTES))}, "initial commit")
        self.repos[repo_id] = repo
        return repo

    def clone(self, old: str, new: str) -> Repo:
        """A second repo with the same history, so that a test can continue from there many times."""
        source = self.repos[old]
        copy = Repo(new, source.private, source.gated, source.head, dict(source.commits), dict(source.tags))
        self.repos[new] = copy
        return copy

    def edit(self, repo_id: str, files: Mapping[str, bytes | None], title: str = "by hand") -> str:
        """A commit by somebody else; None deletes. Files become large objects as `.gitattributes` says."""
        repo = self.repos[repo_id]
        tree = dict(repo.tree())
        for path, data in files.items():
            if data is None:
                del tree[path]
            elif path.endswith(".parquet"):
                sha256 = hashlib.sha256(data).hexdigest()
                (self.objects / sha256).write_bytes(data)
                tree[path] = Entry(git_sha(sha256.encode()), len(data), sha256)
            else:
                tree[path] = self.small(data)
        return repo.add_commit(tree, title)

    def small(self, data: bytes) -> Entry:
        """Keeps a small file."""
        self.blobs[git_sha(data)] = data
        return Entry(git_sha(data), len(data))

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """The bytes of a file."""
        entry = self.repos[repo_id].tree(revision)[path]
        return self.large(entry.sha256).read_bytes() if entry.sha256 else self.blobs[entry.oid]

    # --- large objects ---

    def has(self, sha256: str) -> bool:
        return (self.objects / sha256).exists() or sha256 in self.xet_files()

    def xet_files(self) -> dict[str, tuple[str, int]]:
        """sha256 to xet hash and size, out of the shard files that hf_xet's local store wrote (48-byte records)."""
        found = {}
        for path in self.cas.glob("xet/xorbs/shards/*.mdb") if self.xet else ():
            data, at = path.read_bytes(), 48
            while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
                xet_hash, (flags, entries) = data[at : at + 32], struct.unpack("<II", data[at + 32 : at + 40])
                at += 48
                segments = data[at : at + 48 * entries]
                size = sum(struct.unpack("<I", segments[i * 48 + 36 : i * 48 + 40])[0] for i in range(entries))
                at += 48 * entries * (2 if flags & (1 << 31) else 1)
                if flags & (1 << 30):
                    found[_words(data[at : at + 32])] = (_words(xet_hash), size)
                    at += 48
        return found

    def large(self, sha256: str) -> Path:
        """The bytes of a large object, put together from the xet store if they lie there."""
        path = self.objects / sha256
        if not path.exists() and sha256 in (known := self.xet_files()):
            import hf_xet

            temporary = path.with_suffix(f".{uuid.uuid4().hex}")
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{self.cas}") as group:
                group.start_download_file(hf_xet.XetFileInfo(*known[sha256]), str(temporary))
            temporary.replace(path)
        return path

    def stored(self) -> int:
        """Bytes of all large objects as they lie on disk, in either store."""
        kept = [*self.objects.iterdir(), *self.cas.glob("xet/xorbs/*")]
        return sum(path.stat().st_size for path in kept if path.is_file())

    # --- promises ---

    def lost(self) -> list[str]:
        """Files of a commit that a branch or tag names whose bytes the Hub does not have."""
        return [
            f"{repo.id}@{ref}: {path}"
            for repo in self.repos.values()
            for ref in ("main", *repo.tags)
            for path, entry in repo.tree(ref).items()
            if not (self.has(entry.sha256) if entry.sha256 else entry.oid in self.blobs)
        ]

    def due(self, line: str) -> Fault | None:
        """The planned fault that this request meets."""
        with self.lock:
            for fault in self.faults:
                if re.search(fault.match, line):
                    fault.seen += 1
                    if fault.seen > fault.after and fault.used < fault.times:
                        fault.used += 1
                        return fault
        return None


def _words(data: bytes) -> str:
    """A hash as hf_xet writes it: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def commit_of(body: bytes) -> tuple[dict[str, str], list[tuple[str, dict[str, str]]]]:
    """The header and the operations of a commit request (NDJSON)."""
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    headers = [line["value"] for line in lines if line["key"] == "header"]
    return headers[0] if headers else {}, [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
