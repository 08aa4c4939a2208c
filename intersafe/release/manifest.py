"""The manifest of a release (`manifest.json`): all its files, and what they hold. Releases are compared by it.

It is written last, so a folder without one is not a release. Versions are `MAJOR.MINOR.PATCH` (semver.org, without
pre-releases); tags on the Hub have a `v` in front.
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
PACKAGE_AGAIN = "package the run again"
"""The remedy for a release that is damaged."""


class Version(NamedTuple):
    """A version number; versions compare by major, minor and patch."""

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
    """The version that `1.2.3` or `v1.2.3` names; `InputError` otherwise."""
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


class ReleaseManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a release holds and how it was made; `manifest.json`."""

    version: str
    parent_version: str
    """The release that this one follows; empty for the first."""
    name: str
    """Name of the recipe."""
    generator: dict[str, str]
    """Versions of intersafe and of the libraries that wrote the shards."""
    recipe: str
    """Digest of the resolved recipe."""
    seeds: str
    """Digest of the seeds."""
    prompts: dict[str, str]
    """sha256 of each prompt file."""
    models: dict[str, str]
    """Identity of the model of each role."""
    scripted: bool
    """True if a script played any of the models."""
    includes_unsafe: bool
    """True if a config holds unsafe replies in full."""
    licenses: dict[str, int]
    """Number of rows by the licence of their source."""
    counts: dict[str, Any]
    """Counts of rows by config, split, category, turns and more, for the card."""
    shards: tuple[Shard, ...]
    files: tuple[File, ...]
    """All other files, without the manifest."""
    schema_version: int = SCHEMA_VERSION


_SHARD = re.compile(r"data/[a-z_]+/(?:train|test)-[0-9]{5,7}\.parquet")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def sha256_of(path: Path) -> str:
    """sha256 of a file as hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_manifest(manifest: ReleaseManifest) -> bytes:
    """A manifest as JSON; equal manifests have equal bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted")) + b"\n"


def write_manifest(folder: Path, manifest: ReleaseManifest) -> None:
    """Writes the manifest of a release; all files that it names must exist."""
    write_whole(folder / MANIFEST, encode_manifest(manifest))


def read_manifest(folder: Path) -> ReleaseManifest:
    """The manifest of a release folder; `InputError` if there is none that can be read."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError:
        raise InputError("no release there", at=folder, remedy="make one with `intersafe package RUN`") from None
    return decode_manifest(data, folder / MANIFEST)


def decode_manifest(data: bytes, at: object) -> ReleaseManifest:
    """A manifest from untrusted bytes; `InputError` names `at`."""
    try:
        manifest = msgspec.json.decode(data, type=ReleaseManifest)
        for file in (*manifest.shards, *manifest.files):
            if not (_SHARD if isinstance(file, Shard) else _NAME).fullmatch(file.path):
                raise msgspec.ValidationError(f"{file.path!r} is not a path of a release")
        parse_version(manifest.version, at)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not a manifest: {error}", at=at, remedy=PACKAGE_AGAIN) from None
    return manifest


def check_files(folder: Path, manifest: ReleaseManifest) -> None:
    """`InputError` for the first file that is missing, truncated or changed since the manifest was written."""
    for file in (*manifest.shards, *manifest.files):
        path = folder / file.path
        if not path.is_file():
            raise InputError("missing, though the manifest names it", at=path, remedy=PACKAGE_AGAIN)
        if path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
            raise InputError("not the bytes that the manifest names", at=path, remedy=PACKAGE_AGAIN)
