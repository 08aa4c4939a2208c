"""Real engines for the tests: the tiny checkpoints in this process or behind a URL, call by call or in a whole run."""

import asyncio
import contextlib
import functools
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs
from PIL import Image

from intersafe.errors import IntersafeError
from intersafe.images.store import ImageStore, normalise
from intersafe.models.base import Call, ChatModel, Hooks, Reply, Sampling
from intersafe.models.open import open_models
from intersafe.recipe.engine import Engine
from intersafe.recipe.sections import Cast, Limits, Member
from intersafe.records import Message
from intersafe.replies import Answer, CheckAnswer, PlanAnswer, StepScoreAnswer, VerdictAnswer, schema_of
from tests.support.paths import FIXTURES, REPOSITORY
from tests.support.runs import cli, journal_keys

VICTIM, CAST = FIXTURES / "tiny_vlm", FIXTURES / "tiny_cast"
COLOURS = ("red", "green", "blue", "black", "white")
REFUSAL = "I'm sorry, but I can't help with that."
SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 4096, "images": 4, "eager": True}
"""Single precision, so that a near tie falls the same way whatever else is in the batch."""


def engine(weights: Path = VICTIM, **changes: Any) -> Engine:
    """A small engine with those weights."""
    return Engine(path=str(weights), **(SMALL | changes))


def picture(store: ImageStore, colour: str) -> str:
    """The reference of an image of one colour."""
    data = io.BytesIO()
    Image.new("RGB", (96, 96), colour).save(data, "PNG")
    return store.put(normalise(data.getvalue(), at="test"))


def question(
    text: str,
    *images: str,
    history: Sequence[Message] = (),
    answer: type[Answer] | None = None,
    sizes: tuple[tuple[str, int], ...] = (),
    temperature: float = 0.0,
    seed: int = 1,
    most: int = 200,
) -> Call:
    """A user's message as the last of a conversation."""
    messages = (*history, Message("user", text, images))
    schema = schema_of(answer, sizes) if answer else None
    return Call("judge", "", messages, Sampling(temperature, 1.0, most, seed), schema, "job", 0)


def schema_questions(image: str) -> list[Call]:
    """One question for each of four schemas, the second with an image."""
    return [
        question("Score it.", answer=StepScoreAnswer),
        question("Judge it.", image, answer=VerdictAnswer),
        question("Check it.", answer=CheckAnswer),
        question("Plan it.", answer=PlanAnswer, sizes=(("steps", 3),)),
    ]


def answers(
    spec: str,
    deployed: Engine,
    store: ImageStore,
    rounds: Sequence[Sequence[Call]],
    extra: dict[str, Any] | None = None,
) -> list[list[Reply | IntersafeError]]:
    """What a model makes of each call, or how it fails; the calls of a round are asked all at once."""
    member = Member(model=spec, temperature=0.0, extra=extra or {})
    cast = Cast(attacker=member, victims=(member,), judge=member)

    async def ask(model: ChatModel, call: Call) -> Reply | IntersafeError:
        try:
            return await model.answer(call)
        except IntersafeError as error:
            return error

    async def run() -> list[list[Reply | IntersafeError]]:
        models = open_models(cast, Limits(patience=5), store, Hooks(), engine_of=lambda _: deployed)
        (model,) = set(models.values())
        try:
            return [list(await asyncio.gather(*(ask(model, call) for call in calls))) for calls in rounds]
        finally:
            await model.aclose()

    return asyncio.run(run())


def texts(found: Sequence[Reply | IntersafeError]) -> list[str]:
    """The texts of replies that must all be there."""
    failed = [reply for reply in found if not isinstance(reply, Reply)]
    assert not failed
    return [reply.text for reply in found if isinstance(reply, Reply)]


@functools.cache
def blind_weights(folder: Path) -> Path:
    """A tiny model of text alone, with the tokenizer of the others."""
    import shutil

    import torch  # type: ignore[import-not-found]
    from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=2, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(VICTIM / name, folder / name)
    return folder


def write_seeds(folder: Path, count: int = 12) -> Path:
    """Seeds of several categories; every other one has an image of one colour."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        category = ("fraud", "discrimination")[number % 2]
        line = {"id": f"seed-{number}", "query": f"Worries about painting wall number {number}", "category": category}
        if number % 4 < 2:
            colour = COLOURS[number % 5]
            Image.new("RGB", (96, 96 + 4 * number), colour).save(folder / f"{number}.png")
            line["image"] = f"{number}.png"
        lines.append(line | {"source": "own", "license": "CC0-1.0"})
    (folder / "seeds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "seeds.jsonl"


def write_recipe(path: Path, spec: str, serve: dict[str, Any], **changes: Any) -> Path:
    """A recipe whose attacker, victim and judge are one model, asked greedily; the painter alone is scripted."""
    name = spec.partition(":")[2].partition("@")[0]
    member = {"model": spec, "temperature": 0.0, "max_tokens": 400}
    recipe: dict[str, Any] = {
        "name": "tiny",
        "cast": {
            "attacker": member,
            "victims": [member | {"max_tokens": 40}],
            "judge": member,
            "painter": "scripted:flawless",
        },
        "seeds": str(write_seeds(path.parent / "seeds")),
        "prompts": str(REPOSITORY / "prompts"),
        "strategies": ["role_play", "topic_shift"],
        "samples": 2,
        "turns": {"min": 2, "mean": 3, "max": 4},
        "images": {"min": 1, "mean": 2, "max": 3},
        "clean": None,
        "gates": {"duplicates": None, "coverage": None},
        "limits": {"concurrency": 16, "patience": 60},
        "serve": {name: serve},
    }
    path.write_text(json.dumps(recipe | changes))
    return path


def serve_entry(weights: Path = CAST, **changes: Any) -> dict[str, Any]:
    """A `serve` entry for the tiny cast."""
    kept = {name: value for name, value in structs.asdict(engine(weights, **changes)).items() if value}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def run_of(recipe: Path, run: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    return cli("generate", "--pipeline", str(recipe), "--run", str(run), "--n", "20", cwd=recipe.parent, **env)


@contextlib.contextmanager
def begun(recipe: Path, run: Path, calls: int) -> Iterator["subprocess.Popen[str]"]:
    """A run that has paid for that many calls and is still running."""
    words = ("generate", "--pipeline", str(recipe), "--run", str(run), "--n", "20")
    command = [sys.executable, "-m", "intersafe", *words]
    with subprocess.Popen(command, cwd=run.parent, stderr=subprocess.PIPE, text=True) as running:
        while len(list((run / "journal").glob("*.jsonl"))) == 0 or len(journal_keys(run)) < calls:
            assert running.poll() is None, running.stderr.read() if running.stderr else ""
            time.sleep(0.05)
        yield running
