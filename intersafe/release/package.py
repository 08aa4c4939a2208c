"""Package: a run becomes a release, `<run>/release/<version>/`: shards, card, changelog, Croissant, manifest last.

It is built in a folder beside and renamed at the end, so a release is there whole or not at all. The same run gives the
same bytes; a release that follows another one takes over every shard whose rows are as they were (`plan.py`).
"""

import contextlib
import fcntl
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import structs

from intersafe.errors import InputError, IntersafeError, StorageError
from intersafe.images.store import ImageStore
from intersafe.release.card import CARD, CHANGELOG, KEEP, KEEP_END, PLACEHOLDER, card_files, changelog, kept_text
from intersafe.release.counts import Tally, figures_of, licenses_of
from intersafe.release.manifest import (
    MANIFEST,
    File,
    Manifest,
    Shard,
    Version,
    parse_version,
    read_manifest,
    sha256_of,
    write_manifest,
)
from intersafe.release.plan import Target, plan_shards, rows_at, survey
from intersafe.release.rows import COLUMNS, UNSAFE, bare
from intersafe.release.shards import check_release, need_pyarrow, write_shard
from intersafe.run.directory import Run
from intersafe.storage.files import write_whole

TEST_SHARE = 0.05
SHARD_BYTES = 300_000_000
_STAGING = ".staging"


class VersionTaken(IntersafeError):
    """The version is there with other content."""

    exit_code = 3


class Options(NamedTuple):
    """How a run is packaged."""

    version: Version | None = None
    """None: 1.0.0, or the next minor version after the newest release."""
    parent: Path | None = None
    """The release to go on from; None: the newest one of the run."""
    test_share: float | None = None
    """Share of the seeds in the split `test`; None: that of the release before, or `TEST_SHARE`."""
    shard_bytes: int = SHARD_BYTES
    include_unsafe: bool = False
    """Adds the config `dialogues_unsafe`, which holds the unsafe replies in full."""
    allow_incomplete: bool = False


class Packaged(NamedTuple):
    """A release that was made, or one that was there with the same content."""

    path: Path
    manifest: Manifest
    made: bool
    taken_over: int
    """Shards that stand in the release before byte for byte."""


def releases_of(run: Run) -> dict[Version, Path]:
    """The releases of a run, lowest version first."""
    found = {}
    for path in (run.path / "release").glob(f"*/{MANIFEST}"):
        with contextlib.suppress(InputError):
            found[parse_version(read_manifest(path.parent).version)] = path.parent
    return dict(sorted(found.items()))


def package(run: Run, options: Options) -> Packaged:
    """The run as a release; `InputError`, `StorageError`, or `VersionTaken` if the version is there and differs."""
    need_pyarrow()
    if run.summary is None and not options.allow_incomplete:
        remedy = "go on with `intersafe generate`, or give --allow-incomplete"
        raise InputError("the run is not complete", at=run.path, remedy=remedy)
    with _locked(run), _tidy(run.path / "release") as root:
        return _package(run, options, root)


def address(folder: Path, repo_id: str, kept: str | None = None) -> Manifest:
    """Writes card and Croissant of a release anew for the repository `ORG/NAME`, and the manifest that names them.

    `kept` is the text between the card's markers, None for what stands there; the same arguments give the same bytes.
    """
    manifest = read_manifest(folder)
    kept = _kept(folder / CARD) if kept is None else kept
    files = card_files(manifest, repo_id, kept) | {CHANGELOG: _text(folder / CHANGELOG).encode()}
    return _lay_files(folder, manifest, files)


# --- one release -----------------------------------------------------------------------------------------------------


def _package(run: Run, options: Options, root: Path) -> Packaged:
    there = releases_of(run)
    base = _base(options, there)
    before = read_manifest(base) if base else None
    share = _test_share(options, before)
    tallies = {config: Tally() for config in COLUMNS if config != UNSAFE or options.include_unsafe}
    found = {config: survey(run, config, share, tally) for config, tally in tallies.items()}
    if not tallies["dialogues"].turns:
        raise InputError("no dialogue was kept", at=run.path, remedy="grow some with `intersafe generate`")
    targets, changes = plan_shards(found, base, before, options.shard_bytes)
    draft = _draft(run, options, {config: tally for config, tally in tallies.items() if tally.splits}, share)
    if base and before and options.version in (None, parse_version(before.version)) and _same(draft, before, targets):
        manifest = _mended(base, before) if base.parent == root else before
        return Packaged(base, manifest, made=False, taken_over=len(before.shards))
    newest = max([*there, *([parse_version(before.version)] if before else [])], default=None)
    version = options.version or (newest.bumped("minor") if newest else Version(1, 0, 0))
    final = root / str(version)
    if version in there:
        raise VersionTaken(f"{final}: {version} is there with other content; name a higher --version")
    if final.exists():
        raise InputError("is there and is no release", at=final, remedy="remove the folder")
    draft = structs.replace(draft, version=str(version), parent_version=before.version if before else "")
    draft = structs.replace(draft, counts=draft.counts | {"changes": {name: list(c) for name, c in changes.items()}})
    manifest = _build(run, draft, targets, root / _STAGING, base)
    check_release(root / _STAGING, frozenset(shard.sha256 for shard in before.shards) if before else frozenset())
    (root / _STAGING).rename(final)
    _sync_folder(root)
    return Packaged(final, manifest, made=True, taken_over=sum(target.source is not None for target in targets))


def _base(options: Options, there: Mapping[Version, Path]) -> Path | None:
    """The release that this one goes on from or is held against; `InputError` for a version that cannot follow it."""
    version, parent = options.version, options.parent
    if version is not None and version in there:
        return there[version]
    newest = max(there, default=None)
    base = there[newest] if newest else None
    if parent:
        after = parse_version(read_manifest(parent).version, parent)
        newest, base = max(after, newest or after), parent
    if version and newest and version <= newest:
        what = f"{version} is not above {newest}, the newest release"
        raise InputError(what, at="--version", remedy=f"name {newest.bumped('patch')} or higher")
    return base


def _kept(card: Path) -> str:
    """What a person wrote into a card; `InputError` where torn markers do not tell what it is."""
    text = _text(card)
    if text.count(KEEP) > 1 or text.count(KEEP_END) > 1 or text.count(KEEP) != text.count(KEEP_END):
        raise InputError("the markers around the kept text are torn", at=card, remedy=f"write both once, {KEEP} first")
    return kept_text(text)


def _test_share(options: Options, before: Manifest | None) -> float:
    share = before.counts.get("test_share", TEST_SHARE) if before else TEST_SHARE
    if options.test_share is not None:
        if before and options.test_share < share:
            raise InputError(
                f"{options.test_share:g} is below the {share:g} of {before.version}",
                at="--test-share",
                remedy="seeds that were held out would be trained on; leave it as it is or raise it",
            )
        return options.test_share
    return float(share)


def _draft(run: Run, options: Options, tallies: Mapping[str, Tally], share: float) -> Manifest:
    """The manifest but for version, shards and files."""
    models = {role: bare(member["model"]) for role, member in run.manifest.recipe.get("cast", {}).items()}
    counts = {
        "configs": {config: tally.plain() for config, tally in tallies.items()},
        "figures": figures_of(run),
        "test_share": share,
    }
    return Manifest(
        version="",
        parent_version="",
        name=run.manifest.name,
        generator={name: importlib.metadata.version(name) for name in ("intersafe", "pyarrow")},
        recipe=run.manifest.digest,
        seeds=run.manifest.seeds,
        prompts=run.manifest.prompts,
        models=models,
        scripted=any(model.startswith("scripted:") for model in models.values()),
        includes_unsafe=options.include_unsafe,
        licenses=licenses_of(tallies),
        counts=msgspec.json.decode(msgspec.json.encode(counts)),
        shards=(),
        files=(),
    )


def _same(draft: Manifest, before: Manifest, targets: Sequence[Target]) -> bool:
    """True if a release holds what the draft would: every shard is taken over and all that is said of it is equal."""
    counts = {name: value for name, value in before.counts.items() if name != "changes"}
    kept = {target.path for target in targets if target.source is not None}
    equal = structs.replace(
        before, version="", parent_version="", generator=draft.generator, counts=counts, shards=(), files=()
    )
    return equal == draft and len(kept) == len(targets) and kept == {shard.path for shard in before.shards}


def _mended(base: Path, before: Manifest) -> Manifest:
    """The manifest of a release that is there; if its card was edited since, card and manifest are put in order."""
    if all(_is_as_named(base, file) for file in before.files):
        return before
    return address(base, PLACEHOLDER)


def _is_as_named(folder: Path, file: File) -> bool:
    return (folder / file.path).is_file() and sha256_of(folder / file.path) == file.sha256


# --- files -----------------------------------------------------------------------------------------------------------


def _build(run: Run, draft: Manifest, targets: Sequence[Target], staging: Path, base: Path | None) -> Manifest:
    """Lays everything down in `staging`, the manifest last."""
    store = ImageStore(run.path / "images")
    shards = []
    for target in targets:
        path = staging / target.path
        if target.source:
            _take_over(target.source, path)
        else:
            write_shard(path, target.config, rows_at(run, target.config, target.rows), store.read)
        size, rows = path.stat().st_size, len(target.rows)
        shards.append(Shard(target.path, sha256_of(path), size, target.config, target.split, rows))
    manifest = structs.replace(draft, shards=tuple(shards))
    kept = _kept(base / CARD) if base else ""
    earlier = _text(base / CHANGELOG) if base else ""
    files = card_files(manifest, PLACEHOLDER, kept) | {CHANGELOG: changelog(manifest, earlier).encode()}
    manifest = _lay_files(staging, manifest, files)
    for folder in {path.parent for path in staging.rglob("*")}:
        _sync_folder(folder)
    return manifest


def _lay_files(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    for name, data in files.items():
        write_whole(folder / name, data)
    named = tuple(File(name, sha256_of(folder / name), len(data)) for name, data in sorted(files.items()))
    manifest = structs.replace(manifest, files=named)
    write_manifest(folder, manifest)
    return manifest


def _take_over(source: Path, path: Path) -> None:
    """The same file under another name; a copy where the file system has no hard links, or between two of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), path)
    except OSError:
        shutil.copyfile(source, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise InputError("not UTF-8 text", at=path, remedy="save it as UTF-8, or remove it") from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _tidy(root: Path) -> Iterator[Path]:
    """Takes away what an earlier or this attempt left half-made, and the folder of releases if it stays empty."""
    try:
        shutil.rmtree(root / _STAGING, ignore_errors=True)
        yield root
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        raise StorageError(f"{root}: cannot be written ({why}); free the disk, then package again") from None
    finally:
        shutil.rmtree(root / _STAGING, ignore_errors=True)
        with contextlib.suppress(OSError):
            root.rmdir()


@contextlib.contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Lets no other process package the run meanwhile; generating goes on beside it."""
    handle: Any = os.open(run.path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: better unlocked than not at all
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError("another process is packaging this run", at=run.path, remedy="wait for it") from None
        yield
    finally:
        os.close(handle)
