"""A release as it is uploaded: its shards from the folder, its texts in memory, card and Croissant made out to the
repository with the text that a person keeps in the card there.

So `manifest.json` on the Hub names the bytes that lie on the Hub, and differs from the local one in the entries of
`README.md` and `croissant.json` alone. Two releases have the same content if nothing but `files` differs.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from msgspec import structs

from intersafe.errors import InputError
from intersafe.release.card import CARD, CROISSANT, KEEP, KEEP_END, card_files, kept_text
from intersafe.release.client import Blob, RemoteChanged
from intersafe.release.licenses import OTHER, is_noncommercial
from intersafe.release.manifest import (
    MANIFEST,
    File,
    Manifest,
    Version,
    check_files,
    encode_manifest,
    parse_version,
    read_manifest,
)
from intersafe.release.rows import UNSAFE

DATA = "data/"
AGAIN = "package the run again"


class Release(NamedTuple):
    """A release folder whose files are as its manifest says."""

    folder: Path
    manifest: Manifest

    @property
    def version(self) -> Version:
        """Its version."""
        return parse_version(self.manifest.version, at=self.folder / MANIFEST)


class Staged(NamedTuple):
    """What one version is on the Hub."""

    folder: Path
    manifest: Manifest
    texts: Mapping[str, bytes]
    """Every file but the shards, `manifest.json` among them."""

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
        """Where the bytes of a path come from."""
        return self.texts[path] if path in self.texts else self.folder / path

    def sizes(self) -> dict[str, int]:
        """Bytes of every path."""
        return {s.path: s.bytes for s in self.manifest.shards} | {p: len(data) for p, data in self.texts.items()}

    def hashes(self) -> dict[str, str]:
        """sha256 of every path."""
        texts = {path: hashlib.sha256(data).hexdigest() for path, data in self.texts.items()}
        return {shard.path: shard.sha256 for shard in self.manifest.shards} | texts


def open_release(folder: Path, *, allow_scripted: bool = False) -> Release:
    """A release that may be published; `InputError` for damage, a licence too wide, or a script in place of models.

    Of the card nothing but its licence is looked at: it is written anew when it is staged.
    """
    manifest = read_manifest(folder)
    release = Release(folder, manifest)
    if folder.name != manifest.version and re.fullmatch(r"\d+\.\d+\.\d+", folder.name):
        raise InputError(f"its manifest says version {manifest.version}", at=folder, remedy=AGAIN)
    paths = [file.path for file in (*manifest.shards, *manifest.files)]
    if len(set(paths)) != len(paths) or MANIFEST in paths or release.version.tag in paths or not manifest.shards:
        raise InputError("names a file twice, itself, or no shard", at=folder / MANIFEST, remedy=AGAIN)
    rewritten = tuple(file for file in manifest.files if file.path not in (CARD, CROISSANT))
    check_files(folder, structs.replace(manifest, files=rewritten))
    unsafe = any(shard.config == UNSAFE for shard in manifest.shards)
    scripted = any("scripted:" in model for model in manifest.models.values())
    if (unsafe and not manifest.includes_unsafe) or (scripted and not manifest.scripted):
        raise InputError("its manifest denies what it names itself", at=folder / MANIFEST, remedy=AGAIN)
    if manifest.scripted and not allow_scripted:
        raise InputError("a script played the models", at=folder, remedy="give --allow-scripted to publish it anyway")
    _check_license(folder, manifest)
    return release


def _check_license(folder: Path, manifest: Manifest) -> None:
    named = front_matter(_text(folder / CARD), folder / CARD).get("license", OTHER)
    names = [str(name).casefold() for name in (named if isinstance(named, list) else [named])]
    if is_noncommercial(manifest.licenses) and not all("-nc" in name or name == OTHER for name in names):
        raise InputError(
            f"the card says {', '.join(names)} and some sources forbid commercial use", at=folder / CARD, remedy=AGAIN
        )


def front_matter(card: str, at: Path) -> dict[str, Any]:
    """The YAML at the head of a card; `InputError` if there is none that can be read."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        loaded = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        loaded = None
    if not isinstance(loaded, dict):
        raise InputError("its YAML cannot be read", at=at, remedy=AGAIN)
    return loaded


def stage(release: Release, repo_id: str, remote_card: str | None) -> Staged:
    """What is uploaded: the kept text is that of the card on the Hub, or of the local one before there is any."""
    folder, manifest = release
    card = remote_card if remote_card and (KEEP in remote_card or KEEP_END in remote_card) else _text(folder / CARD)
    if not 0 <= card.find(KEEP) < card.rfind(KEEP_END):
        place = f"{repo_id}: {CARD}" if card is remote_card else str(folder / CARD)
        raise RemoteChanged(f"{place}: the markers around the kept text are torn; write both, `{KEEP}` first")
    try:
        texts = card_files(manifest, repo_id, kept_text(card))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"its counts make no card ({type(error).__name__} {error})"
        raise InputError(said, at=folder / MANIFEST, remedy=AGAIN) from None
    texts |= {file.path: _bytes(folder / file.path, file) for file in manifest.files if file.path not in texts}
    files = (File(path, hashlib.sha256(data).hexdigest(), len(data)) for path, data in sorted(texts.items()))
    manifest = structs.replace(manifest, files=tuple(files))
    return Staged(folder, manifest, texts | {MANIFEST: encode_manifest(manifest)})


def same_content(one: Manifest, other: Manifest) -> bool:
    """True if nothing differs but the texts beside the data."""
    return structs.replace(one, files=()) == structs.replace(other, files=())


def data_is(manifest: Manifest, tree: Mapping[str, Blob]) -> bool:
    """True if the data in a remote tree is what a manifest names: paths, sizes, and the sha256 of large objects."""
    named = {shard.path: (shard.bytes, shard.sha256) for shard in manifest.shards}
    found = {path: blob for path, blob in tree.items() if path.startswith(DATA)}
    return named.keys() == found.keys() and all(
        blob.size == named[path][0] and blob.sha256 in ("", named[path][1]) for path, blob in found.items()
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise InputError("cannot be read", at=path, remedy=AGAIN) from None


def _bytes(path: Path, file: File) -> bytes:
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise InputError("not the bytes that the manifest names", at=path, remedy=AGAIN)
    return data
