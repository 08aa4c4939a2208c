"""Where the weights of a model are, and what their folder says before anything is loaded."""

from pathlib import Path
from typing import Any

import msgspec

from intersafe.recipe.engine import Engine

OTHER_CONFIGS = ("model_index.json", "params.json")
"""Configurations of folders without a `config.json`: a Diffusers pipeline, and Mistral's own format."""


def weights_of(name: str, engine: Engine) -> str:
    """Folder or Hub name of a model's weights."""
    return str(Path(engine.path).expanduser()) if engine.path else name


def config_of(weights: str) -> dict[str, Any] | None:
    """The `config.json` of a folder of weights; None for a Hub name, or if no such file can be read."""
    try:
        config = msgspec.json.decode((Path(weights) / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    return config if isinstance(config, dict) else None


def is_folder(weights: str) -> bool:
    """True if the weights are meant as a folder of this machine, whether it exists or not; else they are a Hub name."""
    return weights.startswith(("/", ".")) or Path(weights).exists()


def folder_problem(weights: str) -> str:
    """Why a folder of this machine is not a model's, in a few words; empty if it is one, and for a Hub name."""
    folder = Path(weights)
    if not is_folder(weights) or config_of(weights) is not None:
        return ""
    if not folder.exists():
        return "no such folder"
    return "" if any((folder / name).exists() for name in OTHER_CONFIGS) else "no config.json that can be read"
