"""Gating again: other gates on what a run holds, no call, the old run untouched, and a run that resumes from there."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from intersafe.errors import InputError
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.regate import regate
from intersafe.recipe.gates import CoverageSettings, DuplicateSettings, Gates, RuleSettings
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Recipe, RefusalGroup
from intersafe.run.directory import Run
from intersafe.run.lock import lock
from intersafe.storage.bundled import bundled
from tests.support.runs import OUTCOMES, cli, digest, journal_keys, refusal, rows, started
from tests.support.servers.scripted_server import scripted_server

N = 40
STRICT = 0.18
"""A threshold at which the scripted cast's dialogues are often near-duplicates."""


def everything(**changes: Any) -> Recipe:
    """Every kind of job, with a small set of refusals, one try each."""
    recipe = override(load_recipe(bundled("pipelines/aligned.yaml")), **changes)
    assert recipe.refusals
    groups = {name: structs.replace(group, n=group.n // 2) for name, group in recipe.refusals.groups.items()}
    return structs.replace(recipe, refusals=structs.replace(recipe.refusals, groups=groups, tries=1))


def gated(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other gates."""
    return structs.replace(recipe, gates=structs.replace(recipe.gates, **changes))


def threshold(recipe: Recipe, value: float) -> Recipe:
    """The recipe with another threshold for near-duplicate dialogues and questions."""
    assert recipe.refusals
    refusals = structs.replace(recipe.refusals, duplicates=DuplicateSettings(threshold=value))
    return structs.replace(gated(recipe, duplicates=DuplicateSettings(threshold=value)), refusals=refusals)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run under the recipe's own gates."""
    path = tmp_path_factory.mktemp("old") / "run"
    generate_dialogues(everything(), run=path, n=N)
    return path


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run under gates that turn down much."""
    path = tmp_path_factory.mktemp("strict") / "run"
    generate_dialogues(threshold(everything(), STRICT), run=path, n=N)
    return path


def everything_in(root: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- what comes of it ------------------------------------------------------------------------------------------------


def test_the_same_gates_give_the_same_bytes(old: Path, strict: Path, tmp_path: Path) -> None:
    for number, (source, recipe) in enumerate(((old, everything()), (strict, threshold(everything(), STRICT)))):
        made = regate(source, recipe, tmp_path / str(number))
        assert digest(made.path) == digest(source)
        assert made.manifest.recipe == Run(source).manifest.recipe
        assert generate_dialogues(recipe, run=made.path, n=N).summary == Run(source).summary
        assert digest(made.path) == digest(source)
        assert journal_keys(made.path) == journal_keys(source)


def test_stricter_gates_keep_fewer_as_they_were(old: Path, tmp_path: Path) -> None:
    made = regate(old, threshold(everything(), STRICT), tmp_path / "new")
    before = rows(old / "dialogues.jsonl")
    kept = rows(made.path / "dialogues.jsonl")
    assert 5 < len(kept) < N
    assert all(row in before for row in kept)
    assert [row["job"] for row in kept] == sorted(row["job"] for row in kept)
    lost = {row["job"]: row["reason"] for row in rows(made.path / "rejected.jsonl")}
    gone = {row["job"] for row in before} - {row["job"] for row in kept}
    assert {lost[job] for job in gone} == {"near_duplicate"}
    assert sorted(lost | {row["job"]: "" for row in kept}) == list(range(Run(old).funnel().jobs))
    assert made.summary is None


def test_twins_and_refusals_follow(old: Path, tmp_path: Path) -> None:
    made = regate(old, threshold(everything(), STRICT), tmp_path / "new")
    kept = [dialogue.id for dialogue in made.dialogues()]
    assert 0 < len(list(made.twins())) < len(list(Run(old).twins()))
    for twin in made.twins():
        assert kept[twin.job] == twin.twin_of
    old_twins = {twin.id: structs.replace(twin, job=0) for twin in Run(old).twins()}
    assert all(old_twins[twin.id] == structs.replace(twin, job=0) for twin in made.twins())
    old_samples = {sample.id: sample for sample in Run(old).refusals()}
    samples = list(made.refusals())
    assert 0 < len(samples) < len(old_samples)
    assert all(old_samples[sample.id] == sample for sample in samples)


def test_looser_gates_bring_back_what_the_old_ones_turned_down(strict: Path, tmp_path: Path) -> None:
    lost = [row for row in Run(strict).ended() if row.reason == "near_duplicate"]
    questions = [row for row in Run(strict).ended("refusals") if row.reason == "near_duplicate"]
    assert len(lost) > 5
    assert questions
    made = regate(strict, threshold(everything(), 0.6), tmp_path / "new")
    kept = {dialogue.job: dialogue for dialogue in made.dialogues()}
    assert {row.job for row in lost} <= set(kept)
    assert all(kept[dialogue.job] == dialogue for dialogue in Run(strict).dialogues())
    assert len(kept) == N + len(lost)
    assert all(turn.aligned for row in lost for turn in kept[row.job].turns)
    back = {sample.job for sample in made.refusals()}
    assert any(row.job in back for row in questions)
    assert made.funnel("refusals").groups == Run(strict).funnel("refusals").groups, "groups stay exact"
    # The texts are those of a run that had these gates from the start.
    fresh = generate_dialogues(threshold(everything(), 0.6), run=tmp_path / "fresh", n=N)
    for dialogue in fresh.dialogues():
        assert (kept[dialogue.job].turns, kept[dialogue.job].key) == (dialogue.turns, dialogue.key)


def test_a_sample_whose_seed_is_gone_from_the_file_of_its_group_is_kept_as_it_was(tmp_path: Path) -> None:
    file, plain = tmp_path / "own.jsonl", threshold(everything(), STRICT)
    fields = '"category":"fraud","source":"own","license":"CC0-1.0"'
    lines = [f'{{"id":"s{i}","query":"A concern of kind {i}",{fields}}}\n' for i in range(20)]
    file.write_text("".join(lines))
    assert plain.refusals
    groups = {"own": RefusalGroup(n=8, about="harmful requests", seeds=(str(file),))}
    recipe = structs.replace(plain, refusals=structs.replace(plain.refusals, groups=groups))
    old = generate_dialogues(recipe, run=tmp_path / "old", n=1)
    lost = [row for row in old.ended("refusals") if row.reason == "near_duplicate"]
    assert any(row.job >= 8 for row in lost), "beyond the jobs of one seed"
    file.write_text(lines[0])
    made = regate(old.path, threshold(recipe, 0.6), tmp_path / "new")
    assert list(made.ended("refusals")) == list(old.ended("refusals"))
    assert list(made.refusals()) == list(old.refusals())


def test_new_rules_hold_dialogues_and_twins(old: Path, tmp_path: Path) -> None:
    phrase = " ".join(next(Run(old).twins()).turns[0].user.text.split()[:3]).lower()
    recipe = gated(everything(), rules=RuleSettings(image_openings=(phrase,)))
    made = regate(old, recipe, tmp_path / "new")
    assert not any(turn.user.text.lower().startswith(phrase) for twin in made.twins() for turn in twin.turns)
    assert made.funnel("twins").ended["rejected gates leaked_image_description"] >= 1
    assert len(list(made.twins())) < len(list(Run(old).twins()))


def test_no_gates_at_all_and_other_quotas(old: Path, tmp_path: Path) -> None:
    none = Gates(rules=None, images=None, coverage=None, duplicates=None)
    made = regate(old, structs.replace(everything(), gates=none), tmp_path / "none")
    assert {d.job for d in made.dialogues()} >= {d.job for d in Run(old).dialogues()}
    one = CoverageSettings(strategy={"role_play": 1.0})
    made = regate(old, gated(everything(), coverage=one), tmp_path / "one")
    assert {dialogue.strategy for dialogue in made.dialogues()} == {"role_play"}
    assert made.funnel().ended["rejected gates strategy_full"] > 20


# --- it resumes ------------------------------------------------------------------------------------------------------


def test_no_call_is_made_and_going_on_pays_for_new_jobs_alone(tmp_path: Path) -> None:
    with scripted_server() as server:
        spec = f"openai:scripted@{server.url}"
        recipe = everything(attacker=spec, judge=spec, responder=spec, victims=[spec], concurrency=8)
        run = generate_dialogues(recipe, run=tmp_path / "run", n=16)
        paid = server.requests
        stricter = threshold(recipe, STRICT)
        made = regate(run.path, stricter, tmp_path / "new")
        assert server.requests == paid
    # The servers are gone, and it works all the same.
    offline = regate(run.path, stricter, tmp_path / "offline")
    assert digest(offline.path) == digest(made.path)
    with scripted_server() as server:
        spec = f"openai:scripted@{server.url}"
        moved = threshold(everything(attacker=spec, judge=spec, responder=spec, victims=[spec], concurrency=8), STRICT)
        filled = generate_dialogues(moved, run=made.path, n=16)
        bill = len(journal_keys(made.path)) - len(journal_keys(run.path))
        painted = sum(row["role"] == "painter" for row in rows(made.path / "journal" / "main.jsonl"))
        assert 0 < server.requests <= bill <= server.requests + painted
    assert filled.funnel().accepted == 16
    keys = journal_keys(made.path)
    assert len(keys) == len(set(keys))


def test_filled_up_it_is_what_a_fresh_run_would_be_but_for_ids(old: Path, tmp_path: Path) -> None:
    recipe = threshold(everything(), STRICT)
    filled = generate_dialogues(recipe, run=regate(old, recipe, tmp_path / "new").path, n=N)
    fresh = generate_dialogues(recipe, run=tmp_path / "fresh", n=N)
    for one, other in ((filled.dialogues(), fresh.dialogues()), (filled.twins(), fresh.twins())):
        plain = [
            [structs.replace(d, id="", twin_of="", provenance=structs.replace(d.provenance, recipe="")) for d in found]
            for found in (one, other)
        ]
        assert plain[0] == plain[1]
    for line in ("", "refusals", "twins"):
        assert filled.funnel(line) == fresh.funnel(line)
    digests = {d.provenance.recipe for d in filled.dialogues()}
    assert digests == {Run(old).manifest.digest, filled.manifest.digest}, (
        "each names the recipe that it was grown under"
    )


def test_gating_twice_is_gating_once(old: Path, tmp_path: Path) -> None:
    middle = regate(old, threshold(everything(), 0.22), tmp_path / "middle")
    twice = regate(middle.path, threshold(everything(), STRICT), tmp_path / "twice")
    once = regate(old, threshold(everything(), STRICT), tmp_path / "once")
    assert digest(twice.path)["dialogues.jsonl"] == digest(once.path)["dialogues.jsonl"]


# --- the old run -----------------------------------------------------------------------------------------------------


def test_the_old_run_is_only_read(old: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(old, run)
    (run / ".lock").unlink(missing_ok=True)
    before = everything_in(run)
    for folder in (run, *(p for p in run.rglob("*") if p.is_dir())):
        folder.chmod(0o555)
    made = regate(run, threshold(everything(), STRICT), tmp_path / "new")
    generate_dialogues(threshold(everything(), STRICT), run=made.path, n=N)
    for folder in (run, *(p for p in run.rglob("*") if p.is_dir())):
        folder.chmod(0o755)
    assert everything_in(run) == before


def test_images_are_held_once_and_either_run_may_go(old: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(old, run)
    made = regate(run, everything(), tmp_path / "new")
    image = next(ref for dialogue in made.dialogues() for ref in dialogue.images)
    ours, theirs = (path / "images" / image[:2] / image for path in (made.path, run))
    assert ours.samefile(theirs), "one copy on the disk"
    sound = ours.read_bytes()
    shutil.rmtree(made.path)
    assert theirs.read_bytes() == sound, "either run may go"


def test_an_incomplete_run_can_be_gated(tmp_path: Path) -> None:
    recipe = everything()
    process = started("generate", "--n", "5000", "--run", "./run", cwd=tmp_path)
    path = tmp_path / "run" / "dialogues.jsonl"
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 30):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    recipe = load_recipe(bundled("pipelines/demo.yaml"))
    # A kill between two files leaves a job out in the middle, and a torn line at the end.
    path.write_bytes(path.read_bytes()[:-40])
    rejected = tmp_path / "run" / "rejected.jsonl"
    if rejected.exists():
        rejected.write_bytes(b"".join(rejected.read_bytes().splitlines(keepends=True)[:1]))
    before = everything_in(tmp_path / "run")
    made = regate(tmp_path / "run", recipe, tmp_path / "new")
    assert everything_in(tmp_path / "run") == before
    jobs = sorted([d.job for d in made.dialogues()] + [row.job for row in made.ended()])
    assert jobs == list(range(len(jobs)))
    assert jobs
    generate_dialogues(recipe, run=made.path, n=60)
    generate_dialogues(recipe, run=tmp_path / "fresh", n=60)
    assert digest(made.path) == digest(tmp_path / "fresh")


def test_an_exhausted_run_with_quotas_can_be_loosened_and_resumes(tmp_path: Path) -> None:
    one = CoverageSettings(category=None, strategy={"role_play": 1.0})
    recipe = structs.replace(gated(everything(), coverage=one), refusals=None, twins=None, samples=1)
    generate_dialogues(recipe, run=tmp_path / "run", n=5)
    made = regate(tmp_path / "run", gated(recipe, coverage=None), tmp_path / "new")
    # What no quota allowed was never grown, so it cannot come back; what was accepted does.
    assert {d.strategy for d in made.dialogues()} == {"role_play"}
    assert len(list(made.dialogues())) >= 5
    assert made.funnel().ended["rejected gates strategy_full"] > 5
    filled = generate_dialogues(gated(recipe, coverage=None), run=made.path, n=20)
    assert len({d.strategy for d in filled.dialogues()}) == 5


# --- refused ---------------------------------------------------------------------------------------------------------


def stage(recipe: Recipe) -> Recipe:
    return structs.replace(recipe, converse=structs.replace(recipe.converse, tries=2))


def larger(recipe: Recipe) -> Recipe:
    assert recipe.refusals
    groups = {name: structs.replace(group, n=group.n + 1) for name, group in recipe.refusals.groups.items()}
    return structs.replace(recipe, refusals=structs.replace(recipe.refusals, groups=groups))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: override(r, judge="scripted:flawless"), "cast.judge.model: scripted:demo -> scripted:flawless"),
        (stage, "converse.tries: 3 -> 2"),
        (lambda r: structs.replace(r, seed=7), "seed: 0 -> 7"),
        (lambda r: structs.replace(r, refusals=None), "refusals"),
        (larger, "refusals.groups.finance.n: 5 -> 6"),
        (lambda r: structs.replace(r, twins=None), "twins"),
        (lambda r: structs.replace(r, respond=None), "respond"),
        (lambda r: override(r, victims=["scripted:eager"]), "cast.victim"),
    ],
)
def test_of_a_recipe_gates_alone_are_used_and_what_else_differs_is_said(
    change: Callable[[Recipe], Recipe], says: str, old: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    made = regate(old, change(everything()), tmp_path / "new", said.append)
    assert len(said) == 1
    assert says in said[0]
    assert digest(made.path) == digest(old)
    assert made.manifest.digest == Run(old).manifest.digest


def test_what_cannot_be_gated_is_said_in_one_line_and_nothing_is_written(old: Path, tmp_path: Path) -> None:
    recipe = everything()
    assert "no run there" in refusal(lambda: regate(tmp_path / "none", recipe, tmp_path / "new"))
    (tmp_path / "there").mkdir()
    assert "already" in refusal(lambda: regate(old, recipe, tmp_path / "there"))
    assert "already" in refusal(lambda: regate(old, recipe, old))
    assert "is inside the run" in refusal(lambda: regate(old, recipe, old / "images" / "new"))
    held = lock(old)
    assert "another process" in refusal(lambda: regate(old, recipe, tmp_path / "new"))
    held.release()
    unknown = gated(recipe, coverage=CoverageSettings(strategy={"role_pla": 1.0}))
    assert "did you mean 'role_play'" in refusal(lambda: regate(old, unknown, tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    done = cli("regate", str(old), "--pipeline", "none.yaml", "--out", "./new", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_damaged_image_is_named_and_leaves_nothing_half_written(old: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(old, run)
    image = next(d.images[0] for d in Run(run).dialogues() if len(d.images) > 1)
    (run / "images" / image[:2] / image).write_bytes(b"damaged")
    with pytest.raises(InputError, match="corrupt"):
        regate(run, everything(), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_kill_in_the_middle_leaves_no_run_and_the_next_one_works(strict: Path, tmp_path: Path) -> None:
    shutil.copytree(strict, tmp_path / "run")
    recipe = tmp_path / "loose.yaml"
    text = bundled("pipelines/aligned.yaml").read_text().replace("../", f"{bundled('pipelines').parent}/")
    for n in (30, 10):
        text = text.replace(f"n: {n}", f"n: {n // 2}") if n == 30 else text.replace("      n: 10", "      n: 5")
    recipe.write_text(text.replace("refusals:\n", "refusals:\n  tries: 1\n"))
    before = everything_in(tmp_path / "run")
    words = ("regate", "./run", "--pipeline", str(recipe), "--out", "./new")
    killed = 0
    for size in (1, 5, 12):
        process = started(*words, cwd=tmp_path)
        staged = tmp_path / ".new.regating" / "dialogues.jsonl"
        while process.poll() is None and not (staged.exists() and staged.stat().st_size >= size * 4096):
            time.sleep(0.001)
        process.kill()
        process.communicate()
        if (tmp_path / "new").exists():
            shutil.rmtree(tmp_path / "new")
        else:
            killed += 1
        assert everything_in(tmp_path / "run") == before
    assert killed
    done = cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".new.regating").exists()
    assert digest(tmp_path / "new") == digest(regate(strict, load_recipe(recipe), tmp_path / "other").path)
    assert set(OUTCOMES) >= {path.name for path in (tmp_path / "new").glob("*.jsonl")} - {"seeds.jsonl"}
