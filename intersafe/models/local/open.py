"""The members of a cast whose model runs in this process: one engine for each model, which members may share."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from intersafe.engines.weights import config_of, folder_problem, is_folder, weights_of
from intersafe.errors import InputError
from intersafe.images.store import ImageStore
from intersafe.models.base import ChatModel, Hooks
from intersafe.models.local.thread import EngineThread, InProcessModel, Library
from intersafe.recipe.engine import Engine
from intersafe.recipe.sections import Member

NEEDS = {"vllm": ("vllm",), "transformers": ("transformers", "torch")}
"""Packages that a backend needs."""
_SEES = re.compile(r"vis|image|img|mm_|auto_map", re.IGNORECASE)
"""Found in the `config.json` of a model that takes images, or whose own code may."""


def open_engines(
    members: Sequence[Member],
    share_key: Callable[[Member], str],
    images: ImageStore,
    hooks: Hooks,
    engine_of: Callable[[str], Engine],
) -> dict[str, ChatModel]:
    """A model for each in-process member, by its `share_key`; members of one identity share an engine."""
    models: dict[str, ChatModel] = {}
    threads: dict[str, EngineThread] = {}
    for member in members:
        if not member.in_process or share_key(member) in models:
            continue
        if member.identity not in threads:
            mine = [other for other in members if other.identity == member.identity]
            concurrency = min(other.concurrency for other in mine)
            load = _loader(member, engine_of(member.spec.model), [other.extra for other in mine])
            threads[member.identity] = EngineThread(member.identity, load, concurrency, hooks)
        models[share_key(member)] = InProcessModel(member, images, threads[member.identity])
    return models


def _loader(member: Member, engine: Engine, extras: Sequence[Mapping[str, Any]]) -> Callable[[], Library]:
    name, revision = member.spec.model, member.revision

    def load() -> Library:
        with _environment(engine.env):
            return loaded()

    def loaded() -> Library:
        if member.spec.backend == "vllm":
            from intersafe.models.local.vllm import VllmLibrary

            return VllmLibrary(name, engine, revision, extras)
        from intersafe.models.local.transformers import TransformersLibrary

        return TransformersLibrary(name, engine, revision, extras)

    return load


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables while an engine loads; the processes that it starts inherit them."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_engine(role: str, member: Member, engine: Engine) -> None:
    """`InputError` where the library is not installed or a folder has no weights; loads nothing."""
    backend, name = member.spec.backend, member.spec.model
    missing = [part for part in NEEDS[backend] if importlib.util.find_spec(part) is None]
    if missing:
        other = ", or name a server: vllm:model@http://localhost:8000/v1" if backend == "vllm" else ""
        raise InputError(
            f"cast.{role}: {backend}: runs in this process; not installed here: {', '.join(missing)}",
            remedy=f"pip install 'intersafe[{backend}]'{other}",
        )
    weights = weights_of(name, engine)
    is_path = is_folder(weights)
    if problem := folder_problem(weights):
        raise InputError(
            f"cast.{role}: no model at {weights!r} ({problem})",
            remedy="give a folder of weights, or owner/name of one on the Hugging Face Hub",
        )
    if is_path and not any(Path(weights).glob(f"*.{kind}") for kind in ("safetensors", "bin", "pt", "pth", "gguf")):
        raise InputError(
            f"cast.{role}: no weights in {weights!r}", remedy="put them there, or correct `path` in `serve`"
        )


def is_blind(member: Member, engine: Engine) -> bool:
    """True if the weights are in a folder whose config.json is that of a text-only model."""
    config = config_of(weights_of(member.spec.model, engine))
    return config is not None and not _SEES.search(msgspec.json.encode(config).decode())
