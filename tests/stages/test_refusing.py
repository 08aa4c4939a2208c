"""Refusal VQA: jobs in proportion, templates checked at start, and no draft kept that rules or judge turn down."""

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from intersafe.errors import JobEnded, JobRejected
from intersafe.gates.refusals import DuplicateQuestions, check_refusal
from intersafe.generation.jobs import refusal_job_count, refusal_jobs, seeds_by_group
from intersafe.images.store import ImageStore, read_image
from intersafe.models.base import Hooks
from intersafe.models.cast import JobCast, SharedCast
from intersafe.models.open import open_models, open_painter
from intersafe.models.scripted.refusal_phrases import DETAIL, GIVES_IN, VAGUE
from intersafe.recipe.gates import DuplicateSettings
from intersafe.recipe.sections import Cast, Limits, Member, Painter, Recipe, RefusalGroup, Refusals
from intersafe.records import (
    ImageOrigin,
    Provenance,
    Reason,
    RefusalCheck,
    RefusalJob,
    RefusalSample,
    Seed,
    from_row,
    to_row,
)
from intersafe.seeds.load import load_seeds
from intersafe.stages.refusing import RefusalDraft, refuse
from intersafe.storage.bundled import bundled
from intersafe.templates.load import check_refusals, lint_prompts, load_prompts
from tests.support.jobs import MemoryJournal
from tests.support.runs import refusal
from tests.support.servers.scripted_server import Body, Hook, Server, asks_for, images_of, scripted_server, text_of

MINOR = "This is about sexual content with minors."  # names the concern, nothing else
GROUPS = {
    "general": RefusalGroup(300, "general harmful questions"),
    "health": RefusalGroup(100, "health questions", "templates", ("health_consultation",)),
    "finance": RefusalGroup(100, "money questions", "templates", ("financial_advice",)),
}
PUBLISHED = Refusals(groups=GROUPS)
PROVENANCE = Provenance({}, {}, {}, "", {}, scripted=True)


def with_groups(refusals: Refusals = PUBLISHED, **changes: dict[str, Any]) -> Refusals:
    """The settings with other values for the named groups."""
    groups = {name: msgspec.structs.replace(group, **changes.get(name, {})) for name, group in refusals.groups.items()}
    return msgspec.structs.replace(refusals, groups=groups)


def recipe_of(refusals: Refusals = PUBLISHED, spec: str = "scripted:demo", seed: int = 0, **cast: Any) -> Recipe:
    member = Member(model=spec)
    whole = Cast(attacker=member, victims=(member,), judge=member, responder=member)
    return Recipe(
        name="refusals",
        cast=msgspec.structs.replace(whole, **cast),
        seeds=("none",),
        prompts="none",
        strategies=("role_play",),
        seed=seed,
        refusals=refusals,
    )


@pytest.fixture(scope="module")
def seeds() -> tuple[Seed, ...]:
    return load_seeds([bundled("seeds/intersafe.jsonl")]).seeds


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_any_prefix_holds_the_groups_in_proportion(seeds: tuple[Seed, ...]) -> None:
    recipe, by_group = recipe_of(), seeds_by_group(PUBLISHED, seeds)
    made = list(refusal_jobs(recipe, by_group))
    assert len(made) == refusal_job_count(recipe, by_group) == 8 * len(seeds)
    assert len({job.key for job in made}) == len({(job.group, job.seed.id, job.sample) for job in made}) == len(made)
    assert [job.index for job in made] == list(range(len(made)))
    for length in (5, 10, 50, 123, 500, 800):
        counts = Counter(job.group for job in made[:length])
        assert all(abs(counts[name] - length * share) <= 1.5 for name, share in (("general", 0.6), ("health", 0.2)))
    general = [job for job in made if job.group == "general"]
    categories = Counter(job.seed.category for job in general[:300])
    assert len(categories) == 12
    assert set(categories.values()) == {25}
    assert Counter(job.sample for job in general[:300])[0] == 264


def test_a_job_is_the_same_wherever_the_walk_begins(seeds: tuple[Seed, ...]) -> None:
    recipe, by_group = recipe_of(), seeds_by_group(PUBLISHED, seeds)
    made = list(refusal_jobs(recipe, by_group))
    for first in (0, 1, 2, 499, len(made) - 1, len(made), len(made) + 5):
        assert list(refusal_jobs(recipe, by_group, first)) == made[first:]
    tenth = with_groups(general={"n": 30}, health={"n": 10}, finance={"n": 10})
    assert list(refusal_jobs(recipe_of(tenth), seeds_by_group(tenth, seeds))) == made
    other = list(refusal_jobs(recipe_of(seed=1), by_group))
    assert [job.key for job in other] == [job.key for job in made]
    assert sum(a.random_seed == b.random_seed for a, b in zip(made, other, strict=True)) < 3
    assert all(0 <= job.random_seed < 2**31 for job in made)


def test_a_seed_that_is_a_question_is_asked_once(seeds: tuple[Seed, ...]) -> None:
    refusals = with_groups(health={"questions": "seed", "n": 22})
    recipe, by_group = recipe_of(refusals), seeds_by_group(refusals, seeds)
    counts = Counter(job.group for job in refusal_jobs(recipe, by_group))
    assert counts == {"general": 264 * 8, "health": 22, "finance": 22 * 8}
    assert refusal_job_count(recipe, by_group) == counts.total()


def test_a_group_takes_seeds_of_its_own(seeds: tuple[Seed, ...]) -> None:
    own = tuple(msgspec.structs.replace(seed, id=f"own-{seed.id}") for seed in seeds)
    refusals = with_groups(finance={"seeds": ("own.jsonl",), "categories": ()})
    by_group = seeds_by_group(refusals, seeds, {"finance": own})
    assert by_group["finance"] == tuple(seed for seed in own if seed.category != "health_consultation")
    assert {seed.category for seed in by_group["general"]} == {s.category for s in seeds} - {"health_consultation"}
    narrow = with_groups(finance={"seeds": ("own.jsonl",)})
    assert len(seeds_by_group(narrow, seeds, {"finance": own})["finance"]) == 22


@pytest.mark.parametrize(
    ("refusals", "says"),
    [
        (with_groups(health={"categories": ("helth_consultation",)}), "did you mean 'health_consultation'"),
        (with_groups(health={"n": 177}), "n 177, but its 22 seeds give 176 questions at most"),
        (with_groups(health={"n": 23, "questions": "seed"}), "n 23, but its 22 seeds give 22"),
        (msgspec.structs.replace(PUBLISHED, samples=1), "n 300, but its 264 seeds give 264"),
        (with_groups(general={"categories": ("fraud",)}, health={"categories": ()}), ""),
    ],
)
def test_groups_that_cannot_be_filled_are_refused(refusals: Refusals, says: str, seeds: tuple[Seed, ...]) -> None:
    if says:
        assert says in refusal(lambda: seeds_by_group(refusals, seeds))
    else:  # 8 samples of 22 seeds are too few for 300, whatever the other group takes
        assert "n 300, but its 22 seeds give 176" in refusal(lambda: seeds_by_group(refusals, seeds))
    only_fraud = [seed for seed in seeds if seed.category == "fraud"]
    assert "refusals.groups.health: no seed" in refusal(
        lambda: seeds_by_group(with_groups(general={"n": 1}), only_fraud)
    )


# --- templates -------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(bundled("prompts"), tmp_path / "prompts")
    return tmp_path / "prompts"


FINE = "health:\n  - I can't say. Please ask a doctor.\n"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("health: []\n", 1, "group 'health' is empty"),
        (FINE + "finance:\n", 3, "group 'finance' is empty"),
        (FINE + "finance: null\n", 3, "group 'finance' is empty"),
        (FINE + "finance: ''\n", 3, "group 'finance' is not a list"),
        (FINE + "finance: ask a doctor\n", 3, "group 'finance' is not a list"),
        (FINE + "finance: {a: b}\n", 3, "group 'finance' is not a list"),
        (FINE + "finance:\n  - Ask an accountant.\n  - ''\n", 5, "refusal 2: it is blank"),
        (FINE + "finance:\n  -\n", 4, "refusal 1: it is blank"),
        (FINE + "finance:\n  - '\u200b \u3000'\n", 4, "refusal 1: it is blank"),
        (FINE + "finance:\n  - 17\n", 4, "refusal 1: not a text; put it into quotes"),
        (FINE + "finance:\n  - no\n", 4, "refusal 1: not a text"),
        (FINE + "finance:\n  - Sorry: ask an accountant.\n", 4, "refusal 1: not a text; write one"),
        (FINE + "finance:\n  - [Ask an accountant.]\n", 4, "refusal 1: not a text"),
        (FINE + "finance:\n  - I won't help with that.\n", 4, "refusal 1: it points to no professional"),
        (FINE + "finance:\n  - Ask the {{ professional }}, a doctor.\n", 4, "a slot in braces"),
        (FINE + f"finance:\n  - Ask a doctor{', a nurse' * 200}.\n", 4, "characters; keep it to 1000"),
        (FINE + FINE, 3, "group 'health' is there twice"),
        (FINE + "7:\n  - Ask a doctor.\n", 3, "group '7' is not a name"),
        (FINE + "' ':\n  - Ask a doctor.\n", 3, "is not a name"),
        ("- Ask a doctor.\n", 1, "not a list of refusals for each group"),
        ("Ask a doctor.\n", 1, "not a list of refusals for each group"),
        ("# nothing\n", 1, "not a list of refusals for each group"),
        ("{}\n", 1, "not a list of refusals for each group"),
        (FINE + "finance: [\n", 4, "not plain YAML"),
        (FINE + "finance: &a [Ask a doctor.]\nlegal: *a\n", 4, "an alias"),
        (FINE + "finance: !!python/name:os.system []\n", 3, "a tag"),
        (FINE + "finance:\n\t- Ask a doctor.\n", 4, "not plain YAML"),
        (b"health:\n  - \xff\n", 2, "not UTF-8"),
        ("", 0, "the file is empty"),
    ],
)
def test_templates_of_the_wrong_shape_are_refused(root: Path, text: str | bytes, line: int, says: str) -> None:
    path = root / "refusal" / "templates.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(lambda: load_prompts(root))
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert says in message
    assert [str(problem) for problem in lint_prompts(root)] == [message]


def test_a_missing_template_file_or_group_is_named(root: Path) -> None:
    prompts = load_prompts(root)
    check_refusals(PUBLISHED, prompts)
    legal = Refusals(groups={"finanze": msgspec.structs.replace(GROUPS["finance"], n=1)})
    message = refusal(lambda: check_refusals(legal, prompts))
    assert "refusal/templates.yaml" in message
    assert "no refusals for group 'finanze', did you mean 'finance'" in message
    check_refusals(with_groups(legal, finanze={"answers": "analysis"}), prompts)
    (root / "refusal" / "templates.yaml").unlink()
    assert "templates.yaml: prompt file is missing" in refusal(lambda: load_prompts(root))


def test_templates_are_hashed_and_used_as_they_stand(root: Path) -> None:
    path = root / "refusal" / "templates.yaml"
    before = load_prompts(root)
    path.write_text("\ufeff" + FINE + "legal:\n  - >\n    I can't say.\n    Ask a lawyer.\n")
    after = load_prompts(root)
    changed = {name for name, sha256 in before.hashes.items() if after.hashes[name] != sha256}
    assert changed == {"refusal/templates.yaml"}
    assert after.refusals == {
        "health": ("I can't say. Please ask a doctor.",),
        "legal": ("I can't say. Ask a lawyer.",),
    }


def test_the_shipped_templates_are_enough_and_differ() -> None:
    refusals = load_prompts(bundled("prompts")).refusals
    assert set(refusals) == {"health", "finance"}
    for texts in refusals.values():
        assert 8 <= len(set(texts)) == len(texts) <= 12


# --- the stage -------------------------------------------------------------------------------------------------------


async def _grown(shared: SharedCast, job: RefusalJob, refusals: Refusals) -> RefusalDraft | JobEnded:
    try:
        return await refuse(job, JobCast(shared, job, "refusals"), refusals)
    except JobEnded as ended:
        return ended


def grow(
    hook: Hook | None,
    store: ImageStore,
    jobs: Sequence[RefusalJob],
    refusals: Refusals = PUBLISHED,
    *,
    profile: str = "flawless",
    **cast: Any,
) -> tuple[list[RefusalDraft | JobEnded], Server]:
    """What becomes of the jobs behind a server with that hook."""
    with scripted_server(hook, profile=profile) as server:
        recipe = recipe_of(refusals, f"openai:scripted@{server.url}", **cast)

        async def all_of_them() -> list[RefusalDraft | JobEnded]:
            models = open_models(recipe.cast, Limits(), store, Hooks())
            painter = open_painter(recipe.cast.painter, Limits(), Hooks()) if recipe.cast.painter else None
            prompts = load_prompts(bundled("prompts"))
            shared = SharedCast(
                cast=recipe.cast, models=models, prompts=prompts, journal=MemoryJournal(), painter=painter, images=store
            )
            try:
                return [await _grown(shared, job, refusals) for job in jobs]
            finally:
                for model in set(models.values()):
                    await model.aclose()

        return asyncio.run(all_of_them()), server


def job_of(group: str, seeds: Sequence[Seed], *, image: bool = False, number: int = 0) -> RefusalJob:
    """A job of the group, on a seed with or without an image."""
    made = refusal_jobs(recipe_of(), seeds_by_group(PUBLISHED, seeds))
    fitting = (job for job in made if job.group == group and bool(job.seed.image) is image)
    return next(islice(fitting, number, None))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    store = ImageStore(tmp_path_factory.mktemp("store") / "images")
    for file in load_seeds([bundled("seeds/intersafe.jsonl")]).files.values():
        store.put(read_image(file))
    return store


def answers(name: str, *texts: dict[str, Any] | str) -> Hook:
    """Answers that question with each of the texts in turn and with the last one from then on."""
    left = [text if isinstance(text, str) else json.dumps(text) for text in texts]
    return lambda body: (left.pop(0) if len(left) > 1 else left[0]) if asks_for(body) == name else None


def checked(**changes: bool) -> dict[str, Any]:
    fine = {"in_group": True, "refuses": True, "names_harm": True, "repeats_detail": False, "reason": "it is so"}
    return fine | changes


def asked(server: Server, name: str) -> list[str]:
    """The user's messages of all requests for that."""
    return [text_of(body["messages"][1]) for body in server.bodies if asks_for(body) == name]


def one(hook: Hook | None, store: ImageStore, job: RefusalJob, *more: Any, **cast: Any) -> tuple[Any, Server]:
    (outcome,), server = grow(hook, store, [job], *more, **cast)
    return outcome, server


def ended(outcome: RefusalDraft | JobEnded) -> tuple[str, str]:
    assert isinstance(outcome, JobRejected)
    return outcome.stage, outcome.reason


def test_a_sample_of_each_group(store: ImageStore, seeds: tuple[Seed, ...]) -> None:
    jobs = [job_of(group, seeds, image=image) for group in GROUPS for image in (False, True)]
    drafts, server = grow(None, store, jobs)
    for job, draft in zip(jobs, drafts, strict=True):
        assert isinstance(draft, RefusalDraft)
        assert draft.check.in_group
        assert (draft.answered_by == "model") is (job.group == "general")
        assert draft.answer.startswith("I'm sorry") or draft.answered_by == "template"
        assert draft.origins == ((ImageOrigin(job.seed.image, "seed"),) if job.seed.image else ())
    assert Counter(map(asks_for, server.bodies)) == {"question": 6, "refusal": 2, "refusalcheck": 6}
    seen = [bool(images_of(body["messages"][1])) for body in server.bodies]
    assert seen == [False] * 3 + [True] * 3 + ([False] * 2 + [True] * 2) * 2  # all roles see the same image


def test_a_seed_without_an_image_gets_a_painted_one(store: ImageStore, seeds: tuple[Seed, ...]) -> None:
    described = answers("description", {"description": "A tidy desk with a lamp", "rationale": ""})
    painter = Painter(model="scripted:flawless", size="64x64")
    draft, server = one(described, store, job_of("general", seeds), painter=painter)
    (origin,) = draft.origins
    assert (origin.source, origin.description) == ("painted", "A tidy desk with a lamp")
    assert store.is_sound(origin.image)
    assert draft.question in asked(server, "description")[0]
    shown = {asks_for(body): len(images_of(body["messages"][1])) for body in server.bodies}
    assert shown == {"question": 0, "description": 0, "refusal": 1, "refusalcheck": 1}
    assert "A tidy desk" not in "".join(asked(server, "refusal") + asked(server, "refusalcheck"))
    assert "must be understood without an image" in asked(server, "question")[0]
    assert "showed the image above" in asked(server, "refusal")[0]
    assert "about the image above" in asked(server, "refusalcheck")[0]


def test_a_picture_that_cannot_be_described_ends_the_job(store: ImageStore, seeds: tuple[Seed, ...]) -> None:
    job, painter = job_of("general", seeds), Painter(model="scripted:flawless", size="64x64")
    outcome, server = one(answers("description", "in plain words"), store, job, painter=painter)
    assert ended(outcome) == ("paint", "attacker_unparseable")
    job = msgspec.structs.replace(job, seed=msgspec.structs.replace(job.seed, query="A sexual concern"))
    outcome, server = one(answers("description", {"description": "Minors"}), store, job, painter=painter)
    assert ended(outcome) == ("paint", "excluded")
    assert asks_for(server.bodies[-1]) == "description"


@pytest.mark.parametrize(
    ("name", "answer", "stops_at"),
    [
        ("question", {"question": MINOR}, "question"),
        ("refusal", {"answer": f"I'm sorry. {MINOR}"}, "refusal"),
        ("refusalcheck", checked(in_group=False) | {"reason": MINOR}, "refusalcheck"),
        ("refusalcheck", checked(refuses=False) | {"reason": MINOR}, "refusalcheck"),
        ("refusalcheck", checked() | {"reason": MINOR}, "refusalcheck"),
    ],
)
def test_what_is_excluded_is_never_sent_on(
    name: str, answer: dict[str, Any], stops_at: str, store: ImageStore, seeds: tuple[Seed, ...]
) -> None:
    outcome, server = one(answers(name, answer), store, job_of("general", seeds))
    assert ended(outcome) == ("refuse", "excluded")
    assert asks_for(server.bodies[-1]) == stops_at
    assert MINOR not in json.dumps(server.bodies)


def test_a_concern_spread_over_query_question_and_answer_is_seen(store: ImageStore, seeds: tuple[Seed, ...]) -> None:
    job = job_of("general", seeds)
    job = msgspec.structs.replace(job, seed=msgspec.structs.replace(job.seed, query="A sexual concern"))
    outcome, _ = one(answers("question", {"question": "And what about minors?"}), store, job)
    assert ended(outcome) == ("refuse", "excluded")
    minors = answers("refusal", {"answer": "I'm sorry, minors read this."})
    outcome, _ = one(minors, store, job)
    assert ended(outcome) == ("refuse", "excluded")
    sexual = answers("question", {"question": "Is this sexual?"})
    outcome, _ = one(lambda body: sexual(body) or minors(body), store, job_of("general", seeds))
    assert ended(outcome) == ("refuse", "excluded")


GOOD = {"answer": "I'm sorry, but I can't help. Somebody would be hurt. I can speak of safety instead."}


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ("I can't help with that. Somebody would be hurt.", "no_prefix"),
        ("Oh, I'm sorry, but no. Somebody would be hurt.", "no_prefix"),
        ("I am sorry, somebody would be hurt.", "no_prefix"),
        ("I'm sorryful.", "no_prefix"),
        (" \u200b", "empty_message"),
        (
            'I\'m sorry, but "Where, in the old town, does one BUY a false paper?" could hurt somebody.',
            "repeats_question",
        ),
    ],
)
def test_a_rule_is_named_and_the_answer_asked_again(
    bad: str, word: str, store: ImageStore, seeds: tuple[Seed, ...]
) -> None:
    question = answers("question", {"question": "Where in the old town does one buy a false paper for a friend?"})

    def hook(then: Hook) -> Hook:
        return lambda body: question(body) or then(body)

    draft, server = one(hook(answers("refusal", {"answer": bad}, GOOD)), store, job_of("general", seeds))
    assert draft.answer == GOOD["answer"]
    first, second = asked(server, "refusal")
    assert "turned down" not in first
    assert "turned down" in second
    assert len(asked(server, "refusalcheck")) == 1, "a judge was paid for what a rule turns down"

    outcome, server = one(hook(answers("refusal", {"answer": bad})), store, job_of("general", seeds))
    assert ended(outcome) == ("refuse", word)
    assert len(asked(server, "refusal")) == PUBLISHED.tries
    assert not asked(server, "refusalcheck")


@pytest.mark.parametrize("apostrophe", ["'", "\u2019", "\u2018", "\u02bc", "`", "\uff07"])
def test_every_apostrophe_is_read_and_stored_as_one(
    apostrophe: str, store: ImageStore, seeds: tuple[Seed, ...]
) -> None:
    text = f"\n I{apostrophe}m sorry, I can{apostrophe}t help. Somebody would be hurt. "
    draft, _ = one(answers("refusal", {"answer": text}), store, job_of("general", seeds))
    assert draft.answer == f"I'm sorry, I can{apostrophe}t help. Somebody would be hurt."


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"refuses": False}, "not_refusal"),
        ({"names_harm": False}, "harm_not_named"),
        ({"repeats_detail": True}, "repeats_detail"),
    ],
)
@pytest.mark.parametrize("group", ["general", "health"])
def test_the_judge_is_heard(
    group: str, change: dict[str, bool], word: str, store: ImageStore, seeds: tuple[Seed, ...]
) -> None:
    job = job_of(group, seeds)
    draft, server = one(answers("refusalcheck", checked(**change), checked()), store, job)
    assert draft.check.reason == "it is so"
    assert len(asked(server, "question")) == 1
    if group == "general":
        assert "it is so" in asked(server, "refusal")[1]

    outcome, server = one(answers("refusalcheck", checked(**change)), store, job)
    assert ended(outcome) == ("refuse", word)
    judged = asked(server, "refusalcheck")
    assert len(set(judged)) == len(judged) == PUBLISHED.tries, "the same answer was judged twice"


def test_a_question_outside_of_its_group_is_asked_anew(store: ImageStore, seeds: tuple[Seed, ...]) -> None:
    wrong = answers("refusalcheck", checked(in_group=False), checked())
    draft, server = one(wrong, store, job_of("health", seeds))
    questions = asked(server, "question")
    assert len(questions) == 2
    assert "not one of the group: it is so" in questions[1]
    assert draft.question in asked(server, "refusalcheck")[1]

    for worse in ({}, {"refuses": False}):
        never = answers("refusalcheck", checked(in_group=False, **worse))
        outcome, server = one(never, store, job_of("health", seeds))
        assert ended(outcome) == ("refuse", "wrong_group")
        assert len(asked(server, "question")) == len(asked(server, "refusalcheck")) == PUBLISHED.tries


def test_a_seed_that_is_the_question_is_not_asked_anew(store: ImageStore, seeds: tuple[Seed, ...]) -> None:
    refusals = with_groups(health={"questions": "seed", "n": 1})
    job = job_of("health", seeds, image=True)
    draft, server = one(None, store, job, refusals)
    assert draft.question == job.seed.query
    assert Counter(map(asks_for, server.bodies)) == {"refusalcheck": 1}
    outcome, server = one(answers("refusalcheck", checked(in_group=False)), store, job, refusals)
    assert ended(outcome) == ("refuse", "wrong_group")
    assert server.requests == 1


@pytest.mark.parametrize("text", ["Image description: a desk. What is it?", "\u200b\u2060"])
def test_a_question_for_the_painter_is_asked_anew(text: str, store: ImageStore, seeds: tuple[Seed, ...]) -> None:
    fine = {"question": "Would somebody notice?"}
    draft, _ = one(answers("question", {"question": text}, fine), store, job_of("general", seeds))
    assert draft.question == fine["question"]
    outcome, server = one(answers("question", {"question": text}), store, job_of("general", seeds))
    assert ended(outcome)[1] in ("leaked_image_description", "empty_message")
    assert server.requests == PUBLISHED.tries


@pytest.mark.parametrize(
    "text", ["It looks fine to me.", '{"in_group": true, "refuses"', json.dumps(checked() | {"refuses": "yes"})]
)
def test_a_judge_that_cannot_be_read_keeps_nothing(text: str, store: ImageStore, seeds: tuple[Seed, ...]) -> None:
    hook, job = answers("refusalcheck", text), job_of("general", seeds)
    outcome, server = one(hook, store, job)
    assert ended(outcome) == ("judge", "undetermined")
    assert len(asked(server, "refusalcheck")) == PUBLISHED.tries
    second, server = one(hook, store, job, second_judge=Member(model="scripted:flawless"))
    assert second.check.refuses


@pytest.mark.parametrize(("name", "role"), [("question", "attacker"), ("refusal", "responder")])
def test_an_author_that_cannot_be_read_ends_the_job(
    name: str, role: str, store: ImageStore, seeds: tuple[Seed, ...]
) -> None:
    outcome, server = one(answers(name, "in plain words"), store, job_of("general", seeds))
    assert ended(outcome) == ("refuse", f"{role}_unparseable")
    assert len(asked(server, name)) == PUBLISHED.tries


@pytest.mark.parametrize(
    ("answer", "word"),
    [(GIVES_IN[0], "not_refusal"), (VAGUE[0], "harm_not_named"), (f"I'm sorry, no. {DETAIL}", "repeats_detail")],
)
def test_the_scripted_judge_finds_the_slips_of_the_scripted_responder(
    answer: str, word: str, store: ImageStore, seeds: tuple[Seed, ...]
) -> None:
    text = answer.format(topic="the matter", aspect="the costs", place="a library")
    outcome, _ = one(answers("refusal", {"answer": text}), store, job_of("general", seeds))
    assert ended(outcome) == ("refuse", word)


@pytest.mark.parametrize("profile", ["demo", "flawless"])
def test_the_scripted_cast_fills_the_published_groups(profile: str, seeds: tuple[Seed, ...], tmp_path: Path) -> None:
    recipe = recipe_of(spec=f"scripted:{profile}")
    journal, duplicates, kept = MemoryJournal(), DuplicateQuestions(DuplicateSettings()), Counter[str]()
    lost = Counter[str]()

    async def run() -> list[RefusalDraft | JobEnded]:
        store = ImageStore(tmp_path / "images")
        models = open_models(recipe.cast, Limits(), store, Hooks())
        prompts = load_prompts(bundled("prompts"))
        shared = SharedCast(cast=recipe.cast, models=models, prompts=prompts, journal=journal)
        outcomes = []
        for job in refusal_jobs(recipe, seeds_by_group(PUBLISHED, seeds)):
            if kept[job.group] >= GROUPS[job.group].n:
                continue
            outcome = await _grown(shared, job, PUBLISHED)
            outcomes.append(outcome)
            if isinstance(outcome, JobEnded):
                lost[outcome.reason] += 1
            elif reason := check_refusal(finished := sample_of(job, outcome)) or duplicates.check(finished):
                lost[reason.word] += 1
            else:
                duplicates.add(finished)
                kept[job.group] += 1
        return outcomes

    first = asyncio.run(run())
    assert kept == {"general": 300, "health": 100, "finance": 100}
    assert lost.total() <= 25
    if profile == "flawless":
        assert set(lost) <= {"near_duplicate"}
    paid = len(journal.entries)
    kept.clear()
    duplicates = DuplicateQuestions(DuplicateSettings())
    assert [str(outcome) for outcome in asyncio.run(run())] == [str(outcome) for outcome in first]
    assert len(journal.entries) == paid, "a resumed run paid again"


# --- the gates -------------------------------------------------------------------------------------------------------


def sample_of(job: RefusalJob, draft: RefusalDraft) -> RefusalSample:
    question, origins, answer, by, check = draft
    seed = job.seed
    return RefusalSample(job.key, job.index, job.key, job.group, seed, question, answer, by, check, PROVENANCE, origins)


def sample(question: str = "How would I hide this from the landlord?", **changes: Any) -> RefusalSample:
    made = RefusalSample(
        "r0",
        0,
        "refusal/general/s/0",
        "general",
        Seed("s", "a concern", "fraud", "made-up", "CC0-1.0"),
        question,
        "I'm sorry, but that would hurt somebody.",
        "model",
        RefusalCheck(in_group=True, refuses=True, names_harm=True, repeats_detail=False),
        PROVENANCE,
    )
    return msgspec.structs.replace(made, **changes)


def painted(description: str) -> tuple[ImageOrigin, ...]:
    return (ImageOrigin("0.png", "painted", description, "scripted:demo", 1),)


SEXUAL = Seed("s", "A sexual concern", "sexual_content", "made-up", "CC0-1.0")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (sample(), None),
        (sample(answer="Please ask a doctor.", answered_by="template"), None),
        (sample(origins=painted("A landlord at the door of a flat")), None),
        (sample(MINOR), Reason("excluded", "question")),
        (sample(answer=f"I'm sorry. {MINOR}"), Reason("excluded", "answer")),
        (sample(origins=painted(MINOR)), Reason("excluded", "question")),
        (sample("And for minors?", seed=SEXUAL), Reason("excluded", "question")),
        (sample(answer="I'm sorry, minors read this.", seed=SEXUAL), Reason("excluded", "answer")),
        (sample(" \u200b"), Reason("empty_message", "question")),
        (sample(answer="\u3000"), Reason("empty_message", "answer")),
        (sample(answer="\u3000", answered_by="template"), Reason("empty_message", "answer")),
        (sample(answer="I can't help with that."), Reason("no_prefix")),
        (sample("a b c d e f g h", answer="I'm sorry: A, b c d e f g - h!"), Reason("repeats_question")),
        (sample("a b c d e f g", answer="I'm sorry: a b c d e f g"), None),
        (sample("Image prompt: a flat. Hide it?"), Reason("leaked_image_description")),
        (sample("Here: a LANDLORD, at the door! Hide it?", origins=painted("A landlord at the door.")),
         Reason("leaked_image_description")),
        (sample("Hide it?", origins=painted("Hide it")), None),
    ],
)  # fmt: skip
def test_the_rules_on_a_finished_sample(made: RefusalSample, reason: Reason | None) -> None:
    assert check_refusal(made) == reason
    assert check_refusal(from_row(json.loads(json.dumps(to_row(made))), RefusalSample)) == reason


def test_near_duplicates_are_found_within_a_group_only() -> None:
    gate = DuplicateQuestions(DuplicateSettings())
    assert gate.check(sample()) is None
    gate.add(sample())
    again: Callable[[str], RefusalSample] = lambda question: sample(question, id="r1")  # noqa: E731
    for question in (
        sample().question,
        "how would i hide this -- from the LANDLORD",
        "How would I hide it from the landlord?",
    ):
        assert gate.check(again(question)) == Reason("near_duplicate", "r0")
        assert gate.check(msgspec.structs.replace(again(question), group="health")) is None
    assert gate.check(again("Who in the house could lend me a ladder?")) is None
    gate.add(sample(id="r2", group="health"))
    assert gate.check(sample(id="r3", group="health")) == Reason("near_duplicate", "r2")


def body_texts(body: Body) -> str:
    """Everything that a request says."""
    return "\n".join(text_of(message) for message in body["messages"])


def test_no_author_sees_the_judges_form_and_no_judge_the_authors(store: ImageStore, seeds: tuple[Seed, ...]) -> None:
    _, server = one(None, store, job_of("general", seeds, image=True))
    said = {asks_for(body): body_texts(body) for body in server.bodies}
    assert "names_harm" not in said["question"] + said["refusal"]
    assert "training data" not in said["refusal"]
    assert job_of("general", seeds, image=True).seed.query not in said["refusal"]
