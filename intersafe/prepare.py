"""Prepare: read and check all that a run is made from, hold it against a run that is there, lay down what is new."""

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import msgspec

from intersafe.errors import InputError
from intersafe.files import write_whole
from intersafe.images import ImageStore, read_image
from intersafe.models import check_cast
from intersafe.recipe import Recipe
from intersafe.records import Job, Provenance, to_row
from intersafe.runs import Manifest, Run, differences
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
        versions={"intersafe": importlib.metadata.version("intersafe")},
    )
    return Prepared(recipe, prompts, seeds, manifest)


def provenance_of(recipe: Recipe, hashes: dict[str, str], versions: dict[str, str], job: Job) -> Provenance:
    """The models, prompts and sampling that a job's record names: only those that the job can have met."""
    family = BY_NAME[job.seed.category].family
    others = {"attacker/", "judge/rubrics/"}
    prompts = {
        name: sha256
        for name, sha256 in hashes.items()
        if not name.startswith(tuple(others)) or name in (f"attacker/{job.strategy}.md", f"judge/rubrics/{family}.md")
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
        recipe=recipe.digest,
        versions=versions,
        scripted=any(member.spec.backend == "scripted" for member in members.values()),
    )


def open_directory(path: Path, prepared: Prepared) -> None:
    """Makes the run directory, or checks that the one that is there was made from the same things."""
    if (path / "recipe.json").exists():
        changed = differences(Run(path).manifest, prepared.manifest)
        if changed:
            more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
            raise InputError(
                f"made from something else: {', '.join(changed[:6])}{more}",
                at=path,
                remedy=f"put it back, or start a new --run, with --reuse {path} to take over what was paid for",
            )
    else:
        write_whole(path / "recipe.json", msgspec.json.format(msgspec.json.encode(prepared.manifest)) + b"\n")
    store = ImageStore(path / "images")
    for reference, file in prepared.seeds.files.items():
        if not store.holds(reference):
            store.put(read_image(file))
    for name, sha256 in prepared.prompts.hashes.items():
        data = (prepared.prompts.root / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError("changed while it was read", at=prepared.prompts.root / name, remedy="start again")
        write_whole(path / "prompts" / name, data)
    rows = b"".join(msgspec.json.encode(to_row(seed)) + b"\n" for seed in prepared.seeds.seeds)
    write_whole(path / "seeds.jsonl", rows)
