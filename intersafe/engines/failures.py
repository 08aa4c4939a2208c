"""Why an engine ended: the last lines of its log, and the known causes in them, each with a remedy.

A server has its own log file. An engine in this process writes to the log of the run (`log.py`).
"""

import re
import signal
from pathlib import Path
from typing import NamedTuple

from intersafe.wording import printable

SHOWN_LINES = 15
"""Number of log lines that are shown."""
READ_BYTES = 2**20
"""Bytes read from the end of a log: the cause comes before the tracebacks that follow from it."""
LATEST_LINES = 200
"""Number of log lines that can explain the death of a server that has answered: it survived what is older."""
LINE_LENGTH = 300
"""Characters of a line that are shown."""


class Failure(NamedTuple):
    """What happened, in vLLM's words where it says so, and what to do."""

    what: str
    remedy: str


_OUT_OF_MEMORY = (
    r"CUDA out of memory|HIP out of memory|OutOfMemoryError|[Cc]an(?:no|')t allocate memory|DefaultCPUAllocator"
)
_REMEDIES = (
    (
        r"Free memory on device|Available memory on node .* is less than",
        "stop what else runs on it, or lower `gpu_memory` of the models that share it",
    ),
    (
        r"No available memory for the cache blocks|KV cache is needed, which is larger than the available",
        "lower `max_model_len` or `images`, or raise `gpu_memory` or `tensor_parallel`",
    ),
    (
        _OUT_OF_MEMORY,
        "lower `gpu_memory`, `max_model_len`, `max_num_seqs` or `images`, or raise `tensor_parallel`",
    ),
    (
        r"unrecognized arguments|unrecognized option|error: argument |unexpected keyword argument",
        "correct `args`; `vllm serve --help=all` lists what this version takes",
    ),
    (
        r"Errno (98|48)\]|error while attempting to bind",
        "stop what uses that port, or write another one in the cast's URL",
    ),
    (r"gated repo|GatedRepoError|401 Client Error", "accept its terms on the Hub, then `hf auth login`"),
    (
        r"is not a valid model identifier|Repository Not Found|RepositoryNotFoundError|Invalid repository ID"
        r"|cached snapshot folder|LocalEntryNotFoundError|couldn't connect to 'https://huggingface.co'",
        "correct the model's name or `path`, or fetch it: `hf download NAME`",
    ),
    (r"greater than the derived max_model_len", "lower `max_model_len`"),
    (r"No module named 'vllm'|vllm: (command )?not found", "name the Python that has vLLM by `command`"),
    (r"Model architectures .* are not supported", "a newer vLLM may support it: name one by `command`"),
)
"""vLLM's own messages (0.32 to 0.33) and what to do about each; the keys named are those of the recipe's `serve`."""
_KNOWN = [(re.compile(words), remedy) for words, remedy in _REMEDIES]
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): \S|^Value error, ")
_ECHO = re.compile(r"initialization failed. See root cause|validation errors? for")
"""Errors that only refer to another error."""
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PREFIX = re.compile(r"^(?:\([^()]*pid=\d+\) )?(?:(?:ERROR|WARNING|INFO) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?\s*")
"""What vLLM writes in front of a line: process, level, time and file."""


def is_out_of_memory(error: Exception) -> bool:
    """True if torch reports that it is out of memory."""
    return bool(re.search(_OUT_OF_MEMORY, f"{type(error).__name__}: {error}"))


def log_lines(log: Path, since: int, secret: str = "") -> list[str]:
    """The non-empty lines of a log from byte `since` on, at most its last MiB, printable and without the secret.

    Empty if the log cannot be read.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(since, log.stat().st_size - READ_BYTES))
            text = file.read(READ_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    text = _COLOUR.sub("", text)
    lines = (printable(line, secret=secret) for line in text.splitlines())
    return [line.rstrip() for line in lines if line.strip()]


def tail_of(lines: list[str]) -> list[str]:
    """The last lines of a log as a terminal shows them: indented, each cut to `LINE_LENGTH` characters."""
    return [f"  | {line[:LINE_LENGTH]}" for line in lines[-SHOWN_LINES:]]


def explain(lines: list[str], log: Path, *, had_answered: bool) -> Failure:
    """The first known cause in the lines of `log`, or else the first error, with the log itself as the remedy.

    `had_answered`: the engine has answered before, so only its latest lines count. `what` is empty if nothing is found.
    """
    lines = lines[-LATEST_LINES:] if had_answered else lines
    for words, remedy in _KNOWN:
        for line in lines:
            if words.search(line):
                return Failure(_bare(line), remedy)
    errors = (bare for line in lines if _ERROR.search(bare := _bare(line)) and not _ECHO.search(bare))
    return Failure(next(errors, ""), f"the whole log is in {log}")


def _bare(line: str) -> str:
    return _PREFIX.sub("", line)[:LINE_LENGTH].rstrip(" .")


def describe_exit(code: int) -> str:
    """The exit code of a process in words; negative codes are signals."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return name + (", perhaps because this machine ran out of memory" if code == -signal.SIGKILL else "")
