"""Why an engine ended: the end of its log for the eye, and the words in it that are known, with their remedy.

A server has a log of its own, an engine of this process writes into that of the run (`log.py`).
"""

import re
import signal
from pathlib import Path
from typing import NamedTuple

from intersafe.wording import printable

LINES = 15
"""Lines of a log that are shown."""
READ = 2**20
"""Bytes of a log's end that are read: the cause stands above the traces of all that it took along."""
LATEST = 200
"""Lines of a log in which the death of a server that answered is looked for: what is older it survived."""
LONGEST = 300
"""Letters of a line that are shown."""


class Failure(NamedTuple):
    """What happened, in vLLM's words where they say it, and what to do."""

    what: str
    remedy: str


_NO_ROOM = r"CUDA out of memory|HIP out of memory|OutOfMemoryError|[Cc]an(?:no|')t allocate memory|DefaultCPUAllocator"
_REMEDIES = (
    (
        r"Free memory on device|Available memory on node .* is less than",
        "stop what else is on it, or lower `gpu_memory` of what shares it",
    ),
    (
        r"No available memory for the cache blocks|KV cache is needed, which is larger than the available",
        "lower `max_model_len` or `images`, or raise `gpu_memory` or `tensor_parallel`",
    ),
    (
        _NO_ROOM,
        "lower `gpu_memory`, `max_model_len`, `max_num_seqs` or `images`, or raise `tensor_parallel`",
    ),
    (
        r"unrecognized arguments|unrecognized option|error: argument |unexpected keyword argument",
        "mend `args`; `vllm serve --help=all` lists what this version takes",
    ),
    (
        r"Errno (98|48)\]|error while attempting to bind",
        "stop what is at that port, or write another one in the cast's URL",
    ),
    (r"gated repo|GatedRepoError|401 Client Error", "accept its terms on the Hub, then `hf auth login`"),
    (
        r"is not a valid model identifier|Repository Not Found|RepositoryNotFoundError|Invalid repository ID"
        r"|cached snapshot folder|LocalEntryNotFoundError|couldn't connect to 'https://huggingface.co'",
        "mend the model's name or `path`, or fetch it: `hf download NAME`",
    ),
    (r"greater than the derived max_model_len", "lower `max_model_len`"),
    (r"No module named 'vllm'|vllm: (command )?not found", "name the Python that has vLLM by `command`"),
    (r"Model architectures .* are not supported", "a newer vLLM may know it: name one by `command`"),
)
"""vLLM's own words (0.32 to 0.33) and what to do about them; keys are those of the recipe's `serve`."""
_KNOWN = [(re.compile(words), remedy) for words, remedy in _REMEDIES]
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): \S|^Value error, ")
_ECHO = re.compile(r"initialization failed. See root cause|validation errors? for")
"""Errors that only say that there is another one."""
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PREFIX = re.compile(r"^(?:\([^()]*pid=\d+\) )?(?:(?:ERROR|WARNING|INFO) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?\s*")
"""What vLLM writes before a line: process, level, time and file."""


def is_out_of_memory(error: Exception) -> bool:
    """True if torch says that memory is short."""
    return bool(re.search(_NO_ROOM, f"{type(error).__name__}: {error}"))


def lines_of(log: Path, since: int, secret: str = "") -> list[str]:
    """The non-empty lines of a log's end from byte `since` on, printable and without the secret."""
    try:
        with log.open("rb") as file:
            file.seek(max(since, log.stat().st_size - READ))
            text = file.read(READ).decode("utf-8", "replace")
    except OSError:
        return []
    text = _COLOUR.sub("", text)
    lines = (printable(line, secret=secret) for line in text.splitlines())
    return [line.rstrip() for line in lines if line.strip()]


def shown(lines: list[str]) -> list[str]:
    """The last of them, cut to a terminal's patience."""
    return [f"  | {line[:LONGEST]}" for line in lines[-LINES:]]


def explain(lines: list[str], log: Path, *, had_answered: bool) -> Failure:
    """The first known cause in a log, or else its first error, with the log itself as the remedy."""
    lines = lines[-LATEST:] if had_answered else lines
    for words, remedy in _KNOWN:
        for line in lines:
            if words.search(line):
                return Failure(_bare(line), remedy)
    errors = (bare for line in lines if _ERROR.search(bare := _bare(line)) and not _ECHO.search(bare))
    return Failure(next(errors, ""), f"the whole log is {log}")


def _bare(line: str) -> str:
    return _PREFIX.sub("", line)[:LONGEST].rstrip(" .")


def ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return name + (", perhaps for want of memory of this machine" if code == -signal.SIGKILL else "")
