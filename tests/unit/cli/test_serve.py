from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import yaml

from serve_app.cli.main import EXIT_ERROR, main
from serve_app.cli.serve import (
    Progress,
    Signals,
    asks_for_key,
    check_model,
    http_options,
    keep_running,
    summary,
)
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError, XeRayError
from serve_app.deployments.launch import Stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class FakeApplication:
    """Runs until told to end; each `check` and `stop` does what the test says."""

    def __init__(
        self,
        on_check: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_checks = 0
        self.num_stops = 0
        self._on_check = on_check
        self._on_stop = on_stop

    def check(self) -> None:
        self.num_checks += 1
        self._on_check()

    def stop(self) -> None:
        self.num_stops += 1
        self._on_stop()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_stops(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    application = FakeApplication(on_check=lambda: send(number))

    with Signals() as signals:
        assert keep_running(application, signals, interval_s=0.001) == 0

    assert application.num_stops == 1
    assert "draining" in capsys.readouterr().err


def test_the_second_signal_ends_the_wait_of_the_first() -> None:
    never = threading.Event()

    def drain() -> None:
        if application.num_stops == 1:
            send(signal.SIGINT)
            never.wait(10)  # a stream that takes its time

    application = FakeApplication(on_check=lambda: send(signal.SIGINT), on_stop=drain)

    with Signals() as signals:
        assert keep_running(application, signals, interval_s=0.001) == 0

    assert application.num_stops == 2


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_interrupts_it(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), Signals():
        send(number)


def test_trouble_that_heals_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    def check() -> None:
        if application.num_checks <= 3:
            raise XeRayError("a replica is stuck")
        send(signal.SIGINT)

    application = FakeApplication(on_check=check)

    with Signals() as signals:
        assert keep_running(application, signals, interval_s=0.001) == 0

    assert capsys.readouterr().err.count("a replica is stuck") == 1


def test_a_ray_that_is_gone_ends_the_command() -> None:
    def check() -> None:
        raise ConnectionError("refused")

    application = FakeApplication(on_check=check)

    with pytest.raises(XeRayError, match="Ray does not answer"), Signals() as signals:
        keep_running(application, signals, interval_s=0.001)

    assert (application.num_checks, application.num_stops) == (3, 1)


def test_progress_lines() -> None:
    out = io.StringIO()
    progress = Progress(out=out)
    progress.announce("configs/local.yaml")
    progress.show(Stage("ray"))
    progress.show(Stage("ray", 4.26))

    assert out.getvalue().splitlines() == [
        "xeray: starting configs/local.yaml",
        "  ray              4.3 s",
    ]


def test_on_a_terminal_a_stage_shows_when_it_begins() -> None:
    out = Terminal()
    progress = Progress(out=out)
    progress.show(Stage("model"))
    assert "model" in out.getvalue()
    assert not out.getvalue().endswith("\n")
    progress.show(Stage("model", 1.0))
    assert out.getvalue().endswith("\r  model            1.0 s\n")


def test_progress_as_json() -> None:
    out = io.StringIO()
    progress = Progress(as_json=True, out=out)
    progress.announce("x")
    progress.show(Stage("ray"))
    progress.show(Stage("ray", 2.0))
    launched: Any = SimpleNamespace(url="http://h:1", model_id="m", startup_s=2.0)
    progress.ready(launched)

    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {"stage": "ray", "seconds": 2.0},
        {"url": "http://h:1", "model": "m", "seconds": 2.0},
    ]


def test_the_summary_says_how_to_ask() -> None:
    text = summary("http://127.0.0.1:8000", "m", 12.34)

    assert "m is ready after 12.3 s: http://127.0.0.1:8000" in text
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in text
    body = text.split("-d '")[1].split("'\n")[0]
    assert json.loads(body)["model"] == "m"
    snippet = text[text.index("  from openai") : text.index("Ctrl-C")]
    compile("\n".join(line[2:] for line in snippet.splitlines()), "snippet", "exec")
    assert "Authorization" not in text

    text = summary("http://127.0.0.1:8000", "m", 12.34, "YOUR_KEY")
    assert "-H 'Authorization: Bearer YOUR_KEY'" in text
    assert 'api_key="YOUR_KEY"' in text


def test_a_key_is_asked_for_by_file_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XERAY_API_KEYS", raising=False)
    assert not asks_for_key(AppConfig())
    assert asks_for_key(AppConfig.model_validate({"auth": {"keys_file": "k.yaml"}}))
    monkeypatch.setenv("XERAY_API_KEYS", " ,")
    assert not asks_for_key(AppConfig())
    monkeypatch.setenv("XERAY_API_KEYS", "secret")
    assert asks_for_key(AppConfig())


def test_host_and_port_go_into_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("http_options: {port: 8000, request_timeout_s: null}\napplications: []\n")
    original = path.read_text()

    with http_options(path, "0.0.0.0", 9000) as changed:
        document = yaml.safe_load(changed.read_text())
        assert changed.name == "mine.yaml"

    assert document["http_options"] == {
        "host": "0.0.0.0",
        "port": 9000,
        "request_timeout_s": None,
    }
    assert not changed.exists()
    assert path.read_text() == original


def test_without_changes_the_file_itself_is_used(tmp_path: Path) -> None:
    with http_options(tmp_path / "mine.yaml", None, None) as changed:
        assert changed == tmp_path / "mine.yaml"


def app(path: Path | str, **engine: Any) -> AppConfig:
    return AppConfig.model_validate({"model": {"path": str(path)}, "engine": engine})


def test_the_embedded_model_passes() -> None:
    check_model(app("embedded"))


def write_gguf(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="perceptron"):
        check_model(app(write_gguf(tmp_path / "m.gguf", "perceptron")))


def test_a_gguf_that_is_no_language_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("weight", np.ones((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(ConfigError, match="no language model"):
        check_model(app(tmp_path / "m.gguf"))


def test_an_architecture_for_the_transformers_engine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))

    check_model(app(tmp_path))
    with pytest.raises(ConfigError, match="gpt_neox"):
        check_model(app(tmp_path, kind="native"))


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "perceptron"}))

    with pytest.raises(ConfigError, match="perceptron"):
        check_model(app(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "nothing.yaml"],
        ["serve", "local", "--set", "engine.max_num_seq=3"],
        ["serve", "local", "--model", "/nowhere/model.gguf"],
    ],
)
def test_a_refused_start_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == EXIT_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("xeray: ")
    assert captured.err.count("\n") == 1
