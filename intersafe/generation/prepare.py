"""Prepare: read and check all that a run is made from, hold it against a run that is there, lay down what is new."""

import hashlib
import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from intersafe.errors import InputError
from intersafe.generation.jobs import seeds_by_group
from intersafe.images.store import ImageStore, read_image
from intersafe.models.open import check_cast
from intersafe.recipe.sections import Member, Model, Painter, Recipe
from intersafe.records import Job, Provenance, RefusalJob, Seed, to_row
from intersafe.run.directory import Run
from intersafe.run.manifest import Manifest, differences
from intersafe.seeds.load import Seeds, load_seeds
from intersafe.storage.files import write_whole
from intersafe.taxonomy import BY_NAME
from intersafe.templates.load import Prompts, check_refusals, load_prompts, needed_by
from intersafe.wording import nearest


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every input was read and checked; nothing is written yet."""

    recipe: Recipe
    prompts: Prompts
    seeds: Seeds
    groups: dict[str, tuple[Seed, ...]]
    """The seeds of each group of the refusals."""
    files: dict[str, Path]
    """Where the bytes of every seed's image lie."""
    values: dict[str, list[str]]
    """What the jobs can have on each axis of the quotas."""
    manifest: Manifest
    known: dict[str, str]
    """The reference of each seed image by the sha256 of its file."""


KNOWN = "index/seed-images.json"
"""Where a run keeps what its seed images were verified to be: a cache, since decoding thousands takes minutes."""


def prepare(recipe: Recipe, run: Path | None = None) -> Prepared:
    """Reads and checks prompts, seeds and cast; `InputError` names the first thing that is wrong.

    `run`: a directory whose seed images were verified before.
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
        _check_sight(recipe)
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
    )
    if before and run and not _is_made_from(run, manifest.seeds):  # the seeds changed, or the cache is damaged
        return prepare(recipe)
    return Prepared(recipe, prompts, seeds, groups, files, values, manifest, known)


def _check_sight(recipe: Recipe) -> None:
    """`InputError` where the weights at hand are of text alone; a server's eyes are looked at by `doctor`."""
    for role, member in recipe.cast.members.items():
        if member.in_process or member.spec.model in recipe.serve:
            from intersafe.models.local.open import is_blind

            if is_blind(member, recipe.engine(member.spec.model)):
                what = f"cast.{role}: {member.spec.model!r} cannot see images, and this recipe sends some"
                raise InputError(what, remedy="name a vision-language model, or seeds without images and no painter")


def _is_made_from(run: Path, seeds: str) -> bool:
    return (run / "recipe.json").exists() and Run(run).manifest.seeds == seeds


def _known(run: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode((run / KNOWN).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}


def values_of(recipe: Recipe, seeds: Sequence[Seed]) -> dict[str, list[str]]:
    """What the jobs can have on each axis; `InputError` for a quota on something that no job has."""
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


_DIALOGUE = ("planner/decompose", "planner/rewrite", "judge/step", "judge/turn", "judge/dialogue", "victim/system")
_MET: dict[str, tuple[str, ...]] = {
    "": _DIALOGUE,
    "refusals": ("refusal/question", "judge/refusal"),
    "twins": ("planner/twin", "judge/turn", "judge/dialogue", "victim/system"),
}
"""The prompt files that a line's jobs can meet, whatever the recipe."""


def provenance_of(recipe: Recipe, manifest: Manifest, job: Job | RefusalJob, line: str = "") -> Provenance:
    """The models, prompts and sampling that a job's record names: only those that the job can have met."""
    met = set(_MET[line])
    roles = {"attacker", "judge", "second_judge"}
    if recipe.cast.painter and line != "twins":
        roles, met = roles | {"painter"}, met | {"painter/describe"}
        met |= {"judge/images"} if recipe.clean and recipe.clean.judge_distance is not None and not line else set()
    if isinstance(job, Job):
        roles |= {f"victim:{job.victim}"}
        met |= {f"judge/rubrics/{BY_NAME[job.seed.category].family}"}
        met |= set() if line else {f"attacker/{job.strategy}"}
        if recipe.respond:
            roles, met = roles | {"responder"}, met | {"responder/aligned", "judge/aligned"}
    elif recipe.refusals and recipe.refusals.groups[job.group].answers == "analysis":
        roles, met = roles | {"responder"}, met | {"refusal/answer"}
    else:
        met |= {"refusal/templates"}
    members = {role.partition(":")[0]: model for role, model in recipe.cast.models.items() if role in roles}
    return Provenance(
        models={role: member.identity for role, member in members.items()},
        prompts={name: sha256 for name, sha256 in manifest.prompts.items() if name.rpartition(".")[0] in met},
        sampling={role: _sampling_of(member) for role, member in members.items()},
        recipe=manifest.digest,
        versions={name: version for name, version in manifest.versions.items() if name == "intersafe"},
        scripted=any(member.spec.backend == "scripted" for member in members.values()),
    )


def _sampling_of(model: Model) -> dict[str, Any]:
    if isinstance(model, Painter):
        plain = {"size": model.size, "steps": model.steps, "guidance": model.guidance}
        return plain | {"negative_prompt": model.negative_prompt}
    assert isinstance(model, Member)
    return {"temperature": model.temperature, "top_p": model.top_p, "max_tokens": model.max_tokens}


def check_same(path: Path, prepared: Prepared) -> None:
    """`InputError` where a run that is there was made from something else; reads alone."""
    if not (path / "recipe.json").exists():
        return
    if changed := differences(Run(path).manifest, prepared.manifest):
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise InputError(
            f"made from something else: {', '.join(changed[:4])}{more}",
            at=path,
            remedy=f"put it back, or name a new --run, with --reuse {path} to take over what was paid for",
        )


def open_directory(path: Path, prepared: Prepared) -> str:
    """Makes the run directory, or checks that the one that is there was made from the same things.

    Returns what the user should know: that the run was begun by another version. A new directory that cannot be filled
    is taken away again.
    """
    if (path / "recipe.json").exists():
        old = Run(path).manifest
        check_same(path, prepared)
        _fill(path, prepared)
        newer = [f"{name} {old.versions.get(name)} -> {v}" for name, v in prepared.manifest.versions.items()]
        return ", ".join(line for line in newer if len(set(line.split()[1::2])) > 1)
    write_whole(path / "recipe.json", msgspec.json.format(msgspec.json.encode(prepared.manifest)) + b"\n")
    try:
        _fill(path, prepared)
    except InputError:
        shutil.rmtree(path)
        raise
    return ""


def _fill(path: Path, prepared: Prepared) -> None:
    """Lays down images, prompts and seeds, or mends what is damaged there."""
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
