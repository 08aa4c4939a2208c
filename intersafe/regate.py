"""Gate again: what a run holds is held to other gates, and what passes becomes a new run; no model is asked anything.

Dialogues that the old gates turned down are grown again from the journal, so that looser gates find them too. The new
run has the journal and the images of the old one: `generate` goes on with it and pays for nothing twice. The old run
stays as it is.
"""

import contextlib
import heapq
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from intersafe.errors import InputError, JobEnded
from intersafe.files import write_whole
from intersafe.gates.chain import Chain
from intersafe.gates.refusals import DuplicateQuestions, check_refusal
from intersafe.jobs import jobs
from intersafe.journal import Entry, lines_of
from intersafe.lines import grow_dialogue
from intersafe.loops import run_anywhere
from intersafe.models.cast import JobCast
from intersafe.prepare import provenance_of, values_of
from intersafe.records import Dialogue, Ended, Job, RefusalSample
from intersafe.rehearsal import Replay
from intersafe.runs import Funnel, Run, lock, outcome_row, run_path
from intersafe.settings import Recipe


def regate(run: str | Path, recipe: Recipe, out: str | Path | None = None) -> Run:
    """The run `out` (default: `<run>-regated`) with what passes the gates of `recipe`; nothing else may differ.

    `InputError` if the recipe would have grown something else, or `out` is there already.
    """
    old = Run(run)
    path = run_path(out) if out is not None else old.path.with_name(f"{old.path.name}-regated")
    _check_same(old, recipe)
    if path.exists():
        raise InputError("is there already", at=path, remedy="name another --out")
    held = lock(old.path)
    try:
        staging = path.with_name(f".{path.name}.regating")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            _fill(old, recipe, staging)
            staging.rename(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(held)
    return Run(path)


def _check_same(old: Run, recipe: Recipe) -> None:
    """Only gates may differ, and of the refusals' settings those that gate."""
    before, after = _grown_by(old.manifest.recipe), _grown_by(recipe.outcome)
    changed = sorted(key for key in before | after if before.get(key) != after.get(key))
    if changed:
        raise InputError(
            f"made with another {', '.join(changed)}", at=old.path, remedy="regate changes gates alone: put these back"
        )


def _grown_by(outcome: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe that decides what the models are asked."""
    plain = {key: value for key, value in outcome.items() if key != "gates"}
    if plain.get("refusals"):
        plain["refusals"] = {key: value for key, value in plain["refusals"].items() if key != "duplicates"}
    return msgspec.json.decode(msgspec.json.encode(plain), type=dict[str, Any])


def _fill(old: Run, recipe: Recipe, path: Path) -> None:
    """Everything of the new run; its manifest is the old one's with the new gates."""
    replay = Replay(old)
    # As it was, with the new gates: paths and limits of the recipe that is given do not belong to the old run.
    resolved = msgspec.structs.replace(replay.recipe, gates=recipe.gates, refusals=recipe.refusals)
    manifest = msgspec.structs.replace(
        old.manifest, recipe=recipe.outcome, resolved=msgspec.to_builtins(resolved), digest=recipe.digest
    )
    write_whole(path / "recipe.json", msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    for name in ("prompts", "journal"):
        if (old.path / name).exists():
            shutil.copytree(old.path / name, path / name)
    _link(old.path / "images", path / "images")
    shutil.copy(old.path / "seeds.jsonl", path / "seeds.jsonl")
    chain = Chain(recipe.gates, values_of(recipe, old.seeds()), replay.images.perceptual_hash)
    kept: list[str] = []
    with _Outcomes(path, "") as outcomes:
        for outcome in _grown_again(old, replay):
            decided = _decide(chain, outcome) if isinstance(outcome, Dialogue) else outcome
            if isinstance(decided, Dialogue):
                chain.add(decided)
                kept.append(decided.id)
            outcomes.add(decided)
    _regate_refusals(old, recipe, path)
    _keep_twins(old, kept, path)


def _link(source: Path, target: Path) -> None:
    """The same images: as hard links where the file system has them, else copied."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    if source.exists():
        shutil.copytree(source, target, copy_function=link)


def _decide(chain: Chain, dialogue: Dialogue) -> Dialogue | Ended:
    reason = chain.check(dialogue)
    if reason is None:
        return dialogue
    category = dialogue.seed.category
    return Ended(dialogue.job, dialogue.key, category, "rejected", "gates", reason.word, reason.detail)


def _in_order(old: Run, line: str) -> Iterator[Any]:
    """Every decided job of a line in job order."""
    kept = old.kept(line)
    ended = sorted(old.ended(line), key=lambda row: row.job)
    return heapq.merge(kept, ended, key=lambda outcome: outcome.job)


def _grown_again(old: Run, replay: Replay) -> Iterator[Dialogue | Ended]:
    """Every decided job in order; what gates turned down as the dialogue that it was."""
    lost = {row.job for row in old.ended() if row.stage == "gates"}
    places = _places(old.path, lost)
    all_jobs = jobs(replay.recipe, old.seeds())
    for outcome in _in_order(old, ""):
        if outcome.job not in lost:
            yield outcome
            continue
        job = next(job for job in all_jobs if job.index == outcome.job)
        yield _regrow(old, replay, job, list(_entries_at(places.get(job.index, [])))) or outcome


def _regrow(old: Run, replay: Replay, job: Job, entries: list[Entry]) -> Dialogue | None:
    company = replay.company({entry.key: entry for entry in entries})
    grown: list[Dialogue] = []

    async def again() -> None:
        with contextlib.suppress(JobEnded):
            provenance = provenance_of(replay.recipe, old.manifest, job)
            grown.append(await grow_dialogue(job, JobCast(company, job), replay.recipe, provenance))

    run_anywhere(again)
    return grown[0] if grown else None


def _places(root: Path, wanted: set[int]) -> dict[int, list[tuple[Path, int]]]:
    """Where the journal's lines of those jobs stand; the texts stay on the disk."""
    places: dict[int, list[tuple[Path, int]]] = {}
    decoder = msgspec.json.Decoder(_Place)
    for path in sorted((root / "journal").glob("*.jsonl")) if wanted else ():
        for offset, line in lines_of(path):
            with contextlib.suppress(msgspec.DecodeError):
                place = decoder.decode(line)
                if place.job in wanted and not place.line:
                    places.setdefault(place.job, []).append((path, offset))
    return places


class _Place(msgspec.Struct):
    job: int
    line: str = ""


def _entries_at(places: list[tuple[Path, int]]) -> Iterator[Entry]:
    for path, offset in places:
        with path.open("rb") as file:
            file.seek(offset)
            yield msgspec.json.decode(file.readline(), type=Entry)


def _regate_refusals(old: Run, recipe: Recipe, path: Path) -> None:
    """The kept samples held to the rules and to the new near-duplicate settings.

    A group that is short again has jobs that were skipped because it was complete: from the first of them on nothing is
    decided, and `generate` goes on there.
    """
    if recipe.refusals is None:
        return
    groups = recipe.refusals.groups
    duplicates = DuplicateQuestions(recipe.refusals.duplicates) if recipe.refusals.duplicates else None
    with _Outcomes(path, "refusals") as outcomes:
        for outcome in _in_order(old, "refusals"):
            counts = outcomes.funnel.groups
            if isinstance(outcome, Ended):
                group = outcome.key.split("/")[1]
                if outcome.reason == "group_complete" and counts.get(group, 0) < groups[group].n:
                    return
                outcomes.add(outcome)
                continue
            reason = check_refusal(outcome) or (duplicates.check(outcome) if duplicates else None)
            if reason:
                word, detail = reason
                outcomes.add(Ended(outcome.job, outcome.key, outcome.seed.category, "rejected", "gates", word, detail))
                continue
            if duplicates:
                duplicates.add(outcome)
            outcomes.add(outcome)


def _keep_twins(old: Run, kept: list[str], path: Path) -> None:
    """The twins of the dialogues that are kept, at the places that these have now.

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
            outcomes.add(msgspec.structs.replace(outcome, job=place))


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
