"""Push: a release becomes a version on the Hub, whole or not at all.

Shards go up first and are seen by nobody; one commit with its parent pinned moves `main`; what arrived is compared with
the manifest; the tag comes last. Nothing is remembered between two pushes: each works out from the repository what is
owed, so a second run after any stop goes on where the first one was. docs/release.md tells what that promises.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from intersafe.errors import InputError, StorageError
from intersafe.release.card import CARD
from intersafe.release.client import (
    AccessRefused,
    Blob,
    Hub,
    RemoteChanged,
    RepoState,
    TagConflict,
    is_passing,
    status_of,
)
from intersafe.release.manifest import MANIFEST, Manifest, Version, decode_manifest, parse_version, sha256_of
from intersafe.release.staged import DATA, Release, Staged, data_is, same_content, stage
from intersafe.release.verify import check_bytes, check_local_rows, check_rows
from intersafe.storage.files import write_whole

BATCH = 20
REBASES = 5

Verify = Literal["tree", "rows", "full"]


class Options(NamedTuple):
    """How a release is pushed."""

    public: bool = False
    """The repository may be public; a new one is made so."""
    gate: bool = True
    dry_run: bool = False
    verify: Verify = "rows"
    message: str = ""
    """Of the commit."""
    take_over: bool = False
    """Replaces data on `main` that no tag names, or that somebody changed by hand."""


class Outcome(NamedTuple):
    """What a push came to."""

    status: Literal["published", "already published", "dry run"]
    tag: str
    commit: str
    adds: tuple[str, ...]
    """Paths that were, or would be, sent."""
    deletes: tuple[str, ...]
    bytes: int
    """Of `adds`; less goes over the wire where the Hub has the bytes already."""


class Receipt(msgspec.Struct, frozen=True):
    """What is kept beside a release of a push; for people, no later push reads it."""

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


class _Push(NamedTuple):
    """One push under way."""

    hub: Hub
    release: Release
    options: Options

    @property
    def tag(self) -> str:
        return self.release.version.tag


def push(hub: Hub, release: Release, options: Options) -> Outcome:
    """Publishes a release in the repository of `hub`; raises what `client.py` lists, and is safe to run again."""
    job = _Push(hub, release, options)
    if release.manifest.includes_unsafe and (options.public or not options.gate):
        raise InputError(
            "it holds unsafe replies in full", at=release.folder, remedy="leave --public and --no-gate away"
        )
    stage(release, hub.repo_id, None)  # before a repository is made, so that a bad manifest leaves no trace
    if options.verify != "tree":
        check_local_rows(release)
    _authenticate(hub)
    state = _closed(job, _prepare(job))
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
    landed = _land(job, state, tags)
    if options.dry_run:
        return landed.outcome("dry run", job.tag)
    _verify(job, landed)
    commit = _tag(job, landed.commit)
    _write_receipt(job, landed._replace(commit=commit))
    return landed._replace(commit=commit).outcome("published", job.tag)


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


# --- may it go there? ------------------------------------------------------------------------------------------------


def _authenticate(hub: Hub) -> None:
    if not hub.token:
        raise AccessRefused("no token; set HF_TOKEN, or log in with `hf auth login`")
    who = hub.call("asking who the token is", lambda: hub.api.whoami(cache=True))
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise AccessRefused(f"the token of {who.get('name')} may only read; make one that may write and set HF_TOKEN")


def _prepare(job: _Push) -> RepoState | None:
    """Finds the repository, or makes it, and closes its gate; None in a dry run before there is one."""
    hub, options = job.hub, job.options
    state = hub.state()
    if state is None and not options.dry_run:
        hub.say(f"making {hub.repo_id}, {'public' if options.public else 'private'}")
        state = hub.call("making the repository", lambda: _create(job))
        if state is None:
            raise AccessRefused(f"{hub.repo_id}: there, and not to be seen with this token")
    if state is not None:
        hub.call("asking for the right to write", lambda: hub.api.auth_check(**hub.where, write=True))
        if options.gate and not state.gated and not options.dry_run:
            _refuse_open(job, state._replace(gated=True))
            hub.call("closing the gate", lambda: hub.api.update_repo_settings(gated="manual", **hub.where))
            state = hub.state()
    return state


def _create(job: _Push) -> RepoState | None:
    """The new repository, or the one that was made meanwhile; None if one is there that this token may not see."""
    hub = job.hub
    try:
        hub.api.create_repo(**hub.where, private=not job.options.public)
    except hub.failures as error:
        if (state := hub.state()) is None and status_of(error) != 409:
            raise
        return state
    return hub.state()


def _closed(job: _Push, state: RepoState | None) -> RepoState | None:
    """The state, after the repository was found to be as closed as it has to be."""
    if state is not None:
        _refuse_open(job, state if not job.options.dry_run else state._replace(gated=True))
    return state


def _refuse_open(job: _Push, state: RepoState) -> None:
    hub, options = job.hub, job.options
    if not state.private and not options.public:
        raise AccessRefused(f"{hub.repo_id} is public; make it private on its settings page, or give --public")
    if not state.gated and options.gate:
        raise AccessRefused(f"{hub.repo_id} has no gate; set one on its settings page, or give --no-gate")
    if job.release.manifest.includes_unsafe and not (state.private and state.gated):
        raise AccessRefused(f"{hub.repo_id} is open and the release holds unsafe replies in full; close it first")


def _published_before(job: _Push, commit: str) -> Outcome:
    """The outcome if the tag names the same content; `TagConflict` otherwise."""
    tree = job.hub.tree(commit)
    there = _manifest_in(job.hub, tree, commit)
    if there is None or not same_content(there, job.release.manifest) or not data_is(there, tree):
        raise TagConflict(
            f"{job.hub.repo_id}: {job.tag} is published with other content and is never moved; "
            "package this under a higher version"
        )
    return Outcome("already published", job.tag, commit, (), (), 0)


def _manifest_in(hub: Hub, tree: Mapping[str, Blob], revision: str) -> Manifest | None:
    if MANIFEST not in tree:
        return None
    try:
        return decode_manifest(hub.read(MANIFEST, revision), f"{hub.repo_id}: {MANIFEST}")
    except InputError:
        return None


# --- one commit ------------------------------------------------------------------------------------------------------


class _Landed(NamedTuple):
    """The commit that holds the release, or the head that one is planned on, and what is sent for it."""

    commit: str
    staged: Staged
    adds: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()

    def outcome(self, status: Literal["published", "dry run"], tag: str) -> Outcome:
        sizes = self.staged.sizes()
        return Outcome(status, tag, self.commit, self.adds, self.deletes, sum(sizes[path] for path in self.adds))


def _land(job: _Push, state: RepoState | None, tags: Mapping[str, str]) -> _Landed:
    """Brings the release onto `main`, anew from wherever `main` is, as long as others touch nothing of ours."""
    hub, adds, deletes = job.hub, set[str](), set[str]()
    before: dict[str, Blob] | None = None
    for _ in range(REBASES):
        head = state.head if state else ""
        tree = hub.tree(head) if state else {}
        staged = stage(job.release, hub.repo_id, _card(hub, tree, head))
        if staged.is_in(tree):
            return _Landed(head, staged, tuple(sorted(adds)), tuple(sorted(deletes)))
        there, ours = _manifest_in(hub, tree, head), _ours(tree)
        if before is None:
            _refuse_replacing(job, there, tree, tags)
        elif ours != before:
            raise RemoteChanged(f"{hub.repo_id}: somebody else pushed data meanwhile; look at what is there first")
        before = ours
        texts = {file.path for file in there.files} & tree.keys() - staged.texts.keys() if there else set()
        planned = _Landed(head, staged, tuple(staged.missing_in(tree)), (*staged.strays_in(tree), *sorted(texts)))
        if job.options.dry_run:
            return planned
        if commit := _commit(job, planned):
            return planned._replace(commit=commit)
        adds, deletes = adds | set(planned.adds), deletes | set(planned.deletes)
        state = _closed(job, hub.state())
    raise RemoteChanged(f"{hub.repo_id}: `main` moved {REBASES} times meanwhile; run the same command again")


def _ours(tree: Mapping[str, Blob]) -> dict[str, Blob]:
    """What nobody else may change between our reading and our commit."""
    return {path: blob for path, blob in tree.items() if path.startswith(DATA) or path == MANIFEST}


def _card(hub: Hub, tree: Mapping[str, Blob], revision: str) -> str | None:
    try:
        return hub.read(CARD, revision).decode() if CARD in tree else None
    except UnicodeDecodeError:
        raise RemoteChanged(f"{hub.repo_id}: {CARD} is not UTF-8 text; mend it there") from None


def _refuse_replacing(job: _Push, there: Manifest | None, tree: Mapping[str, Blob], tags: Mapping[str, str]) -> None:
    """`RemoteChanged` if `main` holds data that no tag keeps: another push on its way, or somebody's work."""
    if job.options.take_over or not _ours(tree):
        return
    remedy = "give --take-over to replace it"
    if there is None or not data_is(there, tree):
        raise RemoteChanged(f"{job.hub.repo_id}: `main` holds data that no release of intersafe put there; {remedy}")
    tag = f"v{there.version}"
    if tag not in tags and not same_content(there, job.release.manifest):
        raise RemoteChanged(
            f"{job.hub.repo_id}: `main` holds {tag}, which has no tag: another push is under way or was stopped; "
            f"run that one again, or {remedy}"
        )


def _commit(job: _Push, planned: _Landed) -> str | None:
    """Sends everything and commits it on top of the planned head; None if `main` is elsewhere by now."""
    hub, staged, hashes = job.hub, planned.staged, planned.staged.hashes()
    hub.say(f"sending {len(planned.adds)} files, {planned.outcome('published', '').bytes:,} bytes")
    operations: list[Any] = []
    for start in range(0, len(planned.adds), BATCH):
        batch = planned.adds[start : start + BATCH]
        operations += hub.call("sending the shards", lambda batch=batch: _send(job, staged, batch))  # type: ignore[misc]
    for operation in operations:
        if operation.upload_info.sha256.hex() != hashes[operation.path_in_repo]:
            raise _changed(staged.folder / operation.path_in_repo)
    operations += [hub.library.CommitOperationDelete(path) for path in planned.deletes]
    message = job.options.message or f"{job.tag}: {staged.manifest.name}"

    def commit() -> str | None:
        # If it lands and its answer is lost, the next attempt is told that the parent is not the head any more.
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


def _send(job: _Push, staged: Staged, paths: Sequence[str]) -> list[Any]:
    """Sends files that no commit names yet; the operations are made anew, since hf_xet trusts an older hash.

    Each attempt starts at the API, so a token that ran out is noticed: hf_xet says "connection" whatever is wrong.
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
    return InputError("changed while it was being sent; nothing was published", at=path, remedy="package the run again")


# --- verify, tag, receipt --------------------------------------------------------------------------------------------


def _verify(job: _Push, landed: _Landed) -> None:
    """What arrived is what was sent, and `main` still holds it."""
    hub, tree = job.hub, job.hub.tree(landed.commit)
    if not landed.staged.is_in(tree):
        raise RemoteChanged(f"{hub.repo_id}: what arrived is not what was sent, so it got no tag; run it again")
    if job.options.verify == "rows":
        check_rows(hub, landed.staged.manifest, landed.commit)
    elif job.options.verify == "full":
        check_bytes(hub, landed.staged.manifest, landed.commit, landed.staged.folder.parent)
    state = _closed(job, hub.state())
    if state is None or (state.head != landed.commit and _ours(hub.tree(state.head)) != _ours(tree)):
        raise RemoteChanged(f"{hub.repo_id}: somebody else pushed data over this, so it got no tag")


def _tag(job: _Push, commit: str) -> str:
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
        raise RemoteChanged(f"{hub.repo_id}: {tag} was taken away again")
    return named if named == commit else _published_before(job, named).commit


def _write_receipt(job: _Push, landed: _Landed) -> None:
    """Leaves a note of the push beside the release."""
    hub, staged = job.hub, landed.staged
    receipt = Receipt(
        repo=hub.repo_id,
        endpoint=hub.endpoint,
        tag=job.tag,
        commit=landed.commit,
        manifest_sha256=staged.hashes()[MANIFEST],
        sent=landed.adds,
        bytes=landed.outcome("published", job.tag).bytes,
        verified=job.options.verify,
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    path = staged.folder.with_name(f"{staged.folder.name}.{hub.repo_id.replace('/', '--')}.receipt.json")
    try:
        write_whole(path, msgspec.json.format(msgspec.json.encode(receipt)) + b"\n")
    except StorageError as error:
        hub.say(f"published, but without a receipt: {error}")
