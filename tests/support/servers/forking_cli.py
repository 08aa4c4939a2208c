"""Runs `intersafe` many times without importing everything each time: a process that forks itself for every command.

    python -m tests.support.servers.forking_cli

It reads orders, one JSON line each: {"argv": [...], "cwd": "...", "env": {...}, "out": "..."}.
It answers with the number of the new process, and later with `NUMBER CODE` when that ends (minus the signal if one
ended it). What a command prints goes to the file `out`. HF_ENDPOINT is read when huggingface_hub is imported, so it
must be set when this starts. Nothing is connected and no thread runs before the fork.
"""

import gc
import json
import os
import selectors
import sys
import traceback

import hf_xet  # noqa: F401  only to have it loaded
import huggingface_hub
import huggingface_hub.hf_api
import pyarrow.parquet  # noqa: F401

import intersafe.release.pull
import intersafe.release.push
import intersafe.release.status  # noqa: F401
from intersafe.cli.main import main


def run(argv: list[str], cwd: str, env: dict[str, str | None], out: str) -> None:
    """Becomes the command; does not return."""
    os.chdir(cwd)
    for name, value in env.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    target, nothing = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), os.open(os.devnull, os.O_RDONLY)
    for there, here in ((nothing, 0), (target, 1), (target, 2)):
        os.dup2(there, here)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    code: object = 1
    try:
        main(argv, prog_name="intersafe")
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)  # tidying modules away costs 40 ms


def serve() -> None:
    """Reads orders until its own stdin ends."""
    for module in ("httpx2", "huggingface_hub.file_download"):
        __import__(module)
    _ = huggingface_hub.HfApi, huggingface_hub.CommitOperationAdd, huggingface_hub.utils.logging
    gc.freeze()
    running: dict[int, int] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(0, selectors.EVENT_READ)
        source = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
        while True:
            for key, _events in ready.select():
                if key.fd != 0:
                    ready.unregister(key.fd)
                    os.close(key.fd)
                    number, status = os.waitpid(running.pop(key.fd), 0)
                    print(number, os.waitstatus_to_exitcode(status), flush=True)
                elif line := source.readline():
                    number = os.fork()
                    if number == 0:
                        run(**json.loads(line))
                    ended = os.pidfd_open(number)
                    running[ended] = number
                    ready.register(ended, selectors.EVENT_READ)
                    print(number, flush=True)
                else:
                    return


if __name__ == "__main__":
    serve()
