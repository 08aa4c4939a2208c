"""Runs servers as child processes: starts them in order, watches them, restarts those that die, and stops them.

Each server has a process group of its own, so Ctrl-C in a terminal reaches intersafe alone, which then stops the
servers in order. If intersafe is killed, its guard (`guard.py`) stops them.
"""

import contextlib
import ctypes
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from intersafe.engines.failures import describe_exit, explain, log_lines, tail_of
from intersafe.errors import InputError, ServiceGone
from intersafe.serving.guard import Guard
from intersafe.serving.plan import KEY_VARIABLE, Server, check_can_start
from intersafe.wording import counted

CHECK_SECONDS = 0.1
"""Seconds between two checks of the servers."""
HEALTH_EVERY, HEALTH_TIMEOUT = 0.5, 2.0
"""Seconds between two health requests to a server that loads, and for the answer to one."""
RESTARTS = 3
"""How often a server that died is restarted."""
STOPPING = 30.0
"""Seconds from SIGTERM to SIGKILL."""
IMPATIENT_AFTER = 5.0
"""Seconds into a stop after which a further signal means SIGKILL; an earlier one is the first one repeated."""
_PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]


@dataclass
class _Process:
    """One server and its current process."""

    server: Server
    log: Path
    output: BinaryIO
    guard: Guard
    state: Literal["waiting", "loading", "answering", "gone"] = "waiting"
    process: "subprocess.Popen[bytes] | None" = None
    began: float = 0.0
    """When the current process started, by `time.monotonic`."""
    asked: float = 0.0
    """When its health was last requested."""
    since: int = 0
    """Byte of the log at which the output of the current process begins."""
    has_answered: bool = False
    restarts: int = 0

    @property
    def name(self) -> str:
        return f"{self.server.name} at port {self.server.port}"

    def launch(self) -> None:
        """Starts the process; `OSError` if the command cannot be run."""
        self.since = self.log.stat().st_size
        self.process = subprocess.Popen(  # noqa: S603 - the recipe's own command
            self.server.argv,
            env=_environment(self.server),
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_dies_with_us(),
        )
        self.guard.add(self.process.pid)
        self.state, self.began, self.asked = "loading", time.monotonic(), 0.0

    def is_dead(self) -> bool:
        """True if the process has ended; kills what is left of its group, to free its memory and its port."""
        process = self.process
        if process is None or process.returncode is not None:
            return True
        # Reaped only after the group is killed: until then the system gives its number to no other process.
        try:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                return False
        except ChildProcessError:  # the system reaped it, as where SIGCHLD is ignored
            if process.poll() is None:
                return False
        self.kill()
        return True

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the whole group, unless the process was reaped."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kills the process and its whole group."""
        self.send(signal.SIGKILL)
        if self.process is not None:
            self.guard.remove(self.process.pid)
            self.process.wait()

    def is_healthy(self) -> bool:
        """True if it answers GET /health with 200; asks at most every `HEALTH_EVERY` seconds."""
        now = time.monotonic()
        if now - self.asked < HEALTH_EVERY:
            return False
        self.asked = now
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=HEALTH_TIMEOUT)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class Supervisor:
    """The servers of one command."""

    def __init__(self, servers: Sequence[Server], folder: Path, say: Say, stopping: float) -> None:
        """Opens a log in `folder` for each server. `say` shows a line to the user; `stopping` is as for `serving`."""
        self._say, self._stopping = say, stopping
        self._lock, self._is_over = threading.Lock(), False
        folder.mkdir(parents=True, exist_ok=True)
        self._guard = Guard(stopping)
        self._processes = [_opened(server, folder, self._guard) for server in servers]

    def start(self) -> None:
        """Starts all servers and returns when each answers; `InputError` if one cannot be started."""
        while any(process.state in ("waiting", "loading") for process in self._processes):
            self.check()
            time.sleep(CHECK_SECONDS)

    def check(self) -> None:
        """Checks each server once and starts what may start now, also what died.

        `InputError` for a server that cannot be started, `ServiceGone` for one that died too often.
        """
        with self._lock:
            for process in () if self._is_over else self._processes:
                if process.state == "waiting" and self._may_start(process):
                    self._launch(process)
                elif process.state == "loading":
                    self._check_loading(process)
                elif process.state == "answering" and process.is_dead():
                    self._failed(process, self._why_ended(process))

    def stop(self) -> None:
        """Stops all servers: SIGTERM, and SIGKILL after `stopping` seconds, or at a further Ctrl-C after 5 s."""
        with _impatience() as impatient, self._lock:
            self._is_over = True
            running = [process for process in self._processes if not process.is_dead()]
            if running:
                self._say(f"stopping {counted(len(running), 'server')}")
            for process in running:
                process.send(signal.SIGTERM)
            deadline = time.monotonic() + self._stopping
            while any(not process.is_dead() for process in running) and time.monotonic() < deadline:
                if impatient.is_set():
                    break
                time.sleep(CHECK_SECONDS / 2)
            for process in running:
                if not process.is_dead():
                    process.kill()
                    self._say(f"{process.name} did not end on SIGTERM: killed")
            for process in self._processes:
                process.output.close()
            self._guard.close()
        if running:
            self._say(f"stopped {counted(len(running), 'server')}")

    def _may_start(self, process: _Process) -> bool:
        """Servers of one GPU load one after the other: vLLM measures the GPU's free memory as it starts."""
        is_earlier = True
        for other in self._processes:
            if other is process:
                is_earlier = False
            elif other.server.shares_gpus(process.server) and (
                other.state == "loading" or (is_earlier and other.state == "waiting")
            ):
                return False
        return True

    def _launch(self, process: _Process) -> None:
        server = process.server
        on = f" on GPU {server.gpus}" if server.gpus else ""
        self._say(f"{server.name}: loading for {server.url}{on}, log in {process.log}")
        try:
            process.launch()
        except OSError as error:
            problem = f"{server.argv[0]!r} cannot be run ({error.strerror}); correct `serve.{server.name}.command`"
            self._failed(process, problem)

    def _check_loading(self, process: _Process) -> None:
        """Has it died, does it answer, or has it used up its time?"""
        took = time.monotonic() - process.began
        if process.is_dead():
            self._failed(process, self._why_ended(process))
        elif process.is_healthy():
            process.state, process.has_answered = "answering", True
            self._say(f"{process.server.name}: answers at {process.server.url} after {took:.0f} s")
        elif took > process.server.startup:
            process.kill()
            for line in tail_of(self._lines(process)):
                self._say(line)
            what = f"did not answer within {process.server.startup:g} s"
            self._failed(process, f"{what}; raise `serve.{process.server.name}.startup`, or read {process.log}")

    def _why_ended(self, process: _Process) -> str:
        """Shows the end of the log; returns why the process ended and what to do, in one line."""
        assert process.process is not None
        lines = self._lines(process)
        for line in tail_of(lines):
            self._say(line)
        what, remedy = explain(lines, process.log, had_answered=process.state == "answering")
        cause = f": {what}" if what else ""
        return f"ended with {describe_exit(process.process.returncode)}{cause}; {remedy}"

    def _lines(self, process: _Process) -> list[str]:
        key = os.environ.get(process.server.key, "").strip() if process.server.key else ""
        return log_lines(process.log, process.since, key)

    def _failed(self, process: _Process, why: str) -> None:
        """A server that never answered is the user's to correct; one that has answered is restarted a few times."""
        if not process.has_answered:
            process.state = "gone"
            raise InputError(f"{process.name} {why}")
        if process.restarts == RESTARTS:
            process.state = "gone"
            raise ServiceGone(f"{process.name} {why}; given up after {RESTARTS} restarts")
        process.restarts += 1
        process.state = "waiting"
        self._say(f"{process.name} {why}; starting it again ({process.restarts} of {RESTARTS})")


@contextlib.contextmanager
def serving(servers: Sequence[Server], folder: Path, say: Say, *, stopping: float = STOPPING) -> Iterator[Supervisor]:
    """Starts the servers, yields when all answer, and stops them at the end of the block.

    `stopping` is the seconds from SIGTERM to SIGKILL. A caller that only waits calls `check` of the supervisor every
    `CHECK_SECONDS`; one that works meanwhile uses `serving_in_background`. `InputError` if a server cannot be started.
    """
    check_can_start(servers)
    supervisor = Supervisor(servers, folder, say, stopping)
    try:
        supervisor.start()
        yield supervisor
    finally:
        supervisor.stop()


@contextlib.contextmanager
def serving_in_background(servers: Sequence[Server], folder: Path, say: Say) -> Iterator[None]:
    """Like `serving`, with a thread that checks the servers. Callers of a server that is restarted wait for it."""
    over, stopped = threading.Event(), threading.Event()

    def watch(supervisor: Supervisor) -> None:
        while not over.wait(CHECK_SECONDS):
            try:
                supervisor.check()
            except (
                ServiceGone,
                OSError,
            ) as error:  # the others still answer; the run has its own patience for this one
                say(str(error))
        stopped.wait()  # Linux sends SIGTERM to the servers that this thread started as soon as the thread ends

    try:
        with serving(servers, folder, say) as supervisor:
            threading.Thread(target=watch, args=(supervisor,), name="servers", daemon=True).start()
            try:
                yield
            finally:
                over.set()
    finally:
        stopped.set()


def _opened(server: Server, folder: Path, guard: Guard) -> _Process:
    """A server that is not started yet, with an empty log."""
    log = folder / server.log
    log.write_bytes(b"")
    return _Process(server, log, log.open("ab"), guard)


def _environment(server: Server) -> dict[str, str]:
    """The environment of this process and of the recipe, with the key that the cast sends and no other key of vLLM."""
    env = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE} | server.env
    return env | ({KEY_VARIABLE: os.environ.get(server.key, "").strip()} if server.key else {})


def _dies_with_us() -> Callable[[], None] | None:
    """Runs in a child between fork and exec: requests SIGTERM for when the thread that started it ends (Linux)."""
    if sys.platform != "linux":
        return None
    us, prctl = os.getpid(), ctypes.CDLL(None).prctl  # looked up before the fork: after it nothing may be loaded

    def request() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != us:
            os._exit(1)

    return request


@contextlib.contextmanager
def _impatience() -> Iterator[threading.Event]:
    """Keeps signals from interrupting a stop; sets the event at one that comes later than `IMPATIENT_AFTER` seconds."""
    impatient, began = threading.Event(), time.monotonic()
    if threading.current_thread() is not threading.main_thread():
        yield impatient
        return

    def on_signal(*_: object) -> None:
        if time.monotonic() - began > IMPATIENT_AFTER:
            impatient.set()

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.getsignal(name) for name in names}
    before = {name: handler for name, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for name in before:
        signal.signal(name, on_signal)
    try:
        yield impatient
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
