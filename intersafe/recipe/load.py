"""Recipes: one YAML file to one typed, frozen value, with errors that name the file, the line and the nearest key.

Paths in a recipe are relative to the recipe's own folder. YAML's aliases and tags are refused. The types are those of
`sections.py`.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec
import yaml

from intersafe.errors import InputError
from intersafe.recipe.base import Section
from intersafe.recipe.sections import Cast, Member, Model, Painter, Price, Recipe
from intersafe.recipe.specs import BACKENDS, OPENAI_URL, PAINTERS, parse_spec
from intersafe.storage.yaml import read_yaml
from intersafe.wording import nearest

# --- reading -------------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file, its paths made absolute; `InputError` names file, line and remedy."""
    path = Path(path)
    node, raw = read_yaml(path)
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
        raise _misfit(error, path, lines, raw) from None
    recipe = check_recipe(_with_paths(recipe, path.resolve().parent), path, lines)
    check_served(recipe, path, lines)
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
    """A folder of weights by its absolute path; a name of the Hub as it is."""
    return os.path.normpath(here / Path(path).expanduser()) if path.startswith((".", "/", "~")) else path


_HINTS = {
    "^[1-9][0-9]{1,3}x": "write WIDTHxHEIGHT, for example 1024x1024",
    "^([A-Za-z_]": "write the NAME of an environment variable, never the key",
    "^[A-Za-z0-9][A-Za-z0-9._-]": "write letters, digits, dots, - and _, at most 60",
}
"""What a pattern asks for, by its beginning."""


def _misfit(error: msgspec.ValidationError, at: object, lines: Mapping[str, int], raw: Any = None) -> InputError:
    """A value of the wrong type or size, with its line."""
    what, _, where = str(error).partition(" - at `")
    where = _named(where.rstrip("`"), raw)
    name = where.removeprefix("$.") or "recipe"
    remedy = next((hint for start, hint in _HINTS.items() if start in what), "docs/recipes.md lists the keys")
    if remedy in _HINTS.values():
        what = "not of the right form"
    if what.startswith(("Expected `int", "Expected `float")) and what.endswith("got `str`"):
        remedy = "write a plain number: no unit, no exponent, no quotes"
    options = _options_at(where)
    if options and what.startswith("Invalid enum value"):
        what, remedy = what.lower(), f"one of {', '.join(map(str, options))}"
    return InputError(f"{name}: {what}", at=at, line=_line_of(where, lines), remedy=remedy)


def _named(where: str, raw: Any) -> str:
    """The place with the key that msgspec leaves out of a mapping (`groups[...]`): the first that does not fit."""
    place, dots, _ = where.partition("[...]")
    if not dots or raw is None:
        return where
    keys = place.removeprefix("$.").split(".")
    inner = raw
    for key in keys:
        inner = inner[key]
    for name in inner:
        alone = {name: inner[name]}
        for key in reversed(keys):
            alone = {key: alone}
        try:
            msgspec.convert({**raw, keys[0]: alone[keys[0]]}, Recipe)
        except msgspec.ValidationError as error:
            if f"{place}[...]" in str(error):
                return where.replace("[...]", f".{name}")
    return where


def _options_at(where: str) -> tuple[Any, ...]:
    """The words that a place allows, where it takes one of a few."""
    kind: Any = Recipe
    for key in re.sub(r"\[\d+\]", "", where).removeprefix("$.").split("."):
        section = _section_in(kind)
        of_dict = _dict_values(kind)
        if of_dict is not None and not (isinstance(kind, type) and issubclass(kind, Section)):
            kind = of_dict
        elif section:
            kind = next((f.type for f in msgspec.structs.fields(section) if f.name == key), None)
    return _literals(kind)


def _literals(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((found for inner in get_args(kind) if (found := _literals(inner))), ())


def check_recipe(recipe: Recipe, at: object = None, lines: Mapping[str, int] | None = None) -> Recipe:
    """The recipe, 1 made 1.0 where a float is meant; `InputError` where values do not fit or contradict each other."""
    lines = lines or {}
    try:
        recipe = msgspec.convert(msgspec.to_builtins(recipe), Recipe)
    except msgspec.ValidationError as error:
        raise _misfit(error, at, lines) from None
    for where, problem in _contradictions(recipe):
        raise InputError(str(problem), at=at, line=_line_of(where, lines))
    return recipe


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, InputError]]:
    """Place and problem."""
    for name, drawn in (("turns", recipe.turns), ("images", recipe.images)):
        if not drawn.min <= drawn.mean <= drawn.max:
            what = f"{name}: min {drawn.min}, mean {drawn.mean}, max {drawn.max}"
            yield f"$.{name}", InputError(what, remedy="the mean lies between min and max")
    yield from _cast_contradictions(recipe)
    yield from _serve_contradictions(recipe)
    yield from _line_contradictions(recipe)


def _cast_contradictions(recipe: Recipe) -> Iterator[tuple[str, InputError]]:
    for name, member in recipe.cast.models.items():
        role, _, number = name.partition(":")
        where = f"$.cast.victims[{number}]" if number else f"$.cast.{role}"
        try:
            _ = member.spec
        except InputError as error:
            yield f"{where}.model", error
        if isinstance(member, Member) and member.batch and (problem := _batch_problem(member)):
            yield f"{where}.batch", InputError(f"{where.removeprefix('$.')}: {problem[0]}", remedy=problem[1])
        for field in {"model", "messages", "prompt", "stream", "n"} & member.extra.keys():
            yield f"{where}.extra", InputError(f"extra: {field!r} is set by intersafe", remedy="drop it")
    identities = [victim.identity for victim in recipe.cast.victims]
    for name, values in (("cast.victims", identities), ("strategies", list(recipe.strategies))):
        for i, value in enumerate(values):
            if value in values[:i]:
                yield f"$.{name}[{i}]", InputError(f"{name}: {value!r} stands twice", remedy="name each once")


def _batch_problem(member: Member) -> tuple[str, str] | None:
    """Why the member cannot be asked through a batch endpoint, and what to do."""
    if not member.model.startswith("openai:"):
        return "`batch: true` is for hosted APIs", "name an openai:model[@url], or drop `batch`"
    if "," in member.model.partition("@")[2]:
        return "`batch: true` with several URLs", "name the provider's one URL"
    if member.send_images != "data":
        return f"`batch: true` with send_images {member.send_images!r}", "a provider reads `data` alone: drop it"
    return None


_SECRET = re.compile(r"(^|[_-])(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)([_-]|$)", re.IGNORECASE)
_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]*@")


def _secrets_in(args: Any, name: str = "") -> Iterator[str]:
    """Names of what looks like a secret, at any depth of the arguments."""
    if isinstance(args, dict):
        for key, value in args.items():
            yield from _secrets_in(value, str(key))
    elif isinstance(args, (list, tuple)):
        for value in args:
            yield from _secrets_in(value, name)
    elif isinstance(args, str) and (_SECRET.search(name) or _IN_URL.search(args)):
        yield name


def _serve_contradictions(recipe: Recipe) -> Iterator[tuple[str, InputError]]:
    """Engines that cannot be what the cast needs."""
    for name, engine in recipe.serve.items():
        here, where = f"serve.{name}", f"$.serve.{name}"
        specs = [model.spec for model in recipe.cast.models.values() if model.spec.model == name]
        if engine.images is not None and engine.images < recipe.most_images:
            what = f"{here}: images {engine.images}, and a request can have {recipe.most_images}"
            yield f"{where}.images", InputError(what, remedy="raise it, or leave it out; or lower `images.max`")
        for variable in engine.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
                what = f"{here}: {variable!r} is no name of an environment variable"
                yield f"{where}.env", InputError(what, remedy="write letters, digits and _")
        words = dict(word.split("=", 1) for word in engine.command.split() if "=" in word)
        for variable in _secrets_in(words):
            what = f"{here}: {variable} in `command` would be written into every run"
            yield f"{where}.command", InputError(what, remedy="export it: engines have the environment of intersafe")
        for variable in _secrets_in(engine.env):
            what = f"{here}: {variable} in `env` would be written into every run"
            yield f"{where}.env", InputError(what, remedy="export it: engines have the environment of intersafe")
        for argument in _secrets_in(engine.args):
            what = f"{here}: {argument} in `args` would be written into every run"
            yield f"{where}.args", InputError(what, remedy="export it as the environment variable that vLLM reads")
        urls = {url for spec in specs for url in spec.urls}
        if len(engine.gpus) not in (0, len(urls)) and urls:
            what = f"{here}: {len(engine.gpus)} entries of gpus for {len(urls)} URLs in the cast"
            yield f"{where}.gpus", InputError(what, remedy="one entry for each URL, as '0,1'")
        if specs and not urls and (engine.gpus or engine.data_parallel > 1 or engine.command):
            what = f"{here}: gpus, data_parallel and command are a server's, and {name!r} runs in this process"
            yield where, InputError(what, remedy=f"drop them, or serve it: vllm:{name}@http://localhost:8000/v1")


def check_served(recipe: Recipe, at: object, lines: Mapping[str, int]) -> None:
    """`InputError` for an entry of `serve` that is no model of the cast."""
    known = sorted({model.spec.model for model in recipe.cast.models.values() if model.spec.backend != "scripted"})
    for name in recipe.serve:
        if name not in known:
            what = f"serve: no model {name!r} in the cast" + nearest(name, known)
            raise InputError(what, at=at, line=lines.get(f"$.serve.{name}"), remedy="mend the name, or drop the entry")


def _line_contradictions(recipe: Recipe) -> Iterator[tuple[str, InputError]]:
    """Stages and lines without the models that they need, and quotas that do not add up."""
    clean = recipe.clean
    if clean and clean.judge_distance is not None and clean.judge_distance <= clean.distance:
        what = f"clean: judge_distance {clean.judge_distance} is not above distance {clean.distance}"
        yield "$.clean", InputError(what, remedy="the judge looks at what lies between the two; raise it, or drop it")
    if recipe.cast.responder is None:
        remedy = "add `responder: backend:model` to the cast"
        if recipe.respond:
            yield "$.respond", InputError("respond: the cast has no responder", remedy=remedy)
        for name, group in recipe.refusals.groups.items() if recipe.refusals else ():
            if group.answers == "analysis":
                what = f"refusals.groups.{name}: an analysis needs a responder"
                yield f"$.refusals.groups.{name}", InputError(what, remedy=f"{remedy}, or `answers: templates`")
    if recipe.refusals and not recipe.refusals.groups:
        yield "$.refusals", InputError("refusals: no group", remedy="name one, or drop `refusals`")
    for name in recipe.refusals.groups if recipe.refusals else ():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
            yield (
                f"$.refusals.groups.{name}",
                InputError(f"refusals: group {name!r}", remedy="name it in small letters, digits and _"),
            )
    for axis in ("category", "strategy", "victim", "turns") if recipe.gates.coverage else ():
        shares = getattr(recipe.gates.coverage, axis)
        if isinstance(shares, dict) and abs(sum(shares.values()) - 1) > 0.005:
            what = f"gates.coverage.{axis}: the shares sum to {sum(shares.values()):g}"
            yield f"$.gates.coverage.{axis}", InputError(what, remedy="make them sum to 1")


def override(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other values, checked again; a cast member given by spec keeps no key of another server."""
    if changes.pop("no_refusals", False):
        # Nobody else asks the responder, so its key is not needed either.
        cast = recipe.cast if recipe.respond else msgspec.structs.replace(recipe.cast, responder=None)
        recipe = msgspec.structs.replace(recipe, refusals=None, cast=cast)
    cast = recipe.cast
    for role in ("attacker", "judge", "responder"):
        if (spec := changes.pop(role, None)) is not None:
            cast = msgspec.structs.replace(cast, **{role: _recast(getattr(cast, role) or Member(model=spec), spec)})
    if (spec := changes.pop("painter", None)) is not None:
        painter = cast.painter or Painter(model=spec)
        cast = msgspec.structs.replace(cast, painter=_recast(painter, spec))
    if specs := changes.pop("victims", None):
        cast = msgspec.structs.replace(cast, victims=tuple(_recast(cast.victims[0], spec) for spec in specs))
    cast = _priced(cast, changes.pop("prices", None) or {})
    limits = {name: changes.pop(name) for name in _LIMITS if changes.get(name) is not None}
    kept = {name: value for name, value in changes.items() if value not in (None, (), [])}
    return check_recipe(
        msgspec.structs.replace(recipe, cast=cast, limits=msgspec.structs.replace(recipe.limits, **limits), **kept)
    )


_LIMITS = ("concurrency", "patience", "max_tokens", "max_cost", "max_time")
"""The limits that have a flag."""

M = TypeVar("M", bound=Model)


def _priced(cast: Cast, prices: Mapping[str, Price]) -> Cast:
    """The cast with these prices by role; that of `victim` holds for every victim that has none of its own."""
    roles = sorted({name for role in cast.models for name in (role, role.partition(":")[0])})
    for role in prices:
        if role not in roles:
            raise InputError(f"no role {role!r} in the cast", at="--price", remedy=f"roles: {', '.join(roles)}")

    def priced(role: str, model: M) -> M:
        price = prices.get(role) or prices.get(role.partition(":")[0])
        return msgspec.structs.replace(model, price=price) if price else model

    members = {role: priced(role, member) for role, member in cast.members.items()}
    victims = tuple(members.pop(f"victim:{number}") for number in range(len(cast.victims)))
    painter = priced("painter", cast.painter) if cast.painter else None
    return msgspec.structs.replace(cast, victims=victims, painter=painter, **members)


def _recast(member: M, spec: str) -> M:
    """The member with another model. A key goes to the server it was meant for and to no other, so it is dropped.

    So is the price, which is that of the model before.
    """
    parsed = parse_spec(spec, PAINTERS if isinstance(member, Painter) else BACKENDS)
    key = "OPENAI_API_KEY" if parsed.urls == (OPENAI_URL,) else ""
    own = {"batch": False} if isinstance(member, Member) else {}  # not every server has a batch endpoint
    return msgspec.structs.replace(member, model=spec, key=key, revision="", extra={}, price=None, **own)


def _expand_members(raw: Any) -> None:
    """`attacker: scripted:demo` is short for `attacker: {model: scripted:demo}`; turn counts are texts to us."""
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
    """Walks the YAML beside the types: unknown, doubled and missing keys, and the line of every place."""
    lines[where] = node.start_mark.line + 1
    struct = _section_in(kind)
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _check_keys(child, struct, f"{where}[{i}]", path, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    of_dict = _dict_values(kind)
    if of_dict is not None:
        struct = None
    fields = {field.name: field for field in msgspec.structs.fields(struct)} if struct else {}
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        place = f"{where}.{key}".removeprefix("$.")[:100]
        if struct and key not in fields:
            raise InputError(
                f"unknown key {place!r}" + nearest(key, list(fields)), at=path, line=line, remedy="mend or drop the key"
            )
        if not key_node.tag.endswith(":str") and where != "$.gates.coverage.turns":
            raise InputError(f"key {place!r} is not a text", at=path, line=line, remedy="put it into quotes")
        if key in seen:
            raise InputError(f"key {place!r} stands twice", at=path, line=line, remedy="keep one")
        seen.add(key)
        inner = fields[key].type if struct else of_dict
        _check_keys(value_node, inner, f"{where}.{key}", path, lines)
    for name, field in fields.items():
        if field.required and name not in seen:
            place = f"{where}.{name}".removeprefix("$.")
            raise InputError(f"missing key {place!r}", at=path, line=lines[where], remedy="docs/recipes.md shows each")


def _dict_values(kind: Any) -> Any:
    """The type of the values where the annotation is a mapping, else None."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    return next((found for inner in get_args(kind) if (found := _dict_values(inner)) is not None), None)


def _section_in(kind: Any) -> type[Section] | None:
    """The Section inside an annotation such as `Annotated[tuple[Member, ...], ...]` or `Gates | None`."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind
    return next((found for inner in get_args(kind) if (found := _section_in(inner))), None)


def _line_of(where: str, lines: Mapping[str, int]) -> int | None:
    """The line of the longest known place that begins `where`."""
    while where and where not in lines:
        where = where[: max(where.rfind("."), where.rfind("["))] if max(where.rfind("."), where.rfind("[")) > 0 else ""
    return lines.get(where)
