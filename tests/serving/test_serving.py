"""`intersafe serve` and `generate --serve` with real processes: a stand-in for `vllm`, its flags and its words."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intersafe.errors import InputError
from intersafe.recipe.load import load_recipe
from intersafe.run.directory import Run
from intersafe.serving.guard import Guard
from intersafe.serving.plan import servers_of
from intersafe.serving.supervisor import Supervisor, serving
from tests.support.paths import SUPPORT
from tests.support.recipes import at, written
from tests.support.runs import cli, digest, rows, started
from tests.support.servers.vllm_command import FAILURES

STANDIN = f"{sys.executable} {SUPPORT / 'servers/vllm_command.py'} serve"
NAME = "org/tiny"
Row = dict[str, Any]


def free_ports(count: int) -> list[int]:
    """Ports at which nobody listens."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def eventually(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns once it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_gone(pid: int) -> bool:
    """No such process, or one that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def get(port: int, path: str, **headers: str) -> int:
    """The status of an answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as line:
        line.request("GET", path, headers=headers)
        return line.getresponse().status


def ask(port: int, name: str = NAME) -> str:
    """The text of a chat completion; `OSError` or `HTTPException` where the server dies of it."""
    body = {"model": name, "messages": [{"role": "user", "content": "How do scams work?"}], "max_tokens": 64}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as line:
        line.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return str(json.loads(line.getresponse().read())["choices"][0]["message"]["content"])


class World:
    """A folder with a recipe, its servers' ports, and their diary."""

    def __init__(self, folder: Path, count: int = 1) -> None:
        self.folder, self.ports = folder, free_ports(count)
        self.diary = folder / "diary.jsonl"

    def engine(self, *, does: dict[str, str] | None = None, **more: Any) -> Row:
        """An entry of `serve`; `does` is what the stand-in shall do."""
        env = {f"STANDIN_{name}": value for name, value in (does or {}).items()}
        return {"command": STANDIN, "env": {"STANDIN_DIARY": str(self.diary), **env}, **more}

    def write(self, *, does: dict[str, str] | None = None, member: Row | None = None, **more: Any) -> Path:
        """A recipe whose judge has all the ports."""
        judge = {"model": at(NAME, *self.ports), **(member or {})}
        return written(self.folder, {"judge": judge}, {NAME: self.engine(does=does, **more)})

    def events(self, *which: str) -> list[Row]:
        return [row for row in rows(self.diary) if not which or row["event"] in which]

    @property
    def pids(self) -> list[int]:
        """Every process that ever served."""
        return [row["engine"] if row["event"] == "engine" else row["pid"] for row in self.events("starts", "engine")]

    def is_clean(self) -> bool:
        """No process is left and nobody listens."""
        return all(map(is_gone, self.pids)) and not any(map(listens, self.ports))

    def log(self, port: int) -> str:
        return (self.folder / f"outputs/serve-logs/org-tiny-{port}.log").read_text()

    @contextlib.contextmanager
    def served(self, said: list[str] | None = None, **options: float) -> Iterator[Supervisor]:
        """The servers of the recipe in this process."""
        recipe = load_recipe(self.folder / "mine.yaml")
        say = (said if said is not None else []).append
        with serving(servers_of(recipe), self.folder / "outputs/serve-logs", say, **options) as supervisor:
            yield supervisor


class Command:
    """A running `intersafe ...` and what it says on stderr."""

    def __init__(self, world: World, *words: str) -> None:
        self.process: subprocess.Popen[str] = started(*(words or ("serve", "mine.yaml")), cwd=world.folder)
        self.said: list[str] = []

    def until(self, words: str) -> str:
        """The line with these words, as soon as it is said."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(line)
            if words in line:
                return line
        raise AssertionError(f"it ended without {words!r}: {''.join(self.said)}")

    def ends(self) -> int:
        _, rest = self.process.communicate(timeout=40)
        self.said += rest.splitlines(keepends=True)
        assert "Traceback" not in self.text
        return self.process.returncode

    @property
    def text(self) -> str:
        return "".join(self.said)


@pytest.fixture
def begin() -> Iterator[Callable[..., Command]]:
    """Starts commands; none of them outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(world: World, *words: str) -> Command:
            command = Command(world, *words)
            stack.enter_context(command.process)
            stack.callback(command.process.kill)
            return command

        yield start


Begin = Callable[..., Command]


def failure(world: World, said: list[str] | None = None) -> str:
    """The one line of a start that fails; nothing is left of it."""
    with pytest.raises(InputError) as caught, world.served(said):
        pytest.fail("it answers")
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)
    assert world.is_clean()
    return str(caught.value)


# --- start and stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_serves_until_it_is_stopped_and_leaves_nothing(how: signal.Signals, tmp_path: Path, begin: Begin) -> None:
    world = World(tmp_path, 2)
    world.write()
    command = begin(world)
    command.until("2 of 2 answer; Ctrl-C stops them")
    assert [get(port, "/v1/models") for port in world.ports] == [200, 200]
    assert ask(world.ports[0])
    command.process.send_signal(how)
    assert command.ends() == 130
    assert world.is_clean()
    assert len(world.events("ends")) == 2, "each had the time to end by itself"
    first, second = world.ports
    assert command.said[0] == (
        f"{NAME}: loading for http://localhost:{first}/v1, log in outputs/serve-logs/org-tiny-{first}.log\n"
    )
    assert f"{NAME}: answers at http://localhost:{second}/v1 after " in command.text
    assert command.said[-2:] == ["stopping 2 servers\n", "stopped 2 servers\n"]
    assert all("Application startup complete." in world.log(port) for port in world.ports)


def test_a_stop_while_they_load_leaves_nothing(tmp_path: Path, begin: Begin) -> None:
    world = World(tmp_path, 2)
    world.write(does={"LOADS": "60"})
    command = begin(world)
    eventually(lambda: world.events("engine"))
    command.process.send_signal(signal.SIGTERM)
    assert command.ends() == 130
    assert world.is_clean()
    assert len(world.events("starts")) == 1, "on one GPU they load one after the other"


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    world, said = World(tmp_path), list[str]()
    world.write(does={"STUBBORN": "1"})
    with world.served(said, stopping=0.5):
        pass
    assert world.events("sigterm")
    assert world.is_clean()
    assert f"{NAME} at port {world.ports[0]} did not end on SIGTERM: killed" in said


def test_two_signals_at_once_do_not_break_off_the_stop(tmp_path: Path, begin: Begin) -> None:
    world = World(tmp_path, 2)
    world.write()
    command = begin(world)
    command.until("2 of 2 answer")
    command.process.send_signal(signal.SIGINT)
    command.until("stopping")
    command.process.send_signal(signal.SIGTERM)
    assert command.ends() == 130
    assert world.is_clean()
    assert len(world.events("ends")) == 2


@pytest.mark.parametrize("does", [{}, {"DEAF": "1"}])
def test_sigkill_of_intersafe_leaves_no_server_behind(does: dict[str, str], tmp_path: Path, begin: Begin) -> None:
    # A vLLM that loads is deaf: the signal is lost on it, and it ends because its engine does.
    world = World(tmp_path, 2)
    world.write(does=does)
    command = begin(world)
    command.until("2 of 2 answer")
    command.process.kill()
    command.process.communicate()
    eventually(world.is_clean)


def test_a_guard_kills_what_ignores_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    server = [*STANDIN.split(), "m", "--host", "127.0.0.1", "--port", str(world.ports[0]), "--served-model-name", "m"]
    env = os.environ | world.engine(does={"STUBBORN": "1"})["env"]
    with subprocess.Popen(server, env=env, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        eventually(lambda: world.events("answers"))
        guard = Guard(0.5)
        guard.add(process.pid)
        guard.close()
        assert process.wait() == -signal.SIGKILL
    assert world.events("sigterm")
    eventually(world.is_clean)


def test_only_a_part_is_served_and_logs_go_where_they_are_told_to(tmp_path: Path, begin: Begin) -> None:
    world = World(tmp_path, 2)
    one, two = world.ports
    written(tmp_path, {"judge": at("a", one), "attacker": at("b", two)}, {"a": world.engine(), "b": world.engine()})
    command = begin(world, "serve", "mine.yaml", "--only", "b", "--logs", "elsewhere")
    command.until("1 of 1 answer")
    assert (listens(one), listens(two)) == (False, True)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [f"b-{two}.log"]
    command.process.send_signal(signal.SIGINT)
    assert command.ends() == 130


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "in_turn"),
    [([], True), (["0", "0"], True), (["0,1", "1,2"], True), (["0", "1"], False)],
)
def test_servers_of_one_gpu_load_one_after_the_other(gpus: list[str], in_turn: bool, tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.write(does={"LOADS": "1"}, gpus=gpus)
    with world.served():
        events = [row["event"] for row in world.events("starts", "answers")]
        seen = sorted((row["port"], row["gpus"]) for row in world.events("starts"))
    both = ["starts", "answers"] * 2 if in_turn else ["starts", "starts", "answers", "answers"]
    assert events == both
    assert seen == sorted(zip(world.ports, gpus or ["", ""], strict=True))


# --- what cannot be started ------------------------------------------------------------------------------------------


def refused(world: World) -> str:
    """The one line with which `intersafe serve` refuses before anything is started."""
    done = cli("serve", "mine.yaml", cwd=world.folder)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert ";" in done.stderr
    assert not world.events()
    return done.stderr


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.write()
    with socket.create_server(("127.0.0.1", world.ports[1]), reuse_port=True):  # as vLLM opens its own
        said = refused(world)
    assert f"port {world.ports[1]} for {NAME} is in use" in said
    assert f"lsof -i :{world.ports[1]}" in said


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "."])
def test_weights_that_are_not_there(path: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write(path=path)
    assert f"correct `serve.{NAME}.path`" in refused(world)


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write()
    written(tmp_path, {"judge": at(NAME, *world.ports)}, {NAME: {"command": "/nowhere/vllm serve"}})
    assert f"no command '/nowhere/vllm' here; correct `serve.{NAME}.command`" in refused(world)


def test_a_key_that_is_not_set(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write(member={"key": "NO_SUCH_KEY"})
    assert "export NO_SUCH_KEY=..." in refused(world)


REMEDIES = {
    "free": "lower `gpu_memory` of the models that share it",
    "cpu": "stop what else runs on it",
    "blocks": "lower `max_model_len` or `images`, or raise `gpu_memory` or `tensor_parallel`",
    "cache": "lower `max_model_len` or `images`, or raise `gpu_memory` or `tensor_parallel`",
    "cuda": "or raise `tensor_parallel`",
    "port": "write another one in the cast's URL",
    "model": "correct the model's name or `path`",
    "gated": "`hf auth login`",
    "offline": "correct the model's name or `path`",
    "length": "lower `max_model_len`",
    "other": "the whole log is in ",
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failed_start_names_the_cause_and_the_remedy(how: str, tmp_path: Path) -> None:
    world, said = World(tmp_path), list[str]()
    world.write(does={"FAILS": how})
    line = failure(world, said)
    cause = "AssertionError: the flux capacitor is  empty" if how == "other" else FAILURES[how].strip(" .")
    assert line.startswith(f"{NAME} at port {world.ports[0]} ended with exit code 1: {cause[:250]}")
    assert REMEDIES[how] in line
    tail = [text for text in said if text.startswith("  | ")]
    assert len(tail) == 15
    assert tail[-1].startswith("  | RuntimeError: Engine core initialization failed.")
    assert all(text.isprintable() for text in [*said, line])


def test_a_failed_start_ends_the_command_with_exit_code_2(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.write(does={"FAILS": "blocks"})
    done = cli("serve", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("  | ")] == [lines[0], lines[-1]]
    assert lines[-1].startswith(
        f"intersafe: {NAME} at port {world.ports[0]} ended with exit code 1: ValueError: No avai"
    )


def test_one_that_fails_stops_those_that_answer(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    cast = {"judge": at("good", world.ports[0]), "attacker": at("bad", world.ports[1])}
    written(tmp_path, cast, {"good": world.engine(), "bad": world.engine(does={"FAILS": "cuda"})})
    assert "CUDA out of memory" in failure(world)
    assert [row["event"] for row in world.events("answers", "ends")] == ["answers", "ends"]


def test_an_unknown_argument_is_named(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write(args={"no_such_flag": 3})
    line = failure(world)
    assert "exit code 2: api_server.py: error: unrecognized arguments: --no-such-flag 3; correct `args`" in line


def test_one_that_never_answers_is_killed_when_its_time_is_over(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write(does={"NEVER": "1", "STUBBORN": "1"}, startup=2)
    line = failure(world)
    assert f"did not answer within 2 s; raise `serve.{NAME}.startup`, or read " in line


# --- death and restart -----------------------------------------------------------------------------------------------


def test_one_that_dies_is_started_again_and_given_up_in_the_end(tmp_path: Path, begin: Begin) -> None:
    world = World(tmp_path, 2)
    world.write(does={"DIES": "always", "DIES_AT": "2"})
    command = begin(world)
    command.until("2 of 2 answer")
    port = world.ports[1]
    for number in (1, 2, 3):
        assert ask(port)
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(port)
        line = command.until("starting it again")
        assert line == (
            f"{NAME} at port {port} ended with exit code 0: vllm.v1.engine.exceptions.EngineDeadError: EngineCore "
            "encountered an issue. See stack trace (above) for the root cause; the whole log is in "
            f"outputs/serve-logs/org-tiny-{port}.log; starting it again ({number} of 3)\n"
        )
        command.until(f"{NAME}: answers at http://localhost:{port}/v1")
        assert ask(world.ports[0]) if number == 1 else True
    os.kill(world.events("starts")[-1]["pid"], signal.SIGKILL)
    assert command.ends() == 4
    last = [line for line in command.said if line.startswith("intersafe: ")]
    assert len(last) == 1
    assert f"{NAME} at port {port} ended with SIGKILL" in last[0]
    assert "given up after 3 restarts" in last[0]
    assert world.is_clean()


# --- the key ---------------------------------------------------------------------------------------------------------


def test_a_server_demands_the_key_that_the_cast_sends_and_nobody_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: Begin
) -> None:
    monkeypatch.setenv("MINE", "sk-very-secret")
    world = World(tmp_path)
    world.write(member={"key": "MINE"}, does={"TELLS": "1", "DIES_AT": "1"})
    command = begin(world)
    command.until("1 of 1 answer")
    (port,) = world.ports
    assert get(port, "/v1/models") == 401
    assert get(port, "/v1/models", Authorization="Bearer sk-very-secret") == 200
    pid = world.events("starts")[0]["pid"]
    assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    os.kill(pid, signal.SIGKILL)
    command.until("  | the key is ***")
    command.until("starting it again")
    command.until("answers at")
    command.process.send_signal(signal.SIGINT)
    command.ends()
    assert "secret" not in command.text


def test_without_a_key_in_the_cast_it_demands_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-of-another-day")
    world = World(tmp_path)
    world.write()
    with world.served():
        assert get(world.ports[0], "/v1/models") == 200
    assert [row["keyed"] for row in world.events("starts")] == [False]


# --- generate --serve ------------------------------------------------------------------------------------------------


def whole(world: World, does: dict[str, str] | None = None) -> None:
    """A recipe with every role behind the servers."""
    spec = at(NAME, *world.ports)
    cast = {"attacker": spec, "victims": [spec], "judge": spec}
    written(world.folder, cast, {NAME: world.engine(does=does)}, limits={"concurrency": 4, "patience": 30})


GENERATE = ("generate", "--pipeline", "mine.yaml", "--n", "3", "--serve")


def test_generate_serves_grows_and_stops(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    whole(world)
    done = cli(*GENERATE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "outputs/mine").funnel().accepted == 3
    assert world.is_clean()
    assert done.stderr.splitlines()[-1] == "stopped 2 servers"
    again = cli(*GENERATE, cwd=tmp_path)
    assert again.returncode == 0
    assert len(world.events("starts")) == 2, "a run that is complete needs no server"


def test_a_run_survives_the_death_of_its_server(tmp_path: Path) -> None:
    world, calm = World(tmp_path), tmp_path / "calm"
    calm.mkdir()
    whole(world, does={"DIES_AT": "40"})
    done = cli(*GENERATE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "starting it again (1 of 3)" in done.stderr
    assert len(world.events("starts")) == 2
    assert world.is_clean()
    whole(World(calm))
    assert cli(*GENERATE, cwd=calm).returncode == 0
    assert digest(tmp_path / "outputs/mine") == digest(calm / "outputs/mine")


def test_a_stop_in_the_middle_leaves_no_server_and_the_run_resumes(tmp_path: Path, begin: Begin) -> None:
    world = World(tmp_path)
    whole(world)
    command = begin(world, *GENERATE[:-3], "--n", "2000", "--serve")
    command.until("generating ")
    command.process.send_signal(signal.SIGTERM)
    assert command.ends() == 130
    assert command.said[-1] == "intersafe: stopped; the same command resumes\n"
    assert world.is_clean()


def test_what_is_wrong_with_the_input_is_said_before_a_server_starts(tmp_path: Path) -> None:
    world = World(tmp_path)
    whole(world)
    (tmp_path / "seeds.jsonl").write_text("no seed\n")
    done = cli(*GENERATE, "--seeds", "seeds.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert not world.events()


def test_a_cluster_is_not_served_from_here(tmp_path: Path) -> None:
    world = World(tmp_path)
    whole(world)
    done = cli(*GENERATE, "--ray", "auto", cwd=tmp_path)
    assert done.returncode == 2
    assert "start them where the workers are" in done.stderr
    assert not world.events()


def test_generate_names_what_cannot_be_served(tmp_path: Path) -> None:
    done = cli("generate", "--n", "1", "--serve", cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing to serve" in done.stderr
    assert not list(tmp_path.iterdir())
