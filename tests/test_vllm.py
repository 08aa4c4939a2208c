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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from intersafe.errors import CallFailed, InputError, IntersafeError
from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Reply
from intersafe.records import Message
from intersafe.replies import CheckAnswer, PlanAnswer, StepScoreAnswer, VerdictAnswer
from tests.engines import (
    CAST,
    COLOURS,
    REFUSAL,
    answers,
    begun,
    blind_weights,
    engine,
    picture,
    put_up,
    question,
    run_of,
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
    """Conversations of every kind, good ones and bad ones, which are asked for all at once."""
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
        return answers("vllm:tiny", engine(CAST, args=ARGS), store, [calls, calls])
    finally:
        for name in ALONE:
            del os.environ[name]


class Served(NamedTuple):
    """A real server that `intersafe serve` started and looks after."""

    url: str
    pid: int
    """Of `intersafe serve`."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    url = f"http://127.0.0.1:{free_port()}/v1"
    recipe = write_recipe(folder / "recipe.json", f"vllm:tiny-cast@{url}", put_up(args=ARGS))
    with serving(recipe, folder) as server:
        yield Served(url, server.pid)


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
    here: list[Found], served: Served, store: ImageStore, calls: list[Call]
) -> None:
    (found,) = answers(f"vllm:tiny-cast@{served.url}", engine(), store, [calls])
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
    (found,) = answers(
        "vllm:tiny", engine(CAST, **changes), store, [[question("Hello."), question("And?")]], extra=extra
    )
    for error in found:
        assert isinstance(error, InputError)
        assert "\n" not in str(error)
        assert all(word in str(error) for word in words)
        assert ";" in str(error)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole cast on the engine of the run's own process."""
    folder = tmp_path_factory.mktemp("here")
    done = run_of(write_recipe(folder / "recipe.json", "vllm:tiny-cast", put_up(args=ARGS)), folder / "run", **ALONE)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def served_run(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe with a URL, which is no part of it; the server's engine is killed in the middle."""
    folder = tmp_path_factory.mktemp("served_run")
    recipe = write_recipe(folder / "recipe.json", f"vllm:tiny-cast@{served.url}", put_up(args=ARGS))
    with begun(recipe, folder / "run", 60) as running:
        (core,) = children_named(served.pid, "EngineCore")
        os.kill(core, signal.SIGKILL)
        _, said = running.communicate(timeout=150)
    assert running.returncode == 0, said
    assert "no connection" in said or "HTTP 5" in said
    assert children_named(served.pid, "EngineCore") not in ([], [core])
    return folder / "run"


def test_served_with_its_engine_killed_and_in_process_give_the_same_bytes(served_run: Path, here_run: Path) -> None:
    assert len(rows(here_run / "dialogues.jsonl")) == 20
    assert digest(served_run) == digest(here_run)
    keys = journal_keys(served_run)
    assert len(keys) == len(set(keys))


def test_images_stand_in_several_turns_and_are_seen_there(here_run: Path) -> None:
    dialogues = rows(here_run / "dialogues.jsonl")
    places = [place for row in dialogues for place, turn in enumerate(row["turns"]) if turn.get("origins")]
    assert len(set(places)) >= 2
    assert max(len([t for t in row["turns"] if t.get("origins")]) for row in dialogues) >= 2


def test_summary_and_funnel_tell_how_busy_the_engines_were(served_run: Path, here_run: Path) -> None:
    for run in (served_run, here_run):
        (figures,) = json.loads((run / "summary.json").read_text())["engines"].values()
        assert figures["looks"] >= 1
        assert figures["queries"] > 1000
        assert 0 <= figures["hits"] <= figures["queries"]
        assert "prefix cache" in cli("show", str(run), "--funnel", cwd=run.parent).stdout


def test_an_engine_of_the_run_that_is_killed_ends_it_in_one_line_and_the_same_command_resumes_it(
    here_run: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.json", "vllm:tiny-cast", put_up(args=ARGS))
    with begun(recipe, tmp_path / "run", 60) as running:
        (core,) = children_named(running.pid, "EngineCore")
        os.kill(core, signal.SIGKILL)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 4, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("intersafe: the engine of vllm:tiny-cast died")
    assert "run the same command again" in last
    assert "Traceback" not in said
    assert not children_named(running.pid, "VLLM")
    resumed = run_of(recipe, tmp_path / "run")  # to its end with an engine in a process of its own
    assert resumed.returncode == 0, resumed.stderr
    keys = journal_keys(tmp_path / "run")
    assert len(keys) == len(set(keys))
    assert digest(tmp_path / "run") == digest(here_run)


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


def test_weights_of_text_alone_are_found_before_a_server_starts(tmp_path: Path) -> None:
    weights = blind_weights(tmp_path / "blind")
    spec = f"vllm:blind@http://127.0.0.1:{free_port()}/v1"
    recipe = write_recipe(tmp_path / "recipe.json", spec, put_up(weights, max_model_len=2048))
    done = cli("generate", "--serve", "--pipeline", str(recipe), "--run", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot see images" in done.stderr
    assert "vision-language" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_doctor_finds_all_well_with_a_real_server(served: Served, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.json", f"vllm:tiny-cast@{served.url}", put_up(args=ARGS))
    done = cli("doctor", str(recipe), "--json", "-", "--timeout", "60", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (group,) = [group for group in json.loads(done.stdout)["groups"] if group["url"] == served.url]
    found = {finding["what"]: finding["status"] for finding in group["findings"]}
    assert {found[what] for what in ("answers", "model", "usage", "finish", "images", "several", "schema")} == {"ok"}
    assert found["metrics"] == "ok"
