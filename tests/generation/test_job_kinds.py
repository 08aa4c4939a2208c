"""All kinds of job of a run together (dialogues, aligned answers, refusals, twins), under kills and other orders."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from msgspec import structs

from intersafe.errors import SeedsExhausted, ServiceGone
from intersafe.generation import dialogues
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.grow import grow_dialogue
from intersafe.generation.job_kind import GateInputs, JobInputs, JobKind, KindRun
from intersafe.generation.kinds import DIALOGUES, KINDS
from intersafe.generation.regate import regate
from intersafe.generation.scheduler import FAILURES
from intersafe.generation.shortfall import all_tried
from intersafe.generation.streak import HOPELESS, LosingStreak
from intersafe.generation.twins import TwinGates
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Recipe, RefusalGroup, TwinSettings
from intersafe.records import Dialogue, Job
from intersafe.run.directory import Run
from intersafe.run.funnel import Funnel
from intersafe.run.kinds import RECORDS, records_of
from intersafe.storage.bundled import bundled
from tests.support.runs import cli, digest, journal_keys, rows, started
from tests.support.seeds import seeds_in
from tests.support.servers.scripted_server import Body, Hook, asks_for, scripted_server, text_of

N = 60
TWINS = 15


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage and kind of job, asking once only, so that every kind loses some of its jobs."""
    path = tmp_path_factory.mktemp("recipe") / "all.yaml"
    text = bundled("pipelines/aligned.yaml").read_text()
    text = text.replace("../", f"{bundled('pipelines').parent}/")
    path.write_text(text.replace("refusals:\n", "converse: {tries: 1}\nrefusals:\n  tries: 1\n"))
    return path


@pytest.fixture(scope="module")
def reference(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, one dialogue at a time."""
    path = tmp_path_factory.mktemp("reference") / "run"
    generate_dialogues(override(load_recipe(pipeline), concurrency=1), run=path, n=N)
    return path


def everything(url: str = "", **changes: Any) -> Recipe:
    """The bundled recipe with every kind of job; where a URL is given, everything but the painter behind it."""
    recipe = load_recipe(bundled("pipelines/aligned.yaml"))
    spec = f"openai:scripted@{url}"
    models = {"attacker": spec, "judge": spec, "responder": spec, "victims": [spec]} if url else {}
    return override(recipe, **(models | changes))


def unique(keys: list[str]) -> bool:
    """True if nothing was paid for twice."""
    return len(keys) == len(set(keys))


# --- the same bytes --------------------------------------------------------------------------------------------------


def test_every_kind_has_its_number_and_loses_some_jobs(reference: Path) -> None:
    summary = Run(reference).summary
    assert summary is not None
    assert summary.complete
    assert summary.funnel.accepted == len(list(Run(reference).dialogues())) == N
    assert summary.refusals.groups == {"general": 30, "health": 10, "finance": 10}
    assert summary.twins.accepted == len(list(Run(reference).twins())) == TWINS
    assert all(funnel.ended for funnel in (summary.funnel, summary.refusals, summary.twins))
    assert unique(journal_keys(reference))


@pytest.mark.parametrize("concurrency", [7, 64, 512])
def test_concurrency_changes_no_byte_of_any_line(
    concurrency: int, pipeline: Path, reference: Path, tmp_path: Path
) -> None:
    generate_dialogues(override(load_recipe(pipeline), concurrency=concurrency), run=tmp_path / "run", n=N)
    assert digest(tmp_path / "run") == digest(reference)
    assert unique(journal_keys(tmp_path / "run"))


def test_growing_in_steps_changes_no_byte_of_any_line(pipeline: Path, reference: Path, tmp_path: Path) -> None:
    recipe = load_recipe(pipeline)
    twins = []
    for n in (10, 25, N):
        generate_dialogues(recipe, run=tmp_path / "run", n=n)
        twins.append(len(list(Run(tmp_path / "run").twins())))
    assert twins == [2, 6, TWINS]
    assert digest(tmp_path / "run") == digest(reference)
    assert unique(journal_keys(tmp_path / "run"))


def entries(run: Path) -> int:
    """Replies in the journal so far."""
    path = run / "journal" / "main.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_ten_kills_change_no_byte_of_any_kind(pipeline: Path, reference: Path, tmp_path: Path) -> None:
    dice, run = random.Random(5), tmp_path / "run"
    whole, killed, twins = entries(reference), 0, 0
    for left in reversed(range(11)):
        stop = whole * (10 - left + dice.random()) / 10.1
        words = ("generate", "--pipeline", str(pipeline), "--n", str(N), "--run", "./run", "--concurrency", "16")
        process = started(*words, cwd=tmp_path)
        while left and process.poll() is None and entries(run) <= stop:
            time.sleep(0.002)
        if left and process.poll() is None:
            process.kill()
            killed += 1
        process.communicate(timeout=100)
        twins += not (run / "summary.json").exists() and b'"line":"twins"' in (run / "journal/main.jsonl").read_bytes()
        assert left == 0 or not (run / "summary.json").exists() or process.returncode == 0
    assert process.returncode == 0
    assert killed >= 8
    assert twins, "no kill came while the twins grew"
    assert digest(run) == digest(reference)
    assert unique(journal_keys(run))
    summary = Run(run).summary
    assert summary is not None
    assert (summary.funnel.accepted, summary.refusals.accepted, summary.twins.accepted) == (N, 50, TWINS)


def test_a_finished_run_is_answered_at_once_without_a_call_or_a_byte(tmp_path: Path) -> None:
    with scripted_server() as server:
        recipe = everything(server.url)
        generate_dialogues(recipe, run=tmp_path / "run", n=12)
        before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file()}
        paid = server.requests
        generate_dialogues(recipe, run=tmp_path / "run", n=12)
        assert server.requests == paid
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.parametrize("line", ["refusals", "twins"])
def test_rows_that_are_lost_from_a_kind_come_back_unpaid(line: str, tmp_path: Path) -> None:
    recipe = everything()
    run = generate_dialogues(recipe, run=tmp_path / "run", n=20)
    whole, keys = digest(run.path), journal_keys(run.path)
    data = (run.path / f"{line}.jsonl").read_bytes()
    (run.path / f"{line}.jsonl").write_bytes(data[: len(data) // 2])
    assert run.summary is None
    generate_dialogues(recipe, run=run.path, n=20)
    assert digest(run.path) == whole
    assert journal_keys(run.path) == keys


# --- aligned answers and twins ---------------------------------------------------------------------------------------


def test_every_turn_has_its_aligned_answer_and_recovers_only_after_an_unsafe_turn(reference: Path) -> None:
    run = Run(reference)
    recoveries = 0
    for dialogue in [*run.dialogues(), *run.twins()]:
        unsafe = False
        for turn in dialogue.turns:
            assert turn.aligned is not None
            assert turn.aligned.text
            assert turn.aligned.verdict.safety == "safe"
            assert turn.aligned.recovery == unsafe
            recoveries += turn.aligned.recovery
            unsafe |= turn.verdict.safety == "unsafe"
    assert recoveries > 10
    assert all(twin.first_unsafe_turn is None for twin in run.twins())


def test_twins_belong_to_accepted_dialogues_and_have_their_images(reference: Path) -> None:
    run = Run(reference)
    accepted = {dialogue.id: dialogue for dialogue in run.dialogues()}
    twins = list(run.twins())
    assert len({twin.twin_of for twin in twins}) == len({twin.id for twin in twins}) == TWINS
    assert not {twin.id for twin in twins} & set(accepted)
    for twin in twins:
        original = accepted[twin.twin_of]
        assert list(accepted).index(original.id) == twin.job
        assert [turn.user.images for turn in twin.turns] == [turn.user.images for turn in original.turns]
        assert [turn.origins for turn in twin.turns] == [turn.origins for turn in original.turns]
        assert (twin.victim, twin.seed, twin.key) == (original.victim, original.seed, f"{original.key}/twin")
        assert twin.goal
    assert any(twin.images for twin in twins)


def twins_of(hook: Hook, path: Path, n: int, ratio: float) -> tuple[Run, int]:
    """A run with twins and nothing else, and how many requests it took."""
    with scripted_server(hook, profile="flawless") as server:
        recipe = everything(server.url, concurrency=8)
        recipe = structs.replace(recipe, refusals=None, respond=None, twins=TwinSettings(ratio=ratio))
        return generate_dialogues(recipe, run=path, n=n), server.requests


def test_twins_that_are_all_rejected_leave_a_complete_run_that_says_so(tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        return '{"goal": "A goal", "messages": ["One message"]}' if asks_for(body) == "twin" else None

    run, requests = twins_of(hook, tmp_path / "run", 6, 0.5)
    assert requests > 0
    assert list(run.twins()) == []
    assert run.funnel("twins").jobs == 6
    summary = run.summary
    assert summary is not None
    assert summary.complete
    again, requests = twins_of(hook, tmp_path / "run", 6, 0.5)
    assert requests == 0
    assert again.funnel("twins").ended == {"rejected twin message_count": 6}
    # More dialogues are more chances: what was wanted before is wanted still.
    more, _ = twins_of(lambda _: None, tmp_path / "run", 12, 0.5)
    assert [twin.job for twin in more.twins()] == [6, 7, 8, 9, 10, 11]


def test_the_terminal_hears_of_missing_twins(tmp_path: Path) -> None:
    text = bundled("pipelines/aligned.yaml").read_text().replace("../", f"{bundled('pipelines').parent}/")
    head = text.partition("refusals:\n")[0].replace("ratio: 0.25", "ratio: 1.0")
    (tmp_path / "twins.yaml").write_text(head.replace("respond: {tries: 3}\n", ""))
    done = cli("generate", "--pipeline", "twins.yaml", "--n", "20", "--run", "./run", cwd=tmp_path)
    assert done.returncode == 0
    kept = len(rows(tmp_path / "run" / "twins.jsonl"))
    assert 0 < kept < 20
    assert f"{kept} of 20 twins: every job was tried (" in done.stderr


@pytest.mark.parametrize("lost", [HOPELESS, HOPELESS - 1])
def test_twins_that_stop_at_a_losing_streak_say_so(reference: Path, lost: int) -> None:
    recipe, run = everything(), Run(reference)
    twins = KindRun(
        kind=KINDS["twins"],
        inputs=JobInputs(recipe, ()),
        wanted=20,
        gates=TwinGates(GateInputs(recipe, {}, lambda reference: 0, reference)),
        funnel=Funnel(jobs=lost + 3, accepted=3, ended={"rejected twin unsafe": lost}),
        streak=LosingStreak(lost=lost),
        first=lost + 3,
        jobs=5000,
        queue=iter(()),
        concurrency=1,
    )
    stopped = (
        f"3 of 20 twins, and the last {lost} jobs were all lost ({lost} rejected twin unsafe); fix what loses them"
    )
    used_up = f"3 of 20 twins: every job was tried ({lost} rejected twin unsafe)"
    assert all_tried(twins, run).reason == (stopped if lost == HOPELESS else used_up)


def test_a_longer_run_that_uses_up_its_jobs_keeps_and_counts_its_twins(tmp_path: Path) -> None:
    recipe = everything(seeds=(str(seeds_in(tmp_path, 12)),), samples=1, strategies=("role_play",))
    recipe = structs.replace(recipe, refusals=None)
    generate_dialogues(recipe, run=tmp_path / "run", n=8)
    before = (tmp_path / "run" / "twins.jsonl").read_bytes()
    with pytest.raises(SeedsExhausted, match="jobs are used up"):
        generate_dialogues(recipe, run=tmp_path / "run", n=5000)
    run = Run(tmp_path / "run")
    assert run.summary is not None
    assert not run.summary.complete
    assert run.summary.twins.accepted == round(0.25 * run.summary.funnel.accepted) > 2
    assert (tmp_path / "run" / "twins.jsonl").read_bytes().startswith(before)


# --- refusals --------------------------------------------------------------------------------------------------------


def groups(recipe: Recipe, samples: int, **sizes: int) -> Recipe:
    """The recipe with refusals in those groups alone, answered by templates so that no responder is asked."""
    assert recipe.refusals
    seeds = recipe.refusals.groups["health"].seeds
    named = {"health": ("health_consultation",), "finance": ("financial_advice",)}
    made = {name: RefusalGroup(n, f"{name} questions", "templates", named[name], seeds) for name, n in sizes.items()}
    return structs.replace(recipe, refusals=structs.replace(recipe.refusals, groups=made, samples=samples))


def of_group(body: Body, group: str) -> bool:
    """True if a request belongs to a refusal sample of that group."""
    return any(f"{group} questions" in text_of(message) for message in body["messages"])


def test_a_group_that_the_judge_never_passes_is_named_and_the_dialogues_are_kept(tmp_path: Path) -> None:
    answer = '{"in_group": true, "refuses": false, "names_harm": true, "repeats_detail": false, "reason": ""}'

    def hook(body: Body) -> str | None:
        kind = asks_for(body)
        return answer if kind == "refusalcheck" and of_group(body, "finance") else None

    with scripted_server(hook, profile="flawless") as server:
        recipe = structs.replace(groups(everything(server.url), 1, health=3, finance=3), twins=None, respond=None)
        said = []
        for _ in range(2):
            with pytest.raises(SeedsExhausted) as caught:
                generate_dialogues(recipe, run=tmp_path / "run", n=5)
            said.append((str(caught.value), server.requests, digest(tmp_path / "run")))
    assert said[0] == said[1]
    assert caught.value.exit_code == 3
    assert "finance 0 of 3 (22 rejected refuse not_refusal)" in said[0][0]
    assert "health" not in said[0][0]
    assert len(list(Run(tmp_path / "run").dialogues())) == 5
    assert Run(tmp_path / "run").funnel("refusals").groups == {"health": 3}


def test_jobs_of_a_complete_group_are_not_paid_for(tmp_path: Path) -> None:
    lost = '{"in_group": false, "refuses": true, "names_harm": true, "repeats_detail": false, "reason": ""}'

    def hook(body: Body) -> str | None:
        return lost if asks_for(body) == "refusalcheck" and of_group(body, "finance") else None

    with scripted_server(hook, profile="flawless") as server:
        recipe = structs.replace(groups(everything(server.url), 4, health=2, finance=2), twins=None, respond=None)
        with pytest.raises(SeedsExhausted):
            generate_dialogues(override(recipe, concurrency=8), run=tmp_path / "run", n=3)
        asked = sum(asks_for(body) == "refusalcheck" and of_group(body, "health") for body in server.bodies)
    assert asked == 2
    funnel = Run(tmp_path / "run").funnel("refusals")
    assert funnel.ended == {"rejected refuse wrong_group": 88, "rejected gates group_complete": 86}


def test_a_complete_group_reads_the_same_whatever_came_of_its_jobs(tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        odd = body["seed"] % 2 or (of_group(body, "finance") and body["seed"] % 8)
        return "no answer" if asks_for(body) == "refusalcheck" and odd else None

    with scripted_server(hook, profile="flawless") as server:
        recipe = structs.replace(groups(everything(server.url), 8, health=6, finance=6), twins=None, respond=None)
        assert recipe.refusals
        recipe = structs.replace(recipe, refusals=structs.replace(recipe.refusals, tries=1))
        digests = []
        for concurrency in (1, 256):
            path = tmp_path / str(concurrency)
            generate_dialogues(override(recipe, concurrency=concurrency), run=path, n=3)
            digests.append(digest(path))
    assert digests[0] == digests[1]
    assert Run(path).funnel("refusals").ended["rejected gates group_complete"] > 10


def test_jobs_that_were_skipped_do_not_hide_that_all_others_fail(tmp_path: Path) -> None:
    def hook(body: Body) -> web.Response | None:
        if of_group(body, "finance"):
            return web.json_response({"error": {"message": "no such model"}}, status=400)
        return None

    with scripted_server(hook, profile="flawless") as server:
        recipe = structs.replace(groups(everything(server.url), 8, health=1, finance=1), twins=None, respond=None)
        with pytest.raises(ServiceGone, match=f"{FAILURES} jobs in a row failed"):
            generate_dialogues(override(recipe, concurrency=8), run=tmp_path / "run", n=3)
    failed = rows(tmp_path / "run" / "refusals-failed.jsonl")
    assert len(failed) <= 1, "nothing but the one before the health sample is decided"


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_finds_what_is_there_and_names_what_is_not(reference: Path, tmp_path: Path) -> None:
    twin, sample = next(Run(reference).twins()), next(iter(Run(reference).accepted("refusals")))
    assert isinstance(twin, Dialogue)
    for words, text in (
        (("--refusal", "1"), sample.id),
        (("--refusal", sample.id), "question"),
        (("--twin", "1"), f"benign twin of {twin.twin_of}"),
        (("--twin", twin.id), twin.id),
        (("--dialogue", twin.twin_of), "what each role saw"),
    ):
        done = cli("show", str(reference), *words, cwd=tmp_path)
        assert done.returncode == 0
        assert text in done.stdout
    assert "15 twins" in done.stdout
    assert "50 refusals: finance 10 of 10, general 30 of 30, health 10 of 10" in done.stdout
    for words in (("--refusal", "51"), ("--refusal", "nope"), ("--twin", "16"), ("--twin", "x"), ("--dialogue", "61")):
        done = cli("show", str(reference), *words, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert words[1] in done.stderr


def test_every_prompt_can_be_rendered_with_the_demo(tmp_path: Path) -> None:
    from intersafe.generation.rehearse import rehearse
    from intersafe.seeds.load import load_seeds
    from intersafe.templates.load import load_prompts

    recipe = load_recipe(bundled("pipelines/demo.yaml"))
    seed = load_seeds(recipe.seed_paths).seeds[0].id
    names = list(load_prompts(Path(recipe.prompts)).prompts)
    assert len(names) > 15
    for name in names:
        call = rehearse(recipe, name, seed, 1)
        assert call.messages[-1].text, name


def test_what_is_listed_as_plain_text_is_told_apart(tmp_path: Path) -> None:
    counts = Counter(cli("prompts", "list", cwd=tmp_path).stdout.split())
    assert counts["plain"] >= 1


# --- one more kind ---------------------------------------------------------------------------------------------------


def single_turns(inputs: JobInputs, first: int) -> Iterator[Job]:
    """Every dialogue job again, with one turn."""
    for job in dialogues.all_jobs(inputs, first):
        yield structs.replace(job, key=f"{job.key}/single", turns=1, pictures=0)


SINGLE = records_of("single", "single-turn dialogue", Job, Dialogue)
"""A baseline for the attack: one single-turn dialogue for every four dialogues."""


@pytest.fixture
def one_more_kind(monkeypatch: pytest.MonkeyPatch) -> JobKind:
    kind = JobKind(
        records=SINGLE,
        wanted=lambda recipe, n: {"": n // 4},
        job_count=dialogues.count,
        jobs=single_turns,
        grow=grow_dialogue,
        gates=TwinGates,
        met=dialogues.met,
        shortfall=all_tried,
        rehearsed=dialogues.rehearsed,
        divisor=4,
        may_fall_short=True,
    )
    monkeypatch.setitem(RECORDS, SINGLE.name, SINGLE)
    monkeypatch.setitem(KINDS, SINGLE.name, kind)
    return kind


def test_a_new_kind_is_one_entry_in_each_table(one_more_kind: JobKind, tmp_path: Path) -> None:
    recipe = structs.replace(everything(), refusals=None, respond=None)
    first = generate_dialogues(recipe, run=tmp_path / "run", n=8)
    made = list(first.accepted("single"))
    assert [len(one.turns) for one in made] == [1, 1]
    assert b'"line":"single"' in (first.path / "journal/main.jsonl").read_bytes()
    assert first.funnel("single").accepted == 2
    run = generate_dialogues(recipe, run=tmp_path / "run", n=16)
    whole = generate_dialogues(override(recipe, concurrency=1), run=tmp_path / "whole", n=16)
    assert [one.id for one in run.accepted("single")] == [one.id for one in whole.accepted("single")]
    assert list(run.accepted("single"))[:2] == made
    assert unique(journal_keys(run.path))
    again = regate(run.path, recipe, tmp_path / "again")
    assert (again.path / SINGLE.accepted).read_bytes() == (run.path / SINGLE.accepted).read_bytes()


def test_every_kind_has_its_records_and_dialogues_come_first() -> None:
    assert list(KINDS) == list(RECORDS)
    assert all(kind.records is RECORDS[name] for name, kind in KINDS.items())
    assert next(iter(KINDS)) == DIALOGUES.name
    assert len({name for records in RECORDS.values() for name in records.files}) == 3 * len(RECORDS)
