"""The environment of `make test-ipex`, without installing anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import runpy, shutil, sys
shutil.disk_usage = lambda folder: type("Usage", (), {"free": %d})()
sys.argv = ["ipex_environment.py", "--venv", sys.argv[1]]
import subprocess
def run(*a, **k): %s
subprocess.run = run
import urllib.request
def unreachable(*a, **k): raise OSError
urllib.request.urlopen = unreachable
runpy.run_path("serve_app/cli/ipex_environment.py", run_name="__main__")
"""


def run(
    repository: Path, venv: Path, free_bytes: int, at_run: str = 'sys.exit("something was run")'
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM % (free_bytes, at_run), str(venv)]
    return subprocess.run(
        command, cwd=repository, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_full_disk_is_refused_before_anything_is_fetched(
    repository: Path, tmp_path: Path
) -> None:
    done = run(repository, tmp_path / "venv", 5 << 30)
    assert done.returncode == 1
    assert "has 5.0 GiB free, and the environment needs 9 GiB" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


def test_ctrl_c_is_one_line_and_no_traceback(repository: Path, tmp_path: Path) -> None:
    done = run(repository, tmp_path / "venv", 50 << 30, "raise KeyboardInterrupt")
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_says_what_it_will_download(repository: Path, tmp_path: Path) -> None:
    done = run(repository, tmp_path / "venv", 50 << 30)
    assert "a download of about 3.5 GB (torch 2.8 with CUDA's libraries)" in done.stdout
    assert "something was run" in done.stderr, "and only then begins"
