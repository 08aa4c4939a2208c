"""A release as it is uploaded: shards from its folder, texts in memory, card and Croissant written for the repository.

The card keeps the text that a person wrote into the card on the Hub. So `manifest.json` on the Hub names the bytes on
the Hub; it differs from the local one in `README.md` and `croissant.json`. Two releases have the same content if their
manifests differ in `files` at most.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from intersafe.errors import InputError
from intersafe.release.card import CARD, CROISSANT, KEEP, KEEP_END, card_files, kept_text
from intersafe.release.client import Blob
from intersafe.release.failures import RemoteChanged
from intersafe.release.front_matter import read_front_matter
from intersafe.release.licenses import OTHER, is_noncommercial
from intersafe.release.manifest import (
    MANIFEST,
    PACKAGE_AGAIN,
    File,
    ReleaseManifest,
    Version,
    check_files,
    encode_manifest,
    parse_version,
    read_manifest,
)
from intersafe.release.rows import UNSAFE

DATA = "data/"


class Release(NamedTuple):
    """A release folder whose files match its manifest."""

    folder: Path
    manifest: ReleaseManifest

    @property
    def version(self) -> Version:
        """The version that the manifest names."""
        return parse_version(self.manifest.version, at=self.folder / MANIFEST)


class Staged(NamedTuple):
    """The content of one version on the Hub."""

    folder: Path
    manifest: ReleaseManifest
    texts: Mapping[str, bytes]
    """The bytes of every file but the shards, with `manifest.json`."""

    def missing_in(self, tree: Mapping[str, Blob]) -> list[str]:
        """Paths that a remote tree lacks or has with other bytes; shards first."""
        shards = [
            shard.path
            for shard in self.manifest.shards
            if shard.path not in tree
            or not tree[shard.path].holds_file(shard.sha256, shard.bytes, self.folder / shard.path)
        ]
        return shards + [path for path, data in self.texts.items() if path not in tree or not tree[path].holds(data)]

    def strays_in(self, tree: Mapping[str, Blob]) -> list[str]:
        """Paths below `data/` that are not part of this version."""
        named = {shard.path for shard in self.manifest.shards}
        return sorted(path for path in tree if path.startswith(DATA) and path not in named)

    def is_in(self, tree: Mapping[str, Blob]) -> bool:
        """True if a remote tree holds this version and no other data."""
        return not self.missing_in(tree) and not self.strays_in(tree)

    def source(self, path: str) -> Path | bytes:
        """The bytes of a path, or the local file that holds them."""
        return self.texts[path] if path in self.texts else self.folder / path

    def sizes(self) -> dict[str, int]:
        """Size of every path, in bytes."""
        return {s.path: s.bytes for s in self.manifest.shards} | {p: len(data) for p, data in self.texts.items()}

    def hashes(self) -> dict[str, str]:
        """sha256 of every path."""
        texts = {path: hashlib.sha256(data).hexdigest() for path, data in self.texts.items()}
        return {shard.path: shard.sha256 for shard in self.manifest.shards} | texts


def open_release(folder: Path, *, allow_scripted: bool = False) -> Release:
    """A release that may be published.

    `InputError` for a damaged release, a licence that the sources do not permit, or scripted models. Of the card only
    the licence is checked, because the card is written again for the upload.
    """
    manifest = read_manifest(folder)
    release = Release(folder, manifest)
    if folder.name != manifest.version and re.fullmatch(r"\d+\.\d+\.\d+", folder.name):
        raise InputError(f"its manifest says version {manifest.version}", at=folder, remedy=PACKAGE_AGAIN)
    paths = [file.path for file in (*manifest.shards, *manifest.files)]
    if len(set(paths)) != len(paths) or MANIFEST in paths or release.version.tag in paths or not manifest.shards:
        raise InputError("names a file twice, itself, or no shard", at=folder / MANIFEST, remedy=PACKAGE_AGAIN)
    rewritten = tuple(file for file in manifest.files if file.path not in (CARD, CROISSANT))
    check_files(folder, structs.replace(manifest, files=rewritten))
    unsafe = any(shard.config == UNSAFE for shard in manifest.shards)
    scripted = any("scripted:" in model for model in manifest.models.values())
    if (unsafe and not manifest.includes_unsafe) or (scripted and not manifest.scripted):
        raise InputError("its manifest contradicts itself", at=folder / MANIFEST, remedy=PACKAGE_AGAIN)
    if manifest.scripted and not allow_scripted:
        raise InputError("a script played the models", at=folder, remedy="give --allow-scripted to publish it anyway")
    _check_license(folder, manifest)
    return release


def _check_license(folder: Path, manifest: ReleaseManifest) -> None:
    named = read_front_matter(_text(folder / CARD), folder / CARD).get("license", OTHER)
    names = [str(name).casefold() for name in (named if isinstance(named, list) else [named])]
    if is_noncommercial(manifest.licenses) and not all("-nc" in name or name == OTHER for name in names):
        raise InputError(
            f"the card says {', '.join(names)} and some sources forbid commercial use",
            at=folder / CARD,
            remedy=PACKAGE_AGAIN,
        )


def stage(release: Release, repo_id: str, remote_card: str | None) -> Staged:
    """What is uploaded to `repo_id`. The kept text is that of the card on the Hub, or else of the local one.

    `RemoteChanged` for a card with one marker only, `InputError` for a manifest from which no card can be made.
    """
    folder, manifest = release
    card = remote_card if remote_card and (KEEP in remote_card or KEEP_END in remote_card) else _text(folder / CARD)
    if not 0 <= card.find(KEEP) < card.rfind(KEEP_END):
        at = f"{repo_id}: {CARD}" if card is remote_card else str(folder / CARD)
        raise RemoteChanged(f"{at}: the markers around the kept text are not a pair; write both, `{KEEP}` first")
    try:
        texts = card_files(manifest, repo_id, kept_text(card))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"its counts do not make a card ({type(error).__name__} {error})"
        raise InputError(said, at=folder / MANIFEST, remedy=PACKAGE_AGAIN) from None
    texts |= {file.path: _bytes(folder / file.path, file) for file in manifest.files if file.path not in texts}
    files = (File(path, hashlib.sha256(data).hexdigest(), len(data)) for path, data in sorted(texts.items()))
    manifest = structs.replace(manifest, files=tuple(files))
    return Staged(folder, manifest, texts | {MANIFEST: encode_manifest(manifest)})


def same_content(one: ReleaseManifest, other: ReleaseManifest) -> bool:
    """True if the manifests differ at most in the files that are not data."""
    return structs.replace(one, files=()) == structs.replace(other, files=())


def data_is(manifest: ReleaseManifest, tree: Mapping[str, Blob]) -> bool:
    """True if the data in a remote tree match a manifest: paths, sizes, and the sha256 of large files."""
    named = {shard.path: (shard.bytes, shard.sha256) for shard in manifest.shards}
    found = {path: blob for path, blob in tree.items() if path.startswith(DATA)}
    return named.keys() == found.keys() and all(
        blob.size == named[path][0] and blob.sha256 in ("", named[path][1]) for path, blob in found.items()
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise InputError("cannot be read", at=path, remedy=PACKAGE_AGAIN) from None


def _bytes(path: Path, file: File) -> bytes:
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise InputError("not the bytes that the manifest names", at=path, remedy=PACKAGE_AGAIN)
    return data
