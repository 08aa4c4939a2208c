"""Real pictures: a tiny diffusers pipeline behind the Images API and in this process must draw the very same ones."""

import asyncio
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from intersafe.errors import CallFailed, InputError
from intersafe.images.store import normalise
from intersafe.models.base import Call, Hooks, Painted, Sampling
from intersafe.models.open import open_painter
from intersafe.recipe.sections import Limits, Painter
from intersafe.records import Message
from tests.support.paths import SUPPORT
from tests.support.servers import running

MISSING = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.t2i,
    pytest.mark.skipif(bool(MISSING), reason=f"no {' nor '.join(MISSING)} here: run `make test-t2i`"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(300),
]


class Drawn(NamedTuple):
    """What one call asks for."""

    description: str = "a red lamp on a table"
    seed: int = 1
    settings: tuple[tuple[str, Any], ...] = ()


def drawing(description: str = "a red lamp on a table", seed: int = 1, **settings: Any) -> Drawn:
    return Drawn(description, seed, tuple(settings.items()))


ONE = drawing()
VARIED = (
    drawing("a crowded street at night"),
    drawing(seed=2),
    drawing(seed=2**31 - 1),
    drawing(steps=3),
    drawing(guidance=4.0, negative_prompt="blurry"),
    drawing(guidance=4.0, negative_prompt="bright"),
    drawing(guidance=9.0, negative_prompt="blurry"),
)


def paint(model: str, drawn: Sequence[Drawn]) -> list[Painted]:
    """The pictures of one painter, asked for all at once; calls with the same settings share it."""

    async def main() -> list[Painted]:
        defaults: dict[str, Any] = {"size": "64x48", "steps": 2}
        painters = {
            repr(each.settings): open_painter(
                Painter(model=model, **defaults | dict(each.settings)), Limits(timeout=120), Hooks()
            )
            for each in {repr(each.settings): each for each in drawn}.values()
        }
        try:
            return await asyncio.gather(*(painters[repr(each.settings)].paint(as_call(each)) for each in drawn))
        finally:
            await asyncio.gather(*(painter.aclose() for painter in painters.values()))

    return asyncio.run(main())


def as_call(drawn: Drawn) -> Call:
    sampling = Sampling(1.0, 1.0, 1, drawn.seed)
    return Call("painter", "painter/describe", (Message("user", drawn.description),), sampling, None, "job", 0)


def pixels(painted: Painted) -> bytes:
    """The reference of the verified picture: equal for equal bytes."""
    assert painted.problem == ""
    image = normalise(painted.data, at="painter")
    assert (image.width, image.height) == (64, 48)
    assert image.ref.endswith(".png")
    return image.data


@pytest.fixture(scope="module", params=["qwen_image", "stable_diffusion"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline; built in another process, as the weights of a run would be."""
    out = tmp_path_factory.mktemp("t2i") / str(request.param)
    command = [sys.executable, str(SUPPORT / "tiny_models/build_t2i.py"), str(request.param), str(out)]
    subprocess.run(command, check=True, timeout=200)
    return out


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with running("t2i_server.py", str(folder)) as base:
        yield base


@pytest.fixture(scope="module")
def served(url: str) -> dict[Drawn, bytes]:
    """What the Images API draws."""
    order = [ONE, *VARIED]
    return {drawn: pixels(painted) for drawn, painted in zip(order, paint(f"openai:tiny@{url}", order), strict=True)}


def test_description_seed_steps_and_guidance_each_change_the_picture(served: dict[Drawn, bytes]) -> None:
    assert len(set(served.values())) == 1 + len(VARIED)


def test_the_same_call_gives_the_same_bytes_again_in_any_order(url: str, served: dict[Drawn, bytes]) -> None:
    backwards = [ONE, *reversed(VARIED), ONE]
    again = [pixels(painted) for painted in paint(f"openai:tiny@{url}", backwards)]
    assert again == [served[drawn] for drawn in backwards]


def test_in_process_draws_what_the_server_draws(folder: Path, served: dict[Drawn, bytes]) -> None:
    order = [*VARIED, ONE, ONE]
    mine = [pixels(painted) for painted in paint(f"diffusers:{folder}", order)]
    assert mine == [served[drawn] for drawn in order]


def test_what_the_pipeline_cannot_draw_fails_the_call_and_no_other(url: str, folder: Path) -> None:
    with pytest.raises(CallFailed, match="pixels"):
        paint(f"openai:tiny@{url}", [drawing(size="4096x4096")])
    bad = drawing(extra={"callback_on_step_end_tensor_inputs": ["nonsense"]})
    with pytest.raises(CallFailed, match="nonsense") as caught:
        paint(f"diffusers:{folder}", [bad, bad])
    assert "\n" not in str(caught.value)
    assert pixels(*paint(f"diffusers:{folder}", [ONE]))


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "no index", "not JSON"])
def test_a_pipeline_that_cannot_be_loaded_is_named_in_one_line(
    damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken = tmp_path / "pipeline"
    if damage != "missing":
        broken.mkdir()
    if damage in ("truncated", "no index", "not JSON"):
        for path in folder.rglob("*"):
            target = broken / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                target.write_bytes(path.read_bytes())
    if damage == "truncated":
        weights = next(broken.glob("vae/*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no index":
        (broken / "model_index.json").unlink()
    elif damage == "not JSON":
        (broken / "model_index.json").write_text("{")
    with pytest.raises(InputError) as caught:
        paint(f"diffusers:{broken}", [ONE])
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)
