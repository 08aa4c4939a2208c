"""Prepare: read and check all that a run is made from, hold it against a run that is there, lay down what is new."""

import hashlib
import importlib.metadata
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from intersafe.errors import InputError
from intersafe.files import write_whole
from intersafe.images import ImageStore, read_image
from intersafe.models import check_cast
from intersafe.records import Job, Provenance, to_row
from intersafe.runs import Manifest, Run, differences
from intersafe.settings import Recipe
from intersafe.stages.seeding import Seeds, load_seeds
from intersafe.taxonomy import BY_NAME
from intersafe.templates import Prompts, load_prompts


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every input was read and checked; nothing is written yet."""

    recipe: Recipe
    prompts: Prompts
    seeds: Seeds
    manifest: Manifest


def prepare(recipe: Recipe) -> Prepared:
    """Reads and checks prompts, seeds and cast; `InputError` names the first thing that is wrong."""
    prompts = load_prompts(Path(recipe.prompts), recipe.strategies)
    check_cast(recipe.cast)
    seeds = load_seeds(recipe.seed_paths)
    manifest = Manifest(
        name=recipe.name,
        recipe=recipe.outcome,
        resolved=msgspec.to_builtins(recipe),
        digest=recipe.digest,
        prompts=dict(prompts.hashes),
        seeds=seeds.digest,
        excluded=seeds.excluded,
        versions={name: importlib.metadata.version(name) for name in ("intersafe", "msgspec", "pillow", "rensa")},
    )
    return Prepared(recipe, prompts, seeds, manifest)


def provenance_of(recipe: Recipe, manifest: Manifest, job: Job) -> Provenance:
    """The models, prompts and sampling that a job's record names: only those that the job can have met."""
    family = BY_NAME[job.seed.category].family
    prompts = {
        name: sha256
        for name, sha256 in manifest.prompts.items()
        if not name.startswith(("attacker/", "judge/rubrics/"))
        or name in (f"attacker/{job.strategy}.md", f"judge/rubrics/{family}.md")
    }
    members = {
        "victim" if role.startswith("victim:") else role: member
        for role, member in recipe.cast.members.items()
        if not role.startswith("victim:") or role == f"victim:{job.victim}"
    }
    return Provenance(
        models={role: member.identity for role, member in members.items()},
        prompts=prompts,
        sampling={
            role: {"temperature": member.temperature, "top_p": member.top_p, "max_tokens": member.max_tokens}
            for role, member in members.items()
        },
        recipe=manifest.digest,
        versions={name: version for name, version in manifest.versions.items() if name == "intersafe"},
        scripted=any(member.spec.backend == "scripted" for member in members.values()),
    )


def open_directory(path: Path, prepared: Prepared) -> str:
    """Makes the run directory, or checks that the one that is there was made from the same things.

    Returns what the user should know: that the run was begun by another version. A new directory that cannot be filled
    is taken away again.
    """
    if (path / "recipe.json").exists():
        old = Run(path).manifest
        changed = differences(old, prepared.manifest)
        if changed:
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise InputError(
                f"made from something else: {', '.join(changed[:4])}{more}",
                at=path,
                remedy=f"put it back, or name a new --run, with --reuse {path} to take over what was paid for",
            )
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
    for reference, file in prepared.seeds.files.items():
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
    rows = b"".join(msgspec.json.encode(to_row(seed)) + b"\n" for seed in prepared.seeds.seeds)
    write_whole(path / "seeds.jsonl", rows)
