"""Model specs, `backend:model[@url[,url...]]`: which library or server answers, as which model, and where."""

import functools
import re
from typing import NamedTuple
from urllib.parse import urlsplit

from intersafe.errors import InputError
from intersafe.wording import nearest

BACKENDS = ("scripted", "openai", "vllm", "transformers")
PAINTERS = ("scripted", "openai", "diffusers")
SERVED = ("openai", "vllm")
"""Backends that may name URLs: any OpenAI-compatible server, and vLLM's own."""
OPENAI_URL = "https://api.openai.com/v1"


class Spec(NamedTuple):
    """The parts of `backend:model[@url[,url...]]`."""

    backend: str
    model: str
    urls: tuple[str, ...]


_ADDRESS = re.compile(r"@(?=http|localhost|[^@]*[:/])")
"""An `@` before an address; any other `@` belongs to the model's name."""


@functools.lru_cache
def parse_spec(text: str, backends: tuple[str, ...] = BACKENDS) -> Spec:
    """The parts of `backend:model[@url[,url...]]`; `InputError` for an unknown backend, no model, or a bad URL."""
    backend, colon, rest = text.partition(":")
    if backend not in backends or not colon:
        known = backend in backends
        what = "no model after the backend" if known else f"unknown backend {backend!r}" + nearest(backend, backends)
        remedy = "write backend:model[@url], for example openai:my-model@http://localhost:8000/v1"
        raise InputError(f"model spec {text!r}: {what}", remedy=remedy)
    if rest.endswith("@"):  # an unset variable, say: the default URL must not get what was meant for another server
        raise InputError(f"model spec {text!r}: no URL after the @", remedy="write the URL, or remove the @")
    model, *address = _ADDRESS.split(rest, maxsplit=1)
    urls = tuple(url.rstrip("/") for url in address[0].split(",")) if address else ()
    if any("@" in url for url in urls):  # not echoed: it may be a password
        raise InputError(
            f"model spec of {model!r}: an @ inside a URL",
            remedy="put a secret into an environment variable, named by `key`",
        )
    if not model or "://" in model or not model.isprintable() or " " in model:
        raise InputError(f"model spec {text!r}: {model!r} is not a model's name", remedy="write backend:model[@url]")
    if backend not in SERVED and urls:
        raise InputError(f"model spec {text!r}: a {backend} model has no URL", remedy="remove what follows the @")
    for url in urls:
        if not _is_base_url(url):
            raise InputError(f"model spec {text!r}: {url!r} is not a URL", remedy="write http(s)://host[:port][/path]")
    return Spec(backend, model, urls or ((OPENAI_URL,) if backend == "openai" else ()))


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return usable and url.isprintable() and not set(url) & set(" ?#")
