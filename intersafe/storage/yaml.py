"""YAML files that people write: no aliases, no tags, and the line of every error."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from intersafe.errors import InputError
from intersafe.storage.files import read_small

DEEPEST = 32
"""Levels of nesting that a YAML file may have."""


def read_yaml(path: Path, what: str = "file") -> tuple[yaml.Node | None, Any]:
    """A YAML file as nodes, which know their lines, and as plain values.

    `InputError` names file, line and remedy, and calls the file `what`.
    """
    try:
        data = read_small(path)
        text = data.decode("utf-8")
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except OSError as error:
        raise InputError(f"cannot read the {what} ({error.strerror})", at=path, remedy="check the path") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError("not UTF-8 text", at=path, line=line, remedy="save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"not plain YAML: {error.problem}", at=path, line=line, remedy="correct the line") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError("a character that YAML forbids", at=path, line=line, remedy="correct the line") from None
    except ValueError:  # PyYAML lets these through: `0x_`, thousands of digits
        raise InputError("a number that cannot be read", at=path, remedy="look for a very long number") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML whose values cannot be larger than its file: no aliases, no tags, bounded nesting. A date is a text."""

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
