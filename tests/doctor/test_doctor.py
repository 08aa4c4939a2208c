"""Doctor finds what is wrong with a server over real HTTP, finds no fault in a good one, and prints no key."""

import base64
import dataclasses
import io
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs
from PIL import Image

from intersafe.doctor.examine import examine
from intersafe.doctor.findings import Finding, Report
from intersafe.recipe.load import load_recipe
from intersafe.recipe.sections import Cast, Limits, Member, Painter, Recipe
from intersafe.storage.bundled import bundled
from tests.support.runs import cli
from tests.support.servers import running_vlm
from tests.support.servers.fault_server import STALL, Answer, FaultServer, Request, Script, error, raw, reply

KEY = "sk-very-secret-0123456789"
HF = "hf_very_secret_token"
Body = dict[str, Any]


def colours_in(message: Body) -> list[str]:
    """The colours of a message's pictures, from their pixels."""
    content = message["content"]
    found = []
    for part in content if isinstance(content, list) else ():
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            pixel: Any = Image.open(io.BytesIO(data)).convert("RGB").getpixel((5, 5))
            named = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green", (0, 0, 0): "black"}
            found.append(named[pixel])
    return found


def seen(body: Body) -> list[str]:
    """The colours of all pictures of a request."""
    return [colour for message in body["messages"] for colour in colours_in(message)]


def completion(text: str, *, finish: str = "stop", count: int = 1, usage: bool = True) -> Answer:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    body: Body = {"choices": [choice] * count}
    return raw(json.dumps(body | ({"usage": {"prompt_tokens": 9, "completion_tokens": 5}} if usage else {})).encode())


def fitting(schema: Body) -> str:
    """The first JSON that a flat schema of words and numbers allows."""
    fields = schema["properties"].items()
    return json.dumps({name: field["enum"][0] if "enum" in field else field["minimum"] for name, field in fields})


def models(*names: str) -> Answer:
    return raw(json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode())


def picture() -> Answer:
    buffer = io.BytesIO()
    Image.new("RGB", (256, 256), "red").save(buffer, "PNG")
    return raw(json.dumps({"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}).encode())


def chat(body: Body) -> Answer:
    """A server that can do everything."""
    form = body.get("response_format")
    if form:
        return completion(fitting(form["json_schema"]["schema"]))
    if body["max_tokens"] == 1:
        return completion("One", finish="length")
    colours = seen(body)
    text = f"I see {' and '.join(colours)}." if colours else f"Drawn with {body['seed']}."
    return completion(text, count=body.get("n", 1))


def good(request: Request) -> Answer:
    if request.path == "/v1/models":
        return models("toy")
    return picture() if request.path == "/v1/images/generations" else chat(request.body)


def but(fault: Callable[[Body], Answer | None]) -> Script:
    """The good server, with an answer of its own to some chat requests."""

    def script(request: Request) -> Answer:
        found = fault(request.body) if request.path == "/v1/chat/completions" else None
        return found or good(request)

    return script


def recipe_at(url: str, *, key: str = "", painter: str = "scripted:demo", **settings: Any) -> Recipe:
    """The demo recipe with a judge at the URL; everybody else is scripted."""
    recipe = load_recipe(bundled("pipelines/demo.yaml"))
    scripted = Member(model="scripted:demo")
    judge = Member(model=f"openai:toy@{url}", key=key, **settings)
    cast = Cast(
        attacker=scripted,
        victims=(Member(model="scripted:careful"),),
        judge=judge,
        painter=Painter(model=painter, key=key if painter != "scripted:demo" else ""),
    )
    return structs.replace(recipe, cast=cast)


def findings(report: Report, url: str) -> dict[str, Finding]:
    """What was found about the chat replica at the URL, by what was looked at."""
    (group,) = [group for group in report.groups if group.url == url and "painter" not in group.roles]
    return {finding.what: finding for finding in group.findings}


def diagnose(script: Script, **settings: Any) -> dict[str, Finding]:
    with FaultServer(script) as server:
        report = examine(recipe_at(server.url, **settings))
        found = findings(report, server.url)
        assert report.ok is not any(finding.status == "FAIL" for finding in found.values())
        assert server.most_in_flight <= 4
    return found


def without_images(body: Body) -> Answer | None:
    return error(400, "this model takes no images") if seen(body) else None


def blind(body: Body) -> Answer | None:
    return completion("A nice picture.") if seen(body) else None


def guessing(body: Body) -> Answer | None:
    return completion(f"Number {sum(map(len, seen(body)))}.") if seen(body) else None


def forgetful(body: Body) -> Answer | None:
    """Sees the pictures of the last message alone."""
    return completion("Which picture?") if seen(body) and not colours_in(body["messages"][-1]) else None


def at_most_two(body: Body) -> Answer | None:
    return error(400, "At most 2 image(s) may be provided in one prompt.") if len(seen(body)) > 2 else None


def prose(body: Body) -> Answer | None:
    return completion("It is sunny.") if "response_format" in body else None


def misfit(body: Body) -> Answer | None:
    return completion('{"word": "sunny", "number": 1}') if "response_format" in body else None


def no_schema(body: Body) -> Answer | None:
    return error(422, "response_format: extra inputs are not permitted") if "response_format" in body else None


FAULTS: list[tuple[Callable[[Body], Answer | None], str, str, str]] = [
    (without_images, "images", "FAIL", "takes no images"),
    (lambda body: error(500, "vision tower") if seen(body) else None, "images", "FAIL", "HTTP 500"),
    (blind, "images", "warn", "seem to be ignored"),
    (guessing, "images", "warn", "name neither"),
    (lambda body: completion("") if seen(body) else None, "images", "warn", "no text"),
    (forgetful, "earlier", "warn", "seem to be ignored"),
    (at_most_two, "several", "FAIL", "At most 2 image"),
    (prose, "schema", "warn", "ignored with HTTP 200"),
    (misfit, "schema", "warn", "ignored with HTTP 200"),
    (no_schema, "schema", "FAIL", "not permitted"),
    (
        lambda body: completion("x" * 99, finish="length") if "response_format" in body else None,
        "schema",
        "warn",
        "128",
    ),
    (lambda body: completion("A cat.") if "n" in body else None, "n", "info", "n ignored: n=2 gives 1"),
    (lambda body: error(400, "n must be 1") if "n" in body else None, "n", "info", "refused"),
    (lambda body: completion("One") if body["max_tokens"] == 1 else None, "finish", "warn", "not 'length'"),
    (
        lambda body: completion("Hi.", usage=False) if body["max_tokens"] == 16 else None,
        "usage",
        "info",
        "no token counts",
    ),
    (lambda _: completion("", finish="length"), "answers", "warn", "without text"),
    (lambda body: completion("Always.") if body["temperature"] == 1 else None, "seed", "info", "another seed"),
]


# --- one server at a time --------------------------------------------------------------------------------------------


def test_a_good_server_has_nothing_to_mend(tmp_path: Path) -> None:
    with FaultServer(good) as server:
        report = examine(recipe_at(server.url, painter=f"openai:toy@{server.url}"), runs=tmp_path / "no" / "outputs")
        found = findings(report, server.url)
    assert report.ok
    kept = ("answers", "model", "usage", "finish", "images", "several", "earlier", "schema")
    assert {what: found[what].status for what in kept} == dict.fromkeys(kept, "ok")
    assert found["n"].says.startswith("n=2 gives two answers")
    assert found["seed"].says == "the same seed gives the same text"
    (painter,) = [group for group in report.groups if group.roles == ("painter",)]
    assert [finding.status for finding in painter.findings] == ["ok"]
    assert not list(tmp_path.iterdir())
    assert max(len(seen(request.body)) for request in server.requests if "messages" in request.body) == 4


@pytest.mark.parametrize(
    ("fault", "what", "status", "words"), FAULTS, ids=[f"{what}-{says}" for _, what, _, says in FAULTS]
)
def test_each_fault_is_found(fault: Callable[[Body], Answer | None], what: str, status: str, words: str) -> None:
    found = diagnose(but(fault))
    assert (found[what].status, words in found[what].says) == (status, True), found[what]
    assert status == "info" or found[what].remedy
    blamed = {name for name, finding in found.items() if finding.status in ("warn", "FAIL")}
    related = {"images": {"images", "earlier", "several"}, "answers": set(found)}.get(what, {what})
    assert blamed <= related


def test_a_seed_that_is_not_kept_to_is_said() -> None:
    count = iter(range(1000))
    found = diagnose(but(lambda body: completion(f"{next(count)}") if body["temperature"] == 1 else None))
    assert found["seed"].says.startswith("one seed gave two texts")


def test_what_nobody_needs_is_no_fault() -> None:
    found = diagnose(but(prose), json_schema=False)
    assert (found["schema"].status, found["schema"].remedy) == ("info", "")
    assert diagnose(but(no_schema), json_schema=False)["schema"].status == "info"
    with FaultServer(but(no_schema)) as server:
        recipe = recipe_at("http://127.0.0.1:1/v1")
        victims = (Member(model=f"openai:toy@{server.url}"),)
        report = examine(structs.replace(recipe, cast=structs.replace(recipe.cast, victims=victims)))
        assert findings(report, server.url)["schema"].status == "info"


def test_a_replica_is_asked_little_at_once() -> None:
    found = diagnose(lambda request: dataclasses.replace(good(request), delay=0.1))
    assert found["images"].status == "ok"


def test_a_budget_needs_tokens_that_are_reported() -> None:
    with FaultServer(but(lambda _: completion("Hello.", usage=False))) as server:
        recipe = structs.replace(recipe_at(server.url), limits=Limits(max_tokens=1000))
        assert findings(examine(recipe), server.url)["usage"].status == "warn"


def test_a_dead_server_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    report = examine(recipe_at(url, painter=f"openai:toy@{url}"))
    (finding,) = findings(report, url).values()
    assert (finding.status, "no connection" in finding.says) == ("FAIL", True)
    assert not report.ok
    assert [g.findings[0].status for g in report.groups if g.roles == ("painter",)] == ["FAIL"]


@pytest.mark.alone
def test_a_server_that_hangs_fails_and_is_asked_no_more() -> None:
    with FaultServer(lambda _: STALL) as server:
        (finding,) = findings(examine(recipe_at(server.url), timeout=0.3), server.url).values()
        assert (finding.status, "no answer within 0.3 s" in finding.says) == ("FAIL", True)
        assert len(server.requests) == 2  # the list of models and the small question


@pytest.mark.alone
def test_a_server_that_hangs_on_pictures_alone_is_looked_at_to_the_end() -> None:
    with FaultServer(but(lambda body: STALL if seen(body) else None)) as server:
        found = findings(examine(recipe_at(server.url), timeout=1.0), server.url)
    assert (found["images"].status, found["images"].says) == ("FAIL", "no answer within 1 s")
    assert set(found) >= {"answers", "several", "earlier", "schema", "n", "seed"}


@pytest.mark.parametrize(
    "garbage", [raw(b"<html>It works!</html>"), raw(b"[" * 5000), raw(b"\xff\xfe"), raw(b'{"choices": []}'), raw(b"")]
)
def test_garbage_fails(garbage: Answer) -> None:
    with FaultServer(lambda _: garbage) as server:
        report = examine(recipe_at(server.url, painter=f"openai:toy@{server.url}"))
        (finding,) = findings(report, server.url).values()
    assert (finding.status, "OpenAI-compatible" in finding.remedy) == ("FAIL", True)
    assert [g.findings[0].status for g in report.groups if g.roles == ("painter",)] == ["FAIL"]


def test_a_reset_and_a_cut_body_fail() -> None:
    for answer in (Answer(how="reset"), raw(reply("a" * 4000).body, how="cut")):
        with FaultServer(lambda _, answer=answer: answer) as server:  # type: ignore[misc]
            (finding,) = findings(examine(recipe_at(server.url)), server.url).values()
            assert finding.status == "FAIL"


def test_one_passing_fault_is_forgiven_and_no_second_one() -> None:
    def failing(times: int) -> Script:
        left = iter(range(times))
        return but(lambda body: error(500) if body["max_tokens"] == 16 and next(left, None) is not None else None)

    assert diagnose(failing(1))["answers"].status == "ok"
    found = diagnose(failing(2))
    assert [(finding.what, finding.status) for finding in found.values()] == [("answers", "FAIL")]


def test_a_busy_server_is_no_broken_one() -> None:
    found = diagnose(but(lambda body: error(429, "slow down") if body["max_tokens"] != 16 else None))
    assert "FAIL" not in {finding.status for finding in found.values()}
    assert "too busy" in found["images"].says
    (finding,) = diagnose(but(lambda _: error(503, "busy"))).values()
    assert finding.status == "warn"


def test_a_wrong_name_is_found_with_the_near_one() -> None:
    def script(request: Request) -> Answer:
        if request.path == "/v1/models":
            return models("toy-7b", "another")
        return error(404, "no such model")

    (finding,) = diagnose(script).values()
    assert (finding.what, finding.status) == ("model", "FAIL")
    assert "did you mean 'toy-7b'" in finding.says


def test_a_name_that_is_answered_for_but_not_listed_is_told() -> None:
    found = diagnose(lambda request: models("other") if request.path == "/v1/models" else good(request))
    assert (found["model"].status, found["images"].status) == ("warn", "ok")


@pytest.mark.parametrize("listing", [error(404), error(500), raw(b"<html>"), raw(b'{"data": 3}')])
def test_a_server_without_a_list_is_good_enough(listing: Answer) -> None:
    found = diagnose(lambda request: listing if request.path == "/v1/models" else good(request))
    assert {finding.status for finding in found.values()} == {"ok", "info"}


# --- painter, replicas, several members ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (raw(b'{"data": [{"url": "https://example.org/secret?sig=1"}]}'), "a link"),
        (raw(b'{"data": []}'), "without a picture"),
        (raw(b'{"data": [{"b64_json": "!!!"}]}'), "no picture"),
        (raw(b'{"data": [{"b64_json": "aGVsbG8="}]}'), "no picture"),
        (error(400, "no diffusion pipeline"), "no diffusion pipeline"),
    ],
)
def test_a_painter_that_gives_no_picture_fails(answer: Answer, words: str) -> None:
    with FaultServer(lambda request: models("toy") if request.path == "/v1/models" else answer) as server:
        recipe = recipe_at("http://127.0.0.1:1/v1", painter=f"openai:toy@{server.url}")
        (group,) = [group for group in examine(recipe).groups if group.roles == ("painter",)]
    (finding,) = group.findings
    assert (finding.status, words in finding.says, "sig=" in finding.says) == ("FAIL", True, False)


def test_a_painter_that_draws_one_size_only_is_asked_for_that() -> None:
    def script(request: Request) -> Answer:
        if request.path == "/v1/images/generations" and request.body["size"] != "1024x1024":
            return error(400, "size must be 1024x1024")
        return good(request)

    with FaultServer(script) as server:
        report = examine(recipe_at(server.url, painter=f"openai:toy@{server.url}"))
    assert report.ok


def test_each_replica_is_looked_at_by_itself_and_once() -> None:
    with FaultServer(good) as one, FaultServer(but(prose)) as two:
        recipe = recipe_at(f"{one.url},{two.url}")
        same = structs.replace(recipe.cast, attacker=Member(model=f"openai:toy@{one.url}"))
        report = examine(structs.replace(recipe, cast=same))
        assert findings(report, one.url)["schema"].status == "ok"
        assert findings(report, two.url)["schema"].status == "warn"
        assert [group.roles for group in report.groups if group.url == one.url] == [("attacker", "judge")]
        assert len([r for r in one.requests if r.path == "/v1/models"]) == 1


def test_uuids_are_tried_where_the_recipe_sends_them() -> None:
    def forgets(body: Body) -> Answer | None:
        content = body["messages"][-1]["content"]
        bare = any(part.get("uuid") and not part["image_url"] for part in content if isinstance(part, dict))
        return error(400, "what image?") if bare else None

    found = diagnose(but(forgets), send_images="uuid")
    assert (found["uuid"].status, found["images"].status) == ("warn", "ok")


# --- keys ------------------------------------------------------------------------------------------------------------


def guarded(request: Request) -> Answer:
    if request.headers.get("Authorization") != f"Bearer {KEY}":
        return error(401, f"Incorrect API key provided: {request.headers.get('Authorization', '')[:14]}...")
    return good(request)


def test_the_right_key_is_sent_and_a_wrong_one_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KEY", KEY)
    assert "FAIL" not in {finding.status for finding in diagnose(guarded, key="TOY_KEY").values()}
    monkeypatch.setenv("TOY_KEY", "sk-wrong-one")
    (finding,) = diagnose(guarded, key="TOY_KEY").values()
    assert (finding.what, finding.status, finding.remedy) == ("key", "FAIL", "is the key in TOY_KEY right?")
    assert "sk-wr" not in finding.says
    (finding,) = diagnose(guarded).values()
    assert (finding.what, "name the variable" in finding.remedy) == ("key", True)


@pytest.mark.parametrize("value", [None, "", "  ", "two\nlines"])
def test_without_a_key_nobody_is_asked(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TOY_KEY", value)
    with FaultServer(good) as server:
        (finding,) = findings(examine(recipe_at(server.url, key="TOY_KEY")), server.url).values()
        assert (finding.status, finding.remedy) == ("FAIL", "export TOY_KEY=...")
        assert not server.requests


def telltale(status: int) -> Script:
    """Says the key wherever words of a server could come through."""

    def script(request: Request) -> Answer:
        if request.path == "/v1/models":
            return models(f"toy-{KEY}")
        if status == 307:
            return Answer(307, b"", {"Location": f"http://127.0.0.1:1/{KEY}"})
        return error(status, f"you sent {KEY}, {request.headers.get('Authorization')}", code=KEY)

    return script


# --- the command -----------------------------------------------------------------------------------------------------


def written(folder: Path, url: str) -> Path:
    """A recipe file whose judge and painter are at the URL."""
    home = bundled("pipelines/demo.yaml").resolve().parent
    text = (home / "demo.yaml").read_text().replace("../", f"{home.parent}/")
    text = text.replace("judge: scripted:demo", f"judge: {{model: 'openai:toy@{url}', key: TOY_KEY}}")
    text = text.replace("painter: scripted:demo", f"painter: {{model: 'openai:toy@{url}', key: TOY_KEY}}")
    path = folder / "toy.yaml"
    path.write_text(text)
    return path


def home(folder: Path) -> dict[str, str]:
    """An environment with a Hub token in a file, and nothing of this machine's."""
    place = folder / "hub"
    place.mkdir(exist_ok=True)
    (place / "token").write_text(HF)
    return {"HF_HOME": str(place), "TOY_KEY": KEY, "HF_TOKEN": "", "HF_TOKEN_PATH": "", "HUGGING_FACE_HUB_TOKEN": ""}


def test_the_command_says_all_is_well_and_writes_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with FaultServer(guarded) as server:
        done = cli("doctor", str(written(tmp_path, server.url)), cwd=work, **home(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing to fix" in done.stdout
    assert "FAIL" not in done.stdout
    assert f"a token in {tmp_path / 'hub' / 'token'}" in done.stdout
    assert not list(work.iterdir())
    assert KEY not in done.stdout + done.stderr
    assert HF not in done.stdout + done.stderr


@pytest.mark.parametrize("status", [307, 400, 401, 403, 404, 418, 422, 500])
def test_no_key_comes_through_whatever_a_server_says(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_KEY", KEY)
    with FaultServer(telltale(status)) as server:
        report = examine(recipe_at(server.url, key="TOY_KEY", painter=f"openai:toy@{server.url}"))
    assert not report.ok
    assert KEY not in msgspec.json.encode(report).decode()


def test_the_json_is_the_report(tmp_path: Path) -> None:
    with FaultServer(but(without_images)) as server:
        recipe = str(written(tmp_path, server.url))
        printed = cli("doctor", recipe, "--json", "-", cwd=tmp_path, **home(tmp_path))
        kept = cli("doctor", recipe, "--json", "found.json", cwd=tmp_path, **home(tmp_path))
    assert (printed.returncode, kept.returncode) == (1, 1)
    for text in (printed.stdout, (tmp_path / "found.json").read_text()):
        report = msgspec.json.decode(text, type=Report)
        assert not report.ok
        assert findings(report, server.url)["images"].status == "FAIL"
    assert "fix: serve a vision-language model" in kept.stdout


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\ncats: {}\n")
    for words in (["bad.yaml"], ["missing.yaml"], ["--json", str(tmp_path)], ["--json", ""]):
        done = cli("doctor", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_without_a_recipe_it_is_the_demo_on_this_machine(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    answer = tools / "nvidia-smi"
    answer.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 80200'\necho 'Odd GPU, [N/A], [N/A]'\n")
    answer.chmod(0o755)
    done = cli("doctor", cwd=tmp_path, PATH=f"{tools}:{os.environ['PATH']}", **home(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "NVIDIA H100 80GB HBM3: 78 of 80 GiB free" in done.stdout
    assert "Odd GPU, memory unknown" in done.stdout
    assert "attacker, judge, responder: scripted:demo\n  ok    scripted     nothing to probe" in done.stdout


def test_the_hub_is_asked_only_where_it_should_be(tmp_path: Path) -> None:
    def hub(request: Request) -> Answer:
        return raw(b"{}") if request.headers.get("Authorization") == f"Bearer {HF}" else error(401, "who?")

    with FaultServer(hub) as server:
        env = home(tmp_path) | {"HF_ENDPOINT": server.url.removesuffix("/v1")}
        cli("doctor", cwd=tmp_path, **env)
        assert not server.requests
        right = cli("doctor", "--online", cwd=tmp_path, **env)
        wrong = cli("doctor", "--online", cwd=tmp_path, **env | {"HF_TOKEN": "hf_wrong_one"})
        assert [request.path for request in server.requests] == ["/api/whoami-v2"] * 2
    assert (right.returncode, "accepts the token" in right.stdout) == (0, True)
    assert (wrong.returncode, "put it into HF_TOKEN" in wrong.stdout) == (1, True)
    assert "hf_wrong_one" not in wrong.stdout + wrong.stderr


# --- a real model ----------------------------------------------------------------------------------------------------


def test_a_real_model_is_seen_to_see() -> None:
    with running_vlm() as url:
        recipe = recipe_at("http://127.0.0.1:1/v1")
        judge = Member(model=f"openai:tiny-vlm@{url}")
        wrong = Member(model=f"openai:tiny-vml@{url}")
        report = examine(structs.replace(recipe, cast=structs.replace(recipe.cast, judge=judge, attacker=wrong)))
    (found,) = [{f.what: f.status for f in group.findings} for group in report.groups if group.roles == ("judge",)]
    kept = ("answers", "model", "usage", "finish", "images", "several", "earlier", "schema")
    assert {what: found[what] for what in kept} == dict.fromkeys(kept, "ok")
    (other,) = [group.findings for group in report.groups if group.roles == ("attacker",)]
    assert [(f.what, f.status, "did you mean 'tiny-vlm'" in f.says) for f in other] == [("model", "FAIL", True)]
