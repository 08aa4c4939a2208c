"""The manifest of a run (`recipe.json`): what it was made from, and how two manifests differ."""

from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class Manifest(msgspec.Struct, frozen=True):
    """What a run was made from (`recipe.json`)."""

    name: str
    recipe: dict[str, Any]
    """The part of the recipe that decides the outcome."""
    resolved: dict[str, Any]
    """The whole recipe as it was first run, with names of key variables and never a key."""
    digest: str
    prompts: dict[str, str]
    """File name to sha256."""
    seeds: str
    excluded: tuple[str, ...]
    """Ids of the seeds that were refused at the door."""
    versions: dict[str, str]
    v: int = 1
    purpose: Literal["estimate"] | UnsetType = UNSET
    """`estimate` for the samples of an estimate; absent in an ordinary run."""


def differences(old: Manifest, new: Manifest) -> list[str]:
    """What changed between two manifests, in words: keys of the recipe, prompt files, seeds."""
    before, after = dict(_leaves(old.recipe)), dict(_leaves(new.recipe))
    changed = [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before | after)
        if before.get(key, "absent") != after.get(key, "absent")
    ]
    changed += [
        f"prompts/{name}"
        for name in sorted(old.prompts | new.prompts)
        if old.prompts.get(name) != new.prompts.get(name)
    ]
    return changed + ([] if old.seeds == new.seeds else ["seeds"])


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value if not isinstance(value, tuple) else list(value)
