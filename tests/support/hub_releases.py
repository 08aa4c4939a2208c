"""Releases made by hand, and the command line with a test Hub, for the tests of push, pull and diff."""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from intersafe.release.card import CHANGELOG, card_files
from intersafe.release.manifest import File, ReleaseManifest, Shard, sha256_of, write_manifest
from tests.support.paths import REPOSITORY
from tests.support.servers.hub import running_hub
from tests.support.servers.hub_state import Fault, State

REPO = "alice/ds"
Rows = Sequence[Mapping[str, Any]]


def rows(name: str, number: int = 5, category: str = "fraud", safety: str = "safe") -> list[dict[str, Any]]:
    """Some rows whose ids start with `name`."""
    labels = json.dumps([{"turn": 1, "safety": safety}])
    return [
        {"id": f"{name}-{k}", "category": category, "turn_labels": labels, "text": f"{name} {k} " * 50}
        for k in range(number)
    ]


def make_release(folder: Path, version: str, shards: Sequence[Rows], **changes: Any) -> Path:
    """A release folder `folder/<version>` with one shard of the config `dialogues` for each list of rows."""
    release = folder / version
    described = []
    for number, content in enumerate(shards):
        path = f"data/dialogues/train-{number:05d}.parquet"
        (release / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(content)), release / path)
        size = (release / path).stat().st_size
        described.append(Shard(path, sha256_of(release / path), size, "dialogues", "train", len(content)))
    total = sum(shard.rows for shard in described)
    manifest = ReleaseManifest(
        version=version, parent_version="", name="demo", generator={"intersafe": "0.1.0"}, recipe="r" * 64,
        seeds="s" * 64, prompts={}, models={"judge": "openai:judge"}, scripted=False, includes_unsafe=False,
        licenses={"CC0-1.0": total}, counts=_counts(total), shards=tuple(described), files=(),
    )  # fmt: skip
    manifest = ReleaseManifest(**{name: getattr(manifest, name) for name in manifest.__struct_fields__} | changes)
    texts = card_files(manifest, "ORG/NAME") | {CHANGELOG: f"# Changelog\n\n## {version}\n".encode()}
    for path, data in texts.items():
        (release / path).write_bytes(data)
    files = tuple(File(path, sha256_of(release / path), len(data)) for path, data in sorted(texts.items()))
    write_manifest(
        release, ReleaseManifest(**{n: getattr(manifest, n) for n in manifest.__struct_fields__} | {"files": files})
    )
    return release


def _counts(total: int) -> dict[str, Any]:
    """The least that a card can be made of."""
    config = {
        "rows": total, "splits": {"train": total}, "bytes": {"train": 1000}, "seeds": 1, "category": {"fraud": total},
        "images": {"0": total}, "sources": {"hand": {"CC0-1.0": total}}, "turns": {"1": total}, "strategy": {},
        "victim": {}, "safety": {"safe": total}, "refusals": {}, "unsafe_rows": 0, "withheld": 0, "aligned": 0,
    }  # fmt: skip
    share = {"count": 0, "total": total, "share": 0.0}
    figures = {
        "state": "complete", "cells_below_quota": 0, "ended": [], "yielded": share, "seeds_excluded": 0, "asr": share,
        "aligned_safe": share, "over_refusal": share, "painted": 0.0,
        "distinct": {"distinct_1": 0.5, "distinct_2": 0.5}, "self_bleu_4": None,
    }  # fmt: skip
    changes = {"dialogues": [total, 0, 0]}
    return {"configs": {"dialogues": config}, "figures": figures, "test_share": 0.05, "changes": changes}


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    said: str
    """stdout and stderr."""


@dataclass
class Started:
    """A command that is running."""

    number: int
    out: Path
    ended: "queue.SimpleQueue[int]"

    def wait(self) -> Done:
        code = self.ended.get(timeout=60)
        return Done(code, self.out.read_text() if self.out.exists() else "")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.number, 9)


class Commands:
    """Starts `intersafe` commands against one Hub."""

    def __init__(self, process: subprocess.Popen[str], scratch: Path) -> None:
        self.process, self.scratch, self.count = process, scratch, 0
        self.started: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.ends: dict[int, queue.SimpleQueue[int]] = {}
        threading.Thread(target=self._listen, args=(process.stdout,), daemon=True).start()

    def _listen(self, answers: IO[str]) -> None:
        for line in answers:
            number, *code = map(int, line.split())
            self.ends.setdefault(number, queue.SimpleQueue())
            if code:
                self.ends[number].put(code[0])
            else:
                self.started.put(number)

    def start(self, *argv: str | Path, env: Mapping[str, str | None] | None = None) -> Started:
        self.count += 1
        out = self.scratch / f"said-{self.count}.txt"
        order = {"argv": list(map(str, argv)), "cwd": str(self.scratch), "env": dict(env or {}), "out": str(out)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        number = self.started.get(timeout=30)
        return Started(number, out, self.ends[number])

    def run(self, *argv: str | Path, env: Mapping[str, str | None] | None = None) -> Done:
        return self.start(*argv, env=env).wait()


@dataclass
class Bench:
    """A Hub and the command line that uses it."""

    hub: State
    commands: Commands
    home: Path

    def push(self, release: Path, *options: str, repo: str = REPO, env: Mapping[str, str | None] | None = None) -> Done:
        return self.commands.run("push", repo, release, *options, env=env)

    def data(self, repo: str = REPO, revision: str = "main") -> dict[str, str]:
        """sha256 of every file below `data/`."""
        tree = self.hub.repos[repo].tree(revision)
        return {path: entry.sha256 for path, entry in tree.items() if path.startswith("data/")}


@contextlib.contextmanager
def bench(root: Path, xet: bool = False, page: int = 1000) -> Iterator[Bench]:
    """A test Hub and a forking command line that knows its address."""
    scratch = root / "scratch"
    scratch.mkdir(parents=True)
    with running_hub(root / "hub", xet, page) as hub:
        mode = {"HF_HUB_DISABLE_XET": "0" if xet else "1"}
        env = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        env |= mode | {"HF_ENDPOINT": hub.hub_url, "HF_TOKEN": "hf_writer", "HF_HOME": str(root / "home")}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "tests.support.servers.forking_cli"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
            try:
                yield Bench(hub, Commands(process, scratch), root)
            finally:
                process.kill()
    assert not hub.lost()


def shards_of(release: Path) -> dict[str, str]:
    """sha256 of every shard of a release folder."""
    return {str(p.relative_to(release)): sha256_of(p) for p in sorted(release.rglob("*.parquet"))}


def copy_of(release: Path, root: Path) -> Path:
    """The same release in another place."""
    return Path(shutil.copytree(release, root / release.name))


@contextlib.contextmanager
def fault(on: Bench, *planned: Fault) -> Iterator[None]:
    on.hub.faults.extend(planned)
    try:
        yield
    finally:
        on.hub.faults.clear()


def refused(done: Done, code: int, *words: str) -> None:
    """One line, that exit code, the words, and no key."""
    lines = [line for line in done.said.splitlines() if line.startswith("intersafe: ")]
    assert done.code == code, done
    assert len(lines) == 1, done
    assert "Traceback" not in done.said
    assert "hf_" not in done.said.replace("hf_xet", "")
    for word in words:
        assert word in lines[0], done
