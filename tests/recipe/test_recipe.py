"""Recipes: what is wrong is one line with file, line and remedy; the digest moves with the outcome and no further."""

import copy
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from intersafe.errors import InputError
from intersafe.generation.jobs import seeds_by_group
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Limits, Member, Recipe, Turns
from intersafe.recipe.specs import parse_spec
from intersafe.seeds.load import load_seeds
from intersafe.storage.bundled import bundled
from tests.support.recipes import Plain, shortest

BASE: dict[str, Any] = {
    "name": "t",
    "cast": {"attacker": "scripted:demo", "victims": ["scripted:careful"], "judge": "scripted:demo"},
    "seeds": "s.jsonl",
    "prompts": "prompts",
    "strategies": ["role_play"],
}
TEXT = shortest()


def load(folder: Path, text: str | bytes) -> Recipe:
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path)


def changed(folder: Path, where: str, value: Any) -> Recipe:
    """The base recipe with one value put in, by a path such as `cast.attacker.model` or `cast.victims.0`."""
    tree, value = copy.deepcopy((BASE, value))
    inner: Any = tree
    *parents, last = where.split(".")
    for name in parents:
        inner = inner[int(name)] if isinstance(inner, list) else inner.setdefault(name, {})
    inner[int(last) if isinstance(inner, list) else last] = value
    return load(folder, yaml.dump(tree, Dumper=Plain, sort_keys=False))


def refusal(folder: Path, text: str | bytes) -> str:
    """The one line an unusable recipe gives, without the folder."""
    with pytest.raises(InputError) as caught:
        load(folder, text)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message, "the remedy is missing"
    assert len(message) < 600
    assert message.startswith(f"{folder}/r.yaml:")
    return message.removeprefix(f"{folder}/")


def with_attacker(value: str) -> str:
    return TEXT.replace("attacker: scripted:demo", f"attacker: {value}")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (TEXT + "promts: x\n", 9, "unknown key 'promts', did you mean 'prompts'?"),
        (TEXT + "turns: {min: 2, meen: 4}\n", 9, "unknown key 'turns.meen', did you mean 'mean'?"),
        (TEXT + "gates:\n  rules:\n    overlapp: 0.5\n", 11, "unknown key 'gates.rules.overlapp'"),
        (TEXT + "gates:\n  coverage: null\n  dupes: null\n", 11, "'gates.dupes', did you mean 'duplicates'?"),
        (TEXT + "plan:\n  treshold: 3\n", 10, "did you mean 'threshold'?"),
        (TEXT + "limits: {retry: 3}\n", 9, "did you mean 'retries'?"),
        (TEXT.replace("judge:", "jugde:"), 5, "unknown key 'cast.jugde', did you mean 'judge'?"),
        (with_attacker("{modle: scripted:demo}"), 3, "'cast.attacker.modle', did you mean 'model'?"),
        (
            TEXT.replace("[scripted:careful]", "\n    - scripted:eager\n    - {model: scripted:demo, temprature: 1}"),
            6,
            "'cast.victims[1].temprature', did you mean 'temperature'?",
        ),
        (TEXT + "3: x\n", 9, "unknown key '3'"),
        (TEXT + "~: x\n", 9, "unknown key"),
        (TEXT + "? [a, b]\n: x\n", 9, "unhashable key"),
        (TEXT + "n" * 900 + ": x\n", 9, "unknown key"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(tmp_path: Path, text: str, line: int, says: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"r.yaml:{line}: ")
    assert says in message


@pytest.mark.parametrize("name", ["name", "seeds", "prompts", "strategies", "cast"])
def test_a_missing_key_is_named(tmp_path: Path, name: str) -> None:
    text = yaml.safe_dump({key: value for key, value in BASE.items() if key != name})
    assert f"r.yaml:1: missing key {name!r}" in refusal(tmp_path, text)


@pytest.mark.parametrize(("name", "line"), [("attacker", 3), ("victims", 3), ("judge", 3)])
def test_a_missing_member_of_the_cast_is_named(tmp_path: Path, name: str, line: int) -> None:
    text = "".join(each for each in TEXT.splitlines(keepends=True) if not each.strip().startswith(f"{name}:"))
    assert f"r.yaml:{line}: missing key 'cast.{name}'" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (TEXT + "name: u\n", 9, "name"),
        (TEXT + "turns:\n  min: 2\n  min: 2\n", 11, "turns.min"),
        (TEXT + "gates: {images: null, images: null}\n", 9, "gates.images"),
        (with_attacker("{model: scripted:demo, extra: {a: {b: 1, b: 2}}}"), 3, "cast.attacker.extra.a.b"),
    ],
)
def test_a_doubled_key_is_never_the_last_one_that_wins(tmp_path: Path, text: str, line: int, key: str) -> None:
    assert f"r.yaml:{line}: key {key!r} appears twice" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        ("n: many", "n"),
        ("n: 2.5", "n"),
        ("n: true", "n"),
        ("n: 0", "n"),
        ("n: -3", "n"),
        ("n: 99999999999999999999", "n"),
        ("n:", "n"),
        ("seed: x", "seed"),
        ("seed: 1.5", "seed"),
        ("seed: 123456789012345678901234567890", "seed"),
        ("samples: 0", "samples"),
        ("turns: 4", "turns"),
        ("turns:", "turns"),
        ("turns: [2, 4, 6]", "turns"),
        ("turns: {min: 0}", "turns.min"),
        ("turns: {max: 17}", "turns.max"),
        ("turns: {mean: four}", "turns.mean"),
        ("turns: {mean: 1.9}", "turns"),
        ("turns: {mean: 6.1}", "turns"),
        ("turns: {min: 5, mean: 4, max: 3}", "turns"),
        ("plan: {threshold: 11}", "plan.threshold"),
        ("converse: {backtracks: -1}", "converse.backtracks"),
        ("gates:", "gates"),
        ("gates: {rules: off}", "gates.rules"),
        ("gates: {duplicates: {threshold: 0}}", "gates.duplicates.threshold"),
        ("gates: {duplicates: {permutations: 33}}", "gates.duplicates.permutations"),
        ("limits: {timeout: 0}", "limits.timeout"),
        ("limits: {patience: -1}", "limits.patience"),
        ("limits: {patience: .inf}", "finite"),
        ("limits: {patience: .nan}", "finite"),
        ("limits: {patience: 1.0e+300}", "limits.patience"),
        ("limits: {concurrency: 0}", "limits.concurrency"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_named(tmp_path: Path, lines: str, place: str) -> None:
    message = refusal(tmp_path, f"{TEXT}{lines}\n")
    assert message.startswith("r.yaml:9: ")
    assert place in message


@pytest.mark.parametrize(
    "values",
    ["temperature: 2.1", "temperature: -1", "top_p: 0", "max_tokens: 0", "json_schema: 1", "extra: [a]"],
)
def test_a_member_has_bounds_too(tmp_path: Path, values: str) -> None:
    message = refusal(tmp_path, with_attacker(f"{{model: scripted:demo, {values}}}"))
    assert message.startswith(f"r.yaml:3: cast.attacker.{values.partition(':')[0]}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TEXT + "turns:\n\tmin: 2\n", 10),
        (TEXT + "turns: {min: 2\n", 10),
        (TEXT + 'turns: "min\n', 10),
        (TEXT + "a: b: c\n", 9),
        (TEXT + "---\nname: u\n", 9),
        (TEXT + "n: \x07\n", 9),
        (TEXT + "n: \x00\n", 9),
        (TEXT.encode() + b"# caf\xe9\n", 9),
        ("", 1),
        ("# nothing\n", 1),
        ("- name: t\n", 1),
        ("name\n", 1),
        ("null\n", 1),
        (b"\x89PNG\r\n\x1a\n\x00", 1),
        (TEXT.encode("utf-16"), 1),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str | bytes, line: int) -> None:
    assert refusal(tmp_path, text).startswith(f"r.yaml:{line}: ")


@pytest.mark.parametrize("text", ["seed: 0x_\n", f"seed: {'9' * 5000}\n"])
def test_a_number_that_yaml_itself_chokes_on_is_refused(tmp_path: Path, text: str) -> None:
    assert "a number that cannot be read" in refusal(tmp_path, TEXT + text)


def test_a_folder_and_a_missing_file_are_no_recipes(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "none.yaml" / "deeper.yaml"):
        with pytest.raises(InputError, match="cannot read the recipe"):
            load_recipe(path)


# --- hostile YAML ----------------------------------------------------------------------------------------------------


def laughs() -> str:
    """Ten levels of ten references each: ten billion values, if they were followed."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    return with_attacker(f"{{model: scripted:demo, extra: {{{', '.join(levels)}}}}}")


@pytest.mark.parametrize(
    "text",
    [
        laughs(),
        with_attacker("&m {model: scripted:demo}").replace("judge: scripted:demo", "judge: *m"),
        with_attacker("&m {model: scripted:demo}").replace("judge: scripted:demo", "judge: {<<: *m}"),
        with_attacker("{model: scripted:demo, extra: &x {a: *x}}"),
        TEXT.replace("[scripted:careful]", "&v [*v]"),
        with_attacker("*nobody"),
    ],
)
def test_aliases_are_refused_before_they_are_followed(tmp_path: Path, text: str) -> None:
    assert "an alias" in refusal(tmp_path, text)


@pytest.mark.parametrize("mark", ["[", "{a: ", "- "])
def test_nesting_without_end_is_refused(tmp_path: Path, mark: str) -> None:
    assert "nested more than" in refusal(tmp_path, TEXT + "turns:\n  " + mark * 100_000)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir ['pwned']",
        "!!python/name:os.system",
        "!!python/object/new:os.system ['exit']",
        "!!binary aGk=",
        "!!int x",
        "!!timestamp x",
        "!mine 3",
        "!!set {a}",
        "!!str 3",
    ],
)
@pytest.mark.parametrize("where", ["n: {}\n", "turns: {{min: {} }}\n", "? {}\n: 1\n"])
def test_tags_are_refused_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "r.yaml:9: not plain YAML: a tag" in refusal(tmp_path, TEXT + where.format(value))
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("value", [r'"a\0b"', r'"a\ud800b"', r'"a\e[31mb"', ".inf", "-.INF", ".NaN"])
def test_values_that_no_file_could_hold_are_refused(tmp_path: Path, value: str) -> None:
    assert refusal(tmp_path, with_attacker(f"{{model: scripted:demo, extra: {{a: {value}}}}}")).startswith("r.yaml:3:")
    assert refusal(tmp_path, TEXT.replace("s.jsonl", value)).startswith("r.yaml:6:")


def test_whatever_is_cut_off_or_swapped_is_refused_or_read(tmp_path: Path) -> None:
    dice = random.Random(5)
    whole = bundled("pipelines/intersafe_v.yaml").read_bytes()
    read = 0
    for _ in range(300):
        text = bytearray(whole[: dice.randrange(len(whole))] if dice.random() < 0.3 else whole)
        for _ in range(dice.randrange(4)):
            text[dice.randrange(len(text) or 1) : dice.randrange(len(text) or 1)] = dice.choice(
                [b"", b"\t", b":", b"- ", b"{", b"'", b"&a ", b"*a", b"!!x ", b"\xff", b"\n  ", b"null", b"~"]
            )
        try:
            load(tmp_path, bytes(text))
            read += 1
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017  read or refused, both are fine
    assert read < 300


# --- specs and contradictions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("openia:m", "did you mean 'openai'?"),
        ("gpt-4o", "known: scripted, openai"),
        ("", "unknown backend"),
        (":m", "unknown backend"),
        ("openai:", "is not a model's name"),
        ("openai:@http://h:1/v1", "is not a model's name"),
        ("openai:http://h:1/v1", "is not a model's name"),
        ("openai:a b", "is not a model's name"),
        ("openai:a\nb", "is not a model's name"),
        ("openai:m@", "no URL after the @"),
        ("openai", "no model after the backend"),
        ("openai:m@http://", "is not a URL"),
        ("openai:m@https://", "is not a URL"),
        ("openai:m@http:///v1", "is not a URL"),
        ("openai:m@localhost:8000", "is not a URL"),
        ("openai:m@localhost", "is not a URL"),
        ("openai:m@node1/v1", "is not a URL"),
        ("openai:m@ftp://h/v1", "is not a URL"),
        ("openai:m@http://h:99999/v1", "is not a URL"),
        ("openai:m@http://h:x/v1", "is not a URL"),
        ("openai:m@http://[::1/v1", "is not a URL"),
        ("openai:m@http://a b/v1", "is not a URL"),
        ("openai:m@http://h/v1?key=1", "is not a URL"),
        ("openai:m@http://h:1/v1,", "is not a URL"),
        ("openai:m@http://h:1/v1,h:2/v1", "is not a URL"),
        ("scripted:demo@http://h:1", "has no URL"),
    ],
)
def test_a_spec_that_is_none_is_refused_with_its_line(tmp_path: Path, spec: str, says: str) -> None:
    text = TEXT.replace("judge: scripted:demo", f"judge: {msgspec.json.encode(spec).decode()}")
    message = refusal(tmp_path, text)
    assert message.startswith("r.yaml:5: model spec")
    assert says in message


def test_a_password_in_a_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for url in ("http://me:hush@host/v1", "http://hush@host/v1", "http://a/v1,http://me:hush@host/v1"):
        message = refusal(tmp_path, with_attacker(f"'openai:m@{url}'"))
        assert "hush" not in message
        assert "`key`" in message


@pytest.mark.parametrize("key", ["sk-proj-hush", "hush hush", "hush=1", "$HUSH", "1hush"])
def test_a_key_in_place_of_its_name_is_refused_and_not_repeated(tmp_path: Path, key: str) -> None:
    message = refusal(tmp_path, with_attacker(f"{{model: 'openai:m', key: '{key}'}}"))
    assert message.startswith("r.yaml:3: cast.attacker.key")
    assert key not in message


def test_a_spec_comes_apart() -> None:
    assert parse_spec("openai:org/M-7B@http://a:1/v1/,https://b/v1") == (
        "openai",
        "org/M-7B",
        ("http://a:1/v1", "https://b/v1"),
    )
    assert parse_spec("openai:claude@2024") == ("openai", "claude@2024", ("https://api.openai.com/v1",))
    assert parse_spec("openai:a:b@http://[::1]:8000/v1").model == "a:b"
    assert parse_spec("scripted:demo").urls == ()


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("cast.victims", ["scripted:demo", "scripted:demo"], "cast.victims: 'scripted:demo' appears twice"),
        ("cast.victims", ["openai:m@http://a/v1", "openai:m@http://b/v1"], "'openai:m' appears twice"),
        ("cast.victims", [], "cast.victims"),
        ("cast.victims", "scripted:demo", "cast.victims"),
        ("cast.victims", [None], "cast.victims[0]"),
        ("cast.victims", [["scripted:demo"]], "cast.victims[0]"),
        ("cast", None, "cast"),
        ("cast", "scripted:demo", "cast"),
        ("cast.attacker", 3, "cast.attacker"),
        ("cast.attacker", None, "cast.attacker"),
        ("cast.second_judge", 3, "cast.second_judge"),
        ("strategies", ["a", "b", "a"], "strategies: 'a' appears twice"),
        ("strategies", [], "strategies"),
        ("strategies", "role_play", "strategies"),
        ("strategies", [3], "strategies[0]"),
        ("seeds", [], "seeds"),
        ("seeds", None, "seeds"),
        ("seeds", {"a": 1}, "seeds"),
        ("prompts", ["a"], "prompts"),
        ("name", "a/b", "name"),
        ("name", "..", "name"),
        ("name", ".hidden", "name"),
        ("name", "", "name"),
        ("name", "a\n", "name"),
        ("name", "a" * 61, "name"),
        ("cast.attacker", {"model": "scripted:demo", "extra": {"messages": []}}, "extra: 'messages'"),
        ("cast.attacker", {"model": "scripted:demo", "extra": {1: 2}}, "'cast.attacker.extra.1' is not a text"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, where: str, value: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        changed(tmp_path, where, value)
    assert says in str(caught.value)
    assert str(caught.value).removeprefix(f"{tmp_path}/r.yaml:")[0].isdigit()


def test_a_doubled_victim_is_found_on_its_own_line(tmp_path: Path) -> None:
    text = TEXT.replace("[scripted:careful]", "\n    - scripted:careful\n    - scripted:eager\n    - scripted:careful")
    assert refusal(tmp_path, text).startswith("r.yaml:7: ")


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "intersafe_v"])
def test_the_shipped_recipes_load(name: str) -> None:
    recipe = load_recipe(bundled(f"pipelines/{name}.yaml"))
    assert recipe.name == name
    assert all(path.is_file() for path in recipe.seed_paths)
    assert Path(recipe.prompts).is_dir()
    assert ".." not in recipe.prompts
    assert recipe.turns.mean == 4


def test_the_short_and_the_long_way_to_write_a_cast_are_one(tmp_path: Path) -> None:
    long = {
        "attacker": {"model": "scripted:demo"},
        "victims": [{"model": "scripted:careful"}],
        "judge": {"model": "scripted:demo"},
    }
    assert changed(tmp_path, "cast", long) == load(tmp_path, TEXT)


def test_members_are_named_as_in_the_records(tmp_path: Path) -> None:
    cast = {
        "attacker": "scripted:demo",
        "victims": ["scripted:careful", "scripted:eager"],
        "judge": "scripted:demo",
        "second_judge": {"model": "openai:m@http://h/v1", "revision": "r2"},
    }
    members = changed(tmp_path, "cast", cast).cast.members
    assert {name: member.identity for name, member in members.items()} == {
        "attacker": "scripted:demo",
        "judge": "scripted:demo",
        "second_judge": "openai:m#r2",
        "victim:0": "scripted:careful",
        "victim:1": "scripted:eager",
    }
    assert set(load(tmp_path, TEXT).cast.members) == {"attacker", "judge", "victim:0"}


def test_paths_are_relative_to_the_recipe_and_not_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/r.yaml").write_text(TEXT.replace("s.jsonl", "[../a.jsonl, /b.jsonl]"))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("pipelines/r.yaml")
    assert recipe.seed_paths == [tmp_path / "a.jsonl", Path("/b.jsonl")]
    assert recipe.prompts == str(tmp_path / "pipelines/prompts")


def test_a_date_is_a_name_and_a_byte_order_mark_is_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + TEXT.replace("name: t", "name: 2026-01-31")).name == "2026-01-31"
    assert load(tmp_path, TEXT.replace("\n", "\r\n")) == load(tmp_path, TEXT)


def test_a_gate_is_switched_off_by_null(tmp_path: Path) -> None:
    gates = load(tmp_path, TEXT + "gates: {rules: null, images: null, coverage: null, duplicates: null}\n").gates
    assert (gates.rules, gates.images, gates.coverage, gates.duplicates) == (None, None, None, None)


def test_a_recipe_survives_the_json_in_which_a_run_keeps_it(tmp_path: Path) -> None:
    extra = {"a": {"b": [1, 2.5, None, True, "x"]}}
    recipe = changed(tmp_path, "cast.attacker", {"model": "openai:m@http://h/v1", "key": "K", "extra": extra})
    again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(recipe))), Recipe)
    assert again == recipe
    assert again.digest == recipe.digest


# --- digest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("name", "other"),
        ("n", 7),
        ("limits", {"concurrency": 3, "timeout": 5, "retries": 2, "patience": 1}),
        ("seeds", ["elsewhere.jsonl"]),
        ("prompts", "elsewhere"),
        ("cast.attacker", {"model": "scripted:demo", "key": "OTHER_NAME"}),
        ("cast.attacker", {"model": "scripted:demo", "concurrency": 3}),
        ("turns", {"min": 2, "mean": 4.0, "max": 6}),
    ],
)
def test_what_does_not_decide_the_outcome_leaves_the_digest_alone(tmp_path: Path, where: str, value: Any) -> None:
    assert changed(tmp_path, where, value).digest == load(tmp_path, TEXT).digest


def test_urls_leave_the_digest_alone(tmp_path: Path) -> None:
    urls = ["openai:m", "openai:m@http://a:1/v1", "openai:m@http://a:1/v1,http://b:2/v1"]
    assert len({changed(tmp_path, "cast.judge", url).digest for url in urls}) == 1


def test_whatever_decides_the_outcome_moves_the_digest(tmp_path: Path) -> None:
    changes: list[tuple[str, Any]] = [
        ("seed", 1),
        ("samples", 2),
        ("strategies", ["role_play", "topic_shift"]),
        ("strategies", ["topic_shift"]),
        ("turns", {"mean": 4.1}),
        ("turns", {"max": 7}),
        ("plan", {"threshold": 6}),
        ("plan", {"tries": 4}),
        ("converse", {"backtracks": 0}),
        ("gates", {"images": None}),
        ("gates", {"duplicates": {"threshold": 0.7}}),
        ("gates", {"rules": {"image_phrases": []}}),
        ("gates", {"coverage": {"tolerance": 0.2}}),
        ("cast.attacker", "scripted:eager"),
        ("cast.judge", "scripted:eager"),
        ("cast.victims", ["scripted:eager"]),
        ("cast.victims", ["scripted:careful", "scripted:eager"]),
        ("cast.victims", ["scripted:eager", "scripted:careful"]),
        ("cast.second_judge", "scripted:demo"),
        *(
            ("cast.attacker", {"model": "scripted:demo", name: value})
            for name, value in {
                "revision": "2",
                "temperature": 0.8,
                "top_p": 0.9,
                "max_tokens": 9,
                "json_schema": False,
                "extra": {"a": 1},
            }.items()
        ),
    ]
    digests = [load(tmp_path, TEXT).digest, *(changed(tmp_path, where, value).digest for where, value in changes)]
    assert len(set(digests)) == len(digests)


def test_the_order_of_keys_does_not_count(tmp_path: Path) -> None:
    turned = yaml.safe_dump(dict(reversed(BASE.items())), sort_keys=False)
    assert load(tmp_path, turned).digest == load(tmp_path, TEXT).digest


def test_whole_numbers_and_floats_are_one(tmp_path: Path) -> None:
    recipe = load(tmp_path, TEXT)
    whole = msgspec.structs.replace(recipe, turns=Turns(min=2, mean=4, max=6), limits=Limits(timeout=300))
    assert override(whole).digest == recipe.digest


# --- override --------------------------------------------------------------------------------------------------------


def test_a_key_goes_to_no_other_server(tmp_path: Path) -> None:
    member = {"model": "openai:m@http://mine/v1", "key": "MY_KEY", "revision": "7", "extra": {"a": 1}, "temperature": 0}
    recipe = changed(tmp_path, "cast", {"attacker": member, "judge": member, "victims": [member]})
    new = "openai:m@http://theirs/v1"
    for changes in ({"attacker": new}, {"judge": new}, {"victims": (new, "scripted:demo")}):
        members = override(recipe, **changes).cast.members
        replaced = {name: each for name, each in members.items() if each.model != member["model"]}
        assert {name.partition(":")[0] for name in replaced} == {next(iter(changes)).removesuffix("s")}
        assert {(each.key, each.revision, each.temperature) for each in replaced.values()} == {("", "", 0.0)}
        assert all(each.extra == {} for each in replaced.values())
        assert all(each.key == "MY_KEY" for name, each in members.items() if name not in replaced)
    assert override(recipe, judge="openai:gpt-4o").cast.judge.key == "OPENAI_API_KEY"


def test_what_is_not_given_stays(tmp_path: Path) -> None:
    recipe = load(tmp_path, TEXT)
    assert override(recipe) == recipe
    assert override(recipe, attacker=None, judge=None, victims=(), seeds=(), concurrency=None, seed=None) == recipe
    assert override(recipe, seed=0, concurrency=2, patience=0.0).limits.patience == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"attacker": ""},
        {"judge": "openia:x"},
        {"victims": ("",)},
        {"victims": ("scripted:demo", "scripted:demo")},
        {"patience": float("nan")},
        {"patience": float("inf")},
        {"patience": -1.0},
        {"concurrency": 0},
        {"concurrency": 10**12},
        {"seed": 10**30},
        {"seed": 1.5},
    ],
)
def test_an_override_is_checked_as_a_recipe_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = load(tmp_path, TEXT)
    with pytest.raises(InputError) as caught:
        override(recipe, **changes)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load(tmp_path, TEXT)
    with pytest.raises(AttributeError):
        recipe.n = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        recipe.cast.judge.key = "x"  # type: ignore[misc]
    assert Member(model="scripted:demo").extra is not Member(model="scripted:demo").extra


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TEXT)
    (tmp_path / "r.yaml").chmod(0)
    with pytest.raises(InputError, match="cannot read the recipe"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", ["demo", "aligned", "intersafe_v"])
def test_a_shipped_recipe_gives_no_group_a_seed_of_a_category_that_another_names(name: str) -> None:
    recipe = load_recipe(bundled(f"pipelines/{name}.yaml"))
    assert recipe.refusals is not None
    seeds = load_seeds(recipe.seed_paths).seeds
    groups = seeds_by_group(recipe.refusals, seeds, dict.fromkeys(recipe.refusals.groups, seeds))
    assert {seed.category for seed in groups["health"]} == {"health_consultation"}
    assert {seed.category for seed in groups["finance"]} == {"financial_advice"}
    assert len({seed.category for seed in groups["general"]}) == 12


def test_without_refusals_nobody_needs_the_key_of_the_responder() -> None:
    recipe = load_recipe(bundled("pipelines/intersafe_v.yaml"))
    assert "responder" in recipe.cast.members
    assert "responder" not in override(recipe, no_refusals=True).cast.members
    assert "responder" in override(recipe, no_refusals=True, responder="scripted:demo").cast.members
