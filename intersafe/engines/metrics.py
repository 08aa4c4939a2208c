"""vLLM's own metrics while it works: running and waiting requests, use of the KV cache, hits in the prefix cache.

They come from `/metrics` of a server (Prometheus text) or from an engine in this process. Counters are summed over the
engines of a server (data parallel). The KV cache usage is that of the fullest engine.
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
    """The metrics of an engine at one moment."""

    running: float = 0.0
    """Requests that the engine is answering."""
    waiting: float = 0.0
    """Requests in the engine's own queue."""
    kv_usage: float = 0.0
    """Share of the KV cache in use, 0 to 1."""
    queries: float = 0.0
    """Prompt tokens looked up in the prefix cache since the engine started."""
    hits: float = 0.0
    """Of these, tokens found there."""


class Figures(msgspec.Struct):
    """The metrics of one engine over one command that worked on a run (`summary.json`)."""

    looks: int = 0
    """Number of samples."""
    running: float = 0.0
    """Mean number of requests answered at once."""
    waiting: float = 0.0
    """Mean number of requests in the engine's own queue."""
    idle: float = 0.0
    """Share of the samples in which it had nothing to do, 0 to 1."""
    kv_usage: float = 0.0
    """Highest use of the KV cache, 0 to 1."""
    queries: float = 0.0
    """Prompt tokens looked up in the prefix cache during this command."""
    hits: float = 0.0
    """Of these, tokens found there."""
    latest: Sample | None = None

    @property
    def hit_rate(self) -> float | None:
        """Share of the prompt tokens found in the prefix cache, 0 to 1; None if none was looked up."""
        return self.hits / self.queries if self.queries else None

    def add(self, sample: Sample, *, is_last: bool = False) -> None:
        """Adds one sample. Counters that fell mean that the engine was restarted.

        The last sample comes after all work is done, so only its counters count.
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
            restarted = sample.queries < before.queries
            self.queries += sample.queries - (0 if restarted else before.queries)
            self.hits += sample.hits - (0 if restarted else before.hits)
        self.latest = sample


def describe_metrics(figures: Figures) -> str:
    """The metrics of a whole command in one line."""
    rate = figures.hit_rate
    found = f", prefix cache {rate:.0%}" if rate is not None else ""
    busy = f"{figures.running:.1f} running and {figures.waiting:.1f} waiting on average"
    return f"{busy}, idle {figures.idle:.0%} of the time{found}, KV cache at most {figures.kv_usage:.0%} full"


def sample_of(values: Iterable[tuple[str, float]]) -> Sample | None:
    """A sample from metrics by name, with or without `vllm:` and `_total`; None if none is vLLM's."""
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
    """The sample in the text of `/metrics` of a server; None if the server is not vLLM."""
    return sample_of((name, float(value)) for name, value in _LINE.findall(text))
