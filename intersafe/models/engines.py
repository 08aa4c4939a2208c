"""The members that a library of this process answers for: one engine for each model, whoever of the cast shares it."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from intersafe.engine_settings import Engine
from intersafe.errors import InputError
from intersafe.images import ImageStore
from intersafe.models import ChatModel
from intersafe.models.inprocess import EngineThread, InProcessModel, Library, config_of, weights_of
from intersafe.settings import Member

NEEDS = {"vllm": ("vllm",), "transformers": ("transformers", "torch")}
"""What must be importable for a backend."""
_SEES = ("vision_config", "vision_tower", "visual", "image_token_id", "image_token_index")
"""Keys of a `config.json` of which a model that sees images has one."""


def open_engines(
    members: Sequence[Member],
    same: Callable[[Member], str],
    images: ImageStore,
    waiting: dict[str, str],
    may_send: Callable[[], None] | None,
    engine_of: Callable[[str], Engine],
) -> dict[str, ChatModel]:
    """A model for each kind of member (`same`) that runs in this process; those of one identity share an engine."""
    models: dict[str, ChatModel] = {}
    threads: dict[str, EngineThread] = {}
    for member in members:
        if not member.in_process or same(member) in models:
            continue
        if member.identity not in threads:
            mine = [other for other in members if other.identity == member.identity]
            concurrency = min(other.concurrency for other in mine)
            load = _loader(member, engine_of(member.spec.model), [other.extra for other in mine])
            threads[member.identity] = EngineThread(member.identity, load, concurrency, waiting, may_send)
        models[same(member)] = InProcessModel(member, images, threads[member.identity])
    return models


def _loader(member: Member, engine: Engine, extras: Sequence[Mapping[str, Any]]) -> Callable[[], Library]:
    name, revision = member.spec.model, member.revision

    def load() -> Library:
        if member.spec.backend == "vllm":
            from intersafe.models.vllm import VllmLibrary

            return VllmLibrary(name, engine, revision, extras)
        from intersafe.models.transformers import TransformersLibrary

        return TransformersLibrary(name, engine, revision, extras)

    return load


def check_engine(role: str, member: Member, engine: Engine) -> None:
    """`InputError` where the library is not installed or a folder of weights is none; loads nothing."""
    backend, name = member.spec.backend, member.spec.model
    missing = [part for part in NEEDS[backend] if importlib.util.find_spec(part) is None]
    if missing:
        other = ", or name a server: vllm:model@http://localhost:8000/v1" if backend == "vllm" else ""
        raise InputError(
            f"cast.{role}: {backend}: runs in this process; not installed here: {', '.join(missing)}",
            remedy=f"pip install 'intersafe[{backend}]'{other}",
        )
    weights = weights_of(name, engine)
    is_path = weights.startswith(("/", ".")) or Path(weights).exists()
    if is_path and config_of(weights) is None:
        raise InputError(
            f"cast.{role}: no model at {weights!r} (no config.json that can be read)",
            remedy="give a folder of weights, or owner/name of one on the Hugging Face Hub",
        )


def is_blind(member: Member, engine: Engine) -> bool:
    """True if the weights lie in a folder whose config.json is that of a model of text alone."""
    config = config_of(weights_of(member.spec.model, engine))
    return config is not None and not any(key in config for key in _SEES)
