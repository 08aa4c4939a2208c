"""Gate again: applies other gates to the outcomes of a run; those that pass become a new run. No model is asked.

Outcomes that the old gates rejected are grown again from the journal, so that looser gates find them too. The new run
has the journal and the images of the old one: `generate` resumes it and pays for nothing twice. The old run is only
read.
"""

import contextlib
import heapq
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import structs

from intersafe.errors import InputError, JobEnded
from intersafe.generation.job_kind import GateInputs, JobInputs, JobKind, KindGates
from intersafe.generation.jobs import seeds_by_group
from intersafe.generation.kinds import DIALOGUES, KINDS
from intersafe.generation.prepare import values_of
from intersafe.generation.provenance import provenance_of
from intersafe.generation.replay import NOT_PAID, Replay
from intersafe.models.cast import JobCast
from intersafe.recipe.sections import Recipe
from intersafe.records import Ended, Seed
from intersafe.run.directory import Run, run_path
from intersafe.run.journal import Entry
from intersafe.run.kinds import AnyJob, Outcome, ended_by, rejected_by_gates
from intersafe.run.lock import unwritten
from intersafe.run.manifest import differences
from intersafe.run.outcomes import outcome_row
from intersafe.seeds.load import load_seeds
from intersafe.storage.files import write_whole
from intersafe.storage.jsonl import lines_of
from intersafe.storage.loops import run_anywhere


def regate(
    run: str | Path, recipe: Recipe, out: str | Path | None = None, say: Callable[[str], None] | None = None
) -> Run:
    """The run `out` (default: `<run>-regated`) with what passes the gates of `recipe`; nothing else of it is used.

    `say` is told what else differs in it. `InputError` if `out` exists, or if `run` is being written.
    """
    old = Run(run)
    path = run_path(out) if out is not None else old.path.with_name(f"{old.path.name}-regated")
    if say and (other := _other_changes(old, recipe)):
        say(f"only the gates of this recipe are used; it also differs in: {other}")
    if path.exists():
        raise InputError("exists already", at=path, remedy="name another --out")
    if path.resolve().is_relative_to(old.path.resolve()):
        raise InputError("is inside the run that is only read", at=path, remedy="name another --out")
    staging = path.with_name(f".{path.name}.regating")
    try:
        with unwritten(old.path):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            _fill(old, recipe, staging)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Run(path)


def _other_changes(old: Run, recipe: Recipe) -> str:
    """What differs besides the gates and those settings of the refusals that gate."""
    before = structs.replace(old.manifest, recipe=_grown_by(old.manifest.recipe))
    changed = differences(before, structs.replace(before, recipe=_grown_by(recipe.outcome)))
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    return ", ".join(changed[:4]) + more


def _grown_by(outcome: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe that decides what the models are asked."""
    plain = {key: value for key, value in outcome.items() if key != "gates"}
    if plain.get("refusals"):
        plain["refusals"] = {key: value for key, value in plain["refusals"].items() if key != "duplicates"}
    return msgspec.json.decode(msgspec.json.encode(plain), type=dict[str, Any])


def _fill(old: Run, recipe: Recipe, path: Path) -> None:
    """Writes the new run; its manifest is the old one's with the new gates."""
    replay = Replay(old)
    refusals = replay.recipe.refusals
    if refusals and recipe.refusals:
        refusals = structs.replace(refusals, duplicates=recipe.refusals.duplicates)
    recipe = structs.replace(replay.recipe, gates=recipe.gates, refusals=refusals)
    manifest = structs.replace(
        old.manifest, recipe=recipe.outcome, resolved=msgspec.to_builtins(recipe), digest=recipe.digest
    )
    write_whole(path / "recipe.json", msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    for name in ("prompts", "journal"):
        if (old.path / name).exists():
            shutil.copytree(old.path / name, path / name)
    _link(old.path / "images", path / "images")
    shutil.copy(old.path / "seeds.jsonl", path / "seeds.jsonl")
    seeds = old.seeds()
    gate_inputs = GateInputs(recipe, values_of(recipe, seeds), replay.images.perceptual_hash, path)
    inputs = JobInputs(recipe, seeds, lambda: _groups(recipe, seeds))
    accepted: list[str] = []
    for kind in (kind for kind in KINDS.values() if kind.wanted(recipe, 1)):
        gates = kind.gates(gate_inputs)
        if kind.follows_dialogues:
            _decide_followers(kind, gates, old, accepted, path)
        else:
            ids = _decide_again(kind, gates, replay, inputs, path)
            accepted = ids if kind is DIALOGUES else accepted


def _groups(recipe: Recipe, seeds: tuple[Seed, ...]) -> dict[str, tuple[Seed, ...]]:
    """The seeds of each refusal group; reads a group's own seed files again."""
    assert recipe.refusals
    named = {name: group.seeds for name, group in recipe.refusals.groups.items() if group.seeds}
    own = {name: load_seeds([Path(seeds) for seeds in paths]).seeds for name, paths in named.items()}
    return seeds_by_group(recipe.refusals, seeds, own)


def _link(source: Path, target: Path) -> None:
    """The same images: as hard links, or as copies on a file system without them."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    if source.exists():
        shutil.copytree(source, target, copy_function=link)


# --- deciding again --------------------------------------------------------------------------------------------------


def _decide_again(kind: JobKind, gates: KindGates, replay: Replay, inputs: JobInputs, path: Path) -> list[str]:
    """Applies the new gates to every decided job of a kind; returns the ids of the accepted outcomes.

    A job that ended is grown again if the kind says so and the journal has all its replies. Where the kind says stop,
    the jobs from that one on are not decided, and `generate` resumes there.
    """
    old = replay.run
    paid = _Paid(old.path, {row.job for row in old.ended(kind.name) if row.stage == "gates"}, kind.name)
    jobs = kind.jobs(inputs, 0)
    accepted: list[str] = []
    with _Outcomes(path, kind.name) as outcomes:
        for outcome in _in_order(old, kind.name):
            decided: Outcome | Ended = outcome
            verdict = kind.reconsider(outcome, gates) if isinstance(outcome, Ended) else "keep"
            if verdict == "stop":
                break
            if verdict == "grow":
                job = next((job for job in jobs if job.index == outcome.job), None)
                if job is None:  # a seed file of its group was shortened since
                    decided = outcome
                elif reason := gates.skip(job):
                    decided = rejected_by_gates(outcome.job, outcome.key, job.seed.category, reason)
                else:
                    decided = _regrown(replay, kind, job, paid.entries(job.index)) or outcome
            if not isinstance(decided, Ended):
                decided = _checked(gates, decided)
            if not isinstance(decided, Ended):
                gates.add(decided)
                accepted.append(decided.id)
            outcomes.add(decided)
    return accepted


def _decide_followers(kind: JobKind, gates: KindGates, old: Run, accepted: list[str], path: Path) -> None:
    """Applies the new gates to the outcomes that belong to the accepted dialogues, at the places these have now.

    From the first dialogue on whose job was not tried nothing is decided, and `generate` resumes there.
    """
    before = {dialogue.id: place for place, dialogue in enumerate(old.dialogues())}
    tried = _in_order(old, kind.name)
    with _Outcomes(path, kind.name) as outcomes:
        for place, name in enumerate(accepted):
            was = before.get(name)
            outcome = next((one for one in tried if one.job == was), None) if was is not None else None
            if outcome is None:
                return
            decided = outcome if isinstance(outcome, Ended) else _checked(gates, outcome)
            if not isinstance(decided, Ended):
                gates.add(decided)
            outcomes.add(structs.replace(decided, job=place))


def _checked(gates: KindGates, outcome: Outcome) -> Outcome | Ended:
    reason = gates.check(outcome)
    return rejected_by_gates(outcome.job, outcome.key, outcome.seed.category, reason) if reason else outcome


def _in_order(old: Run, kind: str) -> Iterator[Any]:
    """The decided jobs of a kind in job order; ends at the first job that a kill left out."""
    accepted = old.accepted(kind)
    ended = sorted(old.ended(kind), key=lambda row: row.job)
    for place, outcome in enumerate(heapq.merge(accepted, ended, key=lambda outcome: outcome.job)):
        if outcome.job != place:
            return
        yield outcome


# --- grown again -----------------------------------------------------------------------------------------------------


def _regrown(replay: Replay, kind: JobKind, job: AnyJob, entries: dict[str, Entry]) -> Outcome | Ended | None:
    """What comes of a job by the replies in the journal; None if they do not reach to its end."""
    recipe = replay.recipe
    provenance = provenance_of(recipe, replay.run.manifest, kind.met(recipe, job))
    grown: list[Outcome | Ended] = []

    async def again() -> None:
        try:
            grown.append(await kind.grow(job, JobCast(replay.shared(entries), job, kind.name), recipe, provenance))
        except JobEnded as end:
            if end.reason != NOT_PAID:
                grown.append(ended_by(job, end))

    run_anywhere(again)
    return grown[0] if grown else None


class _Paid:
    """Where the journal has the replies to jobs of a kind; the texts stay on disk."""

    def __init__(self, root: Path, wanted: set[int], kind: str) -> None:
        self._offsets: dict[int, list[tuple[Path, int]]] = {}
        decoder = msgspec.json.Decoder(_JobOfEntry)
        for path in sorted((root / "journal").glob("*.jsonl")) if wanted else ():
            for offset, row in lines_of(path):
                with contextlib.suppress(msgspec.DecodeError):
                    entry = decoder.decode(row)
                    if entry.job in wanted and entry.kind == kind:
                        self._offsets.setdefault(entry.job, []).append((path, offset))

    def entries(self, job: int) -> dict[str, Entry]:
        """The job's entries by key; a damaged line is a missing reply."""
        found: dict[str, Entry] = {}
        for path, offset in self._offsets.get(job, ()):
            with path.open("rb") as file, contextlib.suppress(msgspec.DecodeError):
                file.seek(offset)
                entry = msgspec.json.decode(file.readline(), type=Entry)
                found[entry.key] = entry
        return found


class _JobOfEntry(msgspec.Struct):
    job: int
    kind: str = msgspec.field(default="dialogues", name="line")


# --- files -----------------------------------------------------------------------------------------------------------


class _Outcomes:
    """Writes the outcomes of a kind into its files; a file without a row is not created."""

    def __init__(self, root: Path, kind: str) -> None:
        self._root, self._kind = root, kind
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "_Outcomes":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def add(self, outcome: Outcome | Ended) -> None:
        """Writes one outcome."""
        name, row = outcome_row(outcome, self._kind)
        if name not in self._files:
            self._files[name] = (self._root / name).open("wb")
        self._files[name].write(msgspec.json.encode(row) + b"\n")
