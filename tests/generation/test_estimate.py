"""The estimate against what the run then takes: from a few samples that are paid for once."""

from pathlib import Path

import pytest
from msgspec import UNSET, structs

from intersafe.errors import BudgetReached, SeedsExhausted
from intersafe.generation.estimate import Estimate, estimate_from, estimate_run, sample_recipe
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.prepare import prepare
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Limits, Price
from intersafe.run.directory import Run
from intersafe.run.journal import RoleTally
from intersafe.run.manifest import differences
from intersafe.storage.bundled import bundled
from tests.support.displays import Recording
from tests.support.runs import cli, demo, journal_keys, refusal, whole_demo
from tests.support.servers.scripted_server import Body, asks_for, scripted_server

N = 400


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the demo recipe takes for 400 dialogues and 500 refusals."""
    return generate_dialogues(whole_demo(), run=tmp_path_factory.mktemp("real") / "run", n=N)


def tokens(tally: RoleTally) -> float:
    """Prompt and completion together."""
    return tally.prompt_tokens + tally.completion_tokens


def test_eight_samples_predict_some_hundred_dialogues(real: Run, tmp_path: Path) -> None:
    found = estimate_run(whole_demo(), n=N, run=tmp_path / "estimate")
    took = real.roles()
    calls, used = sum(tally.calls for tally in took.values()), sum(tokens(tally) for tally in took.values())
    assert found.calls.total == pytest.approx(calls, rel=0.15)
    assert found.tokens.total == pytest.approx(used, rel=0.15)
    assert set(found.roles) == set(took)
    assert found.sampled["dialogues"].tried >= 8
    assert sum(sampled.wanted for kind, sampled in found.sampled.items() if kind != "dialogues") == 500


def test_more_samples_continue_the_same_run_and_come_nearer(real: Run, tmp_path: Path) -> None:
    few = estimate_run(whole_demo(), n=N, samples=8, run=tmp_path / "estimate")
    more = estimate_run(whole_demo(), n=N, samples=100, run=tmp_path / "estimate")
    took = real.roles()
    assert more.sampled["dialogues"].tried >= 100
    assert few.tokens.error is not None
    assert more.tokens.error is not None
    assert more.tokens.error < few.tokens.error
    for role, tally in took.items():
        assert more.roles[role].calls == pytest.approx(tally.calls, rel=0.15), role
    assert more.tokens.total == pytest.approx(sum(tokens(tally) for tally in took.values()), rel=0.05)


def test_a_run_of_every_kind_of_job_is_predicted_with_its_twins(tmp_path: Path) -> None:
    recipe = load_recipe(bundled("pipelines/aligned.yaml"))
    found = estimate_run(recipe, n=120, samples=16, run=tmp_path / "estimate")
    took = generate_dialogues(recipe, run=tmp_path / "run", n=120).roles()
    assert found.sampled["twins"].wanted == 30
    assert found.tokens.total == pytest.approx(sum(tokens(tally) for tally in took.values()), rel=0.15)
    assert found.calls.total == pytest.approx(sum(tally.calls for tally in took.values()), rel=0.15)


def test_the_samples_are_paid_for_once_and_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "estimate"
    with scripted_server() as server:
        spec = f"openai:scripted@{server.url}"
        recipe = demo(attacker=spec, judge=spec, victims=[spec])
        first = estimate_run(recipe, n=50, run=path)
        paid = server.requests
        assert paid > 100
        assert estimate_run(recipe, n=50, run=path) == first
        assert estimate_run(recipe, n=90, samples=2, run=path).n == 90  # fewer samples than there are: all are used
        assert server.requests == paid
        sampled = set(journal_keys(path))
        generate_dialogues(recipe, run=tmp_path / "run", n=8, reuse=path)
        assert server.requests == paid, "a sample was paid for again"
        assert set(journal_keys(tmp_path / "run")) <= sampled


def test_cost_and_time_follow_prices_and_limits(tmp_path: Path) -> None:
    recipe = demo(prices={"judge": Price(prompt=1.0, completion=10.0, call=0.5)})
    run = generate_dialogues(sample_recipe(recipe), run=tmp_path / "run", n=8)
    found = estimate_from(run, recipe, 400)
    judge = found.roles["judge"]
    assert found.cost.total == pytest.approx(
        judge.prompt_tokens * 1e-6 + judge.completion_tokens * 1e-5 + judge.calls * 0.5
    )
    assert found.unpriced == ("attacker", "victim:0", "victim:1")
    slow = structs.replace(recipe.cast.judge, rpm=10)
    attacker = structs.replace(recipe.cast.attacker, model="scripted:careful")  # shares no limit with the judge
    recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, attacker=attacker))
    limited = structs.replace(recipe, cast=structs.replace(recipe.cast, judge=slow))
    assert estimate_from(run, limited, 400).seconds == pytest.approx(60 * judge.calls / 10)
    halved = structs.replace(recipe, cast=structs.replace(recipe.cast, judge=structs.replace(slow, batch=True)))
    assert estimate_from(run, halved, 400).cost.total == pytest.approx(found.cost.total / 2)
    assert estimate_from(run, halved, 400).seconds < 60


def test_one_sample_tells_no_spread_and_still_something(tmp_path: Path) -> None:
    found: Estimate = estimate_run(demo(), n=10, samples=1, run=tmp_path / "run")
    assert found.tokens.error is None
    assert found.tokens.total > 0


def test_limits_hold_for_the_samples_too(tmp_path: Path) -> None:
    recipe = demo()
    attacker = structs.replace(recipe.cast.attacker, model="scripted:careful")  # shares no limit with the judge
    recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, attacker=attacker))
    limited = structs.replace(recipe, limits=Limits(max_tokens=1000))
    with pytest.raises(BudgetReached, match="larger --max-tokens"):
        estimate_run(limited, n=100, run=tmp_path / "run")
    assert estimate_run(recipe, n=100, run=tmp_path / "run").n == 100


def test_the_command_says_all_of_it(tmp_path: Path) -> None:
    done = cli("estimate", "--n", "1000", "--price", "judge=1,2", "--max-cost", "2", cwd=tmp_path)
    assert done.returncode == 0
    for words in (
        "victim:1",
        "±",
        "USD; attacker",
        "8 of 8 samples",
        "--max-cost will be reached",
        "outputs/demo-estim",
    ):
        assert words in done.stdout
    again = cli("estimate", "--n", "1000", cwd=tmp_path)
    assert "no price is known: pass --price ROLE=IN,OUT" in again.stdout
    assert "calls" not in again.stderr, "it grew something again"
    assert cli("generate", "--n", "20", "--no-refusals", "--reuse", "demo-estimate", cwd=tmp_path).returncode == 0
    both = cli("estimate", "a.yaml", "--pipeline", "b.yaml", cwd=tmp_path)
    assert both.returncode == 2
    assert "two recipes" in both.stderr
    changed = cli("estimate", "--n", "5", "--seed", "3", cwd=tmp_path)
    assert changed.returncode == 2
    assert "--run" in changed.stderr


def test_jobs_that_are_not_there_are_said(tmp_path: Path) -> None:
    recipe = override(demo(), samples=1)
    done = cli("estimate", "--n", "40000", "--no-refusals", cwd=tmp_path)
    assert "the recipe has 18,480 dialogue jobs" in done.stdout
    found = estimate_run(recipe, n=40_000, run=tmp_path / "run")
    assert found.most_jobs < found.sampled["dialogues"].jobs


# --- samples that are turned down ------------------------------------------------------------------------------------


def test_an_estimate_gives_up_soon_where_no_sample_is_kept(tmp_path: Path) -> None:
    with scripted_server(lambda body: "no plan" if asks_for(body) == "plan" else None) as server:
        spec = f"openai:scripted@{server.url}"
        recipe = demo(attacker=spec, judge=spec, victims=[spec])
        with pytest.raises(
            SeedsExhausted, match=r"none of 20 sample jobs for dialogues was accepted.*plan attacker_unparseable"
        ):
            estimate_run(recipe, n=50, samples=2, run=tmp_path / "run")
        paid = server.requests
        assert paid == len(journal_keys(tmp_path / "run"))
        with pytest.raises(SeedsExhausted):
            estimate_run(recipe, n=50, samples=2, run=tmp_path / "run")
        assert server.requests == paid, "the same command paid again"


def test_an_estimate_uses_the_few_samples_that_were_kept(tmp_path: Path) -> None:
    plans: dict[str, int] = {}

    def rarely(body: Body) -> str | None:
        """No plan but for the first job."""
        if asks_for(body) != "plan":
            return None
        return None if plans.setdefault(str(body["messages"][:2]), len(plans)) == 0 else "no plan"

    shown = Recording()
    with scripted_server(rarely) as server:
        spec = f"openai:scripted@{server.url}"
        recipe = demo(attacker=spec, judge=spec, victims=[spec], concurrency=1)
        found = estimate_run(recipe, n=50, samples=4, run=tmp_path / "run", display=shown)
    sampled = found.sampled["dialogues"]
    assert 1 <= sampled.accepted < 4
    assert sampled.tried == 40
    assert sampled.jobs == 50 * 40 / sampled.accepted
    assert any(
        f"only {sampled.accepted} of 40 sample jobs" in line and "plan attacker_unparseable" in line
        for line in shown.lines
    )


def test_samples_and_a_run_are_not_taken_for_each_other(tmp_path: Path) -> None:
    recipe = whole_demo()
    run, samples = tmp_path / "run", tmp_path / "x-estimate"
    generate_dialogues(recipe, run=run, n=1)
    estimate_run(recipe, n=5, samples=1, run=samples)
    assert "holds a run" in refusal(lambda: estimate_run(recipe, n=5, run=run))
    assert "holds the samples of an estimate" in refusal(lambda: generate_dialogues(recipe, run=samples, n=5))
    assert b'"purpose"' not in (run / "recipe.json").read_bytes()
    marked = (samples / "recipe.json").read_bytes()
    assert Run(samples).manifest.purpose == "estimate"
    named_otherwise = samples.rename(tmp_path / "samples")
    assert "holds the samples of an estimate" in refusal(lambda: generate_dialogues(recipe, run=named_otherwise, n=5))
    # Of earlier versions: known by the name of the folder alone.
    samples = named_otherwise.rename(samples)
    (samples / "recipe.json").write_bytes(marked.replace(b',\n  "purpose": "estimate"', b""))
    assert Run(samples).manifest.purpose is UNSET
    assert "holds the samples of an estimate" in refusal(lambda: generate_dialogues(recipe, run=samples, n=5))
    assert estimate_run(recipe, n=5, samples=1, run=samples).n == 5


def test_what_else_differs_between_samples_and_a_run_is_listed(tmp_path: Path) -> None:
    recipe, run, samples = whole_demo(), tmp_path / "run-estimate", tmp_path / "samples"
    generate_dialogues(recipe, run=run, n=1)
    other = override(recipe, seed=7)
    assert f"made from something else: seed: {recipe.seed} -> 7; " in refusal(
        lambda: generate_dialogues(other, run=run, n=1)
    ), "an ordinary run in a folder of that name"
    listed = refusal(lambda: estimate_run(other, n=5, run=run))
    assert f"seed: {recipe.seed} -> 7" in listed
    assert "holds" not in listed
    estimate_run(recipe, n=5, samples=1, run=samples)
    marked = (samples / "recipe.json").read_bytes()
    (samples / "recipe.json").write_bytes(marked.replace(b',\n  "purpose": "estimate"', b""))
    listed = refusal(lambda: estimate_run(other, n=5, run=samples))
    assert f"made from something else: seed: {recipe.seed} -> 7; " in listed, "samples of an earlier version"


def test_the_settings_of_samples_alone_tell_them_from_a_run(tmp_path: Path) -> None:
    recipe = load_recipe(bundled("pipelines/aligned.yaml"))
    assert recipe.twins
    recipe = structs.replace(recipe, twins=structs.replace(recipe.twins, ratio=0.1))
    changed = differences(prepare(recipe).manifest, prepare(sample_recipe(recipe)).manifest)
    assert {change.partition(":")[0].split(".")[0] for change in changed} == {"gates", "refusals", "twins"}
    generate_dialogues(recipe, run=tmp_path / "run", n=1)
    assert "holds a run" in refusal(lambda: estimate_run(recipe, n=5, run=tmp_path / "run"))
