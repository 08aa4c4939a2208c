"""Pull: downloads a version from the Hub into a release folder and checks it against its manifest; all or nothing."""

import shutil
from pathlib import Path

from intersafe.errors import InputError, StorageError
from intersafe.release.client import Hub, check_repo_id
from intersafe.release.failures import RemoteChanged
from intersafe.release.manifest import (
    MANIFEST,
    ReleaseManifest,
    Version,
    check_files,
    decode_manifest,
    parse_version,
    read_manifest,
)
from intersafe.release.push_job import versions_of
from intersafe.run.directory import run_path


def parse_source(text: str) -> tuple[str, Version | None]:
    """The repository and the version of `ORG/NAME@v1.2.0`; None, the newest, without `@`. `InputError` if malformed."""
    repo, at, version = text.partition("@")
    return check_repo_id(repo), parse_version(version, at=text) if at else None


def find_version(hub: Hub, version: Version | None) -> tuple[Version, str]:
    """A published version and its commit; `version` None means the newest. `InputError` if it does not exist."""
    if hub.state() is None:
        raise InputError(
            f"no repository {hub.repo_id} that this token may see", remedy="set HF_TOKEN, or check the name"
        )
    tags = hub.tags()
    published = sorted(versions_of(tags))
    if not published:
        raise InputError(f"{hub.repo_id} has no version", remedy="publish one with `intersafe push`")
    chosen = version or published[-1]
    if chosen not in published:
        raise InputError(f"{hub.repo_id} has no {chosen.tag}", remedy=f"it has {', '.join(v.tag for v in published)}")
    return chosen, tags[chosen.tag]


def remote_manifest(hub: Hub, version: Version, commit: str) -> tuple[ReleaseManifest, bytes]:
    """The manifest of a published version and its bytes; `RemoteChanged` if it is not the manifest of that version."""
    data = hub.read(MANIFEST, commit)
    try:
        manifest = decode_manifest(data, f"{hub.repo_id}@{version.tag}: {MANIFEST}")
    except InputError as error:
        raise RemoteChanged(f"{hub.repo_id}@{version.tag}: {error.what}; it is not a release of intersafe") from None
    if parse_version(manifest.version) != version:
        raise RemoteChanged(f"{hub.repo_id}: {version.tag} holds the manifest of v{manifest.version}")
    return manifest, data


def pull(hub: Hub, version: Version | None, out: Path | None) -> Path:
    """Downloads a version (None: the newest) to `out`, or into the runs folder, and returns the folder.

    A folder with the same content is left as it is. `InputError` for one with other content, `RemoteChanged` for a
    damaged version on the Hub, `StorageError` for a failure of the disk.
    """
    version, commit = find_version(hub, version)
    manifest, data = remote_manifest(hub, version, commit)
    folder = out if out is not None else run_path(hub.repo_id.partition("/")[2]) / "release" / str(version)
    if folder.exists():
        _refuse_other(folder, manifest)
        return folder
    staging = folder.with_name(f".{folder.name}.part")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        for file in (*manifest.shards, *manifest.files):
            hub.download(file.path, commit, staging)
        shutil.rmtree(staging / ".cache", ignore_errors=True)  # the notes of huggingface_hub for resuming a download
        (staging / MANIFEST).write_bytes(data)
        check_files(staging, manifest)
        staging.rename(folder)
    except InputError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise RemoteChanged(f"{hub.repo_id}@{version.tag}: {error.what}; the version on the Hub is damaged") from None
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}; free the disk or correct its permissions") from None
    return folder


def _refuse_other(folder: Path, manifest: ReleaseManifest) -> None:
    try:
        equal = read_manifest(folder) == manifest
        check_files(folder, manifest)
    except InputError:
        equal = False
    if not equal:
        raise InputError("exists with other content", at=folder, remedy="name another folder with --out")
