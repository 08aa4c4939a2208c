"""One push: the repository, the release and the options, and what its steps share."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from intersafe.errors import InputError
from intersafe.release.client import Blob, Hub
from intersafe.release.manifest import MANIFEST, ReleaseManifest, Version, decode_manifest, parse_version
from intersafe.release.staged import DATA, Release

Verify = Literal["tree", "rows", "full"]


class PushOptions(NamedTuple):
    """How a release is pushed."""

    public: bool = False
    """The repository may be public; a new one is created public."""
    gate: bool = True
    """The repository must be gated."""
    dry_run: bool = False
    verify: Verify = "rows"
    """What is compared before the tag: sha256 of all files; row counts too; or every downloaded shard."""
    message: str = ""
    """Message of the commit; empty: the version and the recipe's name."""
    take_over: bool = False
    """Replaces data on `main` that no tag names, or that somebody changed by hand."""


class PushJob(NamedTuple):
    """One push in progress."""

    hub: Hub
    release: Release
    options: PushOptions

    @property
    def tag(self) -> str:
        """The tag of the version."""
        return self.release.version.tag


def versions_of(tags: Mapping[str, str]) -> list[Version]:
    """The versions among a repository's tags."""
    found = []
    for name in tags:
        try:
            version = parse_version(name)
        except InputError:
            continue
        found += [version] if version.tag == name else []
    return found


def manifest_in(hub: Hub, tree: Mapping[str, Blob], revision: str) -> ReleaseManifest | None:
    """The manifest in a remote tree; None if there is none that can be read."""
    if MANIFEST not in tree:
        return None
    try:
        return decode_manifest(hub.read(MANIFEST, revision), f"{hub.repo_id}: {MANIFEST}")
    except InputError:
        return None


def release_files(tree: Mapping[str, Blob]) -> dict[str, Blob]:
    """The files of a remote tree that nobody else may change between our reading and our commit."""
    return {path: blob for path, blob in tree.items() if path.startswith(DATA) or path == MANIFEST}
