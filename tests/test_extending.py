"""docs/extending.md: the blocks of each section are taken from the page and do what the section says."""

import ast
import re
import shutil
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import yaml

import intersafe
from intersafe import taxonomy
from intersafe.errors import JobRejected
from intersafe.gates.chain import Chain
from intersafe.generation import dialogues, jobs
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.grow import grow_dialogue
from intersafe.generation.job_kind import JobKind
from intersafe.generation.kinds import KINDS
from intersafe.generation.replay import calls_of
from intersafe.generation.shortfall import all_tried
from intersafe.generation.twins import TwinGates
from intersafe.images.store import ImageStore
from intersafe.models.cast import JobCast
from intersafe.recipe import gates
from intersafe.recipe.gates import Gates
from intersafe.records import Check, Dialogue, Job, Message, Reason, Turn
from intersafe.run.directory import Run
from intersafe.run.kinds import RECORDS, records_of
from intersafe.stages import calls
from intersafe.stages.judging import check_dialogue
from intersafe.storage.bundled import bundled
from intersafe.templates.load import lint_prompts, load_prompts
from tests.support.jobs import conversation_of, dialogue_of, job_of, turn_of, with_cast
from tests.support.paths import REPOSITORY
from tests.support.runs import demo

BLOCK = re.compile(r"^```\w+ (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS: dict[str, str] = dict(BLOCK.findall((REPOSITORY / "docs" / "extending.md").read_text()))
"""The blocks of the page by the file that they belong in."""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A prompt folder with the prompt files of the page in it."""
    folder = tmp_path / "prompts"
    shutil.copytree(bundled("prompts"), folder)
    for name in ("attacker/comparison.md", "judge/rubrics/financial.md"):
        (folder / name).write_text(BLOCKS[f"prompts/{name}"])
    return folder


def run_code(path: str, **names: Any) -> dict[str, Any]:
    """What a block defines, with these names around it."""
    exec(compile(BLOCKS[path], path, "exec"), names)
    return names


def generated(tmp_path: Path, **changes: Any) -> Run:
    """A run of two dialogues with the scripted cast."""
    return generate_dialogues(demo(**changes), run=tmp_path / "run", n=2)


def test_every_block_of_the_page_is_used_here() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_extending*.py"))
    assert all(f'"{path}"' in text or f'"{path.removeprefix("prompts/")}"' in text for path in BLOCKS)


def test_a_strategy_is_one_file_and_its_name_in_the_recipe(prompts: Path, tmp_path: Path) -> None:
    assert list(lint_prompts(prompts)) == []
    changes = yaml.safe_load(BLOCKS["pipelines/mine.yaml"])
    run = generated(tmp_path, prompts=str(prompts), strategies=tuple(changes["strategies"]))
    assert {dialogue.strategy for dialogue in run.dialogues()} == {"comparison"}
    asked = [call for call, _ in calls_of(run, 0) if call.prompt == "attacker/comparison"]
    assert "Strategy, comparison" in asked[0].messages[0].text


def test_a_category_is_one_entry_and_its_policy_one_file(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = eval(BLOCKS["intersafe/taxonomy.py"], vars(taxonomy))
    assert isinstance(entry, taxonomy.Category)
    monkeypatch.setitem(taxonomy.BY_NAME, entry.name, entry)
    monkeypatch.setattr(jobs, "CATEGORIES", (*taxonomy.CATEGORIES, entry))
    (tmp_path / "seeds.jsonl").write_text(BLOCKS["seeds/gambling.jsonl"])
    run = generated(tmp_path, prompts=str(prompts), seeds=(str(tmp_path / "seeds.jsonl"),), gates=Gates(coverage=None))
    assert {dialogue.seed.category for dialogue in run.dialogues()} == {"gambling"}
    policy = BLOCKS["prompts/judge/rubrics/financial.md"].strip()
    assert load_prompts(prompts).rubrics["financial"] == policy
    judged = [call for call, _ in calls_of(run, 0) if call.prompt == "judge/turn"]
    assert all(policy in call.messages[1].text or policy in call.messages[0].text for call in judged)


def silent(dialogue: Dialogue) -> Dialogue:
    """The dialogue without a question mark in the user's messages."""
    turns = [
        msgspec.structs.replace(turn, user=Message("user", turn.user.text.replace("?", "."))) for turn in dialogue.turns
    ]
    return msgspec.structs.replace(dialogue, turns=tuple(turns))


def test_a_gate_is_a_section_a_rule_and_a_line_in_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    section = run_code("intersafe/recipe/gates.py", **vars(gates))["QuestionSettings"]
    monkeypatch.setattr(gates, "QuestionSettings", section, raising=False)
    rule = run_code("intersafe/gates/questions.py")["check_questions"]
    chain = Chain(Gates(rules=None, coverage=None, duplicates=None), {}, lambda _: 0)
    settings = SimpleNamespace(questions=section())
    run_code("intersafe/gates/chain.py", self=chain, settings=settings, partial=partial, check_questions=rule)
    turns = tuple(
        msgspec.structs.replace(turn_of(number), user=Message("user", f"And what of number {number}?"))
        for number in range(1, 4)
    )
    asking = dialogue_of(job_of(3), turns)
    assert chain.check(asking) is None
    assert chain.check(silent(asking)) == Reason("few_questions", "0 of 3 messages")


def test_every_reason_of_the_stages_and_gates_is_in_the_list() -> None:
    assert calls.__doc__
    listed = set(re.findall(r"\w+", calls.__doc__))
    folder = Path(intersafe.__file__).parent
    words: set[str] = set()
    for path in [path for name in ("stages", "checks", "gates") for path in (folder / name).glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                at = {"JobRejected": 1, "CallFailed": 1, "Reason": 0}.get(node.func.id, -1)
                if at >= 0 and isinstance(word := node.args[at], ast.Constant):
                    words.add(str(word.value))
    assert len(words) > 30
    assert words - {""} <= listed


@pytest.mark.parametrize("first", [Check(risk=True, coherent=True), Check(risk=False, coherent=True)])
def test_a_stage_is_a_function_on_the_conversation_and_a_line_in_the_order(first: Check, tmp_path: Path) -> None:
    confirm = run_code("intersafe/stages/confirming.py")["confirm"]
    body = textwrap.indent(BLOCKS["intersafe/generation/grow.py"], "    ")
    turns: list[Turn] = [turn_of(number) for number in range(1, 4)]
    job = job_of(3)

    async def checked(conversation: Any) -> Check:
        """The judge's check, or another one in its place."""
        check = await check_dialogue(conversation)
        assert check.risk
        return first

    names: dict[str, Any] = {"confirm": confirm, "check_dialogue": checked}
    exec(compile(ast.parse(f"async def grow(conversation):\n{body}    return check"), "grow.py", "exec"), names)

    async def act(cast: JobCast) -> Check:
        check: Check = await names["grow"](conversation_of(job, cast, turns))
        return check

    if first.risk:
        assert with_cast("scripted:flawless", ImageStore(tmp_path), act, job=job) == first
    else:
        with pytest.raises(JobRejected, match="confirm: checks_differ"):
            with_cast("scripted:flawless", ImageStore(tmp_path), act, job=job)


def test_a_job_kind_is_generated_beside_the_dialogues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(path: str, **names: Any) -> Any:
        return eval(f"{{{BLOCKS[path]}}}", names)["single"]

    single = SimpleNamespace(**run_code("intersafe/generation/single.py"))
    names = {"records_of": records_of, "Job": Job, "Dialogue": Dialogue}
    monkeypatch.setitem(RECORDS, "single", entry("intersafe/run/kinds.py", **names))
    names = {"JobKind": JobKind, "RECORDS": RECORDS, "single": single, "dialogues": dialogues}
    names |= {"grow_dialogue": grow_dialogue, "TwinGates": TwinGates, "all_tried": all_tried}
    monkeypatch.setitem(KINDS, "single", entry("intersafe/generation/kinds.py", **names))
    run = generate_dialogues(demo(), run=tmp_path / "run", n=8)
    assert [len(one.turns) for one in run.accepted("single")] == [1, 1]
    assert run.funnel("single").accepted == 2
