"""Prepare: read and check everything that a run is made from, and write it into the run directory."""

import hashlib
import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from intersafe.errors import InputError
from intersafe.generation.jobs import seeds_by_group
from intersafe.images.store import ImageStore, read_image
from intersafe.models.open import check_cast
from intersafe.recipe.sections import Recipe
from intersafe.records import Seed, to_row
from intersafe.run.manifest import Manifest
from intersafe.run.state import DirectoryState, state_of
from intersafe.seeds.load import Seeds, load_seeds
from intersafe.storage.files import write_whole
from intersafe.templates.load import Prompts, check_refusals, load_prompts, needed_by
from intersafe.wording import nearest


@dataclass(frozen=True)
class Prepared:
    """A recipe and all its inputs, read and checked; nothing is written yet."""

    recipe: Recipe
    prompts: Prompts
    seeds: Seeds
    groups: dict[str, tuple[Seed, ...]]
    """The seeds of each refusal group."""
    files: dict[str, Path]
    """The file of each seed image, by reference."""
    values: dict[str, list[str]]
    """The values that jobs can have on each axis of the quotas."""
    manifest: Manifest
    known: dict[str, str]
    """The reference of each seed image, by the sha256 of its file."""


KNOWN = "index/seed-images.json"
"""The run's cache of `Prepared.known`: decoding thousands of images takes minutes."""


def prepare(recipe: Recipe, run: Path | None = None, purpose: Literal["estimate"] | UnsetType = UNSET) -> Prepared:
    """Reads and checks prompts, seeds and cast; `InputError` names the first problem.

    `run` is a directory that may have the cache of verified seed images.
    """
    before = _known(run) if run else {}
    known = dict(before)
    prompts = load_prompts(Path(recipe.prompts), recipe.strategies, needed_by(recipe), alone=True)
    check_cast(recipe.cast, recipe.engine)
    seeds = load_seeds(recipe.seed_paths, known)
    files, groups, digests, excluded = dict(seeds.files), {}, [seeds.digest], list(seeds.excluded)
    if recipe.refusals:
        check_refusals(recipe.refusals, prompts)
        named = ((name, group.seeds) for name, group in recipe.refusals.groups.items() if group.seeds)
        loaded = {recipe.seeds: seeds}
        own = {}
        for name, paths in named:
            if paths not in loaded:
                loaded[paths] = load_seeds([Path(path) for path in paths], known)
            own[name] = loaded[paths]
        groups = seeds_by_group(recipe.refusals, seeds.seeds, {name: found.seeds for name, found in own.items()})
        for found in own.values():
            files |= found.files
            digests.append(found.digest)
            excluded += found.excluded
    if files or recipe.cast.painter:
        _check_vision(recipe)
    values = values_of(recipe, seeds.seeds)
    manifest = Manifest(
        name=recipe.name,
        recipe=recipe.outcome,
        resolved=msgspec.to_builtins(recipe),
        digest=recipe.digest,
        prompts=dict(prompts.hashes),
        seeds=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        excluded=tuple(dict.fromkeys(excluded)),
        versions={name: importlib.metadata.version(name) for name in ("intersafe", "msgspec", "pillow", "rensa")},
        purpose=purpose,
    )
    if before and run and state_of(run, manifest).word != "same":  # the seeds changed, or the cache is damaged
        return prepare(recipe, purpose=purpose)
    return Prepared(
        recipe=recipe,
        prompts=prompts,
        seeds=seeds,
        groups=groups,
        files=files,
        values=values,
        manifest=manifest,
        known=known,
    )


def _check_vision(recipe: Recipe) -> None:
    """`InputError` if local weights have no vision support; `doctor` checks the vision support of servers."""
    for role, member in recipe.cast.members.items():
        if member.in_process or member.spec.model in recipe.serve:
            from intersafe.models.local.open import is_blind

            if is_blind(member, recipe.engine(member.spec.model)):
                what = f"cast.{role}: {member.spec.model!r} cannot see images, and this recipe sends some"
                raise InputError(what, remedy="name a vision-language model, or seeds without images and no painter")


def _known(run: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode((run / KNOWN).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}


def values_of(recipe: Recipe, seeds: Sequence[Seed]) -> dict[str, list[str]]:
    """The values that jobs can have on each axis; `InputError` for a quota on a value that no job has."""
    values = {
        "category": sorted({seed.category for seed in seeds}),
        "strategy": list(recipe.strategies),
        "victim": [victim.identity for victim in recipe.cast.victims],
        "turns": [str(number) for number in range(recipe.turns.min, recipe.turns.max + 1)],
    }
    for axis, known in values.items():
        shares = getattr(recipe.gates.coverage, axis) if recipe.gates.coverage else None
        for value in shares if isinstance(shares, dict) else ():
            if value not in known:
                raise InputError(
                    f"gates.coverage.{axis}: no job has {value!r}" + nearest(value, known),
                    remedy="drop it, or make it possible with seeds, strategies, victims or turns",
                )
    return values


def open_directory(path: Path, prepared: Prepared, n: int | None = None) -> DirectoryState:
    """Creates the run directory, or completes the one that is there; returns what it was before, as `state_of` does.

    Raises the problem of the state. A new directory that cannot be filled is deleted again.
    """
    state = state_of(path, prepared.manifest, n)
    if state.problem:
        raise state.problem
    if state.word != "new":
        _fill(path, prepared)
        return state
    write_whole(path / "recipe.json", msgspec.json.format(msgspec.json.encode(prepared.manifest)) + b"\n")
    try:
        _fill(path, prepared)
    except InputError:
        shutil.rmtree(path)
        raise
    return state


def _fill(path: Path, prepared: Prepared) -> None:
    """Writes images, prompts and seeds, and replaces damaged images."""
    store = ImageStore(path / "images")
    for reference, file in prepared.files.items():
        if not store.is_sound(reference):
            image = read_image(file)
            if image.ref != reference:
                raise InputError("changed while it was read", at=file, remedy="start again")
            store.put(image)
    for name, sha256 in prepared.prompts.hashes.items():
        data = (prepared.prompts.root / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError("changed while it was read", at=prepared.prompts.root / name, remedy="start again")
        write_whole(path / "prompts" / name, data)
    if prepared.known != _known(path):
        write_whole(path / KNOWN, msgspec.json.encode(prepared.known))
    rows = b"".join(msgspec.json.encode(to_row(seed)) + b"\n" for seed in prepared.seeds.seeds)
    write_whole(path / "seeds.jsonl", rows)
