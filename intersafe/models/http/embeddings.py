"""Embeddings from any OpenAI-compatible server: POSTs to `/embeddings`, sent by `models/http/service.py`."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Never

import msgspec

from intersafe.errors import CallFailed, InputError
from intersafe.models.base import Hooks
from intersafe.models.http.request import Request
from intersafe.models.http.service import Service
from intersafe.recipe.sections import Limits, Model
from intersafe.recipe.specs import parse_spec
from intersafe.storage.loops import run_anywhere

EMBEDDING_LIMITS = Limits(timeout=60, patience=30, retries=3)
"""A report is cheap to repeat, so it waits less than a run does."""
_BATCH = 64
_FLAG = "--embedder"

Vectors = list[list[float]]


class Embedder(msgspec.Struct, frozen=True):
    """A model that turns texts into vectors: what it is, and a function from texts to one vector each."""

    identity: str
    embed: Callable[[Sequence[str]], Vectors]


class _Item(msgspec.Struct):
    index: int
    embedding: list[float]


class _Answer(msgspec.Struct):
    data: list[_Item]


def open_embedder(spec: str, key: str, hooks: Hooks, limits: Limits = EMBEDDING_LIMITS) -> Embedder:
    """The model of `openai:model@url`; `key` names the environment variable with its API key, if it needs one.

    `embed` raises `InputError` where the server's answer is unusable, and `ServiceGone` where it stays away.
    """
    model = Model(model=spec, key=key)
    if parse_spec(spec).backend != "openai":
        remedy = "write openai:model@url, for example openai:bge-m3@http://localhost:8000/v1"
        raise InputError(f"model spec {spec!r} names no embedder", at=_FLAG, remedy=remedy)
    if key and not os.environ.get(key, "").strip():
        raise InputError(f"the variable {key!r} is not set", at="--embedder-key", remedy="export it, or name another")

    def embed(texts: Sequence[str]) -> Vectors:
        vectors: Vectors = []

        async def work() -> None:
            service = Service(
                model, "/embeddings", limits, hooks, probe=lambda _: EmbeddingRequest(model, ["Say hello."])
            )
            try:
                for i in range(0, len(texts), _BATCH):
                    # One job: all of it goes to one replica, in case two of them hold different weights.
                    batch = await service.ask("stats", EmbeddingRequest(model, texts[i : i + _BATCH]))
                    vectors.extend(batch)
            finally:
                await service.aclose()

        try:
            run_anywhere(work)
        except CallFailed as error:
            remedy = "check the model's name, and how long a text it takes"
            raise InputError(f"{model.identity}: {error.detail}", at=_FLAG, remedy=remedy) from None
        if len({len(vector) for vector in vectors}) > 1:
            raise _unusable("vectors of different lengths")
        return vectors

    return Embedder(model.identity, embed)


class EmbeddingRequest(Request[Vectors]):
    """One vector for each of some texts."""

    max_body = 64 * 2**20

    def __init__(self, model: Model, texts: Sequence[str]) -> None:
        super().__init__("embedder")
        self._model, self._texts = model, list(texts)

    def body(self, url: str) -> bytes:
        """The same for every replica."""
        return msgspec.json.encode({"model": self._model.spec.model, "input": self._texts, "encoding_format": "float"})

    def read(self, data: bytes) -> Vectors:
        """The vectors in the order of the texts; `InputError` where the answer is unusable."""
        return _vectors(data, len(self._texts))

    def blocked(self, message: str) -> Never:
        """`InputError`: a report needs all vectors."""
        remedy = "name a model without one"
        raise InputError(f"the service's filter blocked the texts ({message})", at=_FLAG, remedy=remedy)


def _vectors(data: bytes, count: int) -> Vectors:
    """The vectors of an answer in the order of the texts."""
    try:
        items = sorted(msgspec.json.decode(data, type=_Answer).data, key=lambda item: item.index)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _unusable("no JSON with embeddings") from None
    if [item.index for item in items] != list(range(count)):
        raise _unusable(f"{len(items)} vectors for {count} texts")
    if not all(0 < math.hypot(*item.embedding) < math.inf for item in items):
        raise _unusable("a vector without a direction")
    return [item.embedding for item in items]


def _unusable(what: str) -> InputError:
    return InputError(f"the server's answer is unusable: {what}", at=_FLAG, remedy="name a model that embeds text")
