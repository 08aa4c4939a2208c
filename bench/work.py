"""What the measurements share: the machine in words, recipes, seeds with large images, the cost of a process."""

import contextlib
import io
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml
from PIL import Image

from intersafe.storage.bundled import bundled

CORES = sorted(os.sched_getaffinity(0))
IMAGE_BYTES = 100_000
PACKAGES = ("aiohttp", "msgspec", "jinja2", "tenacity", "rensa")


def describe_machine() -> str:
    """Cores, memory, Python and package versions in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{len(CORES)} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, {packages}, load {os.getloadavg()[0]:.1f} before the start"
    )


# --- recipes and seeds -----------------------------------------------------------------------------------------------


def demo_recipe(
    path: Path,
    *,
    samples: int = 6,
    painter: bool = False,
    duplicates: bool = True,
    seeds: Path | None = None,
    url: str = "",
) -> Path:
    """Writes the demo recipe without refusal samples to `path`; with a `url` the scripted models answer over HTTP."""
    source = bundled("pipelines/demo.yaml")
    recipe: dict[str, Any] = yaml.safe_load(source.read_text())
    recipe |= {
        "name": path.stem,
        "samples": samples,
        "seeds": str((seeds or source.parent / recipe["seeds"]).resolve()),
        "prompts": str((source.parent / recipe["prompts"]).resolve()),
    }
    del recipe["refusals"]
    cast = recipe["cast"]
    if not painter:
        del cast["painter"]
        del recipe["images"]
    if not duplicates:
        recipe["gates"]["duplicates"] = None
    if url:
        behind = dict.fromkeys(("attacker", "judge", "responder"), f"openai:demo@{url}")
        cast |= behind | {"victims": [f"openai:{name}@{url}" for name in ("careful", "eager")]}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def photo(number: int, size: int = IMAGE_BYTES) -> bytes:
    """A JPEG of noise of about `size` bytes, a different one for every number."""
    edge = 260
    noise = random.Random(number).randbytes(edge * edge * 3)
    image = Image.frombytes("RGB", (edge, edge), noise)
    low, high = 5, 100
    while low < high:  # the best quality that fits
        quality = (low + high + 1) // 2
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        low, high = (quality, high) if buffer.tell() <= size else (low, quality - 1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=low)
    return buffer.getvalue()


def photos(folder: Path, count: int) -> list[Path]:
    """Writes `count` image files of about 100 KB."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(photo(number))
    return paths


def photo_seeds(folder: Path) -> Path:
    """Writes the demo's seeds, each with an image of 100 KB of its own."""
    source = bundled("seeds/intersafe.jsonl")
    rows = [msgspec.json.decode(line) for line in source.read_bytes().splitlines()]
    images = photos(folder / "images", len(rows))
    for row, image in zip(rows, images, strict=True):
        row["image"] = f"images/{image.name}"
    target = folder / "seeds.jsonl"
    target.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return target


# --- a child process -------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """The cost of a process and its children; CPU and wall time in seconds, memory in megabytes."""

    cpu: float
    """User and system time of the process and of the children that it waited for."""
    wall: float
    peak: float
    """Highest resident memory of the whole tree, sampled 20 times a second; shared pages count once per process.

    For the first process it is the kernel's high-water mark, which misses no short peak."""
    code: int
    output: str


class Child:
    """A command in a process group of its own, on one core; samples the memory of its tree while it runs."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._output = folder / "output.txt"
        self._began, self._peak, self._stopped = time.monotonic(), 0.0, threading.Event()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
                start_new_session=True,
                preexec_fn=_pin,
            )
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def _look(self) -> None:
        while not self._stopped.wait(0.05):
            resident = sum(_status(pid, "VmRSS") for pid in _tree(self._process.pid))
            self._peak = max(self._peak, resident, _status(self._process.pid, "VmHWM"))

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def is_over(self) -> bool:
        """True once the process has ended; `wait` must still be called."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, patience: float = 3_600.0) -> Usage:
        """Waits for the end and returns the cost; kills the process after `patience` seconds."""
        deadline = time.monotonic() + patience
        while not self.is_over():
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.02)
        _, status, usage = os.wait4(self._process.pid, 0)
        wall = time.monotonic() - self._began
        self._stopped.set()
        self._watch.join()
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.kill()  # children that still run
        output = self._output.read_text(errors="replace")
        return Usage(usage.ru_utime + usage.ru_stime, wall, self._peak, self._process.returncode, output)


def _pin() -> None:
    os.sched_setaffinity(0, {CORES[0]})


def _tree(root: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield root
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{root}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from _tree(int(child))


def _status(pid: int, field: str) -> float:
    """A size from /proc in megabytes; 0 for a process that has ended."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def run(command: Sequence[str], folder: Path, patience: float = 3_600.0) -> Usage:
    """Runs a command to its end and returns the cost; kills it after `patience` seconds."""
    return Child(command, folder).wait(patience)


def wait_until(condition: Callable[[], bool], child: Child, every: float = 0.01) -> bool:
    """Waits for a condition; False if the child ended first."""
    while not condition():
        if child.is_over():
            return False
        time.sleep(every)
    return True


def seconds_of(command: Sequence[str], folder: Path) -> float:
    """Wall time of a command that is too short to be sampled, in seconds."""
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


INTERSAFE = (sys.executable, "-m", "intersafe")
