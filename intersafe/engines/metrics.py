"""What vLLM says about itself while it works: how busy it is, how full its KV cache, how much of the talk it had there.

The same figures come from `/metrics` of a server (Prometheus text) and from an engine in this process. Counters are
summed over the engines of a server (data parallel), the fill of the KV cache is the fullest one's.
"""

import re
from collections.abc import Iterable

import msgspec

_LINE = re.compile(r"^(vllm:[a-z_]+)(?:\{[^}]*\})?[ \t]+([0-9.eE+-]+|NaN)", re.MULTILINE)
_NAMES = {
    "num_requests_running": "running",
    "num_requests_waiting": "waiting",
    "kv_cache_usage_perc": "kv_usage",
    "prefix_cache_queries": "queries",
    "prefix_cache_hits": "hits",
}


class Sample(msgspec.Struct):
    """One look at an engine."""

    running: float = 0.0
    """Requests that are being answered."""
    waiting: float = 0.0
    """Requests that wait in the engine's own queue."""
    kv_usage: float = 0.0
    """Share of the KV cache in use, 0 to 1."""
    queries: float = 0.0
    """Prompt tokens that were looked up in the prefix cache, since the engine started."""
    hits: float = 0.0
    """Those that were found there."""


class Figures(msgspec.Struct):
    """What was seen of one engine while a command worked on a run (`summary.json`)."""

    looks: int = 0
    running: float = 0.0
    """Requests answered at once, on average."""
    waiting: float = 0.0
    """Requests that waited in the engine's own queue, on average."""
    idle: float = 0.0
    """Share of the looks at which it had nothing to do, 0 to 1."""
    kv_usage: float = 0.0
    """Fullest KV cache, 0 to 1."""
    queries: float = 0.0
    """Prompt tokens of this command that were looked up in the prefix cache."""
    hits: float = 0.0
    """Those that were found there."""
    latest: Sample | None = None

    @property
    def hit_rate(self) -> float | None:
        """Share of the prompt tokens that were in the prefix cache, 0 to 1; None where none was looked up."""
        return self.hits / self.queries if self.queries else None

    def look(self, sample: Sample, *, is_last: bool = False) -> None:
        """Takes one more look into account; counters that fell belong to an engine that was started again.

        The last look comes when all is done: it says nothing about how busy the engine was.
        """
        if is_last and self.latest:
            self._count(sample)
            return
        self.looks += 1
        share = 1 / self.looks
        self.running += (sample.running - self.running) * share
        self.waiting += (sample.waiting - self.waiting) * share
        self.idle += ((sample.running + sample.waiting == 0) - self.idle) * share
        self.kv_usage = max(self.kv_usage, sample.kv_usage)
        self._count(sample)

    def _count(self, sample: Sample) -> None:
        if before := self.latest:
            started_again = sample.queries < before.queries
            self.queries += sample.queries - (0 if started_again else before.queries)
            self.hits += sample.hits - (0 if started_again else before.hits)
        self.latest = sample


def words_of(figures: Figures) -> str:
    """The figures of a whole command in one line."""
    rate = figures.hit_rate
    found = f", prefix cache {rate:.0%}" if rate is not None else ""
    busy = f"{figures.running:.1f} running and {figures.waiting:.1f} waiting on average"
    return f"{busy}, idle {figures.idle:.0%} of the time{found}, KV cache at most {figures.kv_usage:.0%} full"


def sample_of(values: Iterable[tuple[str, float]]) -> Sample | None:
    """A sample out of metrics by name, with or without `vllm:` and `_total`; None where there are none of vLLM's."""
    sample, found = Sample(), False
    for name, value in values:
        field = _NAMES.get(name.removeprefix("vllm:").removesuffix("_total"))
        if field is None or value != value:
            continue
        found = True
        before = getattr(sample, field)
        setattr(sample, field, max(before, value) if field == "kv_usage" else before + value)
    return sample if found else None


def parse_metrics(text: str) -> Sample | None:
    """The sample in the text of a server's `/metrics`; None where it is no vLLM."""
    return sample_of((name, float(value)) for name, value in _LINE.findall(text))
