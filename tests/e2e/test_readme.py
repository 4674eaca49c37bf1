"""Every command of README.md is run, or is checked as far as a machine without a cluster can."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from serve_app.cli.main import build_parser

BIN = Path(sys.executable).parent
README = Path(__file__).resolve().parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    """Each command of the `sh` blocks on one line."""
    lines: list[str] = []
    for block in blocks("sh"):
        lines += re.sub(r" *\\\n *", " ", block).strip().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def runs(command: str, repository: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line of the README in the checkout, with this environment's programs first."""
    return subprocess.run(
        ["bash", "-c", f'PATH="{BIN}:$PATH"; {command.replace(".venv/bin/", "")}'],
        cwd=repository,
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
    )


def check_make(command: str, repository: Path) -> None:
    """The recipe exists and leads to the program that other tests run."""
    done = runs(f"make -n {command.removeprefix('make ')}", repository)
    assert done.returncode == 0, done.stderr
    target = command.split()[1]
    expected = {
        "serve": "xeray serve configs/",
        "test": "-m pytest",
        "check": "lint-imports",
        "bench": "xeray bench",
        "wheel": "-m build --wheel",
    }
    assert expected[target] in done.stdout
    for variable in re.findall(r"CONFIG=(\S+)", command):
        assert (repository / variable).is_file()
        assert f"xeray serve {variable}" in done.stdout
    for index in re.findall(r"TORCH_INDEX=(\S+)", command):
        assert f"--torch-index {index}" in done.stdout


def check_xeray(command: str, repository: Path) -> None:
    """It runs and succeeds."""
    done = runs(command, repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def check_arguments(command: str, repository: Path) -> None:
    """Its arguments are accepted and its files exist; other tests start the service."""
    words = command.split()[1:]
    build_parser(words[0]).parse_args(words)
    for word in words:
        assert not word.startswith("configs/") or (repository / word).is_file()


def check_ray(command: str, repository: Path) -> None:
    """Ray's own command line accepts it. tests/deployments starts Ray by hand like this."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own, while it is imported
        if command.startswith("ray "):
            from ray.scripts.scripts import cli
        else:
            from ray.serve.scripts import cli
    _, name, *rest = shlex.split(command)
    subcommand: click.Command = cli.commands[name]
    subcommand.make_context(name, rest, resilient_parsing=False)
    for word in rest:
        assert not word.startswith("configs/") or (repository / word).is_file()


# Each command, and how it is checked; None: the test below this table runs it on the service.
CHECKS: dict[str, Callable[[str, Path], None] | None] = {
    "make ": check_make,
    "curl ": None,
    ".venv/bin/xeray chat": check_arguments,
    'echo "What is the capital of France?" | .venv/bin/xeray chat': None,
    ".venv/bin/xeray plan ": check_xeray,
    ".venv/bin/xeray config ": check_xeray,
    ".venv/bin/xeray serve ": check_arguments,
    ".venv/bin/xeray keys ": check_xeray,
    ".venv/bin/xeray doctor explain ": check_xeray,
    ".venv/bin/xeray doctor --quick": check_arguments,  # its exit code judges this machine
    ".venv/bin/xeray quantize ": check_arguments,
    ".venv/bin/xeray eval ": check_arguments,
    "ray start ": check_ray,
    "serve run ": check_ray,
    "serve deploy ": check_ray,
}


def check_of(command: str) -> Callable[[str, Path], None] | None:
    (prefix,) = [prefix for prefix in CHECKS if command.startswith(prefix)]
    return CHECKS[prefix]


def test_the_two_commands_come_first() -> None:
    assert commands()[:2] == ["make serve", "make test"]


def test_every_check_is_for_a_command_that_is_there() -> None:
    for prefix in CHECKS:
        assert any(command.startswith(prefix) for command in commands()), prefix


@pytest.mark.parametrize("command", [c for c in commands() if check_of(c) is not None])
def test_command(command: str, repository: Path) -> None:
    check = check_of(command)
    assert check is not None
    check(command, repository)


@pytest.mark.parametrize("command", [c for c in commands() if check_of(c) is None])
def test_command_on_the_service(command: str, service: Any, repository: Path) -> None:
    changed = command.replace("http://127.0.0.1:8000", service.url)
    if "xeray chat" in changed:
        changed += f" --url {service.url}"
    done = runs(changed, repository)

    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


@pytest.mark.parametrize("program", blocks("python"))
def test_python_on_the_service(program: str, service: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program.replace("http://127.0.0.1:8000", service.url)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_links_and_configs_exist(repository: Path) -> None:
    text = README.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (repository / target).exists(), target
    for config in re.findall(r"configs/[\w.]+\.yaml", text):
        assert (repository / config).is_file(), config


def test_every_config_is_in_the_table(repository: Path) -> None:
    text = README.read_text()
    for config in (repository / "configs").glob("*.yaml"):
        assert f"`configs/{config.name}`" in text


def test_the_seven_packages_are_named() -> None:
    text = README.read_text()
    for name in (
        "ray[serve]",
        "torch",
        "intel-extension-for-pytorch",
        "transformers",
        "neural-compressor",
        "prometheus-client",
        "starlette",
    ):
        assert f"| `{name}` |" in text
