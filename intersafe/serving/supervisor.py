"""Servers as processes of this one: started in turn, watched, started again when they die, and stopped with it.

Each has a process group of its own, so that Ctrl-C in a terminal reaches intersafe alone, which then stops them in
order. When intersafe is killed, its guard ends them.
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

from intersafe.engines.failures import ended, explain, lines_of, shown
from intersafe.errors import InputError, ServiceGone
from intersafe.serving.guard import Guard
from intersafe.serving.plan import KEY, Server, check_can_start
from intersafe.storage.loops import SIGNAL_GRACE

LOOK = 0.1
"""Seconds between two looks at the servers."""
HEALTH_EVERY, HEALTH_TIMEOUT = 0.5, 2.0
"""Seconds between two questions to a server that loads, and for its answer."""
RESTARTS = 3
"""How often a server that died is started again."""
STOPPING = 30.0
"""Seconds from SIGTERM to SIGKILL."""
_PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]


@dataclass
class _Place:
    """One server, and the process that is it for now."""

    server: Server
    log: Path
    output: BinaryIO
    guard: Guard
    state: Literal["waiting", "loading", "answering", "gone"] = "waiting"
    process: "subprocess.Popen[bytes] | None" = None
    began: float = 0.0
    asked: float = 0.0
    """When it was last asked for its health."""
    since: int = 0
    """Where in the log this process begins."""
    has_answered: bool = False
    restarts: int = 0

    @property
    def at(self) -> str:
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
        self.guard.began(self.process.pid)
        self.state, self.began, self.asked = "loading", time.monotonic(), 0.0

    def is_dead(self) -> bool:
        """True if the process ended; what it leaves of its group is killed then, to free its memory and its port."""
        process = self.process
        if process is None or process.returncode is not None:
            return True
        # Reaped only afterwards: until then its number is nobody else's.
        try:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                return False
        except ChildProcessError:  # the system reaped it, as where SIGCHLD is ignored
            if process.poll() is None:
                return False
        self.kill()
        return True

    def send(self, number: signal.Signals) -> None:
        """A signal for all of the group, as long as the process was not reaped."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Ends the process at once, and all of its group."""
        self.send(signal.SIGKILL)
        if self.process is not None:
            self.guard.ended(self.process.pid)
            self.process.wait()

    def is_healthy(self) -> bool:
        """True if it answers 200 to GET /health; asked now and then."""
        now = time.monotonic()
        if now - self.asked < HEALTH_EVERY:
            return False
        self.asked = now
        line = http.client.HTTPConnection(self.server.host, self.server.port, timeout=HEALTH_TIMEOUT)
        try:
            line.request("GET", "/health")
            return line.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            line.close()


class Supervisor:
    """The servers of one command."""

    def __init__(self, servers: Sequence[Server], folder: Path, say: Say, stopping: float) -> None:
        """Opens a log in `folder` for each; `say` takes one line for the user, `stopping` is as for `serving`."""
        self._say, self._stopping = say, stopping
        self._lock, self._is_over = threading.Lock(), False
        folder.mkdir(parents=True, exist_ok=True)
        self._guard = Guard(stopping)
        self._places = [_opened(server, folder, self._guard) for server in servers]

    def start(self) -> None:
        """Starts all and returns when each answers; `InputError` if one cannot be started."""
        while any(place.state in ("waiting", "loading") for place in self._places):
            self.look()
            time.sleep(LOOK)

    def look(self) -> None:
        """Looks at each once: starts what may start, and what died; `ServiceGone` for one that dies too often."""
        with self._lock:
            for place in () if self._is_over else self._places:
                if place.state == "waiting" and self._may_start(place):
                    self._launch(place)
                elif place.state == "loading":
                    self._look_at_loading(place)
                elif place.state == "answering" and place.is_dead():
                    self._failed(place, self._end_of(place))

    def stop(self) -> None:
        """Ends all by SIGTERM, and in the end by SIGKILL; a second Ctrl-C after 5 s does so at once."""
        with _second_thoughts() as hurry, self._lock:
            self._is_over = True
            running = [place for place in self._places if not place.is_dead()]
            if running:
                self._say(f"stopping {_counted(len(running))}")
            for place in running:
                place.send(signal.SIGTERM)
            deadline = time.monotonic() + self._stopping
            while any(not place.is_dead() for place in running) and time.monotonic() < deadline and not hurry.is_set():
                time.sleep(LOOK / 2)
            for place in running:
                if not place.is_dead():
                    place.kill()
                    self._say(f"{place.at} did not end on SIGTERM: killed")
            for place in self._places:
                place.output.close()
            self._guard.close()
        if running:
            self._say(f"stopped {_counted(len(running))}")

    def _may_start(self, place: _Place) -> bool:
        """Servers measure the free memory of a GPU as they start, so on one GPU they load one after the other."""
        before = True
        for other in self._places:
            if other is place:
                before = False
            elif other.server.shares_gpus(place.server) and (
                other.state == "loading" or (before and other.state == "waiting")
            ):
                return False
        return True

    def _launch(self, place: _Place) -> None:
        server = place.server
        on = f" on GPU {server.gpus}" if server.gpus else ""
        self._say(f"{server.name}: loading for {server.url}{on}, log in {place.log}")
        try:
            place.launch()
        except OSError as error:
            problem = f"{server.argv[0]!r} cannot be run ({error.strerror}); mend `serve.{server.name}.command`"
            self._failed(place, problem)

    def _look_at_loading(self, place: _Place) -> None:
        """Has it died, does it answer, or is its time over?"""
        took = time.monotonic() - place.began
        if place.is_dead():
            self._failed(place, self._end_of(place))
        elif place.is_healthy():
            place.state, place.has_answered = "answering", True
            self._say(f"{place.server.name}: answers at {place.server.url} after {took:.0f} s")
        elif took > place.server.startup:
            place.kill()
            for line in shown(self._lines(place)):
                self._say(line)
            what = f"did not answer within {place.server.startup:g} s"
            self._failed(place, f"{what}; raise `serve.{place.server.name}.startup`, or read {place.log}")

    def _end_of(self, place: _Place) -> str:
        """Shows the log's end; why the process ended and what to do, in one line."""
        assert place.process is not None
        lines = self._lines(place)
        for line in shown(lines):
            self._say(line)
        what, remedy = explain(lines, place.log, had_answered=place.state == "answering")
        said = f": {what}" if what else ""
        return f"ended with {ended(place.process.returncode)}{said}; {remedy}"

    def _lines(self, place: _Place) -> list[str]:
        key = os.environ.get(place.server.key, "").strip() if place.server.key else ""
        return lines_of(place.log, place.since, key)

    def _failed(self, place: _Place, why: str) -> None:
        """A server that never answered is the user's to mend; one that did is started again, a few times."""
        if not place.has_answered:
            place.state = "gone"
            raise InputError(f"{place.at} {why}")
        if place.restarts == RESTARTS:
            place.state = "gone"
            raise ServiceGone(f"{place.at} {why}; given up after {RESTARTS} restarts")
        place.restarts += 1
        place.state = "waiting"
        self._say(f"{place.at} {why}; starting it again ({place.restarts} of {RESTARTS})")


@contextlib.contextmanager
def serving(servers: Sequence[Server], folder: Path, say: Say, *, stopping: float = STOPPING) -> Iterator[Supervisor]:
    """The servers, answering, until the block ends; `InputError` if one cannot be started.

    `stopping` is the seconds that they have to end in after SIGTERM. Who only waits calls `look` of
    what it is given; see `watched` for who works in the meantime.
    """
    check_can_start(servers)
    supervisor = Supervisor(servers, folder, say, stopping)
    try:
        supervisor.start()
        yield supervisor
    finally:
        supervisor.stop()


@contextlib.contextmanager
def watched(servers: Sequence[Server], folder: Path, say: Say) -> Iterator[None]:
    """As `serving`, with a thread that looks after them: who asks them waits for one that is started again."""
    over, stopped = threading.Event(), threading.Event()

    def watch(supervisor: Supervisor) -> None:
        while not over.wait(LOOK):
            try:
                supervisor.look()
            except (ServiceGone, OSError) as error:  # the others go on; the run waits for this one by its patience
                say(str(error))
        stopped.wait()  # a server that this thread started would get a SIGTERM of its own at the thread's end

    try:
        with serving(servers, folder, say) as supervisor:
            threading.Thread(target=watch, args=(supervisor,), name="servers", daemon=True).start()
            try:
                yield
            finally:
                over.set()
    finally:
        stopped.set()


def _opened(server: Server, folder: Path, guard: Guard) -> _Place:
    """The place of a server, with an empty log."""
    log = folder / server.log
    log.write_bytes(b"")
    return _Place(server, log, log.open("ab"), guard)


def _counted(number: int) -> str:
    return f"{number} server" + ("s" if number > 1 else "")


def _environment(server: Server) -> dict[str, str]:
    """This process's, the recipe's, and the key that the cast will send: that one alone, or none."""
    env = {name: value for name, value in os.environ.items() if name != KEY} | server.env
    return env | ({KEY: os.environ.get(server.key, "").strip()} if server.key else {})


def _dies_with_us() -> Callable[[], None] | None:
    """For a child between fork and exec: SIGTERM when the thread that started it ends, however it ends (Linux)."""
    if sys.platform != "linux":
        return None
    us, prctl = os.getpid(), ctypes.CDLL(None).prctl  # found before the fork, where nothing may be loaded any more

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != us:
            os._exit(1)

    return ask


@contextlib.contextmanager
def _second_thoughts() -> Iterator[threading.Event]:
    """While servers are stopped, a signal does not break that off; one that comes some seconds later asks for haste."""
    hurry, began = threading.Event(), time.monotonic()
    if threading.current_thread() is not threading.main_thread():
        yield hurry
        return

    def hear(*_: object) -> None:
        if time.monotonic() - began > SIGNAL_GRACE:
            hurry.set()

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.getsignal(name) for name in names}
    before = {name: handler for name, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for name in before:
        signal.signal(name, hear)
    try:
        yield hurry
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
