"""vLLM's own metrics: parsed from a server's text, summed over restarts, shown and stored."""

import io
import json
import math
from pathlib import Path

import pytest

from intersafe.cli.live import LivePanel, PlainLines
from intersafe.engines.metrics import Figures, Sample, parse_metrics
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.progress import Display, Progress
from intersafe.run.funnel import Funnel
from intersafe.run.journal import Journal
from intersafe.storage.jsonl import GroupWriter
from tests.support.runs import cli, demo
from tests.support.servers.scripted_server import scripted_server

TEXT = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 4.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.5
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 1.2e+03
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 300.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="tiny"} 77.0
vllm:prefix_cache_hits_created{engine="0",model_name="tiny"} 1.7e+09
"""


def test_the_engines_of_a_server_are_added_up() -> None:
    assert parse_metrics(TEXT) == Sample(running=7, waiting=2, kv_usage=0.5, queries=1200, hits=300)


@pytest.mark.parametrize("text", ["", "<html>", "process_cpu_seconds_total 3\n", "vllm:num_requests_running NaN\n"])
def test_what_is_no_vllm_says_nothing(text: str) -> None:
    assert parse_metrics(text) is None


def test_counters_are_those_of_the_command_and_survive_a_restart() -> None:
    figures = Figures()
    for queries, hits in ((1000, 500), (1100, 550), (60, 30), (100, 60)):
        figures.add(Sample(running=float(queries > 60), queries=queries, hits=hits))
    assert (figures.queries, figures.hits) == (100 + 60 + 40, 50 + 30 + 30)
    assert figures.hit_rate == 110 / 200
    assert math.isclose(figures.idle, 1 / 4)
    assert math.isclose(figures.running, 3 / 4)


class Looking(Display):
    """Polls often and records what it shows."""

    interval = 0.05

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progress: Progress | None = None

    def begin(self, progress: Progress) -> None:
        self.progress = progress

    def look(self) -> None:
        assert self.progress
        stream = io.StringIO()
        plain = PlainLines(stream)
        plain.begin(self.progress)
        plain.look()
        self.lines.append(stream.getvalue())


def test_a_run_shows_and_keeps_what_its_servers_say(tmp_path: Path) -> None:
    """Two roles on one server are one engine; a server that is no vLLM's, or says nothing, is left out."""
    with scripted_server(profile="flawless", delay=0.05) as server, scripted_server(profile="flawless") as mute:
        server.metrics = lambda: (
            f"vllm:num_requests_running {server.in_flight}\nvllm:num_requests_waiting 0\n"
            f"vllm:kv_cache_usage_perc 0.25\nvllm:prefix_cache_queries_total {5000 + 100 * server.requests}\n"
            f"vllm:prefix_cache_hits_total {2000 + 50 * server.requests}\n"
        )
        recipe = demo(
            attacker=f"vllm:busy@{server.url}", judge=f"vllm:busy@{server.url}", victims=[f"vllm:mute@{mute.url}"]
        )
        seen = Looking()
        run = generate_dialogues(recipe, run=tmp_path / "run", n=10, display=seen)
    summary = json.loads((run.path / "summary.json").read_text())
    assert list(summary["engines"]) == [f"vllm:busy at {server.url}"]
    (figures,) = summary["engines"].values()
    assert 0 < figures["queries"] <= 100 * server.requests
    assert figures["hits"] == figures["queries"] / 2
    assert figures["kv_usage"] == 0.25
    assert any("engine: " in line and "prefix cache 50%" in line for line in seen.lines)
    shown = cli("show", str(run.path), "--funnel", cwd=tmp_path).stdout
    assert f"engine vllm:busy at {server.url}: " in shown
    assert "prefix cache 50%" in shown


@pytest.mark.parametrize(("kind", "idle_engine"), [(PlainLines, "1 idle"), (LivePanel, "0 running, 0 waiting")])
def test_the_displays_tell_idle_engines(kind: type[PlainLines | LivePanel], idle_engine: str, tmp_path: Path) -> None:
    busy, idle = Figures(), Figures()
    busy.add(Sample(running=12, waiting=3, kv_usage=0.5))
    idle.add(Sample())
    progress = Progress(20, 30, Funnel(), Journal(GroupWriter(tmp_path)), {})
    progress.engines = {"vllm:a at http://h:1/v1": busy, "vllm:b at http://h:2/v1": idle}
    stream = io.StringIO()
    display = kind(stream)
    display.begin(progress)
    display.look()
    display.end()
    shown = stream.getvalue()
    assert "12 running, 3 waiting" in shown
    assert idle_engine in shown
