"""Reads seed files and verifies the seeds and their images.

A seed file has one JSON object per line with the fields of `records.Seed`; `image` is a path relative to the file. The
content is untrusted: no path may lead out of the folder, every image is decoded once, and a seed that
`exclusions.excluded` names is left out before its image is opened.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from intersafe import exclusions, taxonomy
from intersafe.errors import InputError
from intersafe.images.store import reference_of
from intersafe.records import Seed
from intersafe.wording import nearest

LONGEST_QUERY = 4_000
"""Characters."""

_FIELDS = msgspec.structs.fields(Seed)
_NAMES = [field.name for field in _FIELDS]
_REQUIRED = [field.name for field in _FIELDS if field.required]
_ID = re.compile(r"[A-Za-z0-9._-]{1,80}")


class Seeds(NamedTuple):
    """The seeds of a run in their order, each `image` a reference; `files` has the file of each reference.

    `excluded` has the ids that were left out; `digest` is a sha256 of the seeds and these ids. It does not depend on
    paths or blank lines.
    """

    seeds: tuple[Seed, ...]
    files: dict[str, Path]
    excluded: tuple[str, ...]
    digest: str


def load_seeds(paths: Sequence[Path], known: dict[str, str] | None = None) -> Seeds:
    """The usable seeds of the files, verified with their images; `InputError` names file and line.

    `known` has the references of images that were verified before, by the sha256 of their file; new ones are added.
    """
    known = {} if known is None else known
    kept: list[Seed] = []
    excluded: list[str] = []
    places: dict[str, str] = {}
    refs: dict[Path, str] = {}
    files: dict[str, Path] = {}
    for path in paths:
        for number, seed in _read(path):
            if seed.id in places:
                raise InputError(
                    f"id `{seed.id}` is already used at {places[seed.id]}", at=path, line=number, remedy="rename one"
                )
            places[seed.id] = f"{path}:{number}"
            if exclusions.excluded(seed.query, seed.source_category):
                excluded.append(seed.id)
                continue
            if seed.image is not None:
                image = _resolve(seed.image, path, number)
                if image not in refs:
                    refs[image] = verify_image(image, seed.image, path, number, known)
                    files.setdefault(refs[image], image)
                seed = msgspec.structs.replace(seed, image=refs[image])
            kept.append(seed)
    if not kept:
        what = f"no usable seed ({len(excluded)} excluded)"
        raise InputError(what, at=", ".join(map(str, paths)) or None, remedy="pass a file with seeds")
    return Seeds(tuple(kept), files, tuple(excluded), _digest(kept, excluded))


def _digest(seeds: Iterable[Seed], excluded: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for item in (*seeds, *excluded):
        digest.update(msgspec.json.encode(item) + b"\n")
    return digest.hexdigest()


# --- lines -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[tuple[int, Seed]]:
    """The checked seeds of one file with their 1-based line numbers."""
    empty = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
                if text:
                    empty = False
                    yield number, check_seed(_object(text, path, number), path, number)
    except FileNotFoundError:
        raise InputError("no such seed file", at=path, remedy="check the path") from None
    except IsADirectoryError:
        raise InputError("a folder, not a seed file", at=path, remedy="pass the .jsonl file inside it") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", at=path, remedy="check the path") from error
    if empty:
        raise InputError("the seed file is empty", at=path, remedy="pass a file with one JSON object per line")


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of a line with exactly the fields of a seed, their types not yet checked."""
    try:
        row = msgspec.json.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        what = f"not UTF-8 (byte {error.start} of the line)"
        raise InputError(what, at=path, line=number, remedy="save the file as UTF-8") from None
    except msgspec.DecodeError as error:
        what = str(error).removeprefix("JSON is malformed: ").removeprefix("Input data was ")
        raise InputError(
            f"malformed JSON ({what})", at=path, line=number, remedy="write one JSON object per line"
        ) from None
    except RecursionError:
        raise InputError(
            "malformed JSON (nested)", at=path, line=number, remedy="write one JSON object per line"
        ) from None
    if not isinstance(row, dict):
        raise InputError("not a JSON object", at=path, line=number, remedy="write {...} with the fields of a seed")
    for name in row:
        if name not in _NAMES:
            what = f"unknown field {name[:80]!r}" + nearest(name, _NAMES)
            raise InputError(what, at=path, line=number, remedy="correct or remove it")
    for name in _REQUIRED:
        if name not in row:
            raise InputError(f"field `{name}` is missing", at=path, line=number, remedy="add it")
    return row


def check_seed(row: dict[str, Any], at: Path, line: int) -> Seed:
    """The seed of a row; its image and the exclusions are not checked here. Raises `InputError`."""
    try:
        seed = msgspec.convert(row, Seed)
    except msgspec.ValidationError as error:
        what, _, field = str(error).replace("`", "").partition(" - at $.")
        raise InputError(f"field `{field}`: {what.lower()}", at=at, line=line, remedy="correct it") from None
    if not _ID.fullmatch(seed.id):
        remedy = "use 1 to 80 of A-Z a-z 0-9 . _ -"
        raise InputError(f"id {seed.id[:80]!r} is not allowed", at=at, line=line, remedy=remedy)
    if not seed.query.strip():
        raise InputError("the query is empty", at=at, line=line, remedy="write one or remove the line")
    if len(seed.query) > LONGEST_QUERY:
        what = f"the query has {len(seed.query):,} characters, more than {LONGEST_QUERY:,}"
        raise InputError(what, at=at, line=line, remedy="shorten it")
    if seed.category not in taxonomy.BY_NAME:
        what = f"unknown category {seed.category[:80]!r}" + nearest(seed.category, taxonomy.BY_NAME)
        raise InputError(what, at=at, line=line, remedy="correct it")
    return seed


# --- images ----------------------------------------------------------------------------------------------------------


def _resolve(image: str, at: Path, line: int) -> Path:
    """The real path of the image, which is inside the folder of the seed file."""
    if "://" in image:
        raise InputError(f"image `{image}` is a URL", at=at, line=line, remedy="download it next to the seed file")
    try:
        folder = at.parent.resolve()
        real = (folder / image).resolve()
    except (OSError, RuntimeError, ValueError):
        raise InputError(f"image {image!r} is not a usable path", at=at, line=line, remedy="correct it") from None
    if Path(image).is_absolute() or not real.is_relative_to(folder):
        what = f"image `{image}` is absolute or leads out of the seed file's folder"
        raise InputError(what, at=at, line=line, remedy="write a path inside that folder")
    return real


def verify_image(path: Path, name: str, at: Path, line: int, known: dict[str, str]) -> str:
    """The reference of an image, which is `name` in the seed file; its bytes are not kept."""
    try:
        return reference_of(path, known, at=f"image `{name}`")
    except InputError as error:
        raise InputError(str(error), at=at, line=line) from error
