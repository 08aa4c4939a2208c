"""Gate again: what a run holds is held to other gates, and what passes becomes a new run; no model is asked anything.

Dialogues and refusal samples that the old gates turned down are grown again from the journal, so that looser gates find
them too. The new run has the journal and the images of the old one: `generate` goes on with it and pays for nothing
twice. The old run stays as it is: it is only read.
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
from intersafe.gates.chain import Chain
from intersafe.generation.grow import Stages, grow_dialogue, grow_refusal
from intersafe.generation.jobs import jobs, refusal_jobs, seeds_by_group
from intersafe.generation.kinds import RefusalLine, check_twin
from intersafe.generation.prepare import provenance_of, values_of
from intersafe.generation.replay import NOT_PAID, Replay
from intersafe.models.cast import JobCast
from intersafe.recipe.gates import RuleSettings
from intersafe.recipe.sections import Recipe
from intersafe.records import Dialogue, Ended, Job, Reason, RefusalJob, RefusalSample
from intersafe.run.directory import Run, run_path
from intersafe.run.funnel import Funnel
from intersafe.run.journal import Entry
from intersafe.run.lock import unwritten
from intersafe.run.manifest import Manifest, differences
from intersafe.run.outcomes import outcome_row
from intersafe.seeds.load import load_seeds
from intersafe.storage.files import write_whole
from intersafe.storage.jsonl import lines_of
from intersafe.storage.loops import run_anywhere


def regate(
    run: str | Path, recipe: Recipe, out: str | Path | None = None, say: Callable[[str], None] | None = None
) -> Run:
    """The run `out` (default: `<run>-regated`) with what passes the gates of `recipe`, of which nothing else is used.

    `say` is told what else differs in it. `InputError` if `out` is there already, or `run` is being written.
    """
    old = Run(run)
    path = run_path(out) if out is not None else old.path.with_name(f"{old.path.name}-regated")
    if say and (other := _other_changes(old, recipe)):
        say(f"only gates are used of this recipe; it differs in more: {other}")
    if path.exists():
        raise InputError("is there already", at=path, remedy="name another --out")
    if path.resolve().is_relative_to(old.path.resolve()):
        raise InputError("lies in the run that is only read", at=path, remedy="name another --out")
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
    """What differs but the gates, and of the refusals' settings those that gate."""
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
    """Everything of the new run; its manifest is the old one's with the new gates."""
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
    chain = Chain(recipe.gates, values_of(recipe, old.seeds()), replay.images.perceptual_hash, path)
    kept = _regate_dialogues(old, replay, chain, path)
    _regate_refusals(old, replay, recipe, manifest, path)
    _regate_twins(old, kept, recipe.gates.rules, path)


def _link(source: Path, target: Path) -> None:
    """The same images: as hard links where the file system has them, else copied."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    if source.exists():
        shutil.copytree(source, target, copy_function=link)


def _rejected(outcome: Dialogue | RefusalSample | Ended, category: str, reason: Reason) -> Ended:
    return Ended(outcome.job, outcome.key, category, "rejected", "gates", reason.word, reason.detail)


def _in_order(old: Run, line: str) -> Iterator[Any]:
    """The decided jobs of a line in job order; what lies behind one that a kill left out is not decided."""
    kept = old.kept(line)
    ended = sorted(old.ended(line), key=lambda row: row.job)
    for place, outcome in enumerate(heapq.merge(kept, ended, key=lambda outcome: outcome.job)):
        if outcome.job != place:
            return
        yield outcome


def _regate_dialogues(old: Run, replay: Replay, chain: Chain, path: Path) -> list[str]:
    """Every decided dialogue held to the new gates; returns the ids of those that are kept.

    What the old gates turned down is grown again, as far as it ever was: a job that a quota had no room for was perhaps
    not. Such a job stays as it is.
    """
    lost = {row.job for row in old.ended() if row.stage == "gates"}
    paid = _Paid(old.path, lost)
    all_jobs = jobs(replay.recipe, old.seeds())
    kept: list[str] = []
    with _Outcomes(path, "") as outcomes:
        for outcome in _in_order(old, ""):
            if outcome.job in lost:
                job = next(job for job in all_jobs if job.index == outcome.job)
                if reason := chain.full(job, 0.0):
                    outcome = _rejected(outcome, job.seed.category, reason)
                else:
                    outcome = _regrown(replay, job, paid.entries(job.index)) or outcome
            if isinstance(outcome, Dialogue):
                if reason := chain.check(outcome):
                    outcome = _rejected(outcome, outcome.seed.category, reason)
                else:
                    chain.add(outcome)
                    kept.append(outcome.id)
            outcomes.add(outcome)
    return kept


def _regate_refusals(old: Run, replay: Replay, recipe: Recipe, manifest: Manifest, path: Path) -> None:
    """Every decided refusal sample held to the rules and to the new near-duplicate settings.

    A group that is short again has jobs that were skipped because it was complete: from the first of them on nothing is
    decided, and `generate` goes on there.
    """
    if recipe.refusals is None:
        return
    line = RefusalLine(recipe, Stages(recipe, manifest, replay.company({})))
    lost = {row.job for row in old.ended("refusals") if (row.stage, row.reason) == ("gates", "near_duplicate")}
    paid = _Paid(old.path, lost, "refusals")
    found = _refusal_jobs(old, recipe, lost)
    with _Outcomes(path, "refusals") as outcomes:
        for outcome in _in_order(old, "refusals"):
            group = outcome.key.split("/")[1]
            if outcome.job in found and line.has_room(group):
                outcome = _regrown(replay, found[outcome.job], paid.entries(outcome.job)) or outcome
            if isinstance(outcome, Ended) and outcome.reason == "group_complete" and line.has_room(group):
                return
            if isinstance(outcome, RefusalSample):
                if reason := line.check(outcome):
                    outcome = _rejected(outcome, outcome.seed.category, reason)
                else:
                    line.add(outcome)
            outcomes.add(outcome)


def _refusal_jobs(old: Run, recipe: Recipe, wanted: set[int]) -> dict[int, RefusalJob]:
    """The jobs at those places; seed files of a group's own are read once more."""
    assert recipe.refusals
    if not wanted:
        return {}
    named = {name: group.seeds for name, group in recipe.refusals.groups.items() if group.seeds}
    own = {name: load_seeds([Path(seeds) for seeds in paths]).seeds for name, paths in named.items()}
    by_group = seeds_by_group(recipe.refusals, old.seeds(), own)
    return {job.index: job for job in refusal_jobs(recipe, by_group) if job.index in wanted}


def _regate_twins(old: Run, kept: list[str], rules: RuleSettings | None, path: Path) -> None:
    """The twins of the dialogues that are kept, at the places that these have now, held to the new rules.

    From the first dialogue on for which no twin was tried yet nothing is decided, and `generate` goes on there.
    """
    before = {dialogue.id: place for place, dialogue in enumerate(old.dialogues())}
    tried = _in_order(old, "twins")
    with _Outcomes(path, "twins") as outcomes:
        for place, name in enumerate(kept):
            was = before.get(name)
            outcome = next((one for one in tried if one.job == was), None) if was is not None else None
            if outcome is None:
                return
            if isinstance(outcome, Dialogue) and (reason := check_twin(outcome, rules)):
                outcome = _rejected(outcome, outcome.seed.category, reason)
            outcomes.add(structs.replace(outcome, job=place))


# --- grown again -----------------------------------------------------------------------------------------------------


def _regrown(
    replay: Replay, job: Job | RefusalJob, entries: dict[str, Entry]
) -> Dialogue | RefusalSample | Ended | None:
    """What comes of a job by the replies that it was given; None where they do not reach to its end."""
    company, recipe = replay.company(entries), replay.recipe
    grown: list[Dialogue | RefusalSample | Ended] = []

    async def again() -> None:
        try:
            if isinstance(job, Job):
                provenance = provenance_of(recipe, replay.run.manifest, job)
                grown.append(await grow_dialogue(job, JobCast(company, job), recipe, provenance))
            elif recipe.refusals:
                provenance = provenance_of(recipe, replay.run.manifest, job, "refusals")
                grown.append(await grow_refusal(job, JobCast(company, job, "refusals"), recipe.refusals, provenance))
        except JobEnded as end:
            if end.reason != NOT_PAID:
                category = job.seed.category
                grown.append(Ended(job.index, job.key, category, end.kind, end.stage, end.reason, end.detail))

    run_anywhere(again)
    return grown[0] if grown else None


class _Paid:
    """Where the journal holds the replies that jobs of a line were given; the texts stay on the disk."""

    def __init__(self, root: Path, wanted: set[int], line: str = "") -> None:
        self._places: dict[int, list[tuple[Path, int]]] = {}
        decoder = msgspec.json.Decoder(_Place)
        for path in sorted((root / "journal").glob("*.jsonl")) if wanted else ():
            for offset, row in lines_of(path):
                with contextlib.suppress(msgspec.DecodeError):
                    place = decoder.decode(row)
                    if place.job in wanted and place.line == line:
                        self._places.setdefault(place.job, []).append((path, offset))

    def entries(self, job: int) -> dict[str, Entry]:
        """The job's entries by key; a damaged line is a reply that is not there."""
        found: dict[str, Entry] = {}
        for path, offset in self._places.get(job, ()):
            with path.open("rb") as file, contextlib.suppress(msgspec.DecodeError):
                file.seek(offset)
                entry = msgspec.json.decode(file.readline(), type=Entry)
                found[entry.key] = entry
        return found


class _Place(msgspec.Struct):
    job: int
    line: str = ""


# --- files -----------------------------------------------------------------------------------------------------------


class _Outcomes:
    """Writes the outcomes of a line into its files and counts them; files without a line are not made."""

    def __init__(self, root: Path, line: str) -> None:
        self.funnel = Funnel()
        self._root, self._line = root, line
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "_Outcomes":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def add(self, outcome: Dialogue | RefusalSample | Ended) -> None:
        """Writes one outcome."""
        self.funnel.count(outcome)
        name, row = outcome_row(outcome, self._line)
        if name not in self._files:
            self._files[name] = (self._root / name).open("wb")
        self._files[name].write(msgspec.json.encode(row) + b"\n")
