"""Package: a run becomes a release, `<run>/release/<version>/`: shards, card, changelog, Croissant, manifest last.

It is built in a staging folder that is renamed at the end, so a release is whole or absent. The same run gives the same
bytes. A release that follows another one reuses every shard whose rows did not change (`plan.py`).
"""

import contextlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import structs

from intersafe.errors import InputError, IntersafeError
from intersafe.images.store import ImageStore
from intersafe.release.card import ANY_REPO, CARD, CHANGELOG, KEEP, KEEP_END, card_files, changelog, kept_text
from intersafe.release.counts import Tally, figures_of, licenses_of
from intersafe.release.manifest import (
    MANIFEST,
    File,
    ReleaseManifest,
    Shard,
    Version,
    parse_version,
    read_manifest,
    sha256_of,
    write_manifest,
)
from intersafe.release.plan import ShardPlan, plan_shards, rows_at, survey
from intersafe.release.rows import COLUMNS, UNSAFE, public_identity
from intersafe.release.shards import check_release, need_pyarrow, write_shard
from intersafe.release.staging import STAGING, clean_staging, packaging_lock, reuse_file, sync_folder
from intersafe.run.directory import Run
from intersafe.storage.files import write_whole

TEST_SHARE = 0.05
"""Share of the seeds in the split `test` of a first release."""
SHARD_BYTES = 300_000_000
"""Default limit on the texts and images of a shard, in bytes."""


class VersionTaken(IntersafeError):
    """The version exists with other content."""

    exit_code = 3


class PackageOptions(NamedTuple):
    """How a run is packaged."""

    version: Version | None = None
    """None: 1.0.0, or the next minor version after the newest release."""
    parent: Path | None = None
    """The earlier release to follow; None: the newest one of the run."""
    test_share: float | None = None
    """Share of the seeds in the split `test`, 0 to 0.5; None: that of the earlier release, or `TEST_SHARE`."""
    shard_bytes: int = SHARD_BYTES
    """Most bytes of texts and images of a shard."""
    include_unsafe: bool = False
    """Adds the config `dialogues_unsafe`, which holds the unsafe replies in full."""
    allow_incomplete: bool = False
    """Packages a run that is not complete."""


class Packaged(NamedTuple):
    """A release that was made, or an existing one with the same content."""

    path: Path
    manifest: ReleaseManifest
    made: bool
    """False if it existed before."""
    taken_over: int
    """Number of shards that are the same, byte for byte, as in the earlier release."""


def releases_of(run: Run) -> dict[Version, Path]:
    """The releases of a run, lowest version first."""
    found = {}
    for path in (run.path / "release").glob(f"*/{MANIFEST}"):
        with contextlib.suppress(InputError):
            found[parse_version(read_manifest(path.parent).version)] = path.parent
    return dict(sorted(found.items()))


def package(run: Run, options: PackageOptions) -> Packaged:
    """Makes a release of a run.

    `InputError` for a run that cannot be packaged so, `StorageError` for a failure of the disk, `VersionTaken` if the
    version exists with other content.
    """
    need_pyarrow()
    if run.summary is None and not options.allow_incomplete:
        remedy = "complete it with `intersafe generate`, or give --allow-incomplete"
        raise InputError("the run is not complete", at=run.path, remedy=remedy)
    with packaging_lock(run.path), clean_staging(run.path / "release") as root:
        return _package(run, options, root)


def set_repository(folder: Path, repo_id: str, kept: str | None = None) -> ReleaseManifest:
    """Rewrites card, Croissant and manifest of a release for the repository `ORG/NAME`; returns the manifest.

    `kept` is the text between the card's markers; None keeps the present text. The same arguments give the same bytes.
    """
    manifest = read_manifest(folder)
    kept = _kept(folder / CARD) if kept is None else kept
    files = card_files(manifest, repo_id, kept) | {CHANGELOG: _text(folder / CHANGELOG).encode()}
    return _write_texts(folder, manifest, files)


# --- one release -----------------------------------------------------------------------------------------------------


def _package(run: Run, options: PackageOptions, root: Path) -> Packaged:
    releases = releases_of(run)
    base = _base(options, releases)
    before = read_manifest(base) if base else None
    share = _test_share(options, before)
    tallies = {config: Tally() for config in COLUMNS if config != UNSAFE or options.include_unsafe}
    found = {config: survey(run, config, share, tally) for config, tally in tallies.items()}
    if not tallies["dialogues"].turns:
        raise InputError("no accepted dialogue", at=run.path, remedy="generate some with `intersafe generate`")
    plans, changes = plan_shards(found, base, before, options.shard_bytes)
    draft = _draft(run, options, {config: tally for config, tally in tallies.items() if tally.splits}, share)
    if base and before and options.version in (None, parse_version(before.version)) and _same(draft, before, plans):
        manifest = _with_edited_card(base, before) if base.parent == root else before
        return Packaged(base, manifest, made=False, taken_over=len(before.shards))
    newest = max([*releases, *([parse_version(before.version)] if before else [])], default=None)
    version = options.version or (newest.bumped("minor") if newest else Version(1, 0, 0))
    final = root / str(version)
    if version in releases:
        raise VersionTaken(f"{final}: {version} exists with other content; name a higher --version")
    if final.exists():
        raise InputError("exists and is not a release", at=final, remedy="remove the folder")
    draft = structs.replace(draft, version=str(version), parent_version=before.version if before else "")
    draft = structs.replace(draft, counts=draft.counts | {"changes": {name: list(c) for name, c in changes.items()}})
    manifest = _build(run, draft, plans, root / STAGING, base)
    check_release(root / STAGING, frozenset(shard.sha256 for shard in before.shards) if before else frozenset())
    (root / STAGING).rename(final)
    sync_folder(root)
    return Packaged(final, manifest, made=True, taken_over=sum(plan.source is not None for plan in plans))


def _base(options: PackageOptions, releases: Mapping[Version, Path]) -> Path | None:
    """The release that this one follows or is compared with; `InputError` for a version that cannot follow it."""
    version, parent = options.version, options.parent
    if version is not None and version in releases:
        return releases[version]
    newest = max(releases, default=None)
    base = releases[newest] if newest else None
    if parent:
        after = parse_version(read_manifest(parent).version, parent)
        newest, base = max(after, newest or after), parent
    if version and newest and version <= newest:
        what = f"{version} is not above {newest}, the newest release"
        raise InputError(what, at="--version", remedy=f"name {newest.bumped('patch')} or higher")
    return base


def _kept(card: Path) -> str:
    """What a person wrote into a card; `InputError` if its markers are not one pair."""
    text = _text(card)
    if text.count(KEEP) > 1 or text.count(KEEP_END) > 1 or text.count(KEEP) != text.count(KEEP_END):
        raise InputError(
            "the markers around the kept text are not a pair", at=card, remedy=f"write both once, {KEEP} first"
        )
    return kept_text(text)


def _test_share(options: PackageOptions, before: ReleaseManifest | None) -> float:
    share = before.counts.get("test_share", TEST_SHARE) if before else TEST_SHARE
    if options.test_share is not None:
        if before and options.test_share < share:
            raise InputError(
                f"{options.test_share:g} is below the {share:g} of {before.version}",
                at="--test-share",
                remedy="held-out seeds would move to `train`; keep the share or raise it",
            )
        return options.test_share
    return float(share)


def _draft(run: Run, options: PackageOptions, tallies: Mapping[str, Tally], share: float) -> ReleaseManifest:
    """The manifest without version, shards and files."""
    models = {role: public_identity(member["model"]) for role, member in run.manifest.recipe.get("cast", {}).items()}
    counts = {
        "configs": {config: tally.plain() for config, tally in tallies.items()},
        "figures": figures_of(run),
        "test_share": share,
    }
    return ReleaseManifest(
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


def _same(draft: ReleaseManifest, before: ReleaseManifest, plans: Sequence[ShardPlan]) -> bool:
    """True if the earlier release has the content of the draft: it reuses every shard, and the counts are equal."""
    counts = {name: value for name, value in before.counts.items() if name != "changes"}
    reused = {plan.path for plan in plans if plan.source is not None}
    equal = structs.replace(
        before, version="", parent_version="", generator=draft.generator, counts=counts, shards=(), files=()
    )
    return equal == draft and len(reused) == len(plans) and reused == {shard.path for shard in before.shards}


def _with_edited_card(base: Path, before: ReleaseManifest) -> ReleaseManifest:
    """The manifest of an existing release; if its card was edited, card and manifest are written again."""
    if all(_is_as_named(base, file) for file in before.files):
        return before
    return set_repository(base, ANY_REPO)


def _is_as_named(folder: Path, file: File) -> bool:
    return (folder / file.path).is_file() and sha256_of(folder / file.path) == file.sha256


# --- files -----------------------------------------------------------------------------------------------------------


def _build(
    run: Run, draft: ReleaseManifest, plans: Sequence[ShardPlan], staging: Path, base: Path | None
) -> ReleaseManifest:
    """Writes all files to `staging`, the manifest last."""
    store = ImageStore(run.path / "images")
    shards = []
    for plan in plans:
        path = staging / plan.path
        if plan.source:
            reuse_file(plan.source, path)
        else:
            write_shard(path, plan.config, rows_at(run, plan.config, plan.rows), store.read)
        size, rows = path.stat().st_size, len(plan.rows)
        shards.append(Shard(plan.path, sha256_of(path), size, plan.config, plan.split, rows))
    manifest = structs.replace(draft, shards=tuple(shards))
    kept = _kept(base / CARD) if base else ""
    earlier = _text(base / CHANGELOG) if base else ""
    files = card_files(manifest, ANY_REPO, kept) | {CHANGELOG: changelog(manifest, earlier).encode()}
    manifest = _write_texts(staging, manifest, files)
    for folder in {path.parent for path in staging.rglob("*")}:
        sync_folder(folder)
    return manifest


def _write_texts(folder: Path, manifest: ReleaseManifest, files: Mapping[str, bytes]) -> ReleaseManifest:
    for name, data in files.items():
        write_whole(folder / name, data)
    named = tuple(File(name, sha256_of(folder / name), len(data)) for name, data in sorted(files.items()))
    manifest = structs.replace(manifest, files=named)
    write_manifest(folder, manifest)
    return manifest


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise InputError("not UTF-8 text", at=path, remedy="save it as UTF-8, or remove it") from None
