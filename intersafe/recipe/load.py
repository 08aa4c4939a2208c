"""Reads a recipe: one YAML file becomes one typed, frozen value. Errors name the file, the line and the nearest key.

Paths in a recipe are relative to the folder of the recipe. YAML aliases and tags are errors. `sections.py` has the
types.
"""

import os
from pathlib import Path
from typing import Any

import msgspec
import yaml

from intersafe.errors import InputError
from intersafe.recipe.checks import validate_recipe, validate_served
from intersafe.recipe.mismatch import dict_values, mismatch, section_in
from intersafe.recipe.sections import Recipe
from intersafe.storage.yaml import read_yaml
from intersafe.wording import nearest


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file, its paths made absolute; `InputError` names file, line and remedy."""
    path = Path(path)
    node, raw = read_yaml(path, "recipe")
    if not isinstance(node, yaml.MappingNode):
        raise InputError("a recipe is a mapping of keys", at=path, line=1, remedy="start from `intersafe init DIR`")
    lines: dict[str, int] = {}
    _check_keys(node, Recipe, "$", path, lines)
    _expand_members(raw)
    if isinstance(raw.get("seeds"), str):
        raw["seeds"] = [raw["seeds"]]
    try:
        recipe = msgspec.convert(raw, Recipe)
    except msgspec.ValidationError as error:
        raise mismatch(error, path, lines, raw) from None
    recipe = validate_recipe(_with_paths(recipe, path.resolve().parent), path, lines)
    validate_served(recipe, path, lines)
    return recipe


def _with_paths(recipe: Recipe, here: Path) -> Recipe:
    """The recipe with its paths made absolute."""

    def absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(os.path.normpath(here / path) for path in paths)

    replace = msgspec.structs.replace
    if recipe.refusals:
        groups = {name: replace(group, seeds=absolute(group.seeds)) for name, group in recipe.refusals.groups.items()}
        recipe = replace(recipe, refusals=replace(recipe.refusals, groups=groups))
    serve = {name: replace(engine, path=_weights(engine.path, here)) for name, engine in recipe.serve.items()}
    return replace(recipe, seeds=absolute(recipe.seeds), prompts=absolute((recipe.prompts,))[0], serve=serve)


def _weights(path: str, here: Path) -> str:
    """The absolute path of a folder of weights; a Hub name unchanged."""
    return os.path.normpath(here / Path(path).expanduser()) if path.startswith((".", "/", "~")) else path


def _expand_members(raw: Any) -> None:
    """Writes out the short forms in place.

    `attacker: scripted:demo` stands for `attacker: {model: scripted:demo}`; numbers of turns become texts.
    """
    cast = raw.get("cast")
    if not isinstance(cast, dict):
        return
    for role in ("attacker", "judge", "second_judge", "responder", "painter"):
        if isinstance(cast.get(role), str):
            cast[role] = {"model": cast[role]}
    gates = raw.get("gates")
    coverage = gates.get("coverage") if isinstance(gates, dict) else None
    if isinstance(coverage, dict) and isinstance(coverage.get("turns"), dict):
        coverage["turns"] = {str(number): share for number, share in coverage["turns"].items()}
    if isinstance(cast.get("victims"), list):
        cast["victims"] = [{"model": v} if isinstance(v, str) else v for v in cast["victims"]]


def _check_keys(node: yaml.Node, kind: Any, where: str, path: Path, lines: dict[str, int]) -> None:
    """Compares the YAML with the types: `InputError` for an unknown, repeated or missing key.

    Notes the line of every place in `lines`.
    """
    lines[where] = node.start_mark.line + 1
    struct = section_in(kind)
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _check_keys(child, struct, f"{where}[{i}]", path, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    of_dict = dict_values(kind)
    if of_dict is not None:
        struct = None
    fields = {field.name: field for field in msgspec.structs.fields(struct)} if struct else {}
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        place = f"{where}.{key}".removeprefix("$.")[:100]
        if struct and key not in fields:
            raise InputError(
                f"unknown key {place!r}" + nearest(key, list(fields)),
                at=path,
                line=line,
                remedy="correct or remove the key",
            )
        if not key_node.tag.endswith(":str") and where != "$.gates.coverage.turns":
            raise InputError(f"key {place!r} is not a text", at=path, line=line, remedy="put it into quotes")
        if key in seen:
            raise InputError(f"key {place!r} appears twice", at=path, line=line, remedy="keep one")
        seen.add(key)
        inner = fields[key].type if struct else of_dict
        _check_keys(value_node, inner, f"{where}.{key}", path, lines)
    for name, field in fields.items():
        if field.required and name not in seen:
            place = f"{where}.{name}".removeprefix("$.")
            raise InputError(f"missing key {place!r}", at=path, line=lines[where], remedy="docs/recipes.md shows each")
