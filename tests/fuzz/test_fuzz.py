"""A bounded, coverage-guided run of every target; XERAY_FUZZ_SECONDS makes it longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="the fuzzer is not installed")

_SCRIPT = Path(__file__).with_name("targets.py")
_TARGETS = ("gguf", "sse", "http", "body", "output", "template")
_SECONDS = int(os.environ.get("XERAY_FUZZ_SECONDS", "2"))


def run(target: str, folder: Path, seconds: int) -> subprocess.CompletedProcess[str]:
    # The peak of memory is inherited from this process, so single allocations are bounded instead.
    limits = ["-rss_limit_mb=0", "-malloc_limit_mb=1024", "-timeout=10"]
    options = [f"-max_total_time={seconds}", "-max_len=4096", *limits]
    return subprocess.run(
        [sys.executable, str(_SCRIPT), target, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )


@pytest.mark.parametrize("target", _TARGETS)
def test_no_input_breaks_a_parser(target: str, tmp_path: Path) -> None:
    done = run(target, tmp_path, _SECONDS)
    faults = list(tmp_path.glob("crash-*")) + list(tmp_path.glob("timeout-*"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not faults
    assert "DONE" in done.stderr or "Done" in done.stderr


def test_a_fault_would_be_found(tmp_path: Path) -> None:
    """The harness itself: a target that raises ends the run and leaves its input behind."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        f"import sys; sys.path.insert(0, {str(_SCRIPT.parent)!r})\n"
        "import targets\n"
        "def sse(data): raise ValueError\n"
        "targets.TARGETS['sse'] = sse\n"
        "targets.main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(broken), "sse", "-max_total_time=5"],
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert list(tmp_path.glob("crash-*"))
