"""What is wrong with a run or a prompt folder is noticed and said, and what can be mended is."""

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from intersafe.errors import InputError
from intersafe.generation.generate import generate_dialogues
from intersafe.recipe.load import load_recipe
from intersafe.run.directory import Run
from intersafe.storage.bundled import bundled
from intersafe.templates.load import load_prompts, needed_by
from tests.support.runs import cli, demo, digest, refusal, whole_demo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "run"
    generate_dialogues(whole_demo(no_refusals=True), run=path, n=12)
    return path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.mark.parametrize("n", [12, 15])
@pytest.mark.parametrize("how", ["one is gone", "one is empty", "all are gone"])
def test_images_that_records_name_are_missed(how: str, n: int, run: Path) -> None:
    image = next(reference for dialogue in Run(run).dialogues() for reference in dialogue.images)
    path = run / "images" / image[:2] / image
    if how == "all are gone":
        shutil.rmtree(run / "images")
    elif how == "one is gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    said = refusal(lambda: generate_dialogues(whole_demo(no_refusals=True), run=run, n=n))
    assert "missing" in said
    assert "--reuse" in said
    # An empty file is there: what it holds is not read to show a dialogue.
    assert ("(missing)" in cli("show", str(run), cwd=run.parent).stdout) == (how != "one is empty")


def test_reuse_paints_what_is_gone_and_nothing_else(run: Path, tmp_path: Path) -> None:
    lost = next(o.image for d in Run(run).dialogues() for t in d.turns for o in t.origins if o.source == "painted")
    (run / "images" / lost[:2] / lost).unlink()
    again = generate_dialogues(whole_demo(no_refusals=True), run=tmp_path / "again", n=12, reuse=run)
    assert again.lost_images() == []
    assert digest(again.path) == digest(run)


@pytest.mark.parametrize("damage", ["doubled", "garbage", "blank"])
def test_a_damaged_row_of_a_finished_run_is_grown_again(damage: str, run: Path, made: Path) -> None:
    path = run / "dialogues.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    rows[5:6] = {"doubled": [rows[5], rows[5]], "garbage": [b"garbage\n"], "blank": [b"\n"]}[damage]
    path.write_bytes(b"".join(rows))
    assert Run(run).summary is None
    assert generate_dialogues(whole_demo(no_refusals=True), run=run, n=12).funnel().accepted == 12
    assert digest(run) == digest(made)


def test_prompt_files_that_a_recipe_never_asks_with_may_be_absent_and_wrong(tmp_path: Path) -> None:
    prompts = Path(shutil.copytree(bundled("prompts"), tmp_path / "prompts"))
    for name in ("planner/twin.md", "judge/aligned.md", "responder/aligned.md", "refusal/templates.yaml"):
        (prompts / name).unlink()
    (prompts / "refusal" / "question.md").write_text("{% block system %}")
    recipe = msgspec.structs.replace(demo(), prompts=str(prompts))
    assert generate_dialogues(recipe, run=tmp_path / "run", n=3).funnel().accepted == 3
    said = refusal(lambda: generate_dialogues(whole_demo(prompts=str(prompts)), run=tmp_path / "other", n=3))
    assert "refusal/" in said


def test_lint_holds_the_templates_against_the_recipe(tmp_path: Path) -> None:
    assert cli("init", "mine", cwd=tmp_path).returncode == 0
    templates = tmp_path / "mine" / "prompts" / "refusal" / "templates.yaml"
    text = templates.read_text()
    templates.write_text(text[: text.index("finance:")])
    done = cli("prompts", "lint", cwd=tmp_path / "mine")
    assert done.returncode == 2
    assert "finance" in done.stderr


def test_a_prompt_without_end_is_refused(tmp_path: Path) -> None:
    if not os.path.exists("/dev/zero"):  # noqa: PTH110
        pytest.skip("this system has no /dev/zero")
    prompts = Path(shutil.copytree(bundled("prompts"), tmp_path / "prompts"))
    (prompts / "victim" / "system.md").unlink()
    (prompts / "victim" / "system.md").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="more than 4 MiB"):
        load_prompts(prompts)


def test_what_a_recipe_needs_follows_from_it() -> None:
    aligned = needed_by(load_recipe(bundled("pipelines/aligned.yaml")))
    assert {"planner/twin", "responder/aligned", "refusal/templates", "painter/describe"} <= aligned
    assert not {"planner/twin", "refusal/question", "painter/describe"} & needed_by(demo())


def test_figures_go_through_a_link_and_never_over_a_device(run: Path, tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("real.json")
    os.mkfifo(tmp_path / "pipe")
    assert cli("stats", str(run), "--json", "link.json", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link.json").is_symlink()
    assert len((tmp_path / "real.json").read_text()) > 100
    done = cli("stats", str(run), "--json", "pipe", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not a regular file" in done.stderr
