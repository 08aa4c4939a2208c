"""Recipe files: the shortest one, and ones with servers to start."""

from pathlib import Path
from typing import Any

import yaml

from intersafe.storage.bundled import bundled


class Plain(yaml.SafeDumper):
    """Writes a value out each time that it occurs: a recipe knows no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def shortest(prompts: str | Path = "prompts") -> str:
    """The text of a recipe with nothing but what every recipe must say."""
    return f"""\
name: t
cast:
  attacker: scripted:demo
  victims: [scripted:careful]
  judge: scripted:demo
seeds: s.jsonl
prompts: {prompts}
strategies: [role_play]
"""


def written(folder: Path, cast: dict[str, Any], serve: dict[str, Any], **more: Any) -> Path:
    """A recipe file; who is not named in the cast is scripted."""
    names = {"attacker": "scripted:demo", "victims": ["scripted:careful"], "judge": "scripted:demo"} | cast
    path = folder / "mine.yaml"
    recipe = {"name": "mine", "cast": names, "serve": serve, "strategies": ["role_play"], **more}
    recipe |= {"prompts": str(bundled("prompts")), "seeds": str(bundled("seeds/intersafe.jsonl"))}
    path.write_text(yaml.dump(recipe, Dumper=Plain, sort_keys=False))
    return path


def at(name: str, *ports: int, host: str = "localhost", backend: str = "vllm") -> str:
    """The `model` of a member whose replicas are at these ports."""
    return f"{backend}:{name}@" + ",".join(f"http://{host}:{port}/v1" for port in ports)
