from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from serve_app import __version__
from serve_app.cli import main as cli
from serve_app.core.errors import ConfigError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A subcommand `probe` whose `run` a test sets."""
    module = ModuleType("probe_command")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--count", type=int)
        parser.set_defaults(run=lambda options: module.run(options))

    module.add_arguments = add_arguments  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe_command", "probe things"))
    return module


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])

    assert stop.value.code == 0
    assert capsys.readouterr().out == f"xeray {__version__}\n"


def test_without_a_command_the_help_comes_and_the_exit_is_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == cli.EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    for name in ("serve", "chat", "config", "plan", "bench"):
        assert name in captured.err


def test_wrong_usage_is_one_line(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe", "--count", "many"])

    assert stop.value.code == cli.EXIT_USAGE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--count" in error
    assert "xeray probe --help" in error


def test_an_error_of_ours_is_one_line(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise ConfigError("model.path: two\nlines  become one")

    command.run = run  # type: ignore[attr-defined]

    assert cli.main(["probe"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err == "xeray: model.path: two lines become one\n"


def test_a_bug_is_not_hidden(command: ModuleType) -> None:
    def run(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    command.run = run  # type: ignore[attr-defined]

    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_ctrl_c_is_130_and_one_line(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    command.run = run  # type: ignore[attr-defined]

    assert cli.main(["probe"]) == cli.EXIT_INTERRUPTED
    assert capsys.readouterr().err == "xeray: interrupted\n"


def test_a_file_that_cannot_be_opened_is_one_line(
    command: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(_: argparse.Namespace) -> int:
        return len((tmp_path / "absent").read_text())

    command.run = run  # type: ignore[attr-defined]

    assert cli.main(["probe"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err == f"xeray: {tmp_path}/absent: No such file or directory\n"


def test_the_exit_code_of_a_command_is_passed_on(command: ModuleType) -> None:
    command.run = lambda options: options.count  # type: ignore[attr-defined]

    assert cli.main(["probe", "--count", "7"]) == 7
    assert cli.main(["probe"]) == 0


def test_a_reader_that_left_is_no_error() -> None:
    script = "import sys; from serve_app.cli.main import main; sys.exit(main(['config', 'schema']))"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == cli.EXIT_BROKEN_PIPE


def test_the_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from serve_app.cli.main import build_parser\n"
        "build_parser().format_help()\n"
        "heavy = {'torch', 'ray', 'transformers', 'pydantic', 'numpy', 'httpx', 'yaml', 'rich'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_terminated_command_cleans_up_as_an_interrupted_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_options: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            print("cleaned up")
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "build_parser", lambda _chosen: _parser_that_runs(run))
    try:
        assert cli.main([]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "cleaned up" in capsys.readouterr().out


def _parser_that_runs(run: object) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run)
    return parser
