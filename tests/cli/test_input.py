"""The command line: bad input gives one line, exit code 2 and nothing written; good input just works."""

import http.server
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from click.testing import CliRunner, Result

from intersafe.cli.main import main
from intersafe.storage.bundled import bundled
from tests.support.paths import SHARED
from tests.support.recipes import shortest

SCRIPT = Path(sys.executable).parent / "intersafe"
FIGSTEP = SHARED / "data/figstep-tiny"
PNG = (bundled("seeds") / "images/fraud-001.png").read_bytes()
SEED = {"id": "a", "query": "How do scams work?", "category": "fraud", "source": "test", "license": "CC0-1.0"}
PROMPTS = bundled("prompts")
RECIPE = shortest(PROMPTS)
GENERATE = ("generate", "--recipe", "r.yaml", "--n", "1")
RENDER = ("prompts", "render")

Files = dict[str, str | bytes]


def run(cwd: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Runs the installed `intersafe` to its end."""
    assert SCRIPT.exists(), "install the package first: pip install -e ."
    return subprocess.run(
        [SCRIPT, *words], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False, timeout=60
    )


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below a folder."""
    found = sorted(folder.rglob("*"))
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


def lay(folder: Path, files: Files) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


class Attempt(NamedTuple):
    """A command that ran, and whether the folder is as it was before."""

    done: "subprocess.CompletedProcess[str]"
    untouched: bool


def attempt(cwd: Path, *words: str) -> Attempt:
    before = state(cwd)
    done = run(cwd, *words)
    return Attempt(done, state(cwd) == before)


def refusal(tried: Attempt, code: int = 2) -> str:
    """The one line that a refused command says; nothing else may have happened."""
    done = tried.done
    assert "Traceback" not in done.stderr
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("intersafe: ")
    assert "; " in lines[0], "the remedy is missing"
    assert tried.untouched
    return lines[0].removeprefix("intersafe: ")


def row(**changes: Any) -> str:
    return json.dumps(SEED | changes) + "\n"


def recipe(old: str = "", new: str = "") -> Files:
    """A recipe of one seed, with one part of its text replaced, or something added at its end."""
    text = RECIPE.replace(old, new) if old else RECIPE + new
    return {"r.yaml": text, "s.jsonl": row()}


def pictured(name: str, data: bytes, image: str = "") -> Files:
    return recipe() | {"s.jsonl": row(image=image or name), name: data}


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    + chunk(b"IEND", b"")
)

# --- what is refused -------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[tuple[str, ...], Files, str]] = {
    "seeds missing": (("generate", "--seeds", "none.jsonl"), {}, "none.jsonl: no such seed file"),
    "seeds empty": (("generate", "--seeds", "e.jsonl"), {"e.jsonl": ""}, "the seed file is empty"),
    "seeds a folder": (("generate", "--seeds", "."), {}, "a folder, not a seed file"),
    "seeds malformed": (("generate", "--seeds", "e.jsonl"), {"e.jsonl": row() + "\n{oops\n"}, "e.jsonl:3: malformed"),
    "all seeds excluded": (GENERATE, recipe() | {"s.jsonl": row(source_category="cse")}, "no usable seed (1 excluded)"),
    "recipe missing": (
        ("generate", "--recipe", "none.yaml"),
        {},
        "none.yaml: cannot read the recipe (No such file or directory); check",
    ),
    "recipe no YAML": (GENERATE, recipe(new="turns:\n\tmin: 2\n"), "r.yaml:10: not plain YAML"),
    "recipe bomb": (GENERATE, recipe(new="turns: &a [*a]\n"), "r.yaml:9: not plain YAML: an alias"),
    "unknown key": (GENERATE, recipe(new="promts: x\n"), "r.yaml:9: unknown key 'promts', did you mean 'prompts'?"),
    "missing key": (GENERATE, recipe("seeds: s.jsonl\n"), "r.yaml:1: missing key 'seeds'"),
    "unknown backend": (GENERATE, recipe("judge: scripted", "judge: scriptd"), "r.yaml:5: model spec 'scriptd:demo'"),
    "unknown strategy": (
        GENERATE,
        recipe("role_play", "role_paly"),
        "no strategy 'role_paly', did you mean 'role_play'?",
    ),
    "missing prompts": (GENERATE, recipe(str(PROMPTS), "none"), "none: no prompts folder there"),
    "missing key variable": (
        GENERATE,
        recipe("judge: scripted:demo", "judge: {model: 'openai:m', key: NO_SUCH_KEY}"),
        "cast.judge: the environment variable NO_SUCH_KEY is not set",
    ),
    "spec of no backend": ((*GENERATE, "--attacker", "openia:m"), recipe(), "did you mean 'openai'?"),
    "spec empty": ((*GENERATE, "--victim", ""), recipe(), "unknown backend ''"),
    "a time with a unit": (
        GENERATE,
        recipe(new="limits: {max_time: 8h}\n"),
        "r.yaml:9: limits.max_time: Expected `float | null`, got `str`; write a plain number",
    ),
    "patience no number": (
        (*GENERATE, "--patience", "nan"),
        recipe(),
        "--patience: 'nan' is not a finite number; write a plain number",
    ),
    "tokens no number": (
        (*GENERATE, "--max-tokens", "2X"),
        recipe(),
        "--max-tokens: '2X' is not a number of tokens; write",
    ),
    "two prices": ((*GENERATE, *("--price", "judge=1,2") * 2), recipe(), "--price: two prices for judge; pass one"),
    "a price for nobody": (
        (*GENERATE, "--price", "jugde=1,2"),
        recipe(),
        "--price: no role 'jugde' in the cast; roles: ",
    ),
    "a limited cost without a price": (
        (*GENERATE, "--victim", "openai:vlm@http://127.0.0.1:1/v1", "--max-cost", "5"),
        recipe(),
        "--max-cost: the cost is limited, and there is no price for victim:0; add --price victim=IN,OUT or ",
    ),
    "a limited cost in the recipe": (
        (*GENERATE, "--victim", "openai:vlm@http://127.0.0.1:1/v1"),
        recipe(new="limits: {max_cost: 5}\n"),
        "max_cost: the cost is limited, and there is no price for victim:0; add --price victim=IN,OUT or ",
    ),
    "two recipes": (
        (*GENERATE, "--pipeline", "r.yaml"),
        recipe(),
        "--recipe: two recipes, r.yaml and r.yaml; pass one",
    ),
    "no recipe": (("regate", "demo"), {}, "--recipe: no recipe; pass --recipe FILE"),
    "nothing to serve": (("serve", "--dry-run"), {}, "--recipe: no recipe; pass --recipe FILE"),
    "image truncated": (GENERATE, pictured("a.png", PNG[:100]), "s.jsonl:1: image `a.png`: the image is truncated"),
    "image oversized": (GENERATE, pictured("a.png", PNG + bytes(21 * 2**20)), "more than 20,971,520 bytes"),
    "image a bomb": (GENERATE, pictured("a.png", BOMB), "claims 60000 x 60000 pixels"),
    "image misnamed": (GENERATE, pictured("a.jpg", PNG), "the bytes are PNG, the name is `a.jpg`"),
    "image outside": (GENERATE, pictured("a.png", PNG, "../a.png"), "leads out of the seed file's folder"),
    "image a URL": (GENERATE, pictured("a.png", PNG, "http://host/a.png"), "is a URL"),
    "run a file": ((*GENERATE, "--run", "./f"), recipe() | {"f": "x"}, "f: not a folder"),
    "run a foreign folder": ((*GENERATE, "--run", "./d"), recipe() | {"d/x": "x"}, "d: the folder is not empty"),
    "run this folder": ((*GENERATE, "--run", "."), recipe(), ".: the folder is not empty"),
    "run without a name": ((*GENERATE, "--run", ""), recipe(), "a run without a name"),
    "outputs a file": (GENERATE, recipe() | {"outputs": "x"}, "outputs/t: not a folder"),
    "reuse missing": ((*GENERATE, "--reuse", "none"), recipe(), "outputs/none: no journal there"),
    "show missing": (("show", "none"), {}, "outputs/none: no run there; make one"),
    "show nothing": (("show", ""), {}, "a run without a name"),
    "show no manifest": (("show", "./f"), {"f/recipe.json": "{"}, "f/recipe.json: not a manifest"),
    "show a binary manifest": (("show", "./f"), {"f/recipe.json": b"\xff\x00"}, "f/recipe.json: not a manifest"),
    "render no such prompt": ((*RENDER, "judge/trun", "--seed", "fraud-001"), {}, "did you mean 'judge/turn'?"),
    "render outside": ((*RENDER, "../seeds/README", "--seed", "fraud-001"), {}, "no prompt '../seeds/README'"),
    "render no such seed": ((*RENDER, "judge/turn", "--seed", "fruad-001"), {}, "did you mean 'fraud-001'?"),
    "render a turn too far": ((*RENDER, "judge/turn", "--seed", "fraud-001", "--turn", "17"), {}, "at most 16 turns"),
    "render a second end": (
        (*RENDER, "judge/dialogue", "--seed", "fraud-001", "--turn", "2"),
        {},
        "not asked in turn 2",
    ),
    "init onto a file": (("init", "f"), {"f": "x"}, "f: not a folder"),
    "init twice": (("init", "d"), {"d/prompts/mine.md": "x"}, "d/prompts: already exists"),
    "init onto seeds": (("init", "d"), {"d/seeds": "x"}, "d/seeds: already exists"),
    "check missing": (("seeds", "check", "none"), {}, "none: no such seed file"),
    "check binary": (("seeds", "check", "f"), {"f": b"\x89PNG\r\n"}, "f:1: not UTF-8"),
    "figstep empty folder": (("seeds", "import", "figstep", "."), {}, "no CSV file in the folder"),
    "figstep another csv": (
        ("seeds", "import", "figstep", "d"),
        {"d/a.csv": "a,b\n1,2\n"},
        "column `dataset` is missing",
    ),
}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Attempt]:
    """Every attempt, each in a folder of its own, several at once: starting Python takes most of the time."""
    folders = {name: tmp_path_factory.mktemp("bad") for name in BAD}
    for name, (_, files, _) in BAD.items():
        lay(folders[name], files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(BAD, pool.map(lambda name: attempt(folders[name], *BAD[name][0]), BAD), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(attempts: dict[str, Attempt], name: str) -> None:
    assert BAD[name][2] in refusal(attempts[name])
    assert attempts[name].done.stdout == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "{% block system %}x{% endblock %}\n{% block user %}\n{{ qurey }}{% endblock %}",
            "turn.md:3: unknown variable",
        ),
        ("{% block system %}x{% endblock %}", "turn.md:1: block 'user' is missing"),
        ("{% block system %}{{ reply }}{% endblock %}{% block user %}{{ ''.__class__ }}{% endblock %}", "unsafe"),
        (b"\xff", "turn.md:1: not UTF-8"),
    ],
)
def test_a_bad_prompt_file_is_named_before_anything_is_written(tmp_path: Path, text: str | bytes, says: str) -> None:
    shutil.copytree(PROMPTS, tmp_path / "prompts")
    lay(tmp_path, recipe(str(PROMPTS), "prompts") | {"prompts/judge/turn.md": text})
    assert says in refusal(attempt(tmp_path, *GENERATE))
    linted = run(tmp_path, "prompts", "lint", "--recipe", "r.yaml")
    assert linted.returncode == 2
    assert [says in line for line in linted.stderr.splitlines()] == [True, False]


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--n", "0"),
        ("generate", "--n", "abc"),
        ("generate", "--nn", "3"),
        ("genrate",),
        ("show",),
        ("prompts", "render", "judge/turn", "--seed", "fraud-001", "--turn", "0"),
    ],
)
def test_a_command_that_is_none_shows_its_usage(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: intersafe")
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc, which nobody can write")
@pytest.mark.parametrize("words", [(*GENERATE, "--run", "/proc/none/run"), ("init", "/proc/none")])
def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    lay(tmp_path, recipe())
    assert "cannot be written" in refusal(attempt(tmp_path, *words), code=4)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_rights_is_said_in_one_line(tmp_path: Path) -> None:
    lay(tmp_path, recipe())
    tmp_path.chmod(0o500)
    assert "cannot be written" in refusal(attempt(tmp_path, *GENERATE), code=4)


# --- the recipe of a command ------------------------------------------------------------------------------------------

TAKES_A_RECIPE = {
    "generate": ("generate",),
    "estimate": ("estimate",),
    "regate": ("regate", "t"),
    "list": ("prompts", "list"),
    "lint": ("prompts", "lint"),
    "render": ("prompts", "render", "judge/turn", "--seed", "a"),
    "doctor": ("doctor",),
    "serve": ("serve",),
}
WITHOUT_A_FLAG = ("estimate", "doctor", "serve")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs commands in this process and in an empty folder: with one start of Python instead of fifty."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield lambda *words: CliRunner().invoke(main, words)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TAKES_A_RECIPE)
def test_every_command_takes_its_recipe_by_the_same_flag(here: Callable[..., Result], name: str) -> None:
    words = TAKES_A_RECIPE[name]
    none = (2, "intersafe: none.yaml: cannot read the recipe (No such file or directory); check the path\n")
    two = (2, "intersafe: --recipe: two recipes, a.yaml and b.yaml; pass one\n")
    tries = {
        ("--recipe", "none.yaml"): none,
        ("--pipeline", "none.yaml"): none,
        ("--recipe", "a.yaml", "--pipeline", "b.yaml"): two,
        ("--recipe", "a.yaml", "--recipe", "b.yaml"): two,
    }
    if name in WITHOUT_A_FLAG:
        tries |= {("none.yaml",): none, ("a.yaml", "--recipe", "b.yaml"): two, ("--pipeline", "b.yaml", "a.yaml"): two}
    for more, expected in tries.items():
        done = here(*words, *more)
        assert (done.exit_code, done.stderr, done.stdout) == (*expected, ""), more
    if name not in WITHOUT_A_FLAG:
        assert "unexpected extra argument (none.yaml)" in here(*words, "none.yaml").stderr
    shown = here(*words, "--help").stdout
    assert "--recipe, --pipeline FILE" in shown
    assert "RECIPE]" not in shown


def test_without_a_recipe_the_one_here_is_taken_or_the_one_that_ships(tmp_path: Path) -> None:
    assert str(PROMPTS) in run(tmp_path, "prompts", "lint").stdout
    mine = recipe(str(PROMPTS), "mine")["r.yaml"]
    lay(tmp_path, {"pipelines/demo.yaml": mine})
    assert "pipelines/mine: no prompts folder there" in run(tmp_path, "prompts", "lint").stderr


# --- damaged runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made by `init`, with the finished run `demo` of five dialogues in it."""
    folder = tmp_path_factory.mktemp("home")
    made = run(folder, "init", "mine")
    assert made.returncode == 0, made.stderr
    grown = run(folder / "mine", "generate", "--n", "5")
    assert grown.returncode == 0, grown.stderr
    return folder / "mine"


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """A copy of the finished run alone, to damage, in `outputs/demo` below the folder that is returned."""
    shutil.copytree(home / "outputs", tmp_path / "outputs")
    return tmp_path


DAMAGED: dict[str, tuple[str, bytes, bytes, tuple[str, ...], str]] = {
    "manifest cut": ("recipe.json", b'"versions"', b"", ("show", "demo"), "recipe.json: not a manifest"),
    "manifest altered": ("recipe.json", b'"min": 2', b'"min": 3', ("show", "demo"), "recipe.json: not a manifest"),
    "row altered": (
        "dialogues.jsonl",
        b'"job":3',
        b'"job":"3"',
        ("show", "demo", "--dialogue", "5"),
        "jsonl:4: not a row",
    ),
    "row no object": ("dialogues.jsonl", b'{"v":2,', b"[]\n{", ("show", "demo"), "jsonl:1: not a row"),
    "row of a later version": ("dialogues.jsonl", b'{"v":2,', b'{"v":9,', ("show", "demo"), "row version 9"),
    "row not text": ("dialogues.jsonl", b'"key":"', b'"key":"\xff', ("show", "demo"), "jsonl:1: not a row"),
    "seeds damaged": ("seeds.jsonl", b'"query"', b'"qurey"', ("show", "demo"), "seeds.jsonl:1: not a row"),
    "prompt damaged": ("prompts/judge/turn.md", b"{% block user %}", b"", ("show", "demo"), "turn.md"),
    "no such dialogue": ("recipe.json", b"x", b"x", ("show", "demo", "--dialogue", "999"), "no dialogue '999'"),
    "dialogue no number": ("recipe.json", b"x", b"x", ("show", "demo", "--dialogue", "five"), "no dialogue 'five'"),
    "no such run": ("recipe.json", b"x", b"x", ("show", "dmeo"), "runs in outputs/: demo"),
}


@pytest.mark.parametrize(("name", "old", "new", "words", "says"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_run_is_named_by_its_file(
    copy: Path, name: str, old: bytes, new: bytes, words: tuple[str, ...], says: str
) -> None:
    path = copy / "outputs/demo" / name
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1) if old else b"")
    assert says in refusal(attempt(copy, *words))


def test_a_damaged_summary_is_counted_again(copy: Path) -> None:
    shown = run(copy, "show", "demo", "--funnel").stdout
    (copy / "outputs/demo/summary.json").write_text('{"n": 5')
    again = run(copy, "show", "demo", "--funnel")
    assert again.returncode == 0
    assert again.stdout.replace("   (not complete)", "") == shown


def test_a_run_made_from_something_else_is_left_alone(copy: Path, home: Path) -> None:
    shutil.copytree(home / "pipelines", copy / "pipelines")
    recipe_file = copy / "pipelines/demo.yaml"
    text = recipe_file.read_text().replace("../seeds", str(home / "seeds")).replace("../prompts", str(home / "prompts"))
    recipe_file.write_text(text.replace("mean: 4", "mean: 3"))
    message = refusal(attempt(copy, "generate", "--n", "5"))
    assert "made from something else: turns.mean: 4.0 -> 3.0" in message
    assert "--reuse" in message


def test_fewer_dialogues_than_there_are_is_refused(home: Path) -> None:
    assert "holds 5 dialogues, more than --n 3" in refusal(attempt(home, "generate", "--n", "3"))


# --- what works ------------------------------------------------------------------------------------------------------


def test_a_fresh_folder_lints_lists_and_checks(home: Path) -> None:
    linted = run(home, "prompts", "lint")
    assert (linted.returncode, linted.stderr) == (0, "")
    assert "25 files, no problem" in linted.stdout
    listed = run(home, "prompts", "list").stdout
    assert all(name in listed for name in ("attacker/role_play", "judge/turn", "victim/system", "judge/rubrics/legal"))
    assert "* query" in listed
    checked = run(home, "seeds", "check", "seeds/intersafe.jsonl")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "308 seeds, 70 with an image, 0 excluded" in checked.stdout


def test_a_prompt_is_rendered_as_it_would_be_sent(home: Path) -> None:
    first = run(home, *RENDER, "attacker/role_play", "--seed", "fraud-001").stdout
    third = run(home, *RENDER, "attacker/role_play.md", "--seed", "fraud-001", "--turn", "3")
    assert (third.returncode, third.stderr) == (0, "")
    assert third.stdout.startswith("--- system\n")
    assert "This is turn 3 of" in third.stdout
    assert "[turn 2]\nUser: " in third.stdout
    assert "[turn 3]" not in third.stdout
    assert "(it has not begun)" in first
    assert "[image " in first
    assert '"additionalProperties": false' in first


def test_generating_again_writes_nothing(home: Path) -> None:
    before = state(home / "outputs")
    again = run(home, "generate", "--n", "5")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.endswith("outputs/demo/dialogues.jsonl\n")
    assert state(home / "outputs") == before


def test_show_tells_the_whole_story(home: Path) -> None:
    shown = run(home, "show", "demo", "--full")
    assert (shown.returncode, shown.stderr) == (0, "")
    rows = [json.loads(line) for line in (home / "outputs/demo/dialogues.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert "SCRIPTED" in shown.stdout
    assert all(turn["reply"]["text"] in shown.stdout for turn in rows[0]["turns"])
    assert "attacker" in shown.stdout.partition("what each role saw")[2]
    by_number, by_id = (run(home, "show", "demo", "--dialogue", which).stdout for which in ("3", rows[2]["id"]))
    assert by_number == by_id
    assert f"dialogue {rows[2]['id']}" in by_id
    assert run(home, "show", "outputs/demo").stdout == run(home, "show", "demo").stdout


def test_a_terminal_that_knows_few_letters_is_no_obstacle(copy: Path) -> None:
    path = copy / "outputs/demo/dialogues.jsonl"
    path.write_text(path.read_text().replace('"reason":"', '"reason":"caf\N{LATIN SMALL LETTER E WITH ACUTE} \x7f', 1))
    for encoding in ("ascii", "latin-1", "utf-8"):
        assert run(copy, "show", "demo", PYTHONIOENCODING=encoding).returncode == 0


def test_no_home_is_needed(home: Path, tmp_path: Path) -> None:
    lay(tmp_path, recipe())
    done = run(tmp_path, *GENERATE, HOME="/proc/none", XDG_CONFIG_HOME="/proc/none", XDG_CACHE_HOME="/proc/none")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "s.jsonl", "outputs"}


@pytest.mark.skipif(not FIGSTEP.is_dir(), reason="no FigStep (SafeBench-Tiny) beside the repository")
def test_figstep_is_imported_and_usable(tmp_path: Path) -> None:
    done = run(tmp_path, "seeds", "import", "figstep", str(FIGSTEP), "--out", "mine")
    assert (done.returncode, done.stderr) == (0, "")
    assert "50 seeds, 50 with an image" in done.stdout
    assert "50 seeds, 50 with an image, 0 excluded" in run(tmp_path, "seeds", "check", "mine/seeds.jsonl").stdout
    again = attempt(tmp_path, "seeds", "import", "figstep", str(FIGSTEP), "--out", "mine")
    assert "exists and is not an empty folder" in refusal(again)


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRET = "sk-hush-0123456789"


class Tattler(http.server.BaseHTTPRequestHandler):
    """A server that repeats the key it was given in every answer."""

    status: ClassVar[int] = 400
    keys: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers.get("Authorization", "")
        self.keys.add(key)
        body = json.dumps({"error": {"message": f"bad key {key}, really: {key}\n{key * 20}"}}).encode()
        self.send_response(self.status, f"No {key}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Key", key)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name of the base class
        pass


@pytest.fixture
def tattler() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tattler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "code"), [(400, 4), (401, 4), (500, 4), (429, 4)])
def test_a_key_is_in_no_file_and_no_line(tmp_path: Path, tattler: str, status: int, code: int) -> None:
    Tattler.status = status
    Tattler.keys.clear()
    model = f"attacker: {{model: 'openai:m@{tattler}', key: MY_HUSH}}"
    lay(tmp_path, recipe("attacker: scripted:demo", model))
    with (tmp_path / "r.yaml").open("a") as file:
        file.write("limits: {patience: 0.2, retries: 1, timeout: 5}\n")
    done = run(tmp_path, *GENERATE, MY_HUSH=SECRET, no_proxy="127.0.0.1")
    assert Tattler.keys == {f"Bearer {SECRET}"}, "the key went where it belongs"
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    shown = run(tmp_path, "show", "t", MY_HUSH=SECRET)
    texts = [done.stdout, done.stderr, shown.stdout, shown.stderr]
    texts += [path.read_text() for path in (tmp_path / "outputs/t").rglob("*") if path.is_file()]
    assert len(texts) > 10
    assert "MY_HUSH" in (tmp_path / "outputs/t/recipe.json").read_text()
    assert not [text for text in texts if SECRET in text or "hush" in text.replace("MY_HUSH", "")]
