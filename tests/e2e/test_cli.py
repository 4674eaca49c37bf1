"""The command line against the real service, and `xeray serve` where it must refuse."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

XERAY = str(Path(sys.executable).with_name("xeray"))
CAPITAL = "What is the capital of France?"


def xeray(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [XERAY, *arguments], check=False, capture_output=True, text=True, timeout=120, **options
    )


def test_a_piped_chat_answers_each_line(service: Any) -> None:
    done = xeray(
        "chat", "--url", service.url, "--temperature", "0", "--max-tokens", "24", "--stats",
        input=f"{CAPITAL}\nThank you.\n",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    stats = [line for line in done.stderr.splitlines() if line.startswith("TTFT ")]
    assert len(stats) == 2
    assert all("tokens/s" in line for line in stats)


def test_a_single_question_as_json(service: Any) -> None:
    done = xeray("chat", CAPITAL, "--url", service.url, "--temperature", "0", "--json", "--stats")

    answer = json.loads(done.stdout)
    assert "Paris" in answer["content"]
    assert answer["stats"]["num_completion_tokens"] > 0


def test_chat_shows_what_the_server_refuses(service: Any) -> None:
    done = xeray("chat", "hi", "--url", service.url, "--temperature", "-1")

    assert done.returncode == 1
    assert "temperature" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_start_shows_its_stages_and_what_to_do_next(service: Any) -> None:
    output = service.output

    assert f"http://127.0.0.1:{service.port}" in output
    assert "curl " in output
    assert "from openai import OpenAI" in output
    assert output.count(" s\n") >= 3, output


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused start prints."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("xeray: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refused(xeray("serve", "local", "--port", port))

    assert port in line
    assert "port" in line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("engine.max_num_seq=4", ["max_num_seq", "'max_num_seqs'"]),
        ("engine.block_size=17", ["engine.block_size"]),
        ("model.path=/nowhere/model.gguf", ["model.path", "/nowhere/model.gguf"]),
        ("model_replica.num_replicas=0", ["model_replica.num_replicas"]),
    ],
)
def test_wrong_settings(setting: str, words: list[str]) -> None:
    line = refused(xeray("serve", "local", "--set", setting))

    for word in words:
        assert word in line


def test_a_truncated_model_file(tmp_path: Path) -> None:
    from serve_app.config.model_source import resolve_model
    from serve_app.config.schema import ModelSection

    whole = resolve_model(ModelSection(path="embedded")).path
    truncated = tmp_path / "model.gguf"
    with whole.open("rb") as source:
        truncated.write_bytes(source.read(8 << 20))

    line = refused(xeray("serve", "local", "--model", str(truncated)))
    assert "model.gguf" in line
    assert "truncated" in line


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model at all")

    assert "model.gguf" in refused(xeray("serve", "local", "--model", str(path)))


def test_an_architecture_that_nothing_knows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "perceptron-9000"}))

    assert "perceptron-9000" in refused(xeray("serve", "local", "--model", str(tmp_path)))


def test_more_cards_than_there_are() -> None:
    bounds = ("--set", "model_replica.autoscaling.min_replicas=64")
    bounds += ("--set", "model_replica.autoscaling.max_replicas=64")
    line = refused(xeray("serve", "arc2", *bounds))

    assert "64 arc_gpu" in line
