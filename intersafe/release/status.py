"""Compares the releases of a run with the versions in a repository."""

from collections.abc import Mapping
from pathlib import Path

from intersafe.errors import InputError
from intersafe.release.client import Hub
from intersafe.release.manifest import MANIFEST, Version, decode_manifest, parse_version, read_manifest
from intersafe.release.push_job import versions_of
from intersafe.release.staged import data_is, same_content


def releases_in(folder: Path) -> dict[Version, Path]:
    """The releases of a run folder, lowest version first; `folder` may be a release itself."""
    if (folder / MANIFEST).is_file():
        return {parse_version(read_manifest(folder).version): folder}
    found = {}
    for path in (folder / "release").glob(f"*/{MANIFEST}"):
        try:
            found[parse_version(path.parent.name)] = path.parent
        except InputError:
            continue
    return dict(sorted(found.items()))


def status(hub: Hub, releases: Mapping[Version, Path]) -> list[str]:
    """The lines for the user: the repository, each version here or on the Hub, and `main`."""
    state = hub.state()
    if state is None:
        return [f"{hub.repo_id}: not found, or not visible with this token", *map(_unpublished, releases)]
    tags = hub.tags()
    open_or_not = f"{'private' if state.private else 'PUBLIC'}, {'gated' if state.gated else 'NOT GATED'}"
    lines = [f"{hub.repo_id}: {open_or_not}"]
    for version in sorted({*releases, *versions_of(tags)}):
        if version.tag not in tags:
            lines.append(_unpublished(version))
        elif version not in releases:
            lines.append(f"{version.tag:<10} published, not here")
        else:
            equal = _holds(hub, tags[version.tag], releases[version])
            lines.append(f"{version.tag:<10} {'published' if equal else 'PUBLISHED WITH OTHER CONTENT'}")
    tree = hub.tree(state.head)
    if MANIFEST in tree:
        named = decode_manifest(hub.read(MANIFEST, state.head), f"{hub.repo_id}: {MANIFEST}")
        tagged = "" if f"v{named.version}" in tags else ", which has no tag: a push was stopped, run it again"
        changed = "" if data_is(named, tree) else ", changed by hand since"
        lines.append(f"{'main':<10} holds v{named.version}{tagged}{changed}")
    else:
        lines.append(f"{'main':<10} holds no release")
    return lines


def _unpublished(version: Version) -> str:
    return f"{version.tag:<10} not published"


def _holds(hub: Hub, commit: str, folder: Path) -> bool:
    tree = hub.tree(commit)
    if MANIFEST not in tree:
        return False
    remote = decode_manifest(hub.read(MANIFEST, commit), f"{hub.repo_id}: {MANIFEST}")
    return same_content(remote, read_manifest(folder)) and data_is(remote, tree)
