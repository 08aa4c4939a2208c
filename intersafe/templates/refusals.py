"""The standardised refusals of the prompt folder: reading and checking their file."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from intersafe.checks.messages import is_blank
from intersafe.errors import InputError
from intersafe.storage.yaml import read_yaml

TEMPLATES = "refusal/templates.yaml"
"""The file of the standardised refusals in the prompt folder."""
LONGEST_TEXT = 1_000
"""Most characters of a standardised refusal."""

_PROFESSIONAL = re.compile(
    r"\b(?:doctors?|physicians?|clinicians?|nurses?|pharmacists?|dentists?|midwives|midwife|therapists?|psychologists?|"
    r"counsell?ors?|dieti[ct]ians?|vets?|veterinarians?|lawyers?|solicitors?|attorneys?|notary|accountants?|advis[eo]rs?|"
    r"planners?|brokers?|specialists?|experts?|professionals?|(?:health ?care|medical) (?:team|provider)s?|"
    r"(?:emergency|legal aid|debt advice) (?:services?|lines?|offices?))\b",
    re.IGNORECASE,
)


def read_templates(path: Path) -> dict[str, tuple[str, ...]]:
    """The standardised refusals of a YAML file by group; `InputError` names the first problem with its line."""
    node, _ = read_yaml(path)
    if not isinstance(node, yaml.MappingNode) or not node.value:
        remedy = "write `health:` and below it one `- text` for each refusal"
        raise InputError("not a list of refusals for each group", at=path, line=1, remedy=remedy)
    found: dict[str, tuple[str, ...]] = {}
    for key, value in node.value:
        group, line = str(key.value)[:100], key.start_mark.line + 1
        if not key.tag.endswith(":str") or not group.strip():
            raise InputError(f"group {group!r} is not a name", at=path, line=line, remedy="put it into quotes")
        if group in found:
            raise InputError(f"group {group!r} is there twice", at=path, line=line, remedy="merge the two lists")
        found[group] = tuple(_texts(value, group, path, line))
    return found


def _texts(node: yaml.Node, group: str, path: Path, line: int) -> Iterator[str]:
    remedy = "give it at least one refusal, or drop the group"
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        raise InputError(f"group {group!r} is empty", at=path, line=line, remedy=remedy)
    if not isinstance(node, yaml.SequenceNode):
        remedy = "write one `- text` for each refusal"
        raise InputError(f"group {group!r} is not a list", at=path, line=line, remedy=remedy)
    if not node.value:
        raise InputError(f"group {group!r} is empty", at=path, line=line, remedy=remedy)
    for number, entry in enumerate(node.value, 1):
        if problem := _template_problem(entry):
            what, remedy = problem
            described = f"group {group!r}, refusal {number}: {what}"
            raise InputError(described, at=path, line=entry.start_mark.line + 1, remedy=remedy)
        yield " ".join(str(entry.value).split())


def _template_problem(entry: yaml.Node) -> tuple[str, str] | None:
    """What is wrong with one entry, and the remedy."""
    if not isinstance(entry, yaml.ScalarNode):
        return "not a text", "write one `- text`, in quotes if it has a colon"
    if entry.tag.endswith(":null") or is_blank(str(entry.value)):
        return "it is blank", "write the refusal or drop the line"
    if not entry.tag.endswith(":str"):
        return "not a text", "put it into quotes"
    if len(entry.value) > LONGEST_TEXT:
        return f"{len(entry.value)} characters", f"keep it to {LONGEST_TEXT}"
    if set(entry.value) & set("{}"):
        return "a slot in braces", "write it out, a refusal is used as it is"
    if not _PROFESSIONAL.search(entry.value):
        return "it points to no professional", "name one, such as a doctor, a pharmacist or a financial adviser"
    return None
