"""The batch lane against a real provider on 127.0.0.1: the same bytes, paid once, whatever ends early or goes wrong."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from msgspec import structs

from intersafe.errors import BudgetReached, CallFailed, ServiceGone
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.progress import Progress
from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Hooks, Sampling
from intersafe.models.batch import lanes
from intersafe.models.batch.api import Pace
from intersafe.models.batch.files import reply_in
from intersafe.models.batch.lanes import Lanes
from intersafe.models.http.faults import Transient
from intersafe.models.http.quirks import QUEUE_FULL
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Limits, Member, Recipe, Turns
from intersafe.records import Message
from intersafe.run.incidents import Incidents
from intersafe.storage.bundled import bundled
from intersafe.wording import printable
from tests.support.displays import Recording
from tests.support.runs import demo, digest, journal_keys, refusal, rows
from tests.support.servers.batch_server import KEY, Line, Provider, batch_server, fingerprint, problem
from tests.support.servers.scripted_server import Body, asks_for, scripted_server

N = 6
PACE = Pace(quiet=0.04, first_pause=0.01, longest_pause=0.05, list_lag=0.05)
SetPace = Callable[..., None]


@pytest.fixture(autouse=True)
def pace(monkeypatch: pytest.MonkeyPatch) -> SetPace:
    """A run's lanes get a faster pace; the fixture's value sets another one."""
    monkeypatch.setenv("BATCH_KEY", KEY)

    def set_pace(**changes: Any) -> None:
        monkeypatch.setattr(lanes, "Lanes", partial(Lanes, pace=replace(PACE, **changes)))

    set_pace()
    return set_pace


def through(url: str, *, batch: bool = True, limits: Limits | None = None, **member: Any) -> Recipe:
    """The demo with attacker and judge behind a URL."""
    asked = Member(model=f"openai:scripted@{url}", key="BATCH_KEY" if batch else "", batch=batch, **member)
    recipe = demo()
    cast = structs.replace(recipe.cast, attacker=asked, judge=asked)
    limits = limits or Limits(concurrency=N, patience=5)
    return override(structs.replace(recipe, cast=cast, limits=limits, turns=Turns(2, 2, 2)))


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without batches."""
    path = tmp_path_factory.mktemp("direct") / "run"
    with scripted_server() as server:
        generate_dialogues(through(server.url, batch=False), run=path, n=N)
    return path


def dialogues(run: Path) -> bytes:
    return (run / "dialogues.jsonl").read_bytes()


def test_a_run_through_batches_has_the_bytes_of_a_direct_one(direct: Path, tmp_path: Path) -> None:
    with batch_server() as provider:
        heard = Recording()
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N, display=heard)
    assert digest(tmp_path / "run") == digest(direct)
    assert set(provider.answered.values()) == {1}
    assert not provider.orphans
    assert len(provider.batches) < len(provider.answered) / 4
    assert heard.heard("concurrency 6")
    assert not (tmp_path / "run" / "batches").exists()
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


# --- kills -----------------------------------------------------------------------------------------------------------

RECIPE = """
name: batched
cast:
  attacker: {{model: "openai:scripted@{url}", key: BATCH_KEY, batch: true}}
  victims: [scripted:careful, scripted:eager]
  judge: {{model: "openai:scripted@{url}", key: BATCH_KEY, batch: true}}
seeds: {seeds}
prompts: {prompts}
strategies: [decomposition, role_play, scenario_framing, topic_shift, purpose_reversal]
n: 6
samples: 6
turns: {{min: 2, mean: 2, max: 2}}
limits: {{concurrency: 6, patience: 5}}
"""
MAIN = f"""
from functools import partial
from intersafe.cli.main import main
from intersafe.models.batch import lanes
from intersafe.models.batch.api import Pace
lanes.Lanes = partial(lanes.Lanes, pace={PACE!r})
main()
"""
STEPS = ["upload", "uploaded", "create", "created", "list", "look", "content", "served"]


def written(provider: Provider, folder: Path) -> Path:
    """The recipe of these tests as a file."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(url=provider.url, seeds=bundled("seeds/intersafe.jsonl"), prompts=bundled("prompts")))
    return path


def command(recipe: Path) -> "subprocess.Popen[str]":
    """`intersafe generate` in a process of its own."""
    words = ["generate", "--pipeline", str(recipe), "--run", "./run"]
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *words],
        cwd=recipe.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"BATCH_KEY": KEY},
    )


class Killer:
    """Sends a signal to the process at the first occurrence of a step, and waits until a SIGKILL has worked."""

    def __init__(self) -> None:
        self.pid, self.step, self.signal = 0, "", signal.SIGKILL
        self.ready = threading.Event()

    def __call__(self, step: str, _: Provider) -> web.Response | None:
        if step != self.step:
            return None
        self.ready.wait(10)
        self.step = ""
        os.kill(self.pid, self.signal)
        if self.signal == signal.SIGKILL:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return problem(500, "killed") if step == "create" else None

    def strike(self, recipe: Path, step: str) -> tuple[int, str]:
        """Runs the command until it is struck or ends; exit code and what it said."""
        self.step = step
        self.ready.clear()
        process = command(recipe)
        self.pid = process.pid
        self.ready.set()
        _, said = process.communicate(timeout=60)
        return process.returncode, said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of the recipe's dialogues without batches."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with scripted_server() as server:
        recipe = load_recipe(written(Provider(url=server.url), folder))
        members = {
            role: structs.replace(getattr(recipe.cast, role), batch=False, key="") for role in ("attacker", "judge")
        }
        recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, **members))
        generate_dialogues(recipe, run=folder / "run")
    return dialogues(folder / "run")


def test_killed_at_each_step_of_the_protocol_pays_nothing_twice(undisturbed: bytes, tmp_path: Path) -> None:
    killer = Killer()
    with batch_server(killer) as provider:
        recipe = written(provider, tmp_path)
        for step in STEPS:
            code, said = killer.strike(recipe, step)
            assert code == -signal.SIGKILL, (step, said)
        code, said = killer.strike(recipe, "")
        assert code == 0, said
        nonces = [made["metadata"]["intersafe"] for made in provider.batches.values()]
    assert dialogues(tmp_path / "run") == undisturbed
    assert set(provider.seen.values()) == {1}
    assert not provider.orphans
    assert len(set(nonces)) == len(nonces)
    keys = journal_keys(tmp_path / "run")
    assert len(set(keys)) == len(keys)


def test_sigterm_leaves_the_batches_to_the_provider_and_says_so(undisturbed: bytes, tmp_path: Path) -> None:
    killer = Killer()
    killer.signal = signal.SIGTERM
    with batch_server(killer) as provider:
        recipe = written(provider, tmp_path)
        code, said = killer.strike(recipe, "look")
        assert code == 130, said
        assert "1 batches with 6 calls stay with the provider" in said
        assert "Traceback" not in said
        assert killer.strike(recipe, "")[0] == 0
    assert dialogues(tmp_path / "run") == undisturbed
    assert set(provider.seen.values()) == {1}
    assert not provider.orphans


# --- what a provider does --------------------------------------------------------------------------------------------


def at(step: str, number: int, instead: int) -> Any:
    """A hook that answers the n-th occurrence of a step with another status."""

    def hook(now: str, provider: Provider) -> web.Response | None:
        return problem(instead, "a fault") if now == step and provider.steps[step] == number else None

    return hook


@pytest.mark.parametrize("step", ["upload", "uploaded", "create", "created", "look", "content"])
def test_a_lost_answer_makes_no_second_batch(step: str, direct: Path, tmp_path: Path) -> None:
    with batch_server(at(step, 4, 502)) as provider:
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N)
        nonces = [made["metadata"]["intersafe"] for made in provider.batches.values()]
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert set(provider.seen.values()) == {1}
    assert len(set(nonces)) == len(nonces)


def test_a_batch_that_a_list_names_late_is_not_made_again(direct: Path, tmp_path: Path) -> None:
    def late(now: str, provider: Provider) -> web.Response | None:
        if now == "list" and provider.steps["list"] == 1:
            return web.json_response({"object": "list", "data": [], "has_more": False})
        return at("created", 4, 502)(now, provider)  # type: ignore[no-any-return]

    with batch_server(late) as provider:
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N)
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert provider.steps["list"] > 1
    assert set(provider.seen.values()) == {1}
    assert not provider.orphans


@pytest.mark.parametrize("end", ["expired", "cancelled", "failed"])
def test_what_a_batch_did_not_answer_goes_into_the_next(end: str, direct: Path, tmp_path: Path) -> None:
    with batch_server() as provider:
        provider.end = {0: end, 3: end}
        provider.problems = [{"code": "empty_file", "message": "The provider's own words", "line": None}]
        heard = Recording()
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N, display=heard)
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert set(provider.answered.values()) == {1}
    assert heard.heard("asked again")
    assert heard.heard("The provider's own words") == (end == "failed")


def shaky(body: Body, before: int) -> Line | str:
    """Every kind of line that is no answer, once for some bodies; others come twice, or bring a stranger along."""
    kinds: list[Line | str] = [
        "missing",
        "twice",
        b"{torn",
        b'{"custom_id": "nobody", "response": {"status_code": 200, "body": {}}}',
        {"status_code": 429, "body": {"error": {"message": "slow down"}}},
        {"status_code": 500, "body": None},
        {"status_code": 0, "body": {}},
        {"status_code": 200, "body": {"choices": []}},
    ]
    place = int(fingerprint(body)[:4], 16) % 16
    return "answer" if before or place >= len(kinds) else kinds[place]


def test_lines_that_are_no_answer_are_asked_again(direct: Path, tmp_path: Path) -> None:
    with batch_server(line=shaky) as provider:
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N)
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert set(provider.answered.values()) == {1}
    assert 2 in provider.seen.values()


def plans_of_some(status: int, code: str | None = None) -> Any:
    """Answers the plans of some dialogues with that status."""

    def line(body: Body, _: int) -> Line | str:
        if asks_for(body) == "plan" and int(fingerprint(body)[:4], 16) % 4 == 0:
            return {"status_code": status, "body": {"error": {"message": f"said the line {KEY[:4]}", "code": code}}}
        return "answer"

    return line


@pytest.mark.parametrize(("status", "reason", "asked"), [(400, "bad_request", 1), (503, "server_error", 3)])
def test_a_line_that_fails_for_good_ends_its_job_alone(status: int, reason: str, asked: int, tmp_path: Path) -> None:
    with batch_server(line=plans_of_some(status)) as provider:
        limits = Limits(concurrency=N, patience=5, retries=3)
        generate_dialogues(through(provider.url, limits=limits), run=tmp_path / "run", n=N)
    failed = rows(tmp_path / "run" / "failed.jsonl")
    assert {row["reason"] for row in failed} == {reason}
    assert all("said the line" in row["detail"] for row in failed)
    assert set(provider.seen.values()) == {1, asked}
    assert len(rows(tmp_path / "run" / "dialogues.jsonl")) == N


def test_a_line_at_fault_fails_and_its_batch_continues_without_it(tmp_path: Path) -> None:
    with batch_server() as provider:
        provider.end = {0: "failed"}
        provider.problems = [{"code": "invalid_json_line", "message": "not to be parsed", "line": 3}]
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N)
    failed = rows(tmp_path / "run" / "failed.jsonl")
    assert [(row["reason"], row["detail"]) for row in failed] == [("bad_request", "not to be parsed")]
    assert set(provider.seen.values()) == {1}


def test_a_full_queue_makes_batches_smaller_and_costs_no_try(direct: Path, tmp_path: Path) -> None:
    with batch_server() as provider:
        provider.most = 2
        heard = Recording()
        limits = Limits(concurrency=N, patience=5, retries=1)
        generate_dialogues(through(provider.url, limits=limits), run=tmp_path / "run", n=N, display=heard)
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert set(provider.seen.values()) == {1}
    assert heard.heard("Enqueued token limit reached")


def test_a_file_that_is_too_large_is_sent_in_parts(direct: Path, tmp_path: Path) -> None:
    with batch_server() as provider:
        provider.largest = 20_000
        limits = Limits(concurrency=N, patience=5, retries=1)
        generate_dialogues(through(provider.url, limits=limits), run=tmp_path / "run", n=N)
        sizes = [len(provider.files[made["input_file_id"]]) for made in provider.batches.values()]
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert max(sizes) <= 20_000


def test_full_collections_are_sent_at_once_and_side_by_side(direct: Path, tmp_path: Path, pace: SetPace) -> None:
    pace(most_requests=5)
    with batch_server() as provider:
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N)
        sizes = [len(provider.requests_of(name)) for name in provider.batches]
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert max(sizes) == 5
    assert set(provider.seen.values()) == {1}


def test_members_that_share_a_model_share_a_lane(direct: Path, tmp_path: Path) -> None:
    with batch_server() as provider:
        recipe = through(provider.url)
        judge = structs.replace(recipe.cast.judge, extra={"user": "judge"})
        recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, judge=judge))
        generate_dialogues(recipe, run=tmp_path / "run", n=N)
        users = [{line["body"].get("user") for line in provider.requests_of(name)} for name in provider.batches]
    assert {None, "judge"} in users
    assert [d["turns"] for d in rows(tmp_path / "run" / "dialogues.jsonl")] == [
        d["turns"] for d in rows(direct / "dialogues.jsonl")
    ]


# --- away, and wrong from the start ----------------------------------------------------------------------------------


def test_a_wrong_key_ends_the_run_when_patience_does_and_the_right_one_resumes(
    direct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with batch_server() as provider:
        recipe = through(provider.url, limits=Limits(concurrency=N, patience=0.2))
        monkeypatch.setenv("BATCH_KEY", "sk-wrong-key-0")
        with pytest.raises(ServiceGone) as gone:
            generate_dialogues(recipe, run=tmp_path / "run", n=N)
        assert "is the key in BATCH_KEY right?" in str(gone.value)
        assert "sk-wrong" not in str(gone.value)
        del gone
        gc.collect()
        complaints = [record for record in caplog.records if not record.name.startswith("intersafe")]
        assert not complaints  # an error for each call that nobody reads
        monkeypatch.setenv("BATCH_KEY", KEY)
        generate_dialogues(recipe, run=tmp_path / "run", n=N)
    assert dialogues(tmp_path / "run") == dialogues(direct)


def test_a_slow_batch_costs_no_patience(direct: Path, tmp_path: Path) -> None:
    with batch_server() as provider:
        generate_dialogues(through(provider.url, limits=Limits(concurrency=N, patience=0)), run=tmp_path / "run", n=N)
    assert dialogues(tmp_path / "run") == dialogues(direct)


def test_a_batch_of_another_account_is_not_asked_again_unheard(tmp_path: Path) -> None:
    killer = Killer()
    with batch_server(killer) as provider:
        recipe = written(provider, tmp_path)
        code, said = killer.strike(recipe, "look")
        assert code == -signal.SIGKILL, said
        provider.batches.clear()
        limits = Limits(concurrency=N, patience=0.2)
        with pytest.raises(ServiceGone, match="the account that made the batch"):
            generate_dialogues(structs.replace(load_recipe(recipe), limits=limits), run=tmp_path / "run")
        assert not provider.batches


def test_batches_that_no_member_asks_for_any_longer_are_named(tmp_path: Path) -> None:
    killer = Killer()
    with batch_server(killer) as provider, scripted_server() as server:
        path = written(provider, tmp_path)
        code, said = killer.strike(path, "look")
        assert code == -signal.SIGKILL, said
        recipe = load_recipe(path)
        member = Member(model=f"openai:scripted@{server.url}")
        recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, attacker=member, judge=member))
        heard = Recording()
        generate_dialogues(recipe, run=tmp_path / "run", display=heard)
    assert heard.heard("stay with the provider")


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ({"model": "scripted:demo"}, "for hosted APIs"),
        ({"model": "openai:m@http://a/v1,http://b/v1"}, "several URLs"),
        ({"model": "openai:m@http://a/v1", "send_images": "file"}, "send_images"),
    ],
)
def test_a_member_that_no_batch_can_serve_is_refused_at_the_start(member: dict[str, Any], words: str) -> None:
    cast = structs.replace(demo().cast, judge=Member(batch=True, **member))
    assert words in refusal(lambda: override(structs.replace(demo(), cast=cast)))


def test_a_damaged_state_is_named_and_nothing_is_asked(tmp_path: Path) -> None:
    killer = Killer()
    with batch_server(killer) as provider:
        recipe = written(provider, tmp_path)
        killer.strike(recipe, "look")
        state = next((tmp_path / "run" / "batches").glob("*.json"))
        state.write_bytes(json.dumps({"nonce": "x"}).encode())
        files = len(provider.files)
        said = refusal(lambda: generate_dialogues(load_recipe(recipe), run=tmp_path / "run"))
    assert state.name in said
    assert len(provider.files) == files


def test_a_model_given_by_spec_is_asked_directly() -> None:
    asked = Member(model="openai:m@http://a/v1", batch=True)
    recipe = override(structs.replace(demo(), cast=structs.replace(demo().cast, judge=asked)))
    assert not override(recipe, judge="scripted:demo").cast.judge.batch


def test_a_name_of_a_key_and_no_key_is_kept(tmp_path: Path) -> None:
    killer = Killer()
    with batch_server(killer) as provider:
        assert killer.strike(written(provider, tmp_path), "look")[0] == -signal.SIGKILL
    left = [path for path in (tmp_path / "run" / "batches").iterdir() if KEY.encode() in path.read_bytes()]
    assert not left
    assert any(b"BATCH_KEY" in path.read_bytes() for path in (tmp_path / "run" / "batches").iterdir())


def test_results_that_come_down_cut_are_fetched_again(direct: Path, tmp_path: Path) -> None:
    def cut(step: str, provider: Provider) -> web.Response | None:
        return web.Response(text="{cut") if step == "content" and provider.steps[step] in (3, 5) else None

    with batch_server(cut) as provider:
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N)
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert set(provider.answered.values()) == {1}


# --- what is left on the disk ----------------------------------------------------------------------------------------


def limited(url: str, tokens: int) -> Recipe:
    """The recipe with a limit on tokens."""
    return through(url, limits=Limits(concurrency=N, patience=5, max_tokens=tokens))


def results(run: Path) -> list[Path]:
    return sorted((run / "batches").glob("*-output.jsonl"))


def test_results_that_are_in_the_journal_are_deleted_when_the_run_resumes(direct: Path, tmp_path: Path) -> None:
    left: list[Path] = []
    again: list[Path] = []

    def see(step: str, _: Provider) -> web.Response | None:
        if step == "upload" and left:
            again.extend(path for path in left if path.exists())
        return None

    with batch_server(see) as provider:
        with pytest.raises(BudgetReached):
            generate_dialogues(limited(provider.url, 20_000), run=tmp_path / "run", n=N)
        left += results(tmp_path / "run")
        assert left
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N)
    assert not again
    assert not (tmp_path / "run" / "batches").exists()
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert set(provider.seen.values()) == {1}


def test_results_that_a_power_loss_took_from_the_journal_are_not_paid_again(direct: Path, tmp_path: Path) -> None:
    with batch_server() as provider:
        with pytest.raises(BudgetReached):
            generate_dialogues(limited(provider.url, 1), run=tmp_path / "run", n=N)
        journal = tmp_path / "run" / "journal" / "main.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        assert len(lines) == N
        journal.write_bytes(b"".join(lines[:2]) + lines[2][:40])
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N)
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert set(provider.seen.values()) == {1}


def test_a_finished_run_keeps_of_batches_only_what_is_under_way(tmp_path: Path) -> None:
    killer = Killer()
    with batch_server(killer) as provider, scripted_server() as server:
        path = written(provider, tmp_path)
        assert killer.strike(path, "look")[0] == -signal.SIGKILL
        batches = tmp_path / "run" / "batches"
        (state,) = batches.glob("*.json")
        (batches / f"{'1' * 32}-output.jsonl").write_bytes(b'{"custom_id": "%s"}\n' % (b"2" * 32))
        recipe = load_recipe(path)
        member = Member(model=f"openai:scripted@{server.url}")
        recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, attacker=member, judge=member))
        generate_dialogues(recipe, run=tmp_path / "run")
        assert list(batches.iterdir()) == [state]


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "code"), [(503, None), (400, QUEUE_FULL)])
def test_no_batch_is_sent_once_a_limit_is_reached(
    status: int, code: str | None, direct: Path, tmp_path: Path, pace: SetPace
) -> None:
    """Every batch but the first is withheld from the provider until the replies of the first are in the journal."""
    pace(most_requests=3)
    journal = tmp_path / "run" / "journal" / "main.jsonl"

    def closed(step: str, provider: Provider) -> web.Response | None:
        is_first = provider.steps["upload"] == 1
        has_used = journal.exists() and journal.read_bytes().endswith(b"\n")
        return problem(status, "later", code) if step == "upload" and not is_first and not has_used else None

    with batch_server(closed) as provider:
        with pytest.raises(BudgetReached, match="of 1 tokens"):
            generate_dialogues(limited(provider.url, 1), run=tmp_path / "run", n=N)
        assert len(provider.batches) == 1
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N)
    assert dialogues(tmp_path / "run") == dialogues(direct)
    assert set(provider.seen.values()) == {1}
    assert not provider.orphans


# --- who is waited for -----------------------------------------------------------------------------------------------


class Watching(Recording):
    """Looks often, and mends what the run waits for as soon as it is shown."""

    interval = 0.02

    def __init__(self) -> None:
        super().__init__()
        self.progress: Progress | None = None
        self.shown: dict[str, str] = {}

    def begin(self, progress: Progress) -> None:
        self.progress = progress

    def look(self) -> None:
        if self.progress and self.progress.waiting and not self.shown:
            self.shown = dict(self.progress.waiting)
            self.repair()

    def repair(self) -> None:
        """The service is there again."""


@pytest.mark.parametrize(("step", "status"), [("upload", 401), ("create", 429), ("look", 503)])
def test_a_provider_that_is_away_is_shown_for_as_long_as_it_is(
    step: str, status: int, direct: Path, tmp_path: Path, pace: SetPace
) -> None:
    pace(tell_after=0.1)
    display = Watching()

    def away(now: str, _: Provider) -> web.Response | None:
        return problem(status, "not now") if now == step and not display.shown else None

    with batch_server(away) as provider:
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N, display=display)
    said = "HTTP 401;" if status == 401 else f"HTTP {status} not now"
    assert [said in why for why in display.shown.values()] == [True]
    assert display.progress
    assert not display.progress.waiting
    assert display.heard("is back after")
    assert dialogues(tmp_path / "run") == dialogues(direct)


def test_a_provider_that_takes_no_connection_is_shown_until_it_does(
    direct: Path, tmp_path: Path, pace: SetPace
) -> None:
    pace(tell_after=0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with ExitStack() as stack:

        class Starting(Watching):
            def repair(self) -> None:
                stack.enter_context(batch_server(port=port))

        display = Starting()
        recipe = through(f"http://127.0.0.1:{port}/v1")
        generate_dialogues(recipe, run=tmp_path / "run", n=N, display=display)
    assert ["no connection" in why for why in display.shown.values()] == [True]
    assert display.progress
    assert not display.progress.waiting
    assert dialogues(tmp_path / "run") == dialogues(direct)


def test_a_long_retry_after_is_told_before_it_is_waited_for(tmp_path: Path, pace: SetPace) -> None:
    pace(tell_after=0.5)

    def busy(step: str, provider: Provider) -> web.Response | None:
        if step != "create" or provider.steps[step] > 1:
            return None
        answer = problem(429, "later")
        answer.headers["Retry-After"] = "1"
        return answer

    heard = Recording()
    with batch_server(busy) as provider:
        generate_dialogues(through(provider.url), run=tmp_path / "run", n=N, display=heard)
    assert heard.heard("HTTP 429 later")


# --- logged and counted ----------------------------------------------------------------------------------------------


def ask_lane(provider: Provider, folder: Path) -> dict[str, Incidents]:
    """The counts after three calls of the attacker and five of the judge, whose model is one."""

    async def main() -> None:
        member = Member(model=f"openai:scripted@{provider.url}", key="BATCH_KEY", batch=True)
        opened = Lanes(folder / "batches", Limits(patience=5), hooks, replace(PACE, tell_after=0.5))
        models = {role: opened.open(role, member, ImageStore(folder)) for role in ("attacker", "judge")}
        sampling = Sampling(0.0, 1.0, 9, 1)
        calls = [
            Call(role, "", (Message("user", f"{role} {number}"),), sampling, None, "job", number)
            for role, count in (("attacker", 3), ("judge", 5))
            for number in range(count)
        ]
        replies = await asyncio.gather(*(models[call.role].answer(call) for call in calls))
        assert {reply.text for reply in replies} == {"ok"}
        await models["judge"].aclose()

    hooks = Hooks()
    asyncio.run(main())
    return hooks.incidents


def ok(_: Body, before: int) -> Line | str:
    return {"status_code": 200, "body": {"choices": [{"message": {"content": "ok"}}]}}


@pytest.mark.parametrize(
    ("status", "counts", "line"),
    [
        (502, Incidents(retries=1), ("INFO", "attacker: openai:scripted at {url}: try 1 failed (HTTP 502 a fault); ")),
        (429, Incidents(throttled=1), ("INFO", "attacker: openai:scripted at {url} throttles (HTTP 429 a fault)")),
        (401, Incidents(outages=1), ("WARNING", "attacker: openai:scripted is away (HTTP 401; is the key in ")),
    ],
)
def test_a_fault_of_the_batch_endpoint_is_logged_and_counted(
    status: int, counts: Incidents, line: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "intersafe.models.batch")
    with batch_server(at("create", 1, status), ok) as provider:
        assert ask_lane(provider, tmp_path) == {"attacker": counts}
        first, *others = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "intersafe.models.batch"]
    assert first[0] == line[0]
    assert first[1].startswith(line[1].format(url=provider.url))
    assert [level for level, _ in others] == (["WARNING"] if status == 401 else []), "back again"
    assert KEY not in caplog.text


@pytest.mark.parametrize("status", [None, 404, 500])
def test_no_text_of_a_result_holds_the_key_or_breaks(status: int | None) -> None:
    said = {"message": f"no use of {KEY}\n\x1b[2J"}
    line = {"error": said} if status is None else {"response": {"status_code": status, "body": {"error": said}}}
    with pytest.raises((CallFailed, Transient)) as raised:
        reply_in(json.dumps(line).encode(), lambda text: printable(text, secret=KEY))
    text = str(raised.value.detail if isinstance(raised.value, CallFailed) else raised.value)
    assert KEY not in text
    assert "no use of ***" in text
    assert text.isprintable()


def test_calls_that_go_into_a_later_batch_count_for_their_own_roles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "intersafe.models.batch")

    def once_none(body: Body, before: int) -> Line | str:
        return ok(body, before) if before else "missing"

    with batch_server(line=once_none) as provider:
        assert ask_lane(provider, tmp_path) == {"attacker": Incidents(retries=3), "judge": Incidents(retries=5)}
    texts = [r.getMessage() for r in caplog.records if r.name == "intersafe.models.batch"]
    assert [text.partition(" (")[0] for text in texts] == [
        "attacker: openai:scripted: 3 calls are asked again",
        "judge: openai:scripted: 5 calls are asked again",
    ]
