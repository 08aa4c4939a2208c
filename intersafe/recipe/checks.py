"""Checks a recipe: values that do not match their types, and settings that contradict each other."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from intersafe.errors import InputError
from intersafe.recipe.mismatch import line_of, mismatch
from intersafe.recipe.sections import Member, Recipe
from intersafe.wording import nearest


def validate_recipe(recipe: Recipe, at: object = None, lines: Mapping[str, int] | None = None) -> Recipe:
    """The recipe with 1 made 1.0 where a float is meant; `InputError` for wrong types and contradictions.

    `at` is the file of the recipe, `lines` has the line of each place in it.
    """
    lines = lines or {}
    try:
        recipe = msgspec.convert(msgspec.to_builtins(recipe), Recipe)
    except msgspec.ValidationError as error:
        raise mismatch(error, at, lines) from None
    for where, problem in _contradictions(recipe):
        raise InputError(str(problem), at=at, line=line_of(where, lines))
    return recipe


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, InputError]]:
    """Yields each problem with its place."""
    for name, drawn in (("turns", recipe.turns), ("images", recipe.images)):
        if not drawn.min <= drawn.mean <= drawn.max:
            what = f"{name}: min {drawn.min}, mean {drawn.mean}, max {drawn.max}"
            yield f"$.{name}", InputError(what, remedy="set the mean between min and max")
    yield from _cast_contradictions(recipe)
    yield from _serve_contradictions(recipe)
    yield from _stage_contradictions(recipe)


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
            yield f"{where}.extra", InputError(f"extra: {field!r} is set by intersafe", remedy="remove it")
    identities = [victim.identity for victim in recipe.cast.victims]
    for name, values in (("cast.victims", identities), ("strategies", list(recipe.strategies))):
        for i, value in enumerate(values):
            if value in values[:i]:
                yield f"$.{name}[{i}]", InputError(f"{name}: {value!r} appears twice", remedy="name each once")


def _batch_problem(member: Member) -> tuple[str, str] | None:
    """Why the member cannot use a batch endpoint, and what to do; None if it can."""
    if not member.model.startswith("openai:"):
        return "`batch: true` is for hosted APIs", "name an openai:model[@url], or remove `batch`"
    if "," in member.model.partition("@")[2]:
        return "`batch: true` with several URLs", "name the provider's one URL"
    if member.send_images != "data":
        return (
            f"`batch: true` with send_images {member.send_images!r}",
            "a provider reads only `data`: remove send_images",
        )
    return None


_SECRET = re.compile(r"(^|[_-])(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)([_-]|$)", re.IGNORECASE)
_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]*@")


def _secrets_in(args: Any, name: str = "") -> Iterator[str]:
    """The names of values that look like secrets, at any depth of the arguments."""
    if isinstance(args, dict):
        for key, value in args.items():
            yield from _secrets_in(value, str(key))
    elif isinstance(args, (list, tuple)):
        for value in args:
            yield from _secrets_in(value, name)
    elif isinstance(args, str) and (_SECRET.search(name) or _IN_URL.search(args)):
        yield name


def _serve_contradictions(recipe: Recipe) -> Iterator[tuple[str, InputError]]:
    """Engines that do not fit the cast, and secrets in their settings."""
    for name, engine in recipe.serve.items():
        here, where = f"serve.{name}", f"$.serve.{name}"
        specs = [model.spec for model in recipe.cast.models.values() if model.spec.model == name]
        if engine.images is not None and engine.images < recipe.most_images:
            what = f"{here}: images {engine.images}, and a request can have {recipe.most_images}"
            yield f"{where}.images", InputError(what, remedy="raise it, remove it, or lower `images.max`")
        for variable in engine.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
                what = f"{here}: {variable!r} is not a name of an environment variable"
                yield f"{where}.env", InputError(what, remedy="write letters, digits and _")
        words = dict(word.split("=", 1) for word in engine.command.split() if "=" in word)
        export = "export it instead: engines inherit the environment of intersafe"
        for field, values, remedy in (
            ("command", words, export),
            ("env", engine.env, export),
            ("args", engine.args, "export it as the environment variable that vLLM reads"),
        ):
            for secret in _secrets_in(values):
                what = f"{here}: {secret} in `{field}` would be written into every run"
                yield f"{where}.{field}", InputError(what, remedy=remedy)
        urls = {url for spec in specs for url in spec.urls}
        if len(engine.gpus) not in (0, len(urls)) and urls:
            what = f"{here}: {len(engine.gpus)} entries of gpus for {len(urls)} URLs in the cast"
            yield f"{where}.gpus", InputError(what, remedy="write one entry for each URL, for example '0,1'")
        if specs and not urls and (engine.gpus or engine.data_parallel > 1 or engine.command):
            what = f"{here}: gpus, data_parallel and command are for servers, and {name!r} runs in this process"
            yield where, InputError(what, remedy=f"remove them, or serve it: vllm:{name}@http://localhost:8000/v1")


def validate_served(recipe: Recipe, at: object, lines: Mapping[str, int]) -> None:
    """`InputError` for an entry of `serve` that is not a model of the cast."""
    known = sorted({model.spec.model for model in recipe.cast.models.values() if model.spec.backend != "scripted"})
    for name in recipe.serve:
        if name not in known:
            what = f"serve: no model {name!r} in the cast" + nearest(name, known)
            raise InputError(
                what, at=at, line=lines.get(f"$.serve.{name}"), remedy="correct the name, or remove the entry"
            )


def _stage_contradictions(recipe: Recipe) -> Iterator[tuple[str, InputError]]:
    """Stages and job kinds without the models that they need, and quotas that do not add up."""
    clean = recipe.clean
    if clean and clean.judge_distance is not None and clean.judge_distance <= clean.distance:
        what = f"clean: judge_distance {clean.judge_distance} is not above distance {clean.distance}"
        yield (
            "$.clean",
            InputError(what, remedy="raise it, or remove it: the judge compares the images between the two"),
        )
    if recipe.cast.responder is None:
        remedy = "add `responder: backend:model` to the cast"
        if recipe.respond:
            yield "$.respond", InputError("respond: the cast has no responder", remedy=remedy)
        for name, group in recipe.refusals.groups.items() if recipe.refusals else ():
            if group.answers == "analysis":
                what = f"refusals.groups.{name}: an analysis needs a responder"
                yield f"$.refusals.groups.{name}", InputError(what, remedy=f"{remedy}, or `answers: templates`")
    if recipe.refusals and not recipe.refusals.groups:
        yield "$.refusals", InputError("refusals: no group", remedy="add one, or remove `refusals`")
    for name in recipe.refusals.groups if recipe.refusals else ():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
            yield (
                f"$.refusals.groups.{name}",
                InputError(f"refusals: group {name!r}", remedy="write lower-case letters, digits and _"),
            )
    for axis in ("category", "strategy", "victim", "turns") if recipe.gates.coverage else ():
        shares = getattr(recipe.gates.coverage, axis)
        if isinstance(shares, dict) and abs(sum(shares.values()) - 1) > 0.005:
            what = f"gates.coverage.{axis}: the shares sum to {sum(shares.values()):g}"
            yield f"$.gates.coverage.{axis}", InputError(what, remedy="make them sum to 1")
