"""Painted images in a run: what reaches whom, what a painter may do wrong, and what is paid for."""

import hashlib
import json
import random
import re
import shutil
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from intersafe.checks.messages import fold, message_problem, regularise, repeats_description
from intersafe.errors import SeedsExhausted, ServiceGone
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.jobs import jobs
from intersafe.generation.scheduler import FAILURES
from intersafe.images.store import ImageStore, distance
from intersafe.recipe.gates import Gates, RuleSettings
from intersafe.recipe.sections import ConverseSettings, Painter
from intersafe.records import Plan
from intersafe.run.directory import Run
from tests.support.chat_and_images import BothServers, as_image, both_servers, few, picture, uri
from tests.support.runs import digest, journal_keys, rows, started
from tests.support.seeds import seeds_in
from tests.support.servers.fault_server import Answer, Request, error, raw
from tests.support.servers.scripted_server import Body, asks_for, images_of, text_of

N = 150
CLEAN = "Could you tell me what this is, and what people mostly get wrong about number {}?"


def leaks_of(description: str) -> dict[str, str]:
    """The ways in which an attacker gives a description away."""
    words = description.split()
    half = len(words) // 2
    dashed, hidden = " -- ".join(re.findall(r"[^\W_]+", description)), description.replace("a", "a\u200b")
    return {
        "verbatim": f"Look at this. {description} What do you make of it?",
        "in parts": f"So {' '.join(words[:half])}, if you see what I mean, {' '.join(words[half:])}. Well?",
        "other case": f"WELL: {description.upper()}?",
        "other punctuation": f"Hm ... {dashed}!",
        "brackets": f"[Image: {description}]\nWhat do you make of it?",
        "label": f"Image description: {description}\nWhat do you make of it?",
        "bold label": f"**Image Description**: *{description}*\n\n{description}",
        "bold": f"What about **{description}** then?",
        "hidden signs": f"What about {hidden} then?",
    }


@dataclass
class Attacker:
    """Gives the description away in its first version of a message, in every way that there is; then writes another."""

    shown: dict[str, str]
    leaks: Counter[str]
    but: str = ""
    """The way that is left out."""

    def __call__(self, body: Body) -> str | None:
        text = text_of(body["messages"][-1])
        if asks_for(body) != "message" or "shows the last of the images" not in text or "turned down" in text:
            return None
        image = images_of(body["messages"][-1])[-1]
        if image not in self.shown:  # a seed's
            return None
        ways = leaks_of(self.shown[image])
        ways.pop(self.but, None)
        kind = list(ways)[body["seed"] % len(ways)]
        self.leaks[kind] += 1
        return json.dumps({"message": ways[kind], "rationale": ""})


@dataclass
class Made:
    """A run, and what its servers were asked."""

    run: Run
    both_servers: BothServers
    attacker: Attacker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    attacker = Attacker({}, Counter())

    def paint(request: Request) -> bytes:
        data = picture(request.body["prompt"], request.body["seed"])
        attacker.shown[uri(data)] = request.body["prompt"]
        return data

    with both_servers(attacker, paint, profile="demo") as both:
        path = tmp_path_factory.mktemp("painted") / "run"
        run = generate_dialogues(both.recipe(concurrency=16), run=path, n=N)
        yield Made(run, both, attacker)


# --- what reaches whom -----------------------------------------------------------------------------------------------


def test_every_way_to_give_a_description_away_was_tried(made: Made) -> None:
    assert set(made.attacker.leaks) == set(leaks_of("a"))
    assert sum(made.attacker.leaks.values()) > N
    reasons = Counter(row.reason for row in made.run.ended())
    assert reasons["leaked_image_description"] <= 2, "asked again, the attacker wrote another message"


def test_no_description_reaches_the_victim_or_is_in_a_user_message(made: Made) -> None:
    told = sorted({fold(description) for description, _ in made.both_servers.drawn})
    bodies = [body for body in made.both_servers.chat.bodies if asks_for(body) == "victim"]
    sent = {fold(text_of(message)) for body in bodies for message in body["messages"]}
    sent |= {fold(turn.user.text) for d in made.run.dialogues() for turn in (*d.turns, *(p.turn for p in d.pruned))}
    assert len(told) > N
    text = " | ".join(sorted(sent))
    assert not [description for description in told if description in text]
    halves = {" ".join(words[: len(words) // 2]) for each in told if len(words := each.split()) >= 16}
    assert not [half for half in halves if half in text]
    for label in ("image description", "[image:"):
        assert not any(label in text_of(message).casefold() for body in bodies for message in body["messages"])


def test_every_dialogue_has_the_pictures_of_its_job_where_its_plan_wants_them(made: Made) -> None:
    by_index = {job.index: job for job in jobs(made.both_servers.recipe(), made.run.seeds())}
    places: Counter[tuple[bool, int]] = Counter()
    for dialogue in made.run.dialogues():
        job = by_index[dialogue.job]
        painted = [(i, o) for i, turn in enumerate(dialogue.turns) for o in turn.origins if o.source == "painted"]
        painted += [(removed.index, removed.origin) for removed in dialogue.removed]
        assert len(painted) == job.pictures
        assert {i for i, _ in painted} == {i for i, step in enumerate(dialogue.plan.steps) if step.picture}
        first = dialogue.turns[0]
        if job.seed.image:
            assert first.user.images == (job.seed.image,)
            assert first.origins[0].source == "seed"
        places.update((job.seed.image is not None, i) for i, _ in painted)
        for pruned in dialogue.pruned:
            lost = {removed.origin for removed in dialogue.removed if removed.index == pruned.index}
            assert set(pruned.turn.origins) - lost == set(dialogue.turns[pruned.index].origins)
    assert places[False, 0], "a picture in the first turn"
    assert not places[True, 0]
    assert all(places[with_seed, turn] for with_seed in (False, True) for turn in (1, 2, 3))
    assert any(d.pruned and d.pruned[0].turn.user.images for d in made.run.dialogues())


def test_every_image_says_where_it_comes_from_and_can_be_painted_again(made: Made) -> None:
    store, asked = ImageStore(made.run.path / "images"), set(made.both_servers.drawn)
    for dialogue in made.run.dialogues():
        for turn in (*dialogue.turns, *(pruned.turn for pruned in dialogue.pruned)):
            assert tuple(origin.image for origin in turn.origins) == turn.user.images
            for origin in turn.origins:
                data = store.read(origin.image)
                if origin.source == "seed":
                    assert (origin.image, origin.description) == (dialogue.seed.image, "")
                    continue
                assert (origin.description, origin.seed) in asked
                assert origin.model == "openai:painter"
                assert data == picture(origin.description, origin.seed)
        hashes = [store.perceptual_hash(image) for image in dialogue.images]
        assert all(distance(one, other) > 4 for one, other in combinations(hashes, 2))


def test_the_victim_gets_the_images_of_each_turn_and_no_other(made: Made) -> None:
    store = ImageStore(made.run.path / "images")
    bodies = [body["messages"][1:] for body in made.both_servers.chat.bodies if asks_for(body) == "victim"]
    histories = {tuple((text_of(message), *images_of(message)) for message in messages) for messages in bodies}
    for dialogue in made.run.dialogues():
        if dialogue.removed:
            continue  # the turns after a repaired one were answered before
        said = [(m.text, *(store.data_uri(image) for image in m.images)) for m in dialogue.messages]
        for length in range(1, len(said), 2):
            assert tuple(said[:length]) in histories


def test_the_attacker_writes_looking_at_the_new_image_and_without_its_description(made: Made) -> None:
    seen = 0
    for body in made.both_servers.chat.bodies:
        text = text_of(body["messages"][-1])
        if asks_for(body) == "message" and "shows the last of the images" in text:
            description = made.attacker.shown.get(images_of(body["messages"][-1])[-1])
            seen += description is not None
            assert description is None or description not in text
    assert seen > N


# --- one message -----------------------------------------------------------------------------------------------------

TOLD = "A keeper in yellow oilskins climbs the stairs of a lighthouse at dawn, drawn in soft pencil"
RULES = RuleSettings()


@pytest.mark.parametrize("kind", leaks_of(TOLD))
def test_a_message_that_gives_the_description_away_is_repaired_or_rejected(kind: str) -> None:
    text = regularise(leaks_of(TOLD)[kind], RULES)
    problem = message_problem(text, [], "q", Plan(()), RULES, [TOLD])
    assert text == "What do you make of it?" if kind == "brackets" else problem is not None


KEPT = [
    "[Image: a keeper on some stairs]\nWhat is he up to?",
    "What is he up to? (see above)\n\nImage description: a keeper on some stairs",
    "**Image prompt:** a keeper on some stairs\n\nWhat is he up to?",
    "What <image: a keeper, stairs> is he up to?",
]


@pytest.mark.parametrize("draft", KEPT)
def test_a_note_for_the_painter_is_taken_out_and_the_message_stays(draft: str) -> None:
    text = regularise(draft, RULES)
    assert "is he up to?" in text
    assert "keeper" not in text
    assert message_problem(text, [], "q", Plan(()), RULES, [TOLD]) is None


# In each the words after the label are new, so only the label tells that they were meant for the painter.
UNCLEAR = [
    "Image description:\nSome man with a lamp and a beard, in watercolour\n\nWhat is he up to?",
    "Image description:\n\nSome man with a lamp and a beard, in watercolour",
    "**Image description**: some man with a lamp\nand a beard, in watercolour\nWhat is he up to?",
    "[Image description] Some man with a lamp and a beard. What is he up to?",
    "[Image: some man (with a beard) and a lamp] What is he up to?",
    "[Image: some man with a lamp\nand a beard\n\nWhat is he up to?",
    f"[Image: {'some man and ' * 60}] What is he up to?",
    "- Image description: some man with a lamp and a beard",
]


@pytest.mark.parametrize("draft", UNCLEAR)
def test_a_label_is_no_longer_taken_away_from_the_words_that_belong_to_it(draft: str) -> None:
    problem = message_problem(regularise(draft, RULES), [], "q", Plan(()), RULES, [TOLD])
    assert problem is not None
    assert problem.word == "leaked_image_description"


HONEST = [
    "What is the man in yellow doing on the stairs of that lighthouse?",
    "He climbs the stairs of a lighthouse. Is that allowed at dawn?",
    "",
    "Image",
]


@pytest.mark.parametrize("text", HONEST)
def test_a_message_about_what_can_be_seen_is_no_leak(text: str) -> None:
    assert regularise(text, RULES) == text
    assert not repeats_description(text, [TOLD, "A lamp", ""], RULES)


def test_the_shorter_runs_of_a_description_count_together() -> None:
    words = TOLD.split()
    pieces = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    assert repeats_description(" then ".join(pieces), [TOLD], RULES)
    assert not repeats_description(" then ".join(pieces[:1]), [TOLD], RULES)
    assert not repeats_description(" then ".join(words), [TOLD], RULES)


def test_an_attacker_that_never_stops_loses_the_job_and_the_victim_never_reads_a_word_of_it(tmp_path: Path) -> None:
    for rules in (RULES, None):
        attacker = Attacker({}, Counter(), but="brackets" if rules else "")

        def hook(body: Body) -> str | None:
            if asks_for(body) == "message":
                body["messages"][-1] = {"role": "user", "content": _untold(body["messages"][-1])}
            return attacker(body)  # noqa: B023

        def paint(request: Request) -> bytes:
            data = picture(request.body["prompt"], request.body["seed"])
            attacker.shown[uri(data)] = request.body["prompt"]  # noqa: B023
            return data

        with both_servers(hook, paint) as both:
            gates = Gates(rules=rules, coverage=None, duplicates=None)
            recipe = both.recipe(seeds_in(tmp_path / "seeds"), gates=gates, strategies=("role_play",), samples=1)
            # Without rules a label alone is let through: what holds whatever the recipe says is the description itself.
            with pytest.raises(SeedsExhausted):
                generate_dialogues(recipe, run=tmp_path / str(rules is None), n=12)
        told = [fold(description) for description, _ in both.drawn]
        assert len(told) == 12
        bodies = [body for body in both.chat.bodies if asks_for(body) == "victim"]
        for body in bodies:
            text = " | ".join(fold(text_of(message)) for message in body["messages"])
            assert not any(description in text for description in told)
        assert {row.reason for row in Run(tmp_path / str(rules is None)).ended()} == {"leaked_image_description"}


def _untold(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The message without the note that its last version was rejected."""
    parts: list[dict[str, Any]] = message["content"] if isinstance(message["content"], list) else []
    return [part | {"text": part["text"].replace("turned down", "")} if "text" in part else part for part in parts]


# --- what a painter may do wrong -------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to nothing in it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def linked(url: str) -> Answer:
    return raw(json.dumps({"data": [{"url": url}]}).encode())


FAULTS: dict[str, tuple[Answer | bytes, str, str]] = {
    "no image": (raw(b'{"data": []}'), "no_image", ""),
    "empty bytes": (raw(b'{"data": [{"b64_json": ""}]}'), "no_image", ""),
    "truncated": (picture("a lamp", 1)[:-30], "bad_image", "truncated"),
    "huge": (png_header(20_000, 20_000), "bad_image", "20000 x 20000"),
    "a page": (b"<html>busy</html>", "bad_image", "not an image"),
    "a link": (linked("https://pictures.example/1.png"), "image_url", "not fetched"),
    "blocked": (error(400, "no such picture", code="content_policy_violation"), "blocked", "no such picture"),
}


def alone(recipe: Any, **changes: Any) -> Any:
    """The recipe with one dialogue at a time, so that requests come in the order of the jobs."""
    return structs.replace(recipe, limits=structs.replace(recipe.limits, concurrency=1), **changes)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_painter_that_fails_is_asked_again_within_limits_then_the_job_fails_and_the_run_continues(
    fault: str, tmp_path: Path
) -> None:
    answer, word, detail = FAULTS[fault]
    with both_servers(paint=lambda request: answer if request.number < 4 else None) as both:
        recipe = alone(both.recipe(seeds_in(tmp_path / "seeds")), converse=ConverseSettings(tries=4))
        run = generate_dialogues(recipe, run=tmp_path / "run", n=2)
    (failed,) = run.ended()
    assert (failed.job, failed.kind, failed.stage, failed.reason) == (0, "failed", "paint", f"painter_{word}")
    assert detail in failed.detail
    assert rows(run.path / "failed.jsonl")[0]["reason"] == f"painter_{word}"
    assert len(both.drawn) == 4 + 2
    descriptions, seeds = zip(*both.drawn[:4], strict=True)
    assert len(set(seeds)) == 4
    assert len(set(descriptions)) == (4 if word == "blocked" else 1)
    described = [text_of(body["messages"][-1]) for body in both.chat.bodies if asks_for(body) == "description"]
    assert len(described) == (4 if word == "blocked" else 1) + 2
    assert sum("no such picture" in text for text in described) == (3 if word == "blocked" else 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_comes_right_at_the_last_try_is_recorded_with_the_seed_that_drew_it(fault: str, tmp_path: Path) -> None:
    with both_servers(paint=lambda request: FAULTS[fault][0] if request.number < 2 else None) as both:
        run = generate_dialogues(alone(both.recipe(seeds_in(tmp_path / "seeds"))), run=tmp_path / "run", n=1)
    (dialogue,) = run.dialogues()
    (origin,) = [origin for turn in dialogue.turns for origin in turn.origins]
    assert (origin.description, origin.seed) == both.drawn[2]
    assert run.image(origin.image) == picture(*both.drawn[2])
    assert len(both.drawn) == 3


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        link = linked(f"http://127.0.0.1:{trap.getsockname()[1]}/picture.png")
        with both_servers(paint=lambda request: link if request.number < 3 else None) as both:
            generate_dialogues(alone(both.recipe(seeds_in(tmp_path / "seeds"))), run=tmp_path / "run", n=1)
        assert len(both.drawn) == 4
        with pytest.raises(BlockingIOError):
            trap.accept()


@pytest.mark.parametrize("fault", ["a link", "truncated", "blocked"])
def test_a_painter_that_fails_every_job_stops_the_run_which_resumes_once_it_is_mended(
    fault: str, tmp_path: Path
) -> None:
    broken = True
    with both_servers(paint=lambda _: FAULTS[fault][0] if broken else None) as both:
        recipe = both.recipe(seeds_in(tmp_path / "seeds"), concurrency=4, samples=6)
        with pytest.raises(ServiceGone, match=f"paint painter_{FAULTS[fault][1]}") as gone:
            generate_dialogues(recipe, run=tmp_path / "run", n=40)
        assert gone.value.exit_code == 4
        assert FAILURES * 3 <= len(both.drawn) <= (FAILURES + 4) * 3
        assert Run(tmp_path / "run").funnel().jobs == 0
        broken = False
        before = len(both.drawn)
        run = generate_dialogues(recipe, run=tmp_path / "run", n=40)
    assert run.funnel().ended == {}
    assert len(both.drawn) - before <= 40 + 4, "the tries that were paid for are not paid for again"


# --- what never reaches the painter ----------------------------------------------------------------------------------

YOUNG, OTHER = "A poster for teenagers", "a display of nudity"


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split over the dialogue"])
@pytest.mark.parametrize("rules", [RULES, None], ids=["rules", "no rules"])
def test_an_excluded_description_is_never_painted(split: bool, rules: RuleSettings | None, tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        if asks_for(body) == "description":
            return json.dumps({"description": OTHER if split else f"{YOUNG}, {OTHER}", "rationale": ""})
        if asks_for(body) == "message" and split:
            return json.dumps({"message": f"{YOUNG} hangs in hall {body['seed']}, and what of it?"})
        if asks_for(body) == "pictureplan":
            return json.dumps({"steps": ["Some first question", "Some other question", "A third"], "pictures": [3]})
        return None

    gates = Gates(rules=rules, coverage=None, duplicates=None)
    with both_servers(hook) as both:
        recipe = both.recipe(seeds_in(tmp_path / "seeds", 3), strategies=("role_play",), samples=1, gates=gates)
        with pytest.raises(SeedsExhausted):
            generate_dialogues(recipe, run=tmp_path / "run", n=3)
    assert both.drawn == []
    assert {(row.stage, row.reason) for row in Run(tmp_path / "run").ended()} == {("paint", "excluded")}


def test_a_blank_description_is_asked_for_again_and_never_painted(tmp_path: Path) -> None:
    def hook(body: Body) -> str | None:
        blank = asks_for(body) == "description" and (always or "was empty" not in text_of(body["messages"][-1]))
        return json.dumps({"description": " \n\u200b", "rationale": ""}) if blank else None

    always = False
    with both_servers(hook) as both:
        recipe = both.recipe(seeds_in(tmp_path / "seeds", 3), strategies=("role_play",), samples=1)
        generate_dialogues(recipe, run=tmp_path / "run", n=3)
        assert len(both.drawn) == 3
        always = True
        with pytest.raises(SeedsExhausted):
            generate_dialogues(recipe, run=tmp_path / "other", n=3)
    assert all(description.strip(" \n\u200b") for description, _ in both.drawn)
    assert {(row.kind, row.reason) for row in Run(tmp_path / "other").ended()} == {("rejected", "empty_description")}


# --- seeds, orders, kills --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("extra", "seed"), [({"seed": 7}, 7), ({"seed": None}, 0)])
def test_the_recorded_seed_is_the_one_that_was_sent(extra: dict[str, Any], seed: int, tmp_path: Path) -> None:
    with both_servers() as both:
        recipe = both.recipe(seeds_in(tmp_path / "seeds"))
        painter = structs.replace(recipe.cast.painter or Painter(model=""), extra=extra)
        recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, painter=painter))
        run = generate_dialogues(recipe, run=tmp_path / "run", n=2)
    assert {request.body.get("seed") for request in both.images.requests} == set(extra.values())
    origins = [origin for d in run.dialogues() for turn in d.turns for origin in turn.origins]
    assert [origin.seed for origin in origins] == [seed] * 2


def faulty(request: Request) -> Answer | bytes | None:
    """Now and then something else than a picture, always the same for the same request."""
    draw = hashlib.sha256(f"{request.body['prompt']} {request.body['seed']}".encode()).digest()[0]
    faults = [answer for answer, _, _ in FAULTS.values()]
    return faults[draw] if draw < len(faults) else picture("stock", draw % 2) if draw > 150 else None


def test_concurrency_changes_no_byte_whatever_the_painter_does(tmp_path: Path) -> None:
    dice = random.Random(5)

    def slow(_: Body) -> None:
        both.chat.delay = dice.choice((0.0, 0.001, 0.01))

    with both_servers(slow, faulty, profile="demo") as both:
        for concurrency in (1, 24):
            recipe = both.recipe(images=few(3), concurrency=concurrency)
            generate_dialogues(recipe, run=tmp_path / str(concurrency), n=25)
    assert digest(tmp_path / "1") == digest(tmp_path / "24")
    run = Run(tmp_path / "1")
    assert any(d.removed for d in run.dialogues())


def test_kills_change_no_byte_and_no_image_is_paid_for_twice_beyond_those_in_flight(tmp_path: Path) -> None:
    dice, kills, concurrency = random.Random(2), 4, 8

    def slow(request: Request) -> Answer:
        """Takes its time, so that a kill meets some images in flight."""
        return replace(as_image(picture(request.body["prompt"], request.body["seed"])), delay=0.02)

    with both_servers(paint=slow, profile="demo") as both:
        words = ["generate", "--n", "40", "--run", "./run", "--no-refusals", "--concurrency", str(concurrency)]
        for role in ("--attacker", "--victim", "--judge"):
            words += [role, f"openai:scripted@{both.chat.url}"]
        words += ["--painter", f"openai:painter@{both.images.url}"]
        for killed in range(kills + 1):
            process, until = started(*words, cwd=tmp_path), len(both.drawn) + dice.randrange(4, 10)
            while killed < kills and process.poll() is None and len(both.drawn) < until:
                time.sleep(0.002)
            if killed < kills:
                assert process.poll() is None
                process.kill()
            _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        paid = Counter(both.drawn)
        assert sum(count - 1 for count in paid.values()) <= kills * concurrency
        undisturbed = [word.replace("./run", "./whole") for word in words]
        process = started(*undisturbed, cwd=tmp_path)
        process.communicate(timeout=60)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    keys = journal_keys(tmp_path / "run")
    assert len(keys) == len(set(keys))


def test_images_lost_with_the_power_are_painted_again_and_no_other(tmp_path: Path) -> None:
    with both_servers() as both:
        recipe = both.recipe(seeds_in(tmp_path / "seeds"), images=few(2))
        run = generate_dialogues(recipe, run=tmp_path / "run", n=8)
        before, paid, images = digest(run.path), both.chat.requests, list(run.dialogues())
        asked = Counter(both.drawn)
        lost, torn = (images[2].turns, images[5].turns)
        origins = [next(origin for turn in turns for origin in turn.origins) for turns in (lost, torn)]
        paths = [run.path / "images" / origin.image[:2] / origin.image for origin in origins]
        paths[0].unlink()
        paths[1].write_bytes(paths[1].read_bytes()[:40])
        for name in ("summary.json", "dialogues.jsonl", "rejected.jsonl", "failed.jsonl"):
            (run.path / name).unlink(missing_ok=True)
        generate_dialogues(recipe, run=run.path, n=8)
    assert digest(run.path) == before
    assert both.chat.requests == paid
    again = Counter(both.drawn) - asked
    assert again == Counter((origin.description, origin.seed) for origin in origins)
    assert all(run.image(image) for d in run.dialogues() for image in d.images)


def test_reuse_takes_painted_images_over_and_paints_only_what_is_lost(tmp_path: Path) -> None:
    with both_servers() as both:
        recipe = both.recipe(seeds_in(tmp_path / "seeds"))
        older = generate_dialogues(recipe, run=tmp_path / "older", n=6)
        changed = structs.replace(recipe, gates=Gates(coverage=None, duplicates=None, images=None))
        paid = both.chat.requests
        asked = Counter(both.drawn)
        newer = generate_dialogues(changed, run=tmp_path / "newer", n=6, reuse=older.path)
        assert (both.chat.requests, Counter(both.drawn)) == (paid, asked)
        assert [d.images for d in newer.dialogues()] == [d.images for d in older.dialogues()]
        assert all(newer.image(image) for d in newer.dialogues() for image in d.images)
        origin = next(o for turn in next(older.dialogues()).turns for o in turn.origins)
        (older.path / "images" / origin.image[:2] / origin.image).unlink()
        shutil.rmtree(newer.path)
        newer = generate_dialogues(changed, run=tmp_path / "newer", n=6, reuse=older.path)
    assert Counter(both.drawn) - asked == Counter([(origin.description, origin.seed)])
    assert both.chat.requests == paid
    assert all(newer.image(image) for d in newer.dialogues() for image in d.images)
