"""The Makefile's promises, without installing anything."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("help", "serve", "chat", "test", "test-ipex", "check", "bench", "wheel", "clean")


def make(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        cwd=repository,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_lists_every_target(repository: Path) -> None:
    listed = make(repository).stdout

    for target in TARGETS:
        assert re.search(rf"^  make {target} ", listed, flags=re.MULTILINE), target


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_recipe(repository: Path, target: str) -> None:
    done = make(repository, "-n", target)

    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_serve_installs_first_and_takes_its_variables(repository: Path) -> None:
    lines = make(
        repository, "-n", "serve", "CONFIG=configs/arc.yaml", "TORCH_INDEX=xpu", "VENV=/tmp/v"
    ).stdout.splitlines()

    assert "bootstrap.py --venv /tmp/v --torch-index xpu" in lines[0]
    assert "/tmp/v/bin/xeray serve configs/arc.yaml" in lines[-1]


def test_in_parallel_the_environment_is_made_once(repository: Path) -> None:
    printed = make(repository, "-n", "-j4", "check", "test").stdout

    assert printed.count("bootstrap.py") == 1
    assert "--extra test" in printed


def test_without_a_python_there_is_one_clear_line(repository: Path) -> None:
    done = make(repository, "serve", "PYTHON=")

    assert done.returncode != 0
    assert "no Python 3.11 or 3.12 found" in done.stderr
    assert "make serve PYTHON=" in done.stderr


def test_ci_runs_check_and_test_and_passes_on_the_exit_status(
    repository: Path, tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(repository / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text("check:\n\t@echo checked\ntest:\n\t@echo tested; exit 3\n")

    done = subprocess.run(
        ["bash", ".ci/run"],
        cwd=tmp_path,
        env=clean_environment,
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.stdout.splitlines()[:2] == ["checked", "tested"]
    assert done.returncode == 2  # make's own status for a failed recipe


def test_ctrl_c_leaves_no_word_of_make(
    repository: Path, tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    """The recipe of `serve`, with programs that stand in for the bootstrap and the server."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    server = venv / "bin/xeray"
    server.write_text(
        f"#!{sys.executable}\nimport signal, sys\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('stopped', flush=True), sys.exit(0)))\n"
        "print('started', flush=True)\nsignal.pause()\n"
    )
    server.chmod(0o755)
    command = ["make", "serve", f"VENV={venv}", "BOOTSTRAP=true"]
    with subprocess.Popen(
        command,
        cwd=repository,
        env=clean_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=20)

    assert output == "stopped\n"
    assert errors == ""
    assert process.returncode in (0, 130, -signal.SIGINT)
