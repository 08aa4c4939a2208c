"""The manifest of a release (`manifest.json`): what it holds, file by file. It is the unit of comparison everywhere.

It is written last, so a folder without one is no release. Versions are `MAJOR.MINOR.PATCH` (semver.org, without
pre-releases); tags on the Hub carry a `v` before them.
"""

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from intersafe.errors import InputError
from intersafe.storage.files import write_whole

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


class Version(NamedTuple):
    """Three numbers; they compare as versions do."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    @property
    def tag(self) -> str:
        """Its tag on the Hub."""
        return f"v{self}"

    def bumped(self, part: str) -> "Version":
        """The next major, minor or patch version."""
        if part == "major":
            return Version(self.major + 1, 0, 0)
        return Version(self.major, self.minor + 1, 0) if part == "minor" else Version(*self[:2], self.patch + 1)


_VERSION = re.compile(r"v?(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})")


def parse_version(text: str, at: object = "--version") -> Version:
    """`1.2.3` or `v1.2.3`; `InputError` otherwise."""
    found = _VERSION.fullmatch(text)
    if found is None:
        raise InputError(f"{text!r} is not a version", at=at, remedy="write MAJOR.MINOR.PATCH, for example 1.0.0")
    return Version(*map(int, found.groups()))


class File(msgspec.Struct, frozen=True):
    """One file of a release; `path` is relative to its folder, with forward slashes."""

    path: str
    sha256: str
    bytes: int


class Shard(File, frozen=True):
    """One Parquet file."""

    config: str
    split: str
    rows: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything of a release but its own bytes."""

    version: str
    parent_version: str
    """The release whose shards this one goes on from; empty for the first."""
    name: str
    """Of the recipe."""
    generator: dict[str, str]
    """Versions of intersafe and of the libraries that wrote the shards."""
    recipe: str
    """Digest of the resolved recipe."""
    seeds: str
    prompts: dict[str, str]
    models: dict[str, str]
    """Role to identity."""
    scripted: bool
    """True if any of it is no real model output."""
    includes_unsafe: bool
    """True if a config holds unsafe replies in full."""
    licenses: dict[str, int]
    """Licence of the sources to rows."""
    counts: dict[str, Any]
    """Rows by config and split, category, turn count and the like, for the card and for `diff`."""
    shards: tuple[Shard, ...]
    files: tuple[File, ...]
    """All other files but the manifest."""
    schema_version: int = SCHEMA_VERSION


_SHARD = re.compile(r"data/[a-z_]+/(?:train|test)-[0-9]{5,7}\.parquet")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """A manifest as it is written; equal ones have equal bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted")) + b"\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest; everything that it names is there."""
    write_whole(folder / MANIFEST, encode_manifest(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a release folder; `InputError` if there is none, or one of another shape."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError:
        raise InputError("no release there", at=folder, remedy="make one with `intersafe package RUN`") from None
    return decode_manifest(data, folder / MANIFEST)


def decode_manifest(data: bytes, at: object) -> Manifest:
    """A manifest from its bytes, which may come from elsewhere; `InputError` names `at`."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        for file in (*manifest.shards, *manifest.files):
            if not (_SHARD if isinstance(file, Shard) else _NAME).fullmatch(file.path):
                raise msgspec.ValidationError(f"{file.path!r} is no place in a release")
        parse_version(manifest.version, at)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not a manifest: {error}", at=at, remedy="package the run again") from None
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """`InputError` for the first file that is missing, truncated or changed since the manifest was written."""
    for file in (*manifest.shards, *manifest.files):
        path = folder / file.path
        if not path.is_file():
            raise InputError("the manifest names it and it is missing", at=path, remedy="package the run again")
        if path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
            raise InputError("not the bytes that the manifest names", at=path, remedy="package the run again")
