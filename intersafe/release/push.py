"""Push: a release becomes a version on the Hub, whole or not at all.

Shards are uploaded first, invisible to readers. One commit with a pinned parent moves `main`. What arrived is compared
with the manifest, and the tag comes last. No state is kept between two pushes: each compares the repository with the
release, so running a stopped push again completes it. docs/release.md has the guarantees.
"""

import time
from typing import Literal, NamedTuple

import msgspec

from intersafe.errors import InputError, StorageError
from intersafe.release.access import authenticate, check_closed, prepare_repository
from intersafe.release.client import Hub
from intersafe.release.commit import MainCommit, commit_to_main
from intersafe.release.failures import RemoteChanged, TagConflict
from intersafe.release.manifest import MANIFEST
from intersafe.release.push_job import PushJob, PushOptions, manifest_in, release_files, versions_of
from intersafe.release.staged import Release, data_is, same_content, stage
from intersafe.release.verify import check_bytes, check_local_rows, check_rows
from intersafe.storage.files import write_whole

PushStatus = Literal["published", "already published", "dry run"]


class PushResult(NamedTuple):
    """What a push did, or would do."""

    status: PushStatus
    tag: str
    commit: str
    adds: tuple[str, ...]
    """Paths that were, or would be, sent."""
    deletes: tuple[str, ...]
    bytes: int
    """Size of `adds`; less is transferred if the Hub has some of the bytes already."""


class Receipt(msgspec.Struct, frozen=True):
    """The note on a push that is written next to the release, for people: no later push reads it."""

    repo: str
    endpoint: str
    tag: str
    commit: str
    manifest_sha256: str
    """Of `manifest.json` on the Hub."""
    sent: tuple[str, ...]
    bytes: int
    verified: str
    at: str
    """UTC."""


def push(hub: Hub, release: Release, options: PushOptions) -> PushResult:
    """Publishes a release in the repository of `hub`. It is safe to run again after any stop.

    Raises `InputError` for a release that cannot be published, and the failures of `failures.py`.
    """
    job = PushJob(hub, release, options)
    if release.manifest.includes_unsafe and (options.public or not options.gate):
        raise InputError("it holds unsafe replies in full", at=release.folder, remedy="drop --public and --no-gate")
    stage(release, hub.repo_id, None)  # before a repository is created, so that a bad manifest leaves no trace
    if options.verify != "tree":
        check_local_rows(release)
    authenticate(hub)
    state = prepare_repository(job)
    tags = hub.tags() if state else {}
    if job.tag in tags:
        return _published_before(job, tags[job.tag])
    newest = max(versions_of(tags), default=None)
    if newest and release.version < newest:
        raise InputError(
            f"{job.tag} is lower than {newest.tag}, the newest in {hub.repo_id}",
            at="--version",
            remedy=f"package it as {newest.bumped('minor')} or higher",
        )
    made = commit_to_main(job, state, tags)
    if options.dry_run:
        return _result("dry run", job, made)
    _verify(job, made)
    made = made._replace(commit=_tag(job, made.commit))
    _write_receipt(job, made)
    return _result("published", job, made)


def _result(status: PushStatus, job: PushJob, made: MainCommit) -> PushResult:
    return PushResult(status, job.tag, made.commit, made.adds, made.deletes, made.sent_bytes())


def _published_before(job: PushJob, commit: str) -> PushResult:
    """The result if the tag names the same content; `TagConflict` otherwise."""
    tree = job.hub.tree(commit)
    remote = manifest_in(job.hub, tree, commit)
    if remote is None or not same_content(remote, job.release.manifest) or not data_is(remote, tree):
        raise TagConflict(
            f"{job.hub.repo_id}: {job.tag} is published with other content and is never moved; "
            "package this under a higher version"
        )
    return PushResult("already published", job.tag, commit, (), (), 0)


def _verify(job: PushJob, made: MainCommit) -> None:
    """`RemoteChanged` unless what arrived is what was sent, and `main` still holds it."""
    hub, tree = job.hub, job.hub.tree(made.commit)
    if not made.staged.is_in(tree):
        raise RemoteChanged(f"{hub.repo_id}: what arrived is not what was sent, so it got no tag; run it again")
    if job.options.verify == "rows":
        check_rows(hub, made.staged.manifest, made.commit)
    elif job.options.verify == "full":
        check_bytes(hub, made.staged.manifest, made.commit, made.staged.folder.parent)
    state = check_closed(job, hub.state())
    if state is None or (state.head != made.commit and release_files(hub.tree(state.head)) != release_files(tree)):
        raise RemoteChanged(f"{hub.repo_id}: somebody else pushed data over this, so it got no tag")


def _tag(job: PushJob, commit: str) -> str:
    """Tags the commit; returns the commit that the tag names, which is another one if an equal push was first."""
    hub, tag = job.hub, job.tag

    def attempt() -> None:
        try:
            hub.api.create_tag(tag=tag, tag_message=tag, revision=commit, **hub.where)
        except hub.failures:
            if tag not in hub.tags():
                raise

    hub.call("tagging", attempt)
    named = hub.tags().get(tag)
    if named is None:
        raise RemoteChanged(f"{hub.repo_id}: somebody deleted {tag} again")
    return named if named == commit else _published_before(job, named).commit


def _write_receipt(job: PushJob, made: MainCommit) -> None:
    """Writes the receipt next to the release; says so if that fails."""
    hub, staged = job.hub, made.staged
    receipt = Receipt(
        repo=hub.repo_id,
        endpoint=hub.endpoint,
        tag=job.tag,
        commit=made.commit,
        manifest_sha256=staged.hashes()[MANIFEST],
        sent=made.adds,
        bytes=made.sent_bytes(),
        verified=job.options.verify,
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    path = staged.folder.with_name(f"{staged.folder.name}.{hub.repo_id.replace('/', '--')}.receipt.json")
    try:
        write_whole(path, msgspec.json.format(msgspec.json.encode(receipt)) + b"\n")
    except StorageError as error:
        hub.say(f"published, but without a receipt: {error}")
