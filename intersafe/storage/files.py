"""Files: written whole or not at all, YAML read plainly, and where the prompts, seeds and recipes that ship with the
package lie.
"""

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from intersafe.errors import InputError, StorageError

LARGEST = 4 * 2**20
"""Bytes of a recipe, a prompt or a list of texts."""
DEEPEST = 32
"""Levels of nesting that a YAML file may have."""


def write_whole(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all: temporary file beside it, fsync, rename. Raises `StorageError`."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free the disk or mend its rights") from error


def read_small(path: Path) -> bytes:
    """The bytes of a file that a person wrote; `InputError` for more than 4 MiB, `OSError` as when opening it."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise InputError(f"more than {LARGEST // 2**20} MiB", at=path, remedy="name the right file")
    return data


def read_yaml(path: Path) -> tuple[yaml.Node | None, Any]:
    """A YAML file as nodes, which know their lines, and as plain values; `InputError` names file, line and remedy."""
    try:
        data = read_small(path)
        text = data.decode("utf-8")
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except OSError as error:
        raise InputError(f"cannot read the recipe ({error.strerror})", at=path, remedy="give --pipeline FILE") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError("not UTF-8 text", at=path, line=line, remedy="save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"not plain YAML: {error.problem}", at=path, line=line, remedy="mend the line") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError("a character that YAML forbids", at=path, line=line, remedy="mend the line") from None
    except ValueError:  # PyYAML lets these through: `0x_`, thousands of digits
        raise InputError("a number that cannot be read", at=path, remedy="look for a long or odd one") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML that cannot grow beyond its file: no aliases, no tags, bounded nesting; and a date is a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own name
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge", ":value"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        problem = ""
        if isinstance(event, yaml.AliasEvent):
            problem = "an alias (`*name`), write the value out"
        elif event.tag is not None:
            problem = "a tag (`!name`), write plain values"
        elif self.depth >= DEEPEST:
            problem = f"nested more than {DEEPEST} deep"
        elif isinstance(event, yaml.ScalarEvent) and _UNUSABLE.search(event.value):
            problem = "not a finite number, or a control character"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_UNUSABLE = re.compile(r"^[-+]?\.(?:inf|nan)$|[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", re.IGNORECASE)


def bundled(name: str) -> Path:
    """The shipped file or folder, for example `pipelines/demo.yaml`: in the wheel, or in the repository beside it."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "bundled", package.parent):
        if (root / name).exists():
            return root / name
    raise InputError(f"{name} is not part of this installation", at=package, remedy="install intersafe again")


def copy_bundled(directory: Path, names: Sequence[str]) -> int:
    """Copies shipped folders whole or not at all; returns how many files. Refuses to write over anything there."""
    staging = directory / f".{secrets.token_hex(8)}.tmp"
    files = [
        (path, staging / name / path.relative_to(bundled(name)))
        for name in names
        for path in sorted(bundled(name).rglob("*"))
        if path.is_file() and path.suffix in (".md", ".yaml", ".jsonl", ".png")
    ]
    for name in names:
        if (directory / name).exists():
            raise InputError("is there already", at=directory / name, remedy="name an empty folder")
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise InputError("not a folder", at=place, remedy="name an empty folder")
    try:
        for source, target in files:
            write_whole(target, source.read_bytes())
        for name in names:
            (staging / name).rename(directory / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return len(files)
