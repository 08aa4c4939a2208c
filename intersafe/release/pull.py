"""Pull: a version on the Hub becomes a release folder again, checked against its manifest, whole or not at all."""

import shutil
from pathlib import Path

from intersafe.errors import InputError, StorageError
from intersafe.release.client import Hub, RemoteChanged, check_repo_id
from intersafe.release.manifest import (
    MANIFEST,
    Manifest,
    Version,
    check_files,
    decode_manifest,
    parse_version,
    read_manifest,
)
from intersafe.release.push import versions_of
from intersafe.run.directory import run_path


def parse_source(text: str) -> tuple[str, Version | None]:
    """`ORG/NAME@v1.2.0` in its two parts; the version may be missing, which means the newest. `InputError`."""
    repo, at, version = text.partition("@")
    return check_repo_id(repo), parse_version(version, at=text) if at else None


def find_version(hub: Hub, version: Version | None) -> tuple[Version, str]:
    """A published version, None for the newest, with its commit; `InputError` if it is not there."""
    if hub.state() is None:
        raise InputError(
            f"no repository {hub.repo_id} that this token may see", remedy="set HF_TOKEN, or check the name"
        )
    tags = hub.tags()
    there = sorted(versions_of(tags))
    if not there:
        raise InputError(f"{hub.repo_id} has no version", remedy="publish one with `intersafe push`")
    chosen = version or there[-1]
    if chosen not in there:
        raise InputError(f"{hub.repo_id} has no {chosen.tag}", remedy=f"it has {', '.join(v.tag for v in there)}")
    return chosen, tags[chosen.tag]


def remote_manifest(hub: Hub, version: Version, commit: str) -> tuple[Manifest, bytes]:
    """The manifest of a published version, and its bytes; `RemoteChanged` if it is none, or of another version."""
    data = hub.read(MANIFEST, commit)
    try:
        manifest = decode_manifest(data, f"{hub.repo_id}@{version.tag}: {MANIFEST}")
    except InputError as error:
        raise RemoteChanged(f"{hub.repo_id}@{version.tag}: {error.what}; it is no release of intersafe") from None
    if parse_version(manifest.version) != version:
        raise RemoteChanged(f"{hub.repo_id}: {version.tag} holds the manifest of v{manifest.version}")
    return manifest, data


def pull(hub: Hub, version: Version | None, out: Path | None) -> Path:
    """Brings a version into a folder and returns it; one that is there already and is whole is left as it is."""
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
        shutil.rmtree(staging / ".cache", ignore_errors=True)  # what huggingface_hub notes to go on after a stop
        (staging / MANIFEST).write_bytes(data)
        check_files(staging, manifest)
        staging.rename(folder)
    except InputError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise RemoteChanged(f"{hub.repo_id}@{version.tag}: {error.what}; the version there is damaged") from None
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}; free the disk or mend its rights") from None
    return folder


def _refuse_other(folder: Path, manifest: Manifest) -> None:
    try:
        equal = read_manifest(folder) == manifest
        check_files(folder, manifest)
    except InputError:
        equal = False
    if not equal:
        raise InputError("is there with other content", at=folder, remedy="name another folder with --out")
