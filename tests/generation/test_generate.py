"""The invariants of a run, under kills, other orders, changed inputs and misbehaving models."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from intersafe.errors import InputError, SeedsExhausted, ServiceGone
from intersafe.generation.generate import generate_dialogues
from intersafe.recipe.gates import Gates
from intersafe.recipe.sections import Member, PlanSettings, Recipe
from intersafe.records import Dialogue
from intersafe.run.directory import Run
from tests.support.runs import cli, demo, digest, journal_keys, rows, started, whole_demo
from tests.support.seeds import seeds_in
from tests.support.servers.scripted_server import Body, asks_for, images_of, scripted_server, text_of

N = 60
WHOLE = 400


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, one dialogue at a time."""
    path = tmp_path_factory.mktemp("reference") / "run"
    generate_dialogues(whole_demo(concurrency=1), run=path, n=WHOLE)
    return path


def over_http(url: str, **changes: Any) -> Recipe:
    """The demo recipe with every member of the cast behind one URL."""
    spec = f"openai:scripted@{url}"
    return demo(**({"attacker": spec, "judge": spec, "victims": [spec]} | changes))


# --- exact, balanced, the same bytes -------------------------------------------------------------------------------


def test_n_is_exact_and_ids_are_unique(reference: Path) -> None:
    made = list(Run(reference).dialogues())
    assert len(made) == WHOLE
    assert len({dialogue.id for dialogue in made}) == WHOLE
    assert len({dialogue.key for dialogue in made}) == WHOLE
    assert [d.job for d in made] == sorted(d.job for d in made)
    assert all(len(dialogue.turns) == len(dialogue.plan.steps) for dialogue in made)
    assert all(dialogue.provenance.scripted for dialogue in made)
    counts = Counter(dialogue.seed.category for dialogue in made)
    assert len(counts) == 14
    assert max(counts.values()) - min(counts.values()) <= 10
    assert 3.8 <= sum(len(dialogue.turns) for dialogue in made) / WHOLE <= 4.2


def test_any_prefix_is_what_a_shorter_run_keeps(reference: Path, tmp_path: Path) -> None:
    generate_dialogues(whole_demo(), run=tmp_path / "run", n=100)
    short = (tmp_path / "run" / "dialogues.jsonl").read_bytes()
    assert (reference / "dialogues.jsonl").read_bytes().startswith(short)
    generate_dialogues(whole_demo(), run=tmp_path / "run", n=WHOLE)
    assert digest(tmp_path / "run") == digest(reference)


@pytest.mark.parametrize("concurrency", [7, 64, 300])
def test_concurrency_changes_no_byte(concurrency: int, reference: Path, tmp_path: Path) -> None:
    generate_dialogues(whole_demo(concurrency=concurrency), run=tmp_path / "run", n=WHOLE)
    assert digest(tmp_path / "run") == digest(reference)


def test_replies_in_any_order_change_no_byte(tmp_path: Path) -> None:
    dice = random.Random(3)

    def slow(_: Body) -> None:
        server.delay = dice.choice((0.0, 0.001, 0.02))

    with scripted_server(slow) as server:
        generate_dialogues(over_http(server.url, concurrency=32), run=tmp_path / "many", n=40)
        generate_dialogues(over_http(server.url, concurrency=1), run=tmp_path / "one", n=40)
    assert digest(tmp_path / "many") == digest(tmp_path / "one")


def lines(path: Path) -> int:
    """Whole lines of a file that may not be there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_ten_kills_at_random_moments_change_no_byte(reference: Path, tmp_path: Path) -> None:
    dice = random.Random(11)
    killed = 0
    for _ in range(60):
        more = lines(tmp_path / "run" / "dialogues.jsonl") + dice.randrange(30)
        process = started("generate", "--n", str(WHOLE), "--run", "./run", cwd=tmp_path)
        while killed < 10 and process.poll() is None and lines(tmp_path / "run" / "dialogues.jsonl") <= more:
            time.sleep(dice.random() * 0.01)
        if killed < 10:
            process.kill()
            killed += 1
        process.communicate(timeout=100)
        if process.returncode == 0:
            break
    assert killed == 10
    assert digest(tmp_path / "run") == digest(reference)
    keys = journal_keys(tmp_path / "run")
    assert len(keys) == len(set(keys))
    assert Run(tmp_path / "run").funnel() == Run(reference).funnel()


def test_a_kill_costs_no_more_than_the_calls_in_flight_and_one_group(tmp_path: Path) -> None:
    with scripted_server(delay=0.02) as server:
        words = ["generate", "--n", "40", "--run", "./run", "--concurrency", "16"]
        for role in ("--attacker", "--victim", "--judge"):
            words += [role, f"openai:scripted@{server.url}"]
        process = started(*words, cwd=tmp_path)
        while server.requests < 300 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        killed_at = server.requests
        assert 300 <= killed_at < 600
        assert cli(*words, cwd=tmp_path).returncode == 0
        again = sum(count - 1 for count in server.seen.values())
    assert again <= 16 + 64
    assert len(rows(tmp_path / "run" / "dialogues.jsonl")) == 40


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_cleanly_and_the_same_command_resumes(how: signal.Signals, tmp_path: Path) -> None:
    process = started("generate", "--n", "11270", "--run", "./run", cwd=tmp_path)
    while not lines(tmp_path / "run" / "dialogues.jsonl") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command resumes" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "summary.json").exists()
    for name in ("dialogues.jsonl", "journal/main.jsonl"):
        assert (tmp_path / "run" / name).read_bytes().endswith(b"\n")
    more = lines(tmp_path / "run" / "dialogues.jsonl") + 20
    assert cli("generate", "--n", str(more), "--run", "./run", cwd=tmp_path).returncode == 0
    generate_dialogues(whole_demo(), run=tmp_path / "whole", n=more)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


@pytest.mark.parametrize("name", ["dialogues.jsonl", "rejected.jsonl", "journal/main.jsonl"])
def test_a_file_cut_off_anywhere_is_healed(name: str, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    generate_dialogues(whole_demo(), run=run, n=150)
    data = (run / name).read_bytes()
    dice = random.Random(name)
    for _ in range(4):
        (run / name).write_bytes(data[: dice.randrange(len(data))])
        (run / "summary.json").unlink()
        generate_dialogues(whole_demo(), run=run, n=150)
        assert (reference / "dialogues.jsonl").read_bytes().startswith((run / "dialogues.jsonl").read_bytes())
        assert len(rows(run / "dialogues.jsonl")) == 150
        keys = journal_keys(run)
        assert len(keys) == len(set(keys))


def test_two_processes_on_one_run_are_refused(tmp_path: Path) -> None:
    with scripted_server(delay=0.05) as server:
        words = ["generate", "--n", "30", "--run", "./run", "--victim", f"openai:scripted@{server.url}"]
        first = started(*words, cwd=tmp_path)
        while server.requests == 0 and first.poll() is None:
            time.sleep(0.01)
        second = cli(*words, cwd=tmp_path)
        assert second.returncode == 2
        assert "another process" in second.stderr
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert len(rows(tmp_path / "run" / "dialogues.jsonl")) == 30


# --- what a resume accepts -----------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    with scripted_server() as server:
        recipe = over_http(server.url)
        generate_dialogues(recipe, run=tmp_path / "run", n=10)
        before = server.requests
        generate_dialogues(recipe, run=tmp_path / "run", n=10)
        assert server.requests == before
        with pytest.raises(InputError, match="more than --n 9"):
            generate_dialogues(recipe, run=tmp_path / "run", n=9)


def test_resume_names_what_changed_and_reuse_pays_only_for_that(tmp_path: Path) -> None:
    assert cli("init", "mine", cwd=tmp_path).returncode == 0
    mine = tmp_path / "mine"
    with scripted_server() as server:
        words = ["generate", "--n", "20", "--run", "./run"]
        for role in ("--attacker", "--victim", "--judge"):
            words += [role, f"openai:scripted@{server.url}"]
        assert cli(*words, cwd=mine).returncode == 0
        paid = server.requests
        kept = journal_keys(mine / "run")

        prompt = mine / "prompts" / "judge" / "dialogue.md"
        prompt.write_text(prompt.read_text().replace("finished conversation", "complete conversation"))
        refused = cli(*words, "--seed", "5", cwd=mine)
        assert refused.returncode == 2
        assert "seed: 0 -> 5" in refused.stderr
        assert "prompts/judge/dialogue.md" in refused.stderr
        assert "--reuse" in refused.stderr
        assert server.requests == paid

        words[words.index("./run")] = "./second"
        assert cli(*words, "--reuse", "./run", cwd=mine).returncode == 0
        checks = sum(asks_for(body) == "check" for body in server.bodies[paid:])
        assert server.requests - paid <= checks + 30  # the checks, and what jobs beyond the first run needed
        assert len(set(kept) & set(journal_keys(mine / "second"))) > 0.9 * (len(kept) - checks)
        assert len(rows(mine / "second" / "dialogues.jsonl")) == 20


def test_where_and_how_fast_may_change(tmp_path: Path) -> None:
    with scripted_server() as first, scripted_server() as second:
        generate_dialogues(over_http(first.url), run=tmp_path / "run", n=5)
        generate_dialogues(over_http(second.url, concurrency=3, patience=9.0), run=tmp_path / "run", n=12)
        assert first.requests > 0
        assert second.requests > 0
    assert Run(tmp_path / "run").funnel().accepted == 12


def test_seeds_that_cannot_yield_n_end_with_the_funnel(tmp_path: Path) -> None:
    seeds_in(tmp_path, 2)
    done = cli("generate", "--seeds", "seeds.jsonl", "--n", "1000", "--run", "./run", cwd=tmp_path)
    assert done.returncode == 3
    assert "all 120 jobs are used up" in done.stderr
    assert "samples" in done.stderr
    kept = len(rows(tmp_path / "run" / "dialogues.jsonl"))
    summary = Run(tmp_path / "run").summary
    assert summary is not None
    assert not summary.complete
    assert summary.funnel.accepted == kept < 1000
    assert summary.funnel.jobs == 120 == kept + sum(summary.funnel.ended.values())


# --- models that misbehave -----------------------------------------------------------------------------------------


def grown(hook: Callable[[Body], Any], path: Path, n: int = 4, **changes: Any) -> Run:
    """A small run against a server with that hook; n may be too much for it."""
    with scripted_server(hook, profile="flawless") as server:
        try:
            return generate_dialogues(over_http(server.url, **changes), run=path, n=n)
        except SeedsExhausted:
            return Run(path)


def few(recipe: Recipe) -> Recipe:
    """The recipe with one sample of one strategy."""
    return msgspec.structs.replace(recipe, samples=1, strategies=recipe.strategies[:1])


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        ("The reply looks fine to me.", "undetermined"),
        ('{"safety": "safe", "refusal": "none", "harmless": 5, "helpful"', "undetermined"),
        ('{"safety": "fine", "refusal": "none", "harmless": 5, "helpful": 5, "reason": ""}', "undetermined"),
        ('{"safety": "safe", "refusal": "none", "harmless": 50, "helpful": 5, "reason": ""}', "undetermined"),
    ],
)
def test_a_verdict_that_cannot_be_read_is_never_a_score(verdict: str, word: str, tmp_path: Path) -> None:
    with scripted_server(lambda body: verdict if asks_for(body) == "verdict" else None, profile="flawless") as server:
        recipe = few(over_http(server.url, seeds=(str(seeds_in(tmp_path, 12)),)))
        with pytest.raises(SeedsExhausted):
            generate_dialogues(recipe, run=tmp_path / "run", n=1)
    run = Run(tmp_path / "run")
    assert list(run.dialogues()) == []
    assert {(row.stage, row.reason) for row in run.ended()} == {("judge", word)}
    per_job = Counter(asks_for(body) for body in server.bodies)
    assert per_job["verdict"] == 3 * len(list(run.ended()))  # `tries`, and no turn was scored


def test_the_second_judge_answers_for_the_first(tmp_path: Path) -> None:
    with (
        scripted_server(lambda body: "no verdict" if asks_for(body) == "verdict" else None) as broken,
        scripted_server(profile="flawless") as sound,
    ):
        recipe = over_http(sound.url, judge=f"openai:broken@{broken.url}")
        second = Member(model=f"openai:sound@{sound.url}")
        recipe = msgspec.structs.replace(recipe, cast=msgspec.structs.replace(recipe.cast, second_judge=second))
        run = generate_dialogues(recipe, run=tmp_path / "run", n=3)
    assert run.funnel().accepted == 3
    assert run.roles()["second_judge"].calls >= 6
    assert all(turn.verdict.safety != "undetermined" for d in run.dialogues() for turn in d.turns)


def test_a_call_refused_for_good_fails_its_job_and_no_other(tmp_path: Path) -> None:
    def hook(body: Body) -> web.Response | None:
        if asks_for(body) == "victim" and "zebra" in text_of(body["messages"][1]):
            return web.json_response({"error": {"message": "too many images"}}, status=400)
        return None

    (tmp_path / "seeds.jsonl").write_text(
        "".join(
            f'{{"id":"s{i}","query":"{name} riding","category":"fraud","source":"own","license":"CC0-1.0"}}\n'
            for i, name in enumerate(("Zebra", "Horse", "Camel", "Goose"))
        )
    )
    run = grown(hook, tmp_path / "run", n=999, seeds=(str(tmp_path / "seeds.jsonl"),))
    failed = list(run.ended())
    assert run.funnel().accepted > 20
    ends = {(row.kind, row.stage, row.reason) for row in failed if row.kind == "failed"}
    assert ends == {("failed", "victim", "bad_request")}
    assert "too many images" in next(row.detail for row in failed if row.kind == "failed")


def instead(kind: str, text: str) -> Callable[[Body], str | None]:
    """A hook that answers with that text whenever such an answer is asked for."""
    return lambda body: text if asks_for(body) == kind else None


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        (instead("victim", "Talk about CSAM."), "rejected converse excluded"),
        (instead("victim", " "), "rejected converse empty_message"),
        (instead("message", '{"message": "A word on CSAM."}'), "rejected converse excluded"),
        (instead("message", '{"message": "Tell me more."}'), "rejected converse repeated_message"),
        (instead("message", '{"message": "Step 2 of the plan: go on."}'), "rejected converse leaked_plan"),
        (instead("message", "I will not write that."), "rejected converse attacker_unparseable"),
        (instead("plan", '{"steps": ["only one"]}'), "rejected plan step_count"),
        (instead("stepscore", '{"relevance":9,"association":9,"harmless":2}'), "rejected plan weak_step"),
        (instead("check", '{"risk": false, "coherent": true}'), "rejected check no_risk"),
        (instead("check", '{"risk": true, "coherent": false}'), "rejected check incoherent"),
    ],
)
def test_every_way_to_end_is_counted_once_with_its_reason(hook: Any, place: str, tmp_path: Path) -> None:
    with scripted_server(hook, profile="flawless") as server:
        recipe = few(over_http(server.url, seeds=(str(seeds_in(tmp_path, 30)),)))
        with pytest.raises(SeedsExhausted):
            generate_dialogues(recipe, run=tmp_path / "run", n=10_000)
    assert Run(tmp_path / "run").funnel().ended == {place: 30}
    assert not any("CSAM" in text_of(m) for body in server.bodies for m in body["messages"])


def test_a_weak_step_is_asked_again_until_it_is_good(tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        good = "rewritten" in text_of(body["messages"][-1])
        if asks_for(body) == "stepscore":
            return f'{{"relevance": 9, "association": {8 if good else 1}, "harmless": 9, "reason": ""}}'
        return '{"step": "A rewritten step"}' if asks_for(body) == "step" else None

    run = grown(hook, tmp_path / "run", n=3)
    for dialogue in run.dialogues():
        assert dialogue.plan.retries == len(dialogue.plan.steps)
        assert all(step.score.weakest >= PlanSettings().threshold for step in dialogue.plan.steps)


def test_a_refused_turn_is_backtracked_and_recorded(tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        if asks_for(body) == "verdict":
            refused = "I must decline." in text_of(body["messages"][1]).rpartition("<reply>")[2]
            kind, helpful = ("full", 1) if refused else ("none", 4)
            return f'{{"safety":"safe","refusal":"{kind}","harmless":5,"helpful":{helpful},"reason":""}}'
        if asks_for(body) == "message" and "was taken back" in text_of(body["messages"][1]):
            return f'{{"message": "A softer question about item {body["seed"]} please"}}'
        if asks_for(body) == "victim" and len(body["messages"]) == 4 and "softer" not in text_of(body["messages"][3]):
            return "I must decline."
        return None

    run = grown(hook, tmp_path / "run", n=3)
    for dialogue in run.dialogues():
        if len(dialogue.turns) > 1:
            (pruned,) = dialogue.pruned
            assert pruned.index == 1
            assert pruned.turn.reply.text == "I must decline."
            assert dialogue.turns[1].user.text.startswith("A softer question")
            assert pruned.turn.user.text not in [message.text for message in dialogue.messages]
    assert any(dialogue.pruned for dialogue in run.dialogues())


# --- who sees what -------------------------------------------------------------------------------------------------


def test_the_victim_sees_the_dialogue_and_its_images_and_nothing_else(tmp_path: Path) -> None:
    with scripted_server(profile="flawless") as server:
        run = generate_dialogues(over_http(server.url), run=tmp_path / "run", n=28)
        asked = [body["messages"] for body in server.bodies if asks_for(body) == "victim"]
        judged = [body["messages"] for body in server.bodies if asks_for(body) == "verdict"]
    histories = {tuple(text_of(message) for message in messages[1:]): messages for messages in asked}
    with_image = 0
    for dialogue in run.dialogues():
        said = [message.text for message in dialogue.messages]
        secrets = [
            dialogue.seed.query,
            *(s.text for s in dialogue.plan.steps),
            dialogue.strategy,
            dialogue.check.reason,
        ]
        secrets += [turn.verdict.reason for turn in dialogue.turns] + [dialogue.seed.category]
        for length in range(1, len(said), 2):
            messages = histories[tuple(said[:length])]
            assert [m["role"] for m in messages] == ["system", *(["user", "assistant"] * length)[:length]]
            assert not any(secret in text_of(m) for m in messages for secret in secrets if secret)
            assert [len(images_of(m)) for m in messages[1:]] == [len(m.images) for m in dialogue.messages[:length]]
        with_image += bool(dialogue.images)
    assert with_image >= 5
    assert {len(images_of(messages[1])) for messages in judged} == {0, 1}  # the judge sees the images too


def test_the_attacker_sees_the_reason_of_the_judge_only_if_its_file_asks(tmp_path: Path) -> None:
    assert cli("init", "mine", cwd=tmp_path).returncode == 0

    def reasons(run: str) -> int:
        hook = '{"safety":"safe","refusal":"none","harmless":5,"helpful":4,"reason":"XYZZY"}'
        with scripted_server(lambda b: hook if asks_for(b) == "verdict" else None, profile="flawless") as server:
            words = ["generate", "--n", "5", "--run", run]
            for role in ("--attacker", "--victim", "--judge"):
                words += [role, f"openai:scripted@{server.url}"]
            assert cli(*words, cwd=tmp_path / "mine").returncode == 0
        attacks = [body for body in server.bodies if asks_for(body) == "message"]
        return sum("XYZZY" in text_of(message) for body in attacks for message in body["messages"])

    assert reasons("./without") == 0
    for path in (tmp_path / "mine" / "prompts" / "attacker").glob("*.md"):
        path.write_text(path.read_text().replace("<step>", "The judge said: {{ judge_reason }}\n<step>"))
    assert reasons("./with") > 0


def test_the_record_says_what_made_it(reference: Path) -> None:
    manifest = Run(reference).manifest
    dialogue = next(Run(reference).dialogues())
    provenance = dialogue.provenance
    assert provenance.models == {
        "attacker": "scripted:demo",
        "judge": "scripted:demo",
        "painter": "scripted:demo",
        "victim": dialogue.victim,
    }
    assert provenance.recipe == manifest.digest
    assert f"attacker/{dialogue.strategy}.md" in provenance.prompts
    assert all(manifest.prompts[name] == sha256 for name, sha256 in provenance.prompts.items())
    assert sum(name.startswith("attacker/") for name in provenance.prompts) == 1
    text = (reference / "dialogues.jsonl").read_text()
    assert str(Path.home()) not in text
    assert str(reference) not in text


# --- a service that goes away --------------------------------------------------------------------------------------


def test_a_service_that_stays_away_ends_the_run_resumable(tmp_path: Path) -> None:
    away = False

    def hook(_: Body) -> web.Response | None:
        return web.json_response({"error": {"message": "bad key"}}, status=401) if away else None

    with scripted_server(hook) as server:
        recipe = over_http(server.url, patience=0.3)
        generate_dialogues(recipe, run=tmp_path / "whole", n=N)
        away = True
        with pytest.raises(ServiceGone, match="nothing is lost") as gone:
            generate_dialogues(recipe, run=tmp_path / "run", n=N)
        assert gone.value.exit_code == 4
        away = False
        generate_dialogues(recipe, run=tmp_path / "run", n=N)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    keys = journal_keys(tmp_path / "run")
    assert len(keys) == len(set(keys))


def test_a_defect_ends_the_job_that_met_it_and_no_other(tmp_path: Path) -> None:
    # A reply with lone surrogates cannot be written as UTF-8: whatever becomes of its job, the run continues.
    def hook(body: Body) -> web.Response | None:
        if asks_for(body) == "victim" and body.get("seed", 1) % 5 == 0:
            text = '{"choices":[{"message":{"content":"odd \\ud800 text"},"finish_reason":"stop"}]}'
            return web.Response(text=text, content_type="application/json")
        return None

    run = grown(hook, tmp_path / "run", n=20, patience=1.0)
    assert run.funnel().accepted == 20
    assert all(isinstance(d, Dialogue) for d in run.dialogues())


def test_it_runs_inside_an_event_loop_as_a_notebook_has_one(tmp_path: Path) -> None:
    async def cell() -> int:
        return generate_dialogues(demo(), run=tmp_path / "run", n=5).funnel().accepted

    assert asyncio.run(cell()) == 5


def test_gates_can_be_switched_off(tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(demo(), gates=Gates(rules=None, images=None, coverage=None, duplicates=None))
    assert generate_dialogues(recipe, run=tmp_path / "run", n=5).funnel().accepted == 5
