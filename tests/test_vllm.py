"""A real vLLM engine on the CPU, in this process and served by `intersafe serve` (`make test-vllm`).

What the two make of the same calls and of the same recipe must be the same bytes.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intersafe.errors import CallFailed, InputError, IntersafeError
from intersafe.images import ImageStore
from intersafe.models import Call, Reply
from intersafe.records import Message
from intersafe.replies import CheckAnswer, PlanAnswer, StepScoreAnswer, VerdictAnswer
from tests.engines import (
    CAST,
    COLOURS,
    REFUSAL,
    VICTIM,
    answers,
    blind_weights,
    engine,
    picture,
    put_up,
    question,
    texts,
    write_recipe,
)
from tests.makers import cli, digest, hears_ctrl_c, journal_keys, rows

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vllm here: run `make test-vllm`"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(400),
]
Found = list[Reply | IntersafeError]
ARGS = {"skip_mm_profiling": True}
ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine in this very process: it is there in 4 s instead of 25, and cannot die alone."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(recipe: Path, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """`intersafe serve` until all its servers answer, and its clean end."""
    command = [sys.executable, "-m", "intersafe", "serve", str(recipe), "--logs", str(folder / "logs")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, preexec_fn=hears_ctrl_c) as server:
        assert server.stderr is not None
        try:
            said = []
            for line in server.stderr:
                said.append(line)
                if "Ctrl-C stops them" in line:
                    break
            else:
                pytest.fail("".join(said))
            yield server
        finally:
            server.send_signal(signal.SIGINT)
            server.stderr.close()
            server.wait(60)


# --- single calls ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def calls(store: ImageStore) -> list[Call]:
    """Talks of every kind, good ones and bad ones, which are asked for all at once."""
    refs = {colour: picture(store, colour) for colour in COLOURS}
    earlier = (Message("user", "See here.", (refs["blue"],)), Message("assistant", "I see it."))
    return [
        *(question("What is it?", refs[colour]) for colour in COLOURS),
        question("And both?", refs["red"], refs["green"]),
        question("Which was it?", history=earlier),
        question("And now?", refs["white"], history=earlier),
        question("A forbidden one."),
        question("Score it.", answer=StepScoreAnswer),
        question("Judge it.", refs["red"], answer=VerdictAnswer),
        question("Check it.", answer=CheckAnswer),
        question("Plan it.", answer=PlanAnswer, sizes=(("steps", 3),)),
        question("Tell me more.", most=3),
        question("word " * 6000),
        question("Too many.", *[refs["red"]] * 5),
    ]


@pytest.fixture(scope="module")
def here(store: ImageStore, calls: list[Call]) -> list[Found]:
    """What the engine of this process makes of them, twice."""
    os.environ |= ALONE
    try:
        return answers("vllm:tiny", engine(args=ARGS), store, [calls, calls])
    finally:
        for name in ALONE:
            del os.environ[name]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URLs of two real servers that one recipe asks for: the tiny victim and the tiny cast."""
    folder = tmp_path_factory.mktemp("served")
    one, other = (f"http://127.0.0.1:{free_port()}/v1" for _ in range(2))
    cast: dict[str, Any] = {
        "attacker": f"vllm:tiny-cast@{other}",
        "victims": [f"vllm:tiny@{one}"],
        "judge": f"vllm:tiny-cast@{other}",
    }
    serve = {"tiny": put_up(VICTIM, args=ARGS), "tiny-cast": put_up(CAST, args=ARGS)}
    recipe = write_recipe(folder / "recipe.json", cast["attacker"], {}, cast=cast, serve=serve)
    with serving(recipe, folder):
        yield one, other


def test_images_of_every_turn_are_seen_and_schemas_hold(here: list[Found]) -> None:
    found = texts(here[0][:13])
    assert found[:9] == [
        *(f"The image is {colour}. This is answer number 1." for colour in COLOURS),
        "The image is green. This is answer number 1.",
        "The earlier image was blue. This is answer number 2.",
        "The image is white. This is answer number 2.",
        REFUSAL,
    ]
    shapes = [json.loads(text) for text in found[9:13]]
    assert [len(shape) for shape in shapes] == [4, 5, 3, 1]
    assert len(shapes[3]["steps"]) == 3


def test_bad_conversations_fail_alone_and_cut_ones_say_so(here: list[Found]) -> None:
    cut, long, many = here[0][13:]
    assert isinstance(cut, Reply)
    assert (cut.finish, cut.tokens[1]) == ("length", 3)
    assert isinstance(long, CallFailed)
    assert long.reason == "too_long"
    assert isinstance(many, CallFailed)
    assert many.reason == "bad_request"
    assert "At most 4 image" in str(many)


def test_what_the_engine_remembers_of_images_changes_no_answer(here: list[Found]) -> None:
    assert texts(here[0][:14]) == texts(here[1][:14])


def test_a_server_gives_the_same_texts_and_turns_down_the_same(
    here: list[Found], served: tuple[str, str], store: ImageStore, calls: list[Call]
) -> None:
    (found,) = answers(f"vllm:tiny@{served[0]}", engine(), store, [calls])
    assert found[:14] == here[0][:14]
    assert [getattr(failed, "reason", "") for failed in found[14:]] == ["too_long", "bad_request"]


@pytest.mark.parametrize(
    ("changes", "extra", "words"),
    [
        ({"args": {"no_such": 1}}, {}, ("no_such", "args")),
        ({}, {"top_n": 3}, ("top_n", "sampling parameter")),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "9000"}}, {}, ("memory", "gpu_memory")),
    ],
)
def test_an_engine_that_cannot_start_is_one_line(
    changes: dict[str, Any],
    extra: dict[str, Any],
    words: tuple[str, ...],
    store: ImageStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (ALONE | {"VLLM_CPU_KVCACHE_SPACE": "1"}).items():
        monkeypatch.setenv(name, value)
    (found,) = answers("vllm:tiny", engine(**changes), store, [[question("Hello."), question("And?")]], extra=extra)
    for error in found:
        assert isinstance(error, InputError)
        assert "\n" not in str(error)
        assert all(word in str(error) for word in words)
        assert ";" in str(error)


# --- whole runs ------------------------------------------------------------------------------------------------------


def run_of(recipe: Path, run: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    return cli("generate", "--pipeline", str(recipe), "--run", str(run), "--n", "20", cwd=recipe.parent, **env)


@pytest.fixture(scope="module")
def runs(served: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recipe, served and in this process: it differs in the URL alone, which is no part of it."""
    folder = tmp_path_factory.mktemp("runs")
    for name, spec, env in (
        ("served", f"vllm:tiny-cast@{served[1]}", {}),
        ("here", "vllm:tiny-cast", ALONE),
    ):
        recipe = write_recipe(folder / f"{name}.json", spec, put_up(CAST, args=ARGS))
        done = run_of(recipe, folder / name, **env)
        assert done.returncode == 0, done.stderr
    return folder


def test_the_same_recipe_served_and_in_process_gives_the_same_bytes(runs: Path) -> None:
    assert len(rows(runs / "served" / "dialogues.jsonl")) == 20
    assert digest(runs / "served") == digest(runs / "here")


def test_images_stand_in_several_turns_and_are_seen_there(runs: Path) -> None:
    dialogues = rows(runs / "here" / "dialogues.jsonl")
    places = [place for row in dialogues for place, turn in enumerate(row["turns"]) if turn.get("origins")]
    assert len(set(places)) >= 2
    assert max(len([t for t in row["turns"] if t.get("origins")]) for row in dialogues) >= 2


def test_summary_and_funnel_tell_how_busy_the_engines_were(runs: Path) -> None:
    for name in ("served", "here"):
        (figures,) = json.loads((runs / name / "summary.json").read_text())["engines"].values()
        assert figures["looks"] >= 1
        assert figures["queries"] > 1000
        assert 0 <= figures["hits"] <= figures["queries"]
        shown = cli("show", str(runs / name), "--funnel", cwd=runs)
        assert "prefix cache" in shown.stdout


def test_an_engine_that_is_killed_ends_the_run_in_one_line_and_the_same_command_goes_on(
    runs: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.json", "vllm:tiny-cast", put_up(CAST, args=ARGS))
    words = ("generate", "--pipeline", str(recipe), "--run", str(tmp_path / "run"), "--n", "20", "--concurrency", "2")
    command = [sys.executable, "-m", "intersafe", *words]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as running:
        journal = tmp_path / "run" / "journal"
        while not (sum(path.stat().st_size for path in journal.glob("*.jsonl")) if journal.exists() else 0) > 20_000:
            assert running.poll() is None, running.stderr.read() if running.stderr else ""
            time.sleep(0.02)
        (core,) = children_named(running.pid, "EngineCore")
        os.kill(core, signal.SIGKILL)
        _, said = running.communicate(timeout=120)
    assert running.returncode == 4, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("intersafe: the engine of vllm:tiny-cast died")
    assert "run the same command again" in last
    assert "Traceback" not in said
    resumed = run_of(recipe, tmp_path / "run", **ALONE)
    assert resumed.returncode == 0, resumed.stderr
    keys = journal_keys(tmp_path / "run")
    assert len(keys) == len(set(keys))
    written = write_recipe(runs / "again.json", "vllm:tiny-cast", put_up(CAST, args=ARGS))
    assert written.exists()
    assert digest(tmp_path / "run") == digest(runs / "here")


def children_named(parent: int, word: str) -> list[int]:
    """Descendants of a process whose command line or name has that word."""
    found, parents = [], {parent}
    table = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                name = stat[stat.index("(") + 1 : stat.rindex(")")] + (entry / "cmdline").read_text()
                table.append((int(entry.name), int(stat.rpartition(")")[2].split()[1]), name))
    for pid, above, name in sorted(table):
        if above in parents:
            parents.add(pid)
            if word in name:
                found.append(pid)
    return found


def test_a_server_of_text_alone_that_is_sent_images_ends_in_one_line(tmp_path: Path) -> None:
    weights = blind_weights(tmp_path / "blind")
    url = f"http://127.0.0.1:{free_port()}/v1"
    recipe = write_recipe(tmp_path / "recipe.json", f"vllm:blind@{url}", put_up(weights, max_model_len=2048))
    done = cli(
        "generate", "--serve", "--pipeline", str(recipe), "--run", str(tmp_path / "run"), "--n", "5", cwd=tmp_path
    )
    assert done.returncode in (2, 4), done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "vision-language" in last
