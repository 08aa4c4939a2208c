"""A real vision-language model by transformers in this process, alone and in a whole run (`make test-transformers`)."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from intersafe.errors import CallFailed, InputError, IntersafeError
from intersafe.images.store import ImageStore
from intersafe.models.base import Reply
from intersafe.recipe.engine import Engine
from intersafe.records import Message
from intersafe.replies import CheckAnswer, PlanAnswer, StepScoreAnswer, VerdictAnswer
from tests.engines import (
    CAST,
    COLOURS,
    REFUSAL,
    VICTIM,
    answers,
    begun,
    blind_weights,
    engine,
    picture,
    put_up,
    question,
    run_of,
    texts,
    write_recipe,
)
from tests.makers import cli, digest, journal_keys, refusal, rows

MISSING = [name for name in ("torch", "torchvision", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(bool(MISSING), reason=f"no {' nor '.join(MISSING)} here: run `make test-transformers`"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(300),
]
SPEC = "transformers:tiny"
Found = list[list[Reply | IntersafeError]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def colours(store: ImageStore) -> dict[str, str]:
    return {colour: picture(store, colour) for colour in COLOURS}


def test_images_of_every_turn_are_seen_in_a_batch_of_different_conversations(
    store: ImageStore, colours: dict[str, str]
) -> None:
    calls = [question("What is it?", colours[colour]) for colour in COLOURS]
    calls += [question("And both?", colours["red"], colours["green"]), question("A forbidden one."), question("Hello.")]
    earlier = (Message("user", "See here.", (colours["blue"],)), Message("assistant", "I see it."))
    calls.append(question("Which was it?", history=earlier))
    (found,) = answers(SPEC, engine(), store, [calls])
    assert texts(found) == [
        *(f"The image is {colour}. This is answer number 1." for colour in COLOURS),
        "The image is green. This is answer number 1.",
        REFUSAL,
        "Sure. This is answer number 1.",
        "The earlier image was blue. This is answer number 2.",
    ]


def test_a_schema_holds_and_is_closed_once(store: ImageStore, colours: dict[str, str]) -> None:
    calls = [
        question("Score it.", answer=StepScoreAnswer),
        question("Judge it.", colours["red"], answer=VerdictAnswer),
        question("Check it.", answer=CheckAnswer),
        question("Plan it.", answer=PlanAnswer, sizes=(("steps", 3),)),
        question("No schema here."),
    ]
    (found,) = answers(SPEC, engine(), store, [calls])
    shapes = [json.loads(text) for text in texts(found)[:4]]
    assert [list(shape) for shape in shapes] == [
        ["relevance", "association", "harmless", "reason"],
        ["safety", "refusal", "harmless", "helpful", "reason"],
        ["risk", "coherent", "reason"],
        ["steps"],
    ]
    assert len(shapes[3]["steps"]) == 3
    assert texts(found)[4] == "Sure. This is answer number 1."


def test_a_seed_decides_the_draw_whoever_shares_the_batch(store: ImageStore) -> None:
    def drawn(seed: int) -> list[Reply | IntersafeError]:
        others = [question(f"Other {n}.", temperature=1.9, seed=n) for n in range(3)]
        return answers(SPEC, engine(), store, [[question("Tell me more.", temperature=1.9, seed=seed), *others]])[0]

    alone = answers(SPEC, engine(), store, [[question("Tell me more.", temperature=1.9, seed=s)] for s in range(6)])
    assert texts(drawn(0))[0] == texts(alone[0])[0]
    assert len({texts(found)[0] for found in alone}) > 1


def drawn_by(rows: int, width: int = 0, **settings: Any) -> list[int]:
    """The token that each of several rows with seeds of their own draws from five logits."""
    import torch  # type: ignore[import-not-found]

    from intersafe.models.local.sampling import Row, Rows

    defaults: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    made = [
        Row(3, 9, **(defaults | settings), generator=torch.Generator("cpu").manual_seed(n), matcher=None)
        for n in range(rows)
    ]
    ids = torch.tensor([[4] * width + [0, 0, 1]] * rows)
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]] * rows))
    return [int(row.argmax()) for row in Rows(torch, made, width + 3, 5, 4)(ids, logits)]


def test_what_is_drawn_is_the_softmax_within_top_p_and_top_k() -> None:
    for settings, shares in (
        ({}, (0.4, 0.3, 0.15, 0.1, 0.05)),
        ({"top_k": 2}, (4 / 7, 3 / 7, 0, 0, 0)),
        ({"top_p": 0.65}, (4 / 7, 3 / 7, 0, 0, 0)),
        ({"top_p": 0.3}, (1, 0, 0, 0, 0)),
        ({"temperature": 0.0}, (1, 0, 0, 0, 0)),
    ):
        found = drawn_by(4000, **settings)
        for token, share in enumerate(shares):
            assert abs(found.count(token) / 4000 - share) < 0.03
            assert share or token not in found


def test_padding_counts_as_nothing_that_was_said() -> None:
    assert drawn_by(50, width=7, repetition_penalty=3.0) == drawn_by(50, repetition_penalty=3.0)
    assert drawn_by(1, repetition_penalty=9.0, temperature=0.0) == [2]


def test_bad_conversations_fail_alone_and_cut_ones_say_so(store: ImageStore, colours: dict[str, str]) -> None:
    calls = [
        question("word " * 6000),
        question("Too many.", *[colours["red"]] * 5),
        question("Tell me more.", most=3),
        question("What is it?", colours["blue"]),
    ]
    (found,) = answers(SPEC, engine(), store, [calls])
    assert [error.reason for error in found[:2] if isinstance(error, CallFailed)] == ["too_long", "bad_request"]
    assert "images" in str(found[1])
    cut, whole = found[2:]
    assert isinstance(cut, Reply)
    assert (cut.finish, cut.tokens[1]) == ("length", 3)
    assert texts([whole]) == ["The image is blue. This is answer number 1."]


def test_what_is_no_model_or_no_setting_is_one_line(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    hopeless = Engine(path=str(tmp_path), device="cpu")
    for put, extra in ((hopeless, {}), (engine(), {"top_n": 3})):
        (found,) = answers(SPEC, put, store, [[question("Hello."), question("Hello?")]], extra=extra)
        for error in found:
            assert isinstance(error, InputError)
            assert "\n" not in str(error)
            assert ";" in str(error)


def test_a_model_of_text_alone_is_turned_down_before_anything_is_written(
    store: ImageStore, colours: dict[str, str], tmp_path: Path
) -> None:
    weights = blind_weights(tmp_path / "blind")
    recipe = write_recipe(tmp_path / "recipe.json", SPEC, put_up(weights))
    done = cli("generate", "--pipeline", str(recipe), "--run", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot see images" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    (found,) = answers(SPEC, engine(weights), store, [[question("What?", colours["red"]), question("Hello.", most=5)]])
    assert isinstance(found[0], CallFailed)
    assert "vision-language" in str(found[0])
    assert isinstance(found[1], Reply)


def test_a_whole_run_on_one_real_model_is_the_same_after_a_kill(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.json", "transformers:tiny-cast", put_up(CAST))
    whole = run_of(recipe, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert len(rows(tmp_path / "whole" / "dialogues.jsonl")) == 20
    with begun(recipe, tmp_path / "part", 60) as running:
        running.kill()
    resumed = run_of(recipe, tmp_path / "part")
    assert resumed.returncode == 0, resumed.stderr
    assert digest(tmp_path / "part") == digest(tmp_path / "whole")
    keys = journal_keys(tmp_path / "part")
    assert len(keys) == len(set(keys))
    turns = [turn for row in rows(tmp_path / "whole" / "dialogues.jsonl") for turn in row["turns"]]
    pictured = [turn for turn in turns[1:] if turn["user"].get("images")]
    assert pictured


def test_the_weights_must_be_there(tmp_path: Path) -> None:
    from intersafe.recipe.load import load_recipe

    recipe = load_recipe(write_recipe(tmp_path / "recipe.json", SPEC, put_up(VICTIM) | {"path": "./nowhere"}))
    from intersafe.generation.prepare import prepare

    assert "no model at" in refusal(lambda: prepare(recipe))
