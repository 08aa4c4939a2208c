"""Quotas over a whole run: exact n, cells that cannot be filled, what is paid on the way, shares in the recipe."""

import functools
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from msgspec import structs

from intersafe.errors import InputError, SeedsExhausted, ServiceGone
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.prepare import prepare
from intersafe.generation.scheduler import FAILURES
from intersafe.generation.streak import FULL, HOPELESS, LOST, LosingStreak
from intersafe.recipe.gates import CoverageSettings, Gates
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Recipe, Turns
from intersafe.records import Ended
from intersafe.run.directory import Run
from intersafe.storage.bundled import bundled
from intersafe.taxonomy import CATEGORIES
from intersafe.templates.load import load_prompts
from tests.support.runs import cli, demo, digest, journal_keys, refusal, rows
from tests.support.servers.scripted_server import Body, Server, asks_for, scripted_server, text_of


def recipe_of(server: Server, coverage: CoverageSettings, **changes: Any) -> Recipe:
    """The demo's dialogues by two victims behind one URL, with quotas as the only gate."""
    spec = f"openai:other@{server.url}"
    victims = [f"openai:first@{server.url}", f"openai:second@{server.url}"]
    recipe = demo(attacker=spec, judge=spec, victims=victims, **changes)
    recipe = structs.replace(recipe, turns=Turns(min=2, mean=2, max=2))
    return structs.replace(recipe, gates=Gates(coverage=coverage, duplicates=None))


@functools.cache
def role_play() -> str:
    """What a planner is told of the strategy."""
    return load_prompts(bundled("prompts"))["attacker/role_play"].render("summary", {})


def about_role_play(body: Body) -> bool:
    """True if a plan is asked for that role play is to follow."""
    return asks_for(body) == "plan" and role_play() in text_of(body["messages"][1])


def second_is_mute(body: Body) -> str | None:
    """One of the two victims never replies."""
    return " " if body["model"] == "second" and asks_for(body) == "victim" else None


VICTIMS = CoverageSettings(category=None, victim="even")
STRATEGIES = CoverageSettings(category=None, strategy={"role_play": 0.5, "decomposition": 0.5})


def ended(recipe: Recipe, path: Path, n: int) -> SeedsExhausted:
    """How a run ended that could not be filled."""
    with pytest.raises(SeedsExhausted) as caught:
        generate_dialogues(recipe, run=path, n=n)
    assert "\n" not in str(caught.value)
    return caught.value


# --- a cell that cannot be filled ------------------------------------------------------------------------------------


def test_a_victim_that_never_yields_ends_the_run_and_is_named(tmp_path: Path) -> None:
    said, outcomes, paid = [], [], []
    for concurrency in (1, 16):
        with scripted_server(second_is_mute, profile="flawless") as server:
            recipe = recipe_of(server, VICTIMS, concurrency=concurrency)
            path = tmp_path / str(concurrency)
            end = ended(recipe, path, 60)
            plans = sum(asks_for(body) == "plan" for body in server.bodies)
            before = server.requests
            again = ended(recipe, path, 60)
            assert server.requests == before
        assert str(again) == str(end)
        assert end.exit_code == 3
        said.append(str(end))
        outcomes.append(digest(path))
        paid.append(plans)
    assert said[0] == said[1]
    assert outcomes[0] == outcomes[1]
    assert "11 of 60 dialogues were accepted" in said[0]
    assert "victim openai:second 0 of 6" in said[0]
    assert "rejected converse empty_message" in said[0]
    # One dialogue at a time pays for none that a quota turns down; many at once for a few that seemed to fit.
    assert paid[0] <= 11 + LOST + 10
    assert paid[1] <= 11 + LOST + 10 + 150
    run = Run(path)
    assert run.summary is not None
    assert not run.summary.complete
    assert "victim openai:second 0 of 6" in run.summary.short[0]
    shown = cli("show", str(path), "--funnel", cwd=tmp_path).stdout
    assert "below its quota: victim openai:second 0 of 6" in shown


def test_a_strategy_that_never_yields_is_named_in_steps_as_at_once_and_after_a_loss(tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        return '{"steps": []}' if about_role_play(body) else None

    with scripted_server(hook, profile="flawless") as server:
        recipe = recipe_of(server, STRATEGIES, concurrency=4)
        recipe = structs.replace(recipe, strategies=("role_play", "decomposition"))
        said = str(ended(recipe, tmp_path / "once", 40))
        assert "strategy role_play 0 of" in said
        assert "rejected plan attacker_unparseable" in said
        generate_dialogues(recipe, run=tmp_path / "steps", n=5)
        assert str(ended(recipe, tmp_path / "steps", 40)) == said
        assert digest(tmp_path / "steps") == digest(tmp_path / "once")
        paid, keys = server.requests, journal_keys(tmp_path / "steps")
        rejected = tmp_path / "steps" / "rejected.jsonl"
        rejected.write_bytes(rejected.read_bytes()[:20_000])
        assert str(ended(recipe, tmp_path / "steps", 40)) == said
        assert server.requests <= paid + 4 * 20  # jobs that were on their way when the run ended, and are not decided
    assert digest(tmp_path / "steps") == digest(tmp_path / "once")
    assert set(keys) <= set(journal_keys(tmp_path / "steps"))
    assert len(set(journal_keys(tmp_path / "steps"))) == len(journal_keys(tmp_path / "steps"))


def test_a_victim_whose_calls_all_fail_is_a_fault_to_mend_and_costs_no_decision(tmp_path: Path) -> None:
    away = True

    def hook(body: Body) -> web.Response | None:
        gone = away and body["model"] == "second"
        return web.json_response({"error": {"message": "no such model"}}, status=400) if gone else None

    with scripted_server(hook, profile="flawless") as server:
        recipe = recipe_of(server, VICTIMS, concurrency=8)
        # The first failures come between dialogues that are accepted; once the other victim is full, none is.
        with pytest.raises(ServiceGone, match=f"{FAILURES} jobs in a row failed.*no such model"):
            generate_dialogues(recipe, run=tmp_path / "run", n=30)
        decided = Run(tmp_path / "run").funnel()
        assert decided.accepted == 11
        assert decided.ended["failed victim bad_request"] <= 12
        away = False
        generate_dialogues(recipe, run=tmp_path / "run", n=30)
    assert Run(tmp_path / "run").funnel().accepted == 30


def test_a_cell_with_a_low_yield_fills_and_n_is_exact(tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        if body["model"] != "second" or asks_for(body) != "victim" or len(body["messages"]) > 2:
            return None
        chance = hashlib.sha256(text_of(body["messages"][1]).encode()).digest()[0]
        return " " if chance > 0.15 * 256 else None

    with scripted_server(hook, profile="flawless") as server:
        digests = []
        for concurrency in (1, 32):
            recipe = recipe_of(server, VICTIMS, concurrency=concurrency)
            run = generate_dialogues(recipe, run=tmp_path / str(concurrency), n=40)
            digests.append(digest(run.path))
    assert digests[0] == digests[1]
    counts = Counter(dialogue.victim for dialogue in run.dialogues())
    assert sum(counts.values()) == 40
    assert counts["openai:second"] >= 40 * 0.45 - 5
    assert run.funnel().ended["rejected gates victim_full"] > 20
    assert run.summary is not None
    assert run.summary.complete


def test_what_the_shares_leave_out_is_never_paid_for(tmp_path: Path) -> None:
    coverage = CoverageSettings(category=None, strategy={"role_play": 1.0}, turns={"2": 0.5, "4": 0.5})
    with scripted_server(profile="flawless") as server:
        recipe = structs.replace(recipe_of(server, coverage, concurrency=16), turns=Turns(min=2, mean=3, max=4))
        run = generate_dialogues(recipe, run=tmp_path / "run", n=24)
        plans = [body for body in server.bodies if asks_for(body) == "plan"]
    sizes = {body["response_format"]["json_schema"]["schema"]["properties"]["steps"]["minItems"] for body in plans}
    assert sizes == {2, 4}
    assert all(map(about_role_play, plans))
    assert {dialogue.strategy for dialogue in run.dialogues()} == {"role_play"}
    counts = Counter(len(dialogue.turns) for dialogue in run.dialogues())
    assert set(counts) == {2, 4}
    assert max(counts.values()) <= 1.1 * 0.5 * 24 + 5
    assert {row["reason"] for row in rows(tmp_path / "run" / "rejected.jsonl")} <= {"strategy_full", "turns_full"}


def test_jobs_used_up_while_quotas_wait_name_the_cell(tmp_path: Path) -> None:
    fields = '"source":"own","license":"CC0-1.0"'
    seeds = [("fraud", i) for i in range(30)] + [("political", 0)]
    text = "".join(f'{{"id":"{c}{i}","query":"A {c} concern {i}","category":"{c}",{fields}}}\n' for c, i in seeds)
    (tmp_path / "seeds.jsonl").write_text(text)
    recipe = demo(seeds=(str(tmp_path / "seeds.jsonl"),), victims=["scripted:flawless"], samples=2)
    recipe = structs.replace(recipe, gates=Gates(coverage=CoverageSettings(slack=1.0), duplicates=None))
    end = ended(recipe, tmp_path / "run", 200)
    jobs = 31 * len(recipe.strategies) * 2
    assert f"all {jobs} jobs are used up" in str(end)
    assert "category political 10 of 12" in str(end)
    assert Run(tmp_path / "run").funnel().jobs == jobs


def test_a_cell_below_its_quota_is_said_kept_and_shown_although_n_was_reached(tmp_path: Path) -> None:
    names = [category.name for category in CATEGORIES]
    fields = '"source":"own","license":"CC0-1.0"'
    seeds = [(name, i) for name in names[1:] for i in range(10)] + [(names[0], 0)]
    text = "".join(f'{{"id":"{c}-{i}","query":"A {c} concern {i}","category":"{c}",{fields}}}\n' for c, i in seeds)
    (tmp_path / "seeds.jsonl").write_text(text)
    (tmp_path / "few.yaml").write_text(
        "name: few\ncast: {attacker: 'scripted:flawless', victims: ['scripted:flawless'], judge: 'scripted:flawless'}\n"
        f"seeds: seeds.jsonl\nprompts: {bundled('prompts')}\nstrategies: [role_play]\n"
        "turns: {min: 2, mean: 2, max: 2}\ngates: {duplicates: null, coverage: {slack: 1}}\n"
    )
    done = cli("generate", "--pipeline", "few.yaml", "--n", "120", "--run", "./run", cwd=tmp_path)
    assert done.returncode == 0
    cell = f"below its quota: category {names[0]} 1 of 6 (of 1 jobs: none was lost)"
    assert cell in done.stderr
    summary = Run(tmp_path / "run").summary
    assert summary is not None
    assert summary.complete
    assert [cell.removeprefix("below its quota: ")] == list(summary.short)
    assert cell in cli("show", "./run", "--funnel", cwd=tmp_path).stdout
    again = cli("generate", "--pipeline", "few.yaml", "--n", "120", "--run", "./run", cwd=tmp_path)
    assert again.returncode == 0
    assert cell in again.stdout


# --- when a kind of job gives up -------------------------------------------------------------------------------------


def row(reason: str, stage: str = "gates") -> Ended:
    return Ended(0, "key", "fraud", "rejected", stage, reason)


def test_a_kind_gives_up_only_where_quotas_bite_and_nothing_comes_of_the_rest() -> None:
    assert not LosingStreak(lost=HOPELESS - 1).lasting, "no quota is in the way"
    streak = LosingStreak(lost=HOPELESS - 1)
    streak.count(row("empty_message", "converse"))
    assert streak.lasting, "nothing comes at all"
    streak = LosingStreak()
    for _ in range(100 * FULL):
        streak.count(row("victim_full"))
    assert not streak.lasting, "no job that there was room for was lost"
    for _ in range(LOST):
        assert not streak.lasting
        streak.count(row("near_duplicate"))
    assert streak.lasting


# --- shares in the recipe --------------------------------------------------------------------------------------------


def pipeline(tmp_path: Path, coverage: str) -> Path:
    """The demo with those quotas."""
    text = bundled("pipelines/demo.yaml").read_text().replace("../", f"{bundled('pipelines').parent}/")
    old = "{category: even, strategy: even, victim: even}"
    assert old in text
    (tmp_path / "p.yaml").write_text(text.replace(old, coverage))
    return tmp_path / "p.yaml"


def test_turn_counts_are_numbers_in_yaml(tmp_path: Path) -> None:
    recipe = load_recipe(pipeline(tmp_path, "{category: null, turns: {2: 0.5, 4: 0.5}}"))
    assert recipe.gates.coverage is not None
    assert recipe.gates.coverage.turns == {"2": 0.5, "4": 0.5}
    run = generate_dialogues(override(recipe, no_refusals=True), run=tmp_path / "run", n=30)
    counts = run.funnel().turns
    assert set(counts) == {2, 4}
    assert sum(counts.values()) == 30


@pytest.mark.parametrize(
    ("coverage", "says"),
    [
        ("{strategy: {role_pla: 1.0}}", "did you mean 'role_play'"),
        ("{victim: {'scripted:eagre': 1.0}}", "did you mean 'scripted:eager'"),
        ("{category: {frauds: 1.0}}", "did you mean 'fraud'"),
        ("{turns: {2: 0.5, 7: 0.5}}", "no job has '7', known: 2, 3, 4, 5, 6"),
        ("{turns: {2.0: 1.0}}", "2.0"),
        ("{turns: {2: 0.5, '2': 0.5}}", "appears twice"),
        ("{strategy: {role_play: 0.5, decomposition: 0.4}}", "the shares sum to 0.9"),
        ("{strategy: {role_play: 1.5}}", "strategy"),
        ("{strategy: {}}", "the shares sum to 0"),
        ("{strategy: {role_play: 0, decomposition: 1}}", "strategy"),
        ("{strategy: evn}", "strategy"),
        ("{strateg: even}", "did you mean 'strategy'"),
    ],
)
def test_shares_that_cannot_be_kept_are_refused_at_the_start(coverage: str, says: str, tmp_path: Path) -> None:
    path = pipeline(tmp_path, coverage)
    assert says in refusal(lambda: prepare(load_recipe(path)))


def test_shares_that_cannot_be_kept_leave_no_run(tmp_path: Path) -> None:
    path = pipeline(tmp_path, "{strategy: {role_pla: 1.0}}")
    done = cli("generate", "--pipeline", str(path), "--n", "3", "--run", "./run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError):
        generate_dialogues(load_recipe(path), run=tmp_path / "run", n=3)


def test_a_kind_that_nothing_comes_of_ends_before_all_jobs_are_paid_for(tmp_path: Path) -> None:
    recipe = structs.replace(demo(judge="scripted:weak"), gates=Gates(coverage=None))
    with pytest.raises(SeedsExhausted, match=f"the last {HOPELESS} jobs were all lost") as caught:
        generate_dialogues(recipe, run=tmp_path / "run", n=10)
    assert "rejected plan weak_step" in str(caught.value)
    assert Run(tmp_path / "run").funnel().jobs == HOPELESS
