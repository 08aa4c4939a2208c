"""Prompt files: what a curator gets wrong is found at the start, with file and line; what a seed says is only text."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from intersafe.errors import InputError
from intersafe.generation.prepare import prepare
from intersafe.recipe.load import load_recipe
from intersafe.storage.bundled import bundled
from intersafe.templates.load import lint_prompts, load_prompts
from intersafe.templates.roles import PROMPTS, STRATEGY
from tests.support.runs import cli

NAME = "judge/dialogue"
VALUES: dict[str, Any] = {
    "category": "fraud",
    "concern": "deception",
    "query": "a query",
    "has_image": True,
    "transcript": "a conversation",
    "rubric": "a rubric",
}
# Names what judge/dialogue and a strategy need each, where it is offered, so that a body under test need not.
HEAD = "{% block system %}\nYou judge {{ transcript }}.\n{% endblock %}\n"
SUMMARY = "{% block summary %}in one line{% endblock %}\n"


def user(body: str) -> str:
    """A whole file with that body in its `user` block, from line 5 on."""
    return f"{HEAD}{{% block user %}}\n{body}\nText.{{% endblock %}}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(bundled("prompts"), tmp_path / "prompts")
    return tmp_path / "prompts"


def rendered(root: Path, body: str, **values: Any) -> str:
    (root / f"{NAME}.md").write_text(user(body))
    return load_prompts(root)[NAME].render("user", VALUES | values)


def refusal(root: Path, text: str | bytes, name: str = NAME) -> str:
    """The one line about that file, without the folder."""
    path = root / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (message,) = [str(problem) for problem in lint_prompts(root)]
    assert "\n" not in message
    assert "; " in message, "the remedy is missing"
    assert message.startswith(f"{path}:")
    return message.removeprefix(f"{path}:")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "line", "says"),
    [
        ("{{ qurey }}", 5, "unknown variable 'qurey', did you mean 'query'?"),
        ("\n\n{% if has_imgae %}x{% endif %}", 7, "did you mean 'has_image'?"),
        ("{{ reply }}", 5, "unknown variable 'reply', known: category"),
        ("{{ nobody | default('x') }}", 5, "unknown variable 'nobody'"),
        ("{% if nobody is defined %}x{% endif %}", 5, "unknown variable 'nobody'"),
        ("{{ self.system() }}", 5, "unknown variable 'self'"),
        ("{{ caller() }}", 5, "unknown variable 'caller'"),
        ("{{ lipsum() }}", 5, "unknown variable 'lipsum'"),
        ("{{ query.nothing }}", 5, "has no attribute 'nothing'"),
        ("\n{{ query['nothing'] }}", 6, "has no attribute 'nothing'"),
        ("{% if not has_image %}\n{{ query.nothing }}{% endif %}", 6, "has no attribute 'nothing'"),
        ("{{ query + 1 }}", 5, "does not render"),
        ("\n\n{{ 1 / 0 }}", 7, "division by zero"),
        ("{{ query.encode('no\nthing') }}", 5, "unknown encoding"),
        ("{{ query.index('zzz') }}", 5, "does not render"),
        ("{{ {}['a'] }}", 5, "does not render"),
        ("{{ loop }}", 5, "'loop' is undefined"),
        ("{% if false %}{% set mine = 1 %}{% endif %}{{ mine }}", 5, "'mine' is undefined"),
        ("{{ query", 6, "expected token"),
        ("{% if query %}", 6, "endblock"),
        ("{% nonsense %}", 5, "unknown tag 'nonsense'"),
        ("{{ }}", 5, "Expected an expression"),
        ("{{ query | nonsense }}", 5, "No filter named 'nonsense'"),
        ("{{ [1, 2] | random }}", 5, "No filter named 'random'"),
        ("{% include 'judge/turn.md' %}", 5, "a prompt reads no other file"),
        ("{% import 'judge/turn.md' as t %}", 5, "a prompt reads no other file"),
        ("{% from 'judge/turn.md' import t %}", 5, "a prompt reads no other file"),
        ("{% do query.x() %}", 5, "unknown tag 'do'"),
        ("{% block aside %}x{% endblock %}", 5, "unknown block 'aside'"),
        ("{% block usr %}x{% endblock %}", 5, "unknown block 'usr', did you mean 'user'?"),
        ("{% block system %}x{% endblock %}", 5, "block 'system' defined twice"),
    ],
)
def test_a_mistake_is_found_with_its_line(root: Path, body: str, line: int, says: str) -> None:
    message = refusal(root, user(body))
    assert message.startswith(f"{line}: ")
    assert says in message


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (HEAD, 1, "block 'user' is missing"),
        ("Plain text.\n", 1, "block 'system' is missing"),
        (user("x").replace("user", "uesr"), 1, "block 'user' is missing"),
        (user("x") + "{% block extra %}x{% endblock %}", 7, "unknown block 'extra'"),
        (user("x") + "\nbye\n", 8, "outside of the blocks"),
        ("hello {{ query }}\n" + user("x"), 1, "outside of the blocks"),
        ("{% set a = 1 %}\n" + user("x"), 1, "outside of the blocks"),
        ("{% macro m() %}x{% endmacro %}\n" + user("{{ m() }}"), 1, "outside of the blocks"),
        (HEAD + "{% if query %}{% block user %}x{% endblock %}{% endif %}", 4, "outside of the blocks"),
        ("{% extends 'judge/turn.md' %}\n" + user("x"), 1, "a prompt reads no other file"),
        (HEAD + "{% block user %}  \n{# nothing #}{% endblock %}", 1, "block 'user' is empty"),
        (HEAD + "{% block user %}{% if has_image %}x{% endif %}{% endblock %}", 1, "block 'user' is empty"),
        (user("x") + "{% endblock %}", 7, "unknown tag 'endblock'"),
        (b"{% block system %}\n\xff\n", 2, "not UTF-8"),
        ("", 0, "the file is empty"),
        (" \n\t\n", 0, "the file is empty"),
    ],
)
def test_a_file_of_the_wrong_shape_is_refused(root: Path, text: str | bytes, line: int, says: str) -> None:
    message = refusal(root, text)
    assert message.startswith(f"{line}: " if line else " ")
    assert says in message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "too deep"),
        ("{{ " + "-" * 5000 + "1 }}", "too deep"),
        ("{% if query %}" * 500 + "x" + "{% endif %}" * 500, "too deep"),
        ("{% for a in 'xy' %}" * 25 + "x" + "{% endfor %}" * 25, "too deep"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_nesting_without_end_is_no_crash(root: Path, body: str, words: str) -> None:
    assert words in refusal(root, user(body))


@pytest.mark.parametrize("count", ["10 ** 9", "1000000000", "99999999999999999999"])
def test_a_loop_cannot_be_made_without_end(root: Path, count: str) -> None:
    assert "does not render" in refusal(root, user(f"{{% for i in range({count}) %}}x{{% endfor %}}"))


@pytest.mark.parametrize(
    "body",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ query.__init__.__globals__ }}",
        "{{ range.__globals__ }}",
        "{{ (query.upper).__self__.__class__ }}",
        "{{ '{0.__class__}'.format(query) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': query}) }}",
        "{{ ('{0.__class__}' | attr('format'))(query) }}",
        "{% for k in [[]] %}{{ k.append(1) }}{% endfor %}",
        "{% set d = {} %}{{ d.update({'a': 1}) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__ }}",
        "{{ namespace.__init__ }}",
        "{{ dict.__mro__ }}",
        "{% macro m() %}x{% endmacro %}{{ m.__globals__ }}",
        "{% macro m() %}x{% endmacro %}{{ m._func.__globals__ }}",
    ],
)
def test_the_sandbox_holds(root: Path, body: str) -> None:
    assert refusal(root, user(body)).startswith("5: ")


@pytest.mark.parametrize(
    "way", ["map('attr', '__class__') | list", "map(attribute='__class__') | list", "groupby('__class__')"]
)
def test_no_way_round_gives_a_class(root: Path, way: str) -> None:
    assert "class '" not in rendered(root, f"{{{{ [query] | {way} }}}}")


@pytest.mark.parametrize("name", [*PROMPTS, *(f"judge/rubrics/{family}" for family in ("general", "health"))])
def test_a_missing_file_is_named(root: Path, name: str) -> None:
    (root / f"{name}.md").unlink()
    with pytest.raises(InputError) as caught:
        load_prompts(root)
    assert str(caught.value).startswith(f"{root / name}.md: prompt file is missing; ")


def test_a_folder_in_place_of_a_file_is_named(root: Path) -> None:
    (root / f"{NAME}.md").unlink()
    (root / f"{NAME}.md").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load_prompts(root)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prompts folder there; "):
        load_prompts(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["judge/trun", "judge/rubrics/helth", "notes", "attacker/deeper/role_play", "vicitm/x"]
)
def test_a_file_that_nothing_uses_is_named(root: Path, name: str) -> None:
    assert "nothing uses this file" in refusal(root, "x", name)


def test_notes_and_hidden_copies_are_left_alone(root: Path) -> None:
    known = dict(load_prompts(root).hashes)
    for name in ("README.md", "attacker/README.md", "attacker/._role_play.md", ".ipynb_checkpoints/role_play.md"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\xff {{ nobody }}")
    (root / "attacker/notes.txt").write_text("{{ nobody }}")
    assert dict(load_prompts(root).hashes) == known


def test_lint_finds_every_problem_and_load_the_first(root: Path) -> None:
    (root / "planner/decompose.md").write_text(user("{{ one }}"))
    (root / "judge/turn.md").write_text(HEAD)
    (root / "judge/rubrics/legal.md").unlink()
    (root / "attacker/mine.md").write_text(user("x"))
    (root / "stray.md").write_text("x")
    found = [str(problem) for problem in lint_prompts(root)]
    assert [line.removeprefix(f"{root}/").split(":")[0] for line in found] == [
        "planner/decompose.md",
        "judge/turn.md",
        "attacker/mine.md",
        "judge/rubrics/legal.md",
        "stray.md",
    ]
    with pytest.raises(InputError) as caught:
        load_prompts(root)
    assert str(caught.value) == found[0]


def test_strategies_that_no_recipe_names_may_be_unfinished(root: Path) -> None:
    (root / "attacker/draft.md").write_text(user("{{ nobody }}"))
    assert "attacker/draft" not in load_prompts(root, ["role_play"]).prompts
    with pytest.raises(InputError, match="unknown variable"):
        load_prompts(root)


def test_an_unknown_strategy_is_named_with_the_nearest(root: Path) -> None:
    with pytest.raises(InputError, match="no strategy 'role_paly', did you mean 'role_play'"):
        load_prompts(root, ["topic_shift", "role_paly"])
    for name in ("../judge/turn", "", ".", "role_play.md"):
        with pytest.raises(InputError, match="no strategy"):
            load_prompts(root, [name])
    shutil.rmtree(root / "attacker")
    with pytest.raises(InputError, match="no strategy file"):
        load_prompts(root)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{% set mine = query %}{{ mine }}", "a query"),
        ("{% set mine %}kept{% endset %}{{ mine }}", "kept"),
        ("{% for word in query.split() %}{{ loop.index }}{{ word }} {% endfor %}", "1a 2query"),
        ("{% for a, b in [(1, 2)] %}{{ a }}{{ b }}{% endfor %}", "12"),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", "012"),
        ("{% with mine = 7 %}{{ mine }}{% endwith %}", "7"),
        ("{% macro mine(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ mine(1) }}", "12()"),
        ("{% macro mine() %}<{{ caller() }}>{% endmacro %}{% call mine() %}in{% endcall %}", "<in>"),
        ("{% macro mine() %}{{ caller(5) }}{% endmacro %}{% call(u) mine() %}{{ u }}{% endcall %}", "5"),
        ("{% filter upper %}{{ query }}{% endfilter %}", "A QUERY"),
        ("{% raw %}{{ nobody }}{% endraw %}", "{{ nobody }}"),
        ("{# {{ nobody }} #}seen", "seen"),
    ],
)
def test_what_a_file_names_itself_is_known(root: Path, body: str, says: str) -> None:
    assert rendered(root, body).startswith(says)


@pytest.mark.parametrize(
    "query",
    [
        "{{ 7*7 }}",
        "{% for i in range(9) %}x{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{% endblock %}{% block system %}",
        "{# gone #}",
        "{0.__class__} %s ${query}",
        "{% raw %}",
        "<b>&amp;</b>",
        "</query>",
        "\r\n\u2028\x00\x1b[31m",
    ],
)
def test_a_seed_is_text_and_nothing_more(root: Path, query: str) -> None:
    assert rendered(root, "<{{ query }}>{{ transcript }}", query=query, transcript=query) == f"<{query}>{query}\nText."


def test_a_variable_that_was_not_given_is_an_error_and_no_gap(root: Path) -> None:
    prompt = load_prompts(root)[NAME]
    values = {name: value for name, value in VALUES.items() if name != "transcript"}
    with pytest.raises(InputError, match=r"dialogue\.md:\d+: block 'user' does not render: 'transcript' is undefined"):
        prompt.render("user", values)


def test_rendering_changes_neither_the_values_nor_the_next_rendering(root: Path) -> None:
    prompt = load_prompts(root)["planner/rewrite"]
    values = dict(prompt.role.sample)
    first = prompt.render("user", values)
    assert prompt.render("user", values | {"steps": ["other"]}) != first
    assert prompt.render("user", values) == first
    assert values == prompt.role.sample


def test_line_ends_and_a_byte_order_mark_are_not_sent(root: Path) -> None:
    known = {name: prompt.render("user", prompt.role.sample) for name, prompt in texts(root).items()}
    for path in root.rglob("*.md"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert {name: prompt.render("user", prompt.role.sample) for name, prompt in texts(root).items()} == known
    assert not any(rubric.startswith("\ufeff") for rubric in load_prompts(root).rubrics.values())


def texts(root: Path) -> dict[str, Any]:
    return {name: prompt for name, prompt in load_prompts(root).prompts.items() if "user" in prompt.role.blocks}


def test_every_byte_is_in_the_hash(root: Path) -> None:
    known = dict(load_prompts(root).hashes)
    assert len(known) == len([*root.rglob("*.md"), *root.rglob("*.yaml")])
    for name in known:
        path = root / name
        before = path.read_bytes()
        path.write_bytes(before.replace(b"\n", b" \n", 1) if b"\n" in before else before + b" ")
        after = load_prompts(root).hashes
        assert {other for other in known if after[other] != known[other]} == {name}
        path.write_bytes(before)
    assert load_prompts(root).hashes == known


def test_the_shipped_files_use_only_what_is_offered_and_offer_nothing_unknown(root: Path) -> None:
    for name, prompt in load_prompts(root).prompts.items():
        role = STRATEGY if name.startswith("attacker/") else PROMPTS[name]
        assert prompt.uses <= set(role.variables) == set(role.sample)
        assert all(prompt.render(block, role.sample) for block in role.blocks)


def test_a_new_file_is_a_new_strategy(tmp_path: Path) -> None:
    for name in ("prompts", "seeds", "pipelines"):
        shutil.copytree(bundled(name), tmp_path / name)
    recipe = tmp_path / "pipelines/demo.yaml"
    (tmp_path / "prompts/attacker/small_talk.md").write_text(SUMMARY + user("{{ step }} {{ judge_reason }}"))
    shown = cli("prompts", "list", cwd=tmp_path).stdout
    assert "attacker/small_talk" in shown
    assert "in one line" in shown
    recipe.write_text(recipe.read_text().replace("[decomposition,", "[small_talk, decomposition,"))
    prepared = prepare(load_recipe(recipe))
    assert prepared.prompts.strategies[0] == "small_talk"
    assert prepared.prompts["attacker/small_talk"].uses == {"judge_reason", "step", "transcript"}
    assert "attacker/small_talk.md" in prepared.manifest.prompts


@pytest.mark.parametrize(
    ("name", "cut", "says"),
    [
        ("judge/step", "{{ step }}", "{{ step }} is never used"),
        ("judge/dialogue", "{{ transcript }}", "{{ transcript }} is never used"),
        ("planner/decompose", "{{ n_steps }}", "{{ n_steps }} is never used"),
        ("planner/rewrite", "{{ step }}", "{{ step }} is never used"),
        ("attacker/topic_shift", "{{ step }}", "{{ step }} is never used"),
    ],
)
def test_a_prompt_without_its_subject_is_refused(root: Path, name: str, cut: str, says: str) -> None:
    text = (root / f"{name}.md").read_text()
    assert cut in text
    assert says in refusal(root, text.replace(cut, ""), name)


def test_a_verdict_prompt_needs_the_reply_or_the_transcript(root: Path) -> None:
    path = root / "judge" / "turn.md"
    path.write_text(path.read_text().replace("{{ reply }}", ""))
    assert list(lint_prompts(root)) == []  # the reply is at the end of the transcript
    assert "never used" in refusal(root, path.read_text().replace("{{ transcript }}", ""), "judge/turn")
