"""How vLLM and torch say that memory is short."""

import re

_SHORT = re.compile(
    r"out of memory|free memory on device|available (?:kv cache )?memory for the cache blocks|kv cache is needed"
    r"|available kv cache memory|kvcache_space|cannot allocate memory|can't allocate memory",
    re.IGNORECASE,
)


def is_out_of_memory(words: str) -> bool:
    """True if a library or its log says that memory is short."""
    return bool(_SHORT.search(words))
