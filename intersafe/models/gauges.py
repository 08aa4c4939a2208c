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
