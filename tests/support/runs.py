"""Recipes with the scripted cast, the command line, and what a run leaves on disk."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from intersafe.errors import InputError
from intersafe.recipe.gates import Gates
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Recipe
from intersafe.run.kinds import RECORDS
from intersafe.storage.bundled import bundled

OUTCOMES = tuple(name for records in RECORDS.values() for name in records.files)


def whole_demo(**changes: Any) -> Recipe:
    """The demo recipe as it ships, with changes as `override` takes them."""
    return override(load_recipe(bundled("pipelines/demo.yaml")), **changes)


def demo(**changes: Any) -> Recipe:
    """Of the demo recipe the dialogues alone: no painter, no refusals, quotas for categories only."""
    recipe = whole_demo()
    cast = structs.replace(recipe.cast, painter=None, responder=None)
    return override(structs.replace(recipe, cast=cast, refusals=None, gates=Gates()), **changes)


def cli(*words: str, cwd: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    """Runs `intersafe` to its end in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", "intersafe", *words],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def hears_ctrl_c() -> None:
    """In a child process: Ctrl-C works even where a script started the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def started(*words: str, cwd: Path, new_session: bool = False) -> "subprocess.Popen[str]":
    """Starts `intersafe` and returns at once; in a new session it leads a process group, as a shell lets it."""
    return subprocess.Popen(
        [sys.executable, "-m", "intersafe", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_session,
        preexec_fn=hears_ctrl_c,
    )


def refusal(act: Callable[[], object]) -> str:
    """The one line an `InputError` shows."""
    with pytest.raises(InputError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message, "the remedy is missing"
    return message


def digest(run: Path) -> dict[str, str]:
    """sha256 of each outcome file of a run."""
    return {
        name: hashlib.sha256((run / name).read_bytes()).hexdigest() if (run / name).exists() else ""
        for name in OUTCOMES
    }


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def journal_keys(run: Path) -> list[str]:
    """The key of every journal line."""
    return [row["key"] for path in sorted((run / "journal").glob("*.jsonl")) for row in rows(path)]
