"""What `intersafe serve` would start: commands, ports, environment; nothing is started here."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from intersafe.engines.arguments import engine_arguments
from intersafe.engines.weights import folder_problem
from intersafe.recipe.load import load_recipe
from intersafe.recipe.sections import Recipe
from intersafe.serving.plan import Server, servers_of, unserved_urls
from tests.support.recipes import at, written
from tests.support.runs import cli, refusal

VLLM = "/opt/vllm/bin/vllm serve"
MODULE = "/opt/vllm/bin/python -m vllm.entrypoints.openai.api_server"
C = {"command": VLLM}
STRUCTURED = ["--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}']


def made(folder: Path, cast: dict[str, Any], serve: dict[str, Any], **more: Any) -> Recipe:
    return load_recipe(written(folder, cast, serve, **more))


def one(folder: Path, engine: dict[str, Any], **member: Any) -> Server:
    """The one server of a judge `m` with that engine."""
    recipe = made(folder, {"judge": {"model": at("m", 8001), **member}}, {"m": {"command": VLLM, **engine}})
    (server,) = servers_of(recipe)
    return server


# --- the command -----------------------------------------------------------------------------------------------------


def test_what_is_the_librarys_own_default_is_not_sent(tmp_path: Path) -> None:
    server = one(tmp_path, {})
    assert server.argv == (
        *("/opt/vllm/bin/vllm", "serve", "m", "--host", "127.0.0.1", "--port", "8001", "--served-model-name", "m"),
        *("--seed", "0", "--limit-mm-per-prompt", '{"image":1,"video":0}', *STRUCTURED),
    )
    assert (server.env, server.key, server.startup, server.log) == ({}, "", 1800.0, "m-8001.log")


def test_every_setting_reaches_the_command(tmp_path: Path) -> None:
    engine: dict[str, Any] = {"path": "org/weights", "dtype": "bfloat16", "max_model_len": 16384, "images": 6}
    engine |= {"tensor_parallel": 4, "data_parallel": 2, "gpu_memory": 0.85, "max_num_seqs": 64, "eager": True}
    engine |= {"prefix_caching": False, "gpus": ["0,1,2,3,4,5,6,7"], "env": {"VLLM_USE_V1": "1"}, "startup": 60}
    server = one(tmp_path, engine, revision="abc")
    assert server.argv[2] == server.weights == "org/weights"
    assert server.argv[9:] == (
        *("--seed", "0", "--revision", "abc", "--dtype", "bfloat16", "--max-model-len", "16384"),
        *("--limit-mm-per-prompt", '{"image":6,"video":0}', "--tensor-parallel-size", "4"),
        *("--gpu-memory-utilization", "0.85", "--max-num-seqs", "64", "--no-enable-prefix-caching", "--enforce-eager"),
        *(*STRUCTURED, "--data-parallel-size", "2"),
    )
    assert server.env == {"VLLM_USE_V1": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert server.startup == 60


def test_other_arguments_go_by_their_python_names_and_before_ours(tmp_path: Path) -> None:
    args = {
        "quantization": "fp8",
        "trust_remote_code": True,
        "enable_chunked_prefill": False,
        "mm_processor_kwargs": {"min_pixels": 784},
        "middleware": ["a", "b"],
        "swap-space": 4,
        "seed": 7,
        "structured_outputs_config": None,
    }
    argv = one(tmp_path, {"args": args}).argv[9:]
    assert argv == (
        *("--seed", "7", "--limit-mm-per-prompt", '{"image":1,"video":0}', "--quantization", "fp8"),
        *("--trust-remote-code", "--no-enable-chunked-prefill", "--mm-processor-kwargs", '{"min_pixels":784}'),
        *("--middleware", '["a","b"]', "--swap-space", "4"),
    )


def test_the_same_arguments_serve_in_process(tmp_path: Path) -> None:
    engine = {"max_model_len": 4096, "prefix_caching": False, "args": {"swap-space": 4}}
    recipe = made(tmp_path, {"judge": at("m", 8001)}, {"m": engine})
    assert engine_arguments(recipe.engine("m"), "abc") == {
        "seed": 0,
        "revision": "abc",
        "max_model_len": 4096,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "enable_prefix_caching": False,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "swap_space": 4,
    }


def test_the_module_form_names_the_weights_by_a_flag(tmp_path: Path) -> None:
    argv = one(tmp_path, {"command": MODULE}).argv
    assert argv[:7] == (*MODULE.split(), "--model", "m", "--host", "127.0.0.1")


@pytest.mark.parametrize("role", ["vllm", "openai"])
def test_as_many_images_as_a_dialogue_can_have(tmp_path: Path, role: str) -> None:
    cast = {"judge": at("m", 8001, backend=role), "painter": "scripted:demo"}
    recipe = made(tmp_path, cast, {"m": {"command": VLLM}}, images={"max": 3})
    assert '{"image":3,"video":0}' in servers_of(recipe)[0].argv


# --- where -----------------------------------------------------------------------------------------------------------


def test_ports_come_from_the_cast_and_members_share_a_server(tmp_path: Path) -> None:
    cast = {
        "attacker": at("big", 8000),
        "victims": [at("small", 8001, 8002), f"vllm:other@http://node7:8000/v1,{at('', 8003).partition('@')[2]}"],
        "judge": at("big", 8000, backend="openai"),
        "responder": at("big", 8000, host="127.0.0.1"),
        "second_judge": at("six", 8006, host="[::1]"),
    }
    engine = {"command": VLLM}
    serve = {"small": engine | {"gpus": ["2", "3"]}, "big": engine, "other": engine | {"gpus": ["4", "5"]}}
    recipe = made(tmp_path, cast, {**serve, "six": engine})
    servers = servers_of(recipe)
    assert [(s.name, s.host, s.port, s.gpus) for s in servers] == [
        ("small", "127.0.0.1", 8001, "2"),
        ("small", "127.0.0.1", 8002, "3"),
        ("big", "127.0.0.1", 8000, ""),
        ("other", "127.0.0.1", 8003, "5"),
        ("six", "::1", 8006, ""),
    ]
    assert unserved_urls(recipe) == ["http://node7:8000/v1 (other) is on another machine: not started"]
    assert [s.port for s in servers_of(recipe, ["six", "other"])] == [8003, 8006]


def test_a_local_url_without_an_entry_is_unserved_urls(tmp_path: Path) -> None:
    recipe = made(tmp_path, {"judge": at("m", 8001), "attacker": at("b", 8002)}, {"m": {"command": VLLM}})
    assert [s.port for s in servers_of(recipe)] == [8001]
    assert unserved_urls(recipe) == ["http://localhost:8002/v1 (b) has no entry in `serve`: not started"]


def test_log_names_are_file_names(tmp_path: Path) -> None:
    recipe = made(tmp_path, {"judge": at("../a/b:c", 8001)}, {"../a/b:c": {"command": VLLM}})
    assert servers_of(recipe)[0].log == "a-b-c-8001.log"


# --- the painter -----------------------------------------------------------------------------------------------------


def test_a_painter_is_served_by_vllm_omni(tmp_path: Path) -> None:
    engine = {"command": VLLM, "max_model_len": 4096, "args": {"cache_backend": "tea_cache"}}
    recipe = made(tmp_path, {"painter": at("Qwen/Qwen-Image", 8003, backend="openai")}, {"Qwen/Qwen-Image": engine})
    assert servers_of(recipe)[0].argv == (
        *("/opt/vllm/bin/vllm", "serve", "Qwen/Qwen-Image", "--omni", "--host", "127.0.0.1", "--port", "8003"),
        *("--served-model-name", "Qwen/Qwen-Image", "--cache-backend", "tea_cache"),
    )


def test_a_painter_is_not_served_by_the_module(tmp_path: Path) -> None:
    recipe = made(tmp_path, {"painter": at("q", 8003, backend="openai")}, {"q": {"command": MODULE}})
    assert "serve.q.command" in refusal(lambda: servers_of(recipe))


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cast", "serve", "words"),
    [
        ({"judge": "vllm:m"}, {"m": {}}, "nothing to serve"),
        ({"judge": at("m", 8001, host="node7")}, {"m": {}}, "nothing to serve"),
        ({}, {}, "nothing to serve"),
        ({"judge": "vllm:m@https://localhost:8001/v1"}, {"m": C}, "write http://localhost:8001/v1"),
        ({"judge": "vllm:m@http://localhost:8001"}, {"m": C}, "write http://localhost:8001/v1"),
        ({"judge": at("m", 8001), "attacker": at("b", 8001)}, {"m": C, "b": C}, "m and b both have port 8001"),
        ({"judge": {"model": at("m", 8001), "key": "K"}, "attacker": at("m", 8001)}, {"m": C}, "the key '' and 'K'"),
        (
            {"judge": {"model": at("m", 8001), "revision": "a"}, "attacker": at("m", 8001)},
            {"m": C},
            "the revision '' and 'a'",
        ),
        ({"judge": at("m", 8001)}, {"m": {"command": "vllm 'serve"}}, "serve.m.command: No closing quotation"),
        ({"judge": at("m", 8001)}, {"m": {"command": VLLM, "args": {"port": 7}}}, "'port' in `args`; drop it"),
        (
            {"judge": at("m", 8001)},
            {"m": {"command": VLLM, "args": {"served-model-name": "x"}}},
            "'served_model_name' in `args`",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    tmp_path: Path, cast: dict[str, Any], serve: dict[str, Any], words: str
) -> None:
    recipe = made(tmp_path, cast, serve)
    assert words in refusal(lambda: servers_of(recipe))


def test_an_unknown_name_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    recipe = made(tmp_path, {"judge": at("model", 8001)}, {"model": {"command": VLLM}})
    assert "did you mean 'model'" in refusal(lambda: servers_of(recipe, ["modle"]))


@pytest.mark.parametrize("args", [{"api_key": "sk-1"}, {"hf_token": "hf-1"}])
def test_a_secret_in_args_is_refused_and_not_shown(tmp_path: Path, args: dict[str, str]) -> None:
    said = refusal(lambda: made(tmp_path, {"judge": at("m", 8001)}, {"m": {"args": args}}))
    assert next(iter(args)) in said
    assert next(iter(args.values())) not in said


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("config.json", '{"model_type": "qwen2_5_vl"}', ""),
        ("model_index.json", "{}", ""),
        ("params.json", "{}", ""),
        ("config.json", "[]", "no config.json that can be read"),
        ("README.md", "weights", "no config.json that can be read"),
    ],
)
def test_a_folder_of_weights_has_a_configuration(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text)
    assert folder_problem(str(tmp_path)) == problem
    assert folder_problem(str(tmp_path / "elsewhere")) == "no such folder"
    assert folder_problem("org/model") == "", "a Hub name"


# --- which vLLM, and --dry-run ---------------------------------------------------------------------------------------


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def commands(folder: Path, **env: str) -> list[list[str]]:
    """What `--dry-run` prints, taken apart as a shell does."""
    done = cli("serve", "mine.yaml", "--dry-run", cwd=folder, **env)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_vllm_of_this_python_comes_first(tmp_path: Path) -> None:
    written(tmp_path, {"judge": at("m", 8001), "painter": at("q", 8002, backend="openai")}, {"m": {}, "q": {}})
    (tmp_path / "lib/vllm").mkdir(parents=True)
    (tmp_path / "lib/vllm/__init__.py").write_text("raise ImportError('it takes seconds')")
    vllm = executable(tmp_path / "bin/vllm")
    path = f"{vllm.parent}:{os.environ['PATH']}"
    judge, painter = commands(tmp_path, PYTHONPATH=str(tmp_path / "lib"), PATH=path)
    assert judge[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    assert painter[:4] == [str(vllm), "serve", "q", "--omni"]
    assert commands(tmp_path, PATH=path)[0][:3] == [str(vllm), "serve", "m"]


def test_without_vllm_the_commands_are_printed_all_the_same_but_not_started(tmp_path: Path) -> None:
    written(tmp_path, {"judge": at("m", 8001), "painter": at("q", 8002, backend="openai")}, {"m": {}, "q": {}})
    assert [command[:3] for command in commands(tmp_path, PATH="")] == [["vllm", "serve", "m"], ["vllm", "serve", "q"]]
    done = cli("serve", "mine.yaml", "--only", "m", cwd=tmp_path, PATH="")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'intersafe[vllm]'" in done.stderr
    assert "serve.m.command" in done.stderr


def test_a_dry_run_shows_the_environment_and_no_secret(tmp_path: Path) -> None:
    judge = {"model": at("m", 8001, 8002), "key": "MY_KEY"}
    engine = {"command": VLLM, "env": {"A": "two words"}, "gpus": ["0", "1"], "path": "/nowhere/m"}
    written(tmp_path, {"judge": judge, "attacker": at("far", 80, host="node7")}, {"m": engine})
    done = cli("serve", "mine.yaml", "--dry-run", cwd=tmp_path, MY_KEY="sk-very-secret")
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].startswith(
        "A='two words' CUDA_VISIBLE_DEVICES=1 VLLM_API_KEY=\"$MY_KEY\" /opt/vllm/bin/vllm serve /nowhere/m "
    )
    assert json.loads(shlex.split(done.stdout.splitlines()[0])[-1])["backend"] == "xgrammar"
    assert done.stderr == "http://node7:80/v1 (far) is on another machine: not started\n"
    assert "sk-very" not in done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]
