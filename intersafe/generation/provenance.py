"""Provenance: the models, prompts and sampling that a job's record names."""

from typing import Any

from intersafe.generation.job_kind import Met
from intersafe.recipe.sections import Member, Model, Painter, Recipe
from intersafe.records import Provenance
from intersafe.run.manifest import Manifest


def provenance_of(recipe: Recipe, manifest: Manifest, met: Met) -> Provenance:
    """The provenance of a job: only what it can have met."""
    members = {role.partition(":")[0]: model for role, model in recipe.cast.models.items() if role in met.roles}
    return Provenance(
        models={role: member.identity for role, member in members.items()},
        prompts={name: sha256 for name, sha256 in manifest.prompts.items() if name.rpartition(".")[0] in met.prompts},
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
