"""Real servers for the tests, each started as a process of its own on a free port of 127.0.0.1."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent


@contextlib.contextmanager
def running_vlm(*options: str) -> Iterator[str]:
    """Yields the base URL (with `/v1`) of a tiny real VLM; `options` go to `vlm_server.py`. Skips without mistralrs."""
    if importlib.util.find_spec("mistralrs") is None:
        import pytest  # here, because the environment that trains the model has none

        pytest.skip("mistralrs is not installed: pip install 'intersafe[test]'")
    # The engine logs to stdout unless it is told not to; what it says in spite of that comes before the ready line.
    with running("vlm_server.py", *options, RUST_LOG="error", RUST_BACKTRACE="0") as url:
        yield url


@contextlib.contextmanager
def running(script: str, *options: str, **env: str) -> Iterator[str]:
    """Yields the base URL (with `/v1`) of a server of this folder that takes a port and these options."""
    command = [sys.executable, str(HERE / script), "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | env) as server:
        try:
            assert server.stdout is not None
            ready = next((line for line in server.stdout if line.startswith("ready ")), "")
            assert ready, f"{script} did not start"
            yield ready.split()[1]
        finally:
            server.kill()
