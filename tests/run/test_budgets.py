"""Budgets: a limit that is reached stops a run cleanly, keeps what was paid for, and changes no byte of the result."""

import asyncio
import errno
import io
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from aiohttp import web
from msgspec import structs

from intersafe.cli.live import LivePanel, PlainLines, rate_of
from intersafe.cli.values import DURATION, TOKENS, USD
from intersafe.errors import BudgetReached
from intersafe.generation.context import RunRequest, opened
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.prepare import prepare
from intersafe.generation.progress import Display, Progress
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Limits, Price, Recipe
from intersafe.run.budget import Budget, prices_of
from intersafe.run.directory import Run
from intersafe.run.funnel import Funnel
from intersafe.run.journal import Journal, RoleTally
from intersafe.storage.bundled import bundled
from intersafe.storage.jsonl import GroupWriter
from tests.support.displays import Recording
from tests.support.runs import cli, demo, digest, journal_keys, refusal, rows, started
from tests.support.servers.scripted_server import Body, scripted_server

N = 20
AT_ONCE = 8
PRICE = Price(prompt=1.0, completion=10.0, call=0.001)


def over_http(url: str, **changes: Any) -> Recipe:
    """The demo recipe's dialogues, every member of the cast behind one URL and with a price."""
    spec = f"openai:scripted@{url}"
    prices = dict.fromkeys(("attacker", "judge", "victim"), PRICE)
    models = {"attacker": spec, "judge": spec, "victims": [spec], "prices": prices}
    return demo(**(models | {"concurrency": AT_ONCE} | changes))


def tokens_in(run: Path) -> list[int]:
    """What each call of the journal used."""
    return [sum(row.get("tokens", (0, 0))) for path in run.glob("journal/*.jsonl") for row in rows(path)]


def usd_in(run: Path) -> list[float]:
    """What each call of the journal cost."""
    pairs = [row.get("tokens", (0, 0)) for path in run.glob("journal/*.jsonl") for row in rows(path)]
    return [prompt * 1e-6 + completion * 1e-5 + 0.001 for prompt, completion in pairs]


def stopped(recipe: Recipe, path: Path, n: int = N) -> str:
    """Runs it against its limit; what it says."""
    with pytest.raises(BudgetReached) as caught:
        generate_dialogues(recipe, run=path, n=n)
    assert "\n" not in str(caught.value)
    assert not (path / "summary.json").exists()
    assert not rows(path / "failed.jsonl")
    return str(caught.value)


# --- the stop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "used", "allowed"),
    [("max_tokens", tokens_in, 60_000), ("max_cost", usd_in, 0.25)],
    ids=["tokens", "cost"],
)
def test_a_run_stops_at_its_limit_and_ends_with_the_same_bytes_under_a_larger_one(
    limit: str, used: Callable[[Path], list[float]], allowed: float, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with scripted_server(delay=0.002) as server:
        generate_dialogues(over_http(server.url), run=tmp_path / "free", n=N)
        free = server.requests
        for times in (1, 2):
            before = server.requests
            said = stopped(over_http(server.url, **{limit: allowed * times}), run)
            assert f"larger --{limit.replace('_', '-')}" in said
            spent = used(run)
            assert allowed * times <= sum(spent) <= allowed * times + AT_ONCE * max(spent)
            assert server.requests - before > 0
            assert server.requests - free == len(spent), "a reply that was paid for is not in the journal"
            again = server.requests
            stopped(over_http(server.url, **{limit: allowed * times}), run)
            assert server.requests == again, "a run whose budget is used up asked a model"
        generate_dialogues(over_http(server.url, **{limit: allowed * 100}), run=run, n=N)
    assert digest(run) == digest(tmp_path / "free")
    keys = journal_keys(run)
    assert len(keys) == len(set(keys))


def test_all_kinds_of_job_stop_and_resume_together(tmp_path: Path) -> None:
    recipe = load_recipe(bundled("pipelines/aligned.yaml"))
    generate_dialogues(recipe, run=tmp_path / "free", n=24)
    whole = sum(tokens_in(tmp_path / "free"))
    for share in (0.1, 0.5, 0.95):  # the last one falls among the twins
        said = stopped(override(recipe, max_tokens=int(share * whole)), tmp_path / "run", 24)
        assert "of 50 refusals" in said
    generate_dialogues(override(recipe, max_tokens=10**9), run=tmp_path / "run", n=24)
    assert digest(tmp_path / "run") == digest(tmp_path / "free")


def test_replies_of_the_journal_cost_nothing_again(tmp_path: Path) -> None:
    with scripted_server() as server:
        generate_dialogues(over_http(server.url, concurrency=1), run=tmp_path / "run", n=5)
        before, paid = digest(tmp_path / "run"), server.requests
        for file in tmp_path.glob("run/*.jsonl"):
            if file.name != "seeds.jsonl":
                file.unlink()
        (tmp_path / "run" / "summary.json").unlink()
        generate_dialogues(over_http(server.url, concurrency=1, max_tokens=1), run=tmp_path / "run", n=5)
        assert server.requests == paid
    assert digest(tmp_path / "run") == before


@pytest.mark.alone
def test_when_the_time_is_up_what_is_in_flight_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with scripted_server(delay=0.02) as server:
        assert "0 of 20 dialogues" in stopped(over_http(server.url, max_time=1e-6), run)
        assert server.requests == 0
        said = stopped(over_http(server.url, max_time=0.4), run)
        assert "0.4 s of --max-time" in said
        assert server.requests == len(tokens_in(run))
        server.delay = 0.0
        generate_dialogues(over_http(server.url, max_time=600.0), run=run, n=N)
        generate_dialogues(over_http(server.url), run=tmp_path / "free", n=N)
    assert digest(run) == digest(tmp_path / "free")


def test_what_does_not_end_is_cancelled_a_while_after_the_time() -> None:
    ended = []

    async def stall() -> None:
        budget = Budget(Limits(max_time=0.01), {}, grace=0.01)
        async with budget.lasting():
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

    with pytest.raises(BudgetReached, match="--max-time"):
        asyncio.run(stall())
    assert ended


def test_a_timeout_of_the_work_itself_is_not_taken_for_the_limit() -> None:
    async def fail() -> None:
        async with Budget(Limits(max_time=1000.0), {}).lasting():
            raise TimeoutError("a defect")

    with pytest.raises(TimeoutError, match="a defect"):
        asyncio.run(fail())


class _Held(web.Response):
    """An answer that does not come before the test lets it."""

    def __init__(self, let_go: threading.Event) -> None:
        super().__init__(status=500)
        self._let_go = let_go

    async def prepare(self, request: web.BaseRequest) -> Any:
        await asyncio.to_thread(self._let_go.wait, 60)
        return await super().prepare(request)


def test_ctrl_c_does_not_wait_for_what_is_in_flight(tmp_path: Path) -> None:
    let_go = threading.Event()
    with scripted_server(lambda _: _Held(let_go) if server.requests == 1 else None) as server:
        words = ["generate", "--n", "50", "--run", "./run", "--no-refusals", "--concurrency", "4"]
        for role in ("attacker", "victim", "judge"):
            words += [f"--{role}", f"openai:scripted@{server.url}"]
        process = started(*words, "--max-tokens", "1k", cwd=tmp_path)
        while process.poll() is None and sum(tokens_in_bytes(tmp_path / "run")) < 1000:
            time.sleep(0.01)
        assert process.poll() is None, "it did not wait for the call that is under way"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        let_go.set()
    assert process.returncode == 130
    assert "Traceback" not in said


def tokens_in_bytes(run: Path) -> list[int]:
    """As `tokens_in`, while the journal is being written."""
    path = run / "journal" / "main.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return [sum(msgspec.json.decode(line).get("tokens", (0, 0))) for line in whole]


def test_the_command_ends_with_code_5_and_says_how_to_continue(tmp_path: Path) -> None:
    words = ("generate", "--n", "30", "--run", "./run", "--no-refusals")
    done = cli(*words, "--max-tokens", "50k", cwd=tmp_path)
    assert done.returncode == 5
    last = done.stderr.strip().splitlines()[-1]
    assert "of 30 dialogues" in last
    assert "larger --max-tokens to continue" in last
    assert cli("show", "./run", "--funnel", cwd=tmp_path).returncode == 0
    assert cli(*words, cwd=tmp_path).returncode == 0


# --- several processes -----------------------------------------------------------------------------------------------


def test_the_time_limit_counts_from_before_the_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> int:
        time.sleep(0.05)
        return 0

    monkeypatch.setattr("intersafe.generation.context.align_outcomes", slow)

    async def seconds() -> float:
        with opened(RunRequest(prepare(demo()), tmp_path / "run", 1, Display()), 0) as context:
            return context.budget.seconds

    assert asyncio.run(seconds()) >= 0.05


def test_what_several_roles_used_is_added_up() -> None:
    roles = {"judge": RoleTally(calls=1, prompt_tokens=40, completion_tokens=9)}
    budget = Budget(Limits(max_tokens=100), roles)
    budget.check()
    roles["attacker"] = RoleTally(calls=1, prompt_tokens=50, completion_tokens=1)
    with pytest.raises(BudgetReached, match="100 of 100 tokens"):
        budget.check()


def test_a_worker_can_be_stopped_from_outside() -> None:
    worker = Budget(Limits(), {})
    worker.check()
    worker.stopped = "50.10 of 50.00 USD are used"
    with pytest.raises(BudgetReached, match=r"50\.10 of 50\.00"):
        worker.check()


# --- prices ----------------------------------------------------------------------------------------------------------


def test_a_limit_on_the_cost_needs_a_price_for_every_network(tmp_path: Path) -> None:
    spec = "openai:m@http://127.0.0.1:9/v1"
    recipe = demo(attacker=spec, victims=[spec, "scripted:eager"], max_cost=1.0)
    said = refusal(lambda: generate_dialogues(recipe, run=tmp_path / "run"))
    assert "attacker, victim:0;" in said
    assert "--price attacker=" in said
    assert not (tmp_path / "run").exists()
    zeros = override(recipe, prices=dict.fromkeys(("attacker", "victim"), Price()), max_tokens=1)
    with pytest.raises(BudgetReached):  # the price is accepted: nothing but the limit stops it
        generate_dialogues(
            structs.replace(zeros, limits=structs.replace(zeros.limits, max_time=1e-6)), run=tmp_path / "r"
        )


def test_prices_go_to_the_roles_that_they_name() -> None:
    own, all_ = Price(prompt=3.0), Price(prompt=1.0, completion=2.0, call=4.0)
    recipe = demo(prices={"victim": all_, "victim:1": own})
    assert {role: model.price for role, model in recipe.cast.models.items() if model.price} == {
        "victim:0": all_,
        "victim:1": own,
    }
    assert recipe.outcome == demo().outcome, "a price decides nothing of what a run holds"
    assert "no role 'jugde'" in refusal(lambda: demo(prices={"jugde": own}))
    assert demo(prices={"judge": own}, judge="scripted:careful").cast.judge.price == own
    priced = demo(prices={"judge": own})
    assert override(priced, judge="scripted:careful").cast.judge.price is None, "that is the price of another model"
    batch = structs.replace(recipe.cast.victims[0], batch=True)
    cast = structs.replace(recipe.cast, victims=(batch, recipe.cast.victims[1]))
    assert prices_of(cast) == {"victim:0": Price(prompt=0.5, completion=1.0, call=2.0), "victim:1": own}


def test_the_summary_and_the_funnel_hold_the_cost(tmp_path: Path) -> None:
    prices = ["--price", "judge=1,10,1", "--price", "attacker=0,0", "--no-refusals"]
    done = cli("generate", "--n", "5", "--run", "./run", *prices, cwd=tmp_path)
    summary = Run(tmp_path / "run").summary
    assert summary is not None
    judged = [row["tokens"] for row in rows(tmp_path / "run" / "journal" / "main.jsonl") if row["role"] == "judge"]
    expected = sum(prompt * 1e-6 + completion * 1e-5 + 1 for prompt, completion in judged)
    assert summary.roles["judge"].cost == pytest.approx(expected)
    shown = cli("show", "./run", "--funnel", cwd=tmp_path).stdout
    for text in (done.stdout, shown, cli("stats", "./run", cwd=tmp_path).stdout):
        assert f"{expected:.2f} USD" in text
    assert "painter, victim:0 no price" in done.stdout
    assert shown in done.stdout

    old = msgspec.json.decode((tmp_path / "run" / "summary.json").read_bytes())
    del old["prices"]
    for tally in old["roles"].values():
        del tally["cost"]
    (tmp_path / "run" / "summary.json").write_bytes(msgspec.json.encode(old))
    again = Run(tmp_path / "run").summary
    assert again is not None
    assert again.roles["judge"].calls == summary.roles["judge"].calls
    assert "USD" not in cli("show", "./run", "--funnel", cwd=tmp_path).stdout


# --- flags -----------------------------------------------------------------------------------------------------------


LIMITS = {"max_tokens": TOKENS, "max_cost": USD, "max_time": DURATION}


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("max_tokens", "2000000", 2_000_000),
        ("max_tokens", "2M", 2_000_000),
        ("max_tokens", "1.5B", 1_500_000_000),
        ("max_tokens", "500k", 500_000),
        ("max_cost", "12.5", 12.5),
        ("max_time", "90", 90),
        ("max_time", "90s", 90),
        ("max_time", "30m", 1800),
        ("max_time", "8h", 28_800),
        ("max_time", "1d", 86_400),
        ("max_time", "1h30m", 5400),
        ("max_time", "7:30:00", 27_000),
    ],
)
def test_limits_are_read_as_people_write_them(flag: str, text: str, value: float) -> None:
    number = LIMITS[flag].convert(text, None, None)
    assert number == value
    assert getattr(demo(**{flag: number}).limits, flag) == value


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        *(("max_tokens", text) for text in ("", "0", "-5", "1.5", "2X", "nan", "1e400", "9999999B", "٣")),
        *(("max_cost", text) for text in ("", "0", "-1", "nan", "inf", "50 USD", "1e10")),
        *(("max_time", text) for text in ("", "0", "-1", "7:30", "1:99:00", "1x", "1h30", "nan", "s", "99999999d")),
    ],
)
def test_limits_that_are_none_are_refused(flag: str, text: str) -> None:
    option = click.Option([f"--{flag.replace('_', '-')}"])
    message = refusal(lambda: LIMITS[flag].convert(text, option, None))
    assert message.startswith(f"{option.opts[0]}: {text!r} is not ")
    assert "; write " in message


# --- the display -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PlainLines, LivePanel])
def test_the_display_shows_what_is_used_allowed_and_waited_for(
    kind: type[PlainLines | LivePanel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    journal = Journal(GroupWriter(tmp_path), prices={"judge": PRICE})
    journal.roles["judge"] = RoleTally(calls=7, prompt_tokens=1_000_000, completion_tokens=500_000, cost=12.31)
    waiting = {"judge at http://h/v1": "HTTP 503 busy"}
    progress = Progress(200, 300, Funnel(jobs=60, accepted=50), journal, {"judge": 3}, 50)
    progress.budget = Budget(Limits(max_cost=50, max_tokens=10**10, max_time=7200), journal.roles)
    progress.waiting = waiting
    during = shown(kind, progress)
    for words in ("1.5M of 10B tokens", "about 6M in all", "12.31 of 50.00 USD", "about 49.24 in all", "of 2:00:00"):
        assert words in during
    assert "HTTP 503 busy" in during
    waiting.clear()
    assert "503" not in shown(kind, progress)


class Terminal(io.StringIO):
    """A terminal that is closed at some moment."""

    is_gone = False

    def write(self, text: str) -> int:
        if self.is_gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("kind", [PlainLines, LivePanel])
def test_a_terminal_that_was_closed_stops_no_run(kind: type[PlainLines | LivePanel], tmp_path: Path) -> None:
    terminal = Terminal()
    display = kind(terminal)
    display.begin(Progress(200, 300, Funnel(), Journal(GroupWriter(tmp_path)), {}))
    terminal.is_gone = True
    # That none of these raises is what is tested: the run calls them, and would end with their exception.
    display.look()
    display.say("judge at http://h/v1 is back after 3 s")
    display.end()
    assert "is back" not in terminal.getvalue()


def shown(kind: type[PlainLines | LivePanel], progress: Progress) -> str:
    """What a display writes that looks once."""
    stream = io.StringIO()
    display = kind(stream)
    display.begin(progress)
    display.look()
    display.end()
    return stream.getvalue()


# --- servers that do not say what they used --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "usage",
    ["", ', "usage": null', ', "usage": {}', ', "usage": {"prompt_tokens": 1e30}', ', "usage": ["?"]',
     ', "usage": {"prompt_tokens": 7.5, "completion_tokens": 3}', f', "usage": {{"prompt_tokens": {10**30}}}'],
)  # fmt: skip
def test_calls_without_usage_are_counted_by_estimate_and_that_is_said_once(usage: str, tmp_path: Path) -> None:
    shown = Recording()
    text = "0123456789abcdef" * 25

    def silent(_: Body) -> web.Response:
        message = msgspec.json.encode({"content": text}).decode()
        whole = f'{{"choices": [{{"message": {message}, "finish_reason": "stop"}}]{usage}}}'
        return web.Response(text=whole, content_type="application/json")

    with scripted_server(silent) as server:
        recipe = over_http(server.url, max_tokens=2000, concurrency=1)
        with pytest.raises(BudgetReached, match="--max-tokens"):
            generate_dialogues(recipe, run=tmp_path / "run", n=N, display=shown)
    used = [row["tokens"] for row in rows(tmp_path / "run" / "journal" / "main.jsonl")]
    assert 1 <= len(used) <= 20, "the limit was not noticed in time"
    assert all(completion == 100 and prompt > 50 for prompt, completion in used)
    assert [line for line in shown.lines if "by estimate" in line] == [
        "openai:scripted reports no tokens: they are counted by estimate, four characters a token"
    ]


# --- calls that wait -------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_calls_that_wait_for_a_place_are_not_sent_after_the_limit(tmp_path: Path) -> None:
    run, shown = tmp_path / "run", Recording()
    with scripted_server(delay=0.3) as server:
        recipe = over_http(server.url, max_tokens=1, concurrency=AT_ONCE)
        # The three roles share one model, and the lowest limit holds.
        attacker = structs.replace(recipe.cast.attacker, concurrency=2)
        recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, attacker=attacker))
        with pytest.raises(BudgetReached):
            generate_dialogues(recipe, run=run, n=N, display=shown)
    # Two are in flight when the first answer comes, and one more may start before that answer is counted.
    assert server.requests <= 4
    assert server.requests == len(tokens_in(run))


def test_when_the_time_is_up_nobody_waits_for_servers_that_are_away(tmp_path: Path) -> None:
    recipe = over_http("http://127.0.0.1:9/v1", max_time=1.0, concurrency=4, patience=600.0)
    began = time.monotonic()
    with pytest.raises(BudgetReached, match="--max-time"):
        generate_dialogues(recipe, run=tmp_path / "run", n=N)
    assert time.monotonic() - began < 30, "it waited for the grace that calls in flight have"


@pytest.mark.alone
def test_the_time_ends_a_wait_for_a_quota(tmp_path: Path) -> None:
    with scripted_server() as server:
        recipe = over_http(server.url, max_time=1.0, concurrency=4)
        slow = structs.replace(recipe.cast.attacker, rpm=1)
        recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, attacker=slow))
        began = time.monotonic()
        with pytest.raises(BudgetReached, match="--max-time"):
            generate_dialogues(recipe, run=tmp_path / "run", n=N)
    assert time.monotonic() - began < 30
    assert server.requests == len(tokens_in(tmp_path / "run")) == 1


@pytest.mark.alone
def test_one_line_says_what_is_in_flight_at_the_limit(tmp_path: Path) -> None:
    shown = Recording()
    with scripted_server(delay=2.0) as server:
        recipe = over_http(server.url, max_time=1.0, concurrency=3)
        with pytest.raises(BudgetReached):
            generate_dialogues(recipe, run=tmp_path / "run", n=N, display=shown)
    assert len(tokens_in(tmp_path / "run")) == 3
    told = [line for line in shown.lines if line.startswith("limit reached")]
    assert len(told) == 1
    assert "--max-time" in told[0]
    assert told[0].endswith("3 calls in flight are ending")


@pytest.mark.parametrize(
    ("per_second", "words"),
    [(0.0, "0.0/s"), (12.34, "12.3/s"), (0.1, "0.1/s"), (0.09, "5.4/min"), (0.002, "0.1/min"), (0.001, "3.6/h")],
)
def test_a_slow_rate_is_no_zero(per_second: float, words: str) -> None:
    assert rate_of(per_second) == words


@pytest.mark.alone
def test_a_wait_for_a_quota_is_shown_and_a_request_above_it_is_said_once(tmp_path: Path) -> None:
    class Watching(Recording):
        """Remembers what was waited for."""

        def begin(self, progress: Progress) -> None:
            self.progress, self.seen = progress, set[tuple[str, str]]()

        def look(self) -> None:
            self.seen |= set(self.progress.waiting.items())

    shown = Watching()
    with scripted_server() as server:
        recipe = over_http(server.url, max_time=1.0, concurrency=4)
        slow = structs.replace(recipe.cast.attacker, tpm=300)
        recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, attacker=slow))
        with pytest.raises(BudgetReached):
            generate_dialogues(recipe, run=tmp_path / "run", n=N, display=shown)
    assert shown.seen == {("the quota of openai:scripted", "calls are held back by 300 tokens a minute")}
    assert sum("more than its `tpm` allows" in line for line in shown.lines) == 1
