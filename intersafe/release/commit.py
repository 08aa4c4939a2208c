"""Brings a release onto `main` in one commit whose parent is pinned, again and again while others move `main`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from intersafe.errors import InputError
from intersafe.release.access import check_closed
from intersafe.release.card import CARD
from intersafe.release.client import Blob, Hub, RepoState
from intersafe.release.failures import RemoteChanged, is_passing, status_of
from intersafe.release.manifest import PACKAGE_AGAIN, ReleaseManifest, sha256_of
from intersafe.release.push_job import PushJob, manifest_in, release_files
from intersafe.release.staged import Staged, data_is, same_content, stage

BATCH = 20
"""Files of one upload."""
REBASES = 5
"""How often a commit is tried on a new head of `main`."""


class MainCommit(NamedTuple):
    """The commit on `main` that holds the release, or the head that such a commit is planned on, and what it sends."""

    commit: str
    staged: Staged
    adds: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()

    def sent_bytes(self) -> int:
        """Size of all added files, in bytes."""
        sizes = self.staged.sizes()
        return sum(sizes[path] for path in self.adds)


def commit_to_main(job: PushJob, state: RepoState | None, tags: Mapping[str, str]) -> MainCommit:
    """Commits the release on top of `main`; in a dry run only plans it.

    Starts again from the new head if others moved `main`; `RemoteChanged` if they changed data or the manifest.
    """
    hub, adds, deletes = job.hub, set[str](), set[str]()
    before: dict[str, Blob] | None = None
    for _ in range(REBASES):
        head = state.head if state else ""
        tree = hub.tree(head) if state else {}
        staged = stage(job.release, hub.repo_id, _remote_card(hub, tree, head))
        if staged.is_in(tree):
            return MainCommit(head, staged, tuple(sorted(adds)), tuple(sorted(deletes)))
        remote, ours = manifest_in(hub, tree, head), release_files(tree)
        if before is None:
            _refuse_replacing(job, remote, tree, tags)
        elif ours != before:
            raise RemoteChanged(f"{hub.repo_id}: somebody else pushed data meanwhile; look at it before you push again")
        before = ours
        texts = {file.path for file in remote.files} & tree.keys() - staged.texts.keys() if remote else set()
        planned = MainCommit(head, staged, tuple(staged.missing_in(tree)), (*staged.strays_in(tree), *sorted(texts)))
        if job.options.dry_run:
            return planned
        if commit := _commit(job, planned):
            return planned._replace(commit=commit)
        adds, deletes = adds | set(planned.adds), deletes | set(planned.deletes)
        state = check_closed(job, hub.state())
    raise RemoteChanged(f"{hub.repo_id}: `main` moved {REBASES} times meanwhile; run the same command again")


def _remote_card(hub: Hub, tree: Mapping[str, Blob], revision: str) -> str | None:
    try:
        return hub.read(CARD, revision).decode() if CARD in tree else None
    except UnicodeDecodeError:
        raise RemoteChanged(f"{hub.repo_id}: {CARD} is not UTF-8 text; correct it there") from None


def _refuse_replacing(
    job: PushJob, remote: ReleaseManifest | None, tree: Mapping[str, Blob], tags: Mapping[str, str]
) -> None:
    """`RemoteChanged` if `main` holds data that no tag keeps: another push in progress, or somebody's own work."""
    if job.options.take_over or not release_files(tree):
        return
    remedy = "give --take-over to replace it"
    if remote is None or not data_is(remote, tree):
        raise RemoteChanged(f"{job.hub.repo_id}: `main` holds data that no release of intersafe put there; {remedy}")
    tag = f"v{remote.version}"
    if tag not in tags and not same_content(remote, job.release.manifest):
        raise RemoteChanged(
            f"{job.hub.repo_id}: `main` holds {tag}, which has no tag: another push is in progress or was stopped; "
            f"run that one again, or {remedy}"
        )


def _commit(job: PushJob, planned: MainCommit) -> str | None:
    """Uploads everything and commits it on the planned head; None if `main` has moved since."""
    hub, staged, hashes = job.hub, planned.staged, planned.staged.hashes()
    hub.say(f"sending {len(planned.adds)} files, {planned.sent_bytes():,} bytes")
    operations: list[Any] = []
    for start in range(0, len(planned.adds), BATCH):
        batch = planned.adds[start : start + BATCH]
        operations += hub.call("sending the shards", lambda batch=batch: _upload(job, staged, batch))  # type: ignore[misc]
    for operation in operations:
        if operation.upload_info.sha256.hex() != hashes[operation.path_in_repo]:
            raise _changed(staged.folder / operation.path_in_repo)
    operations += [hub.library.CommitOperationDelete(path) for path in planned.deletes]
    message = job.options.message or f"{job.tag}: {staged.manifest.name}"

    def commit() -> str | None:
        # If the commit succeeds and its answer is lost, the next attempt finds that its parent is no longer the head.
        try:
            info = hub.api.create_commit(
                operations=operations, commit_message=message, parent_commit=planned.commit, **hub.where
            )
        except hub.failures as error:
            if status_of(error) == 412:
                return None
            raise
        return str(info.oid)

    return hub.call("committing", commit)


def _upload(job: PushJob, staged: Staged, paths: Sequence[str]) -> list[Any]:
    """Uploads files that no commit names yet. The operations are new ones, since hf_xet trusts an older hash.

    Each attempt starts at the API, so an expired token is noticed: hf_xet reports every problem as one of connection.
    """
    hub = job.hub
    try:
        operations = [hub.library.CommitOperationAdd(path, staged.source(path)) for path in paths]
        hub.api.preupload_lfs_files(additions=operations, free_memory=False, gitignore_content="", **hub.where)
    except hub.failures as error:
        hashes = staged.hashes()
        for path in paths if not is_passing(error) else ():
            if path not in staged.texts and _sha256(staged.folder / path) != hashes[path]:
                raise _changed(staged.folder / path) from None
        raise
    return operations


def _sha256(path: Path) -> str:
    return sha256_of(path) if path.is_file() else ""


def _changed(path: Path) -> InputError:
    return InputError("changed while it was being sent; nothing was published", at=path, remedy=PACKAGE_AGAIN)
