"""cluster/host-setup.sh: with stand-ins for commands, and for real in a Debian root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import dockerfile

Run = Callable[..., subprocess.CompletedProcess[str]]
GIB = 1 << 30

# Each stand-in keeps its state in files below $STATE, so that a second run sees what the first did.
STAND_INS = {
    "apt-get": (
        'case "$*" in update*) exit 0 ;; esac\n'
        'for word; do last=$word; done; echo "$last" >>"$STATE/installed"; echo "$*" >>"$STATE/log"'
    ),
    "apt-cache": 'grep -qx "$2" "$STATE/known" && echo "  Candidate: 1.0" || true',
    "dpkg-query": (
        'for word; do last=$word; done\ngrep -qx "$last" "$STATE/installed" && printf installed'
    ),
    "getent": '[ "$1" = passwd ] && [ "$2" = ada ] || grep -qx "$2" "$STATE/groups"',
    "groupadd": 'for word; do last=$word; done; echo "$last" >>"$STATE/groups"',
    "usermod": 'echo "$2" >>"$STATE/members"; echo "usermod $*" >>"$STATE/log"',
    "id": '[ "$1" = -u ] && echo 0 || { echo ada; cat "$STATE/members"; }',
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    for name in ("installed", "groups", "members", "log"):
        (folder / name).write_text("")
    (folder / "known").write_text("intel-opencl-icd\nlevel-zero\nintel-microcode\npciutils\n")
    return folder


@pytest.fixture
def run(repository: Path, tmp_path: Path, state: Path) -> Run:
    """The script with stand-ins first on PATH, and a root folder of its own."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, script in STAND_INS.items():
        path = bin_folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    (tmp_path / "root").mkdir()

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", repository / "cluster/host-setup.sh", "--root", tmp_path / "root", *options],
            env={"PATH": f"{bin_folder}:{os.environ['PATH']}", "STATE": str(state)},
            check=False,
            capture_output=True,
            text=True,
        )

    return call


def card(root: Path, address: str, window: int) -> None:
    folder = root / f"sys/bus/pci/devices/{address}"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text("0x8086\n")
    (folder / "class").write_text("0x030000\n")
    lines = ["0x0 0x0 0x0", "0x0 0x0 0x0", f"{0x4000000000:#x} {0x4000000000 + window - 1:#x} 0x14"]
    (folder / "resource").write_text("\n".join(lines) + "\n")


def test_without_apply_nothing_changes(run: Run, state: Path, tmp_path: Path) -> None:
    done = run("--user", "ada")

    assert done.returncode == 0, done.stderr
    assert "would   install level-zero (Level Zero loader)" in done.stdout
    assert "would   add the group render" in done.stdout
    assert re.search(r"^\d+ changes to make, \d+ notes; --apply makes them$", done.stdout, re.M)
    assert (state / "installed").read_text() == ""
    assert list((tmp_path / "root").iterdir()) == []


def test_the_second_run_changes_nothing(run: Run, state: Path, tmp_path: Path) -> None:
    first = run("--apply", "--user", "ada")
    assert first.returncode == 0, first.stderr
    assert "change  install intel-opencl-icd" in first.stdout
    assert "change  put ada into the group render" in first.stdout
    units = tmp_path / "root/etc/systemd/system"
    assert "performance" in (units / "xeray-governor.service").read_text()
    wanted = units / "multi-user.target.wants/xeray-governor.service"
    assert wanted.resolve() == units / "xeray-governor.service"

    log = (state / "log").read_text()
    second = run("--apply", "--user", "ada")
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines()[-1].startswith("0 changes made")
    assert (state / "log").read_text() == log


def test_old_names_are_taken_where_the_new_ones_are_not_known(run: Run, state: Path) -> None:
    with (state / "known").open("a") as known:
        known.write("intel-level-zero-gpu\n")
    done = run()
    assert "would   install intel-level-zero-gpu (Level Zero GPU driver)" in done.stdout

    with (state / "known").open("a") as known:
        known.write("libze-intel-gpu1\n")
    assert "would   install libze-intel-gpu1 (Level Zero GPU driver)" in run().stdout

    with (state / "installed").open("a") as installed:
        installed.write("intel-level-zero-gpu\n")
    assert "ok      Level Zero GPU driver: intel-level-zero-gpu" in run().stdout


def test_a_package_that_no_source_has_is_a_note(run: Run) -> None:
    assert re.search(r"^note    Level Zero GPU driver: none of", run().stdout, re.M)


@pytest.mark.parametrize(("window", "word"), [(256 << 20, "note"), (16 * GIB, "ok  ")])
def test_resizable_bar_is_read_from_the_third_window(
    run: Run, tmp_path: Path, window: int, word: str
) -> None:
    card(tmp_path / "root", "0000:03:00.0", window)
    card(tmp_path / "root", "0000:00:02.0", 256 << 20)  # an integrated GPU has none

    lines = [line for line in run().stdout.splitlines() if "Resizable BAR of" in line]

    assert len(lines) == 1
    assert lines[0].startswith(word)
    assert ("Above 4G Decoding" in run().stdout) == (word == "note")


def test_a_failed_change_ends_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bin/apt-get").write_text(
        '#!/bin/sh\ncase "$1" in update) ;; *) exit 100 ;; esac\n'
    )
    done = run("--apply")
    assert done.returncode == 1
    assert "install intel-opencl-icd (OpenCL driver): failed" in done.stderr


def test_wrong_usage(run: Run) -> None:
    assert run("--aply").returncode == 2
    assert run("--user").returncode == 2


@pytest.mark.parametrize("name", ["host-setup.sh", "ray-up/start-node.sh"])
def test_shellcheck_finds_nothing(repository: Path, name: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("no shellcheck: it comes with the test extra")
    command = [shellcheck, repository / "cluster" / name]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(900)
def test_in_a_debian_root_the_second_run_changes_nothing(repository: Path, tmp_path: Path) -> None:
    if os.environ.get("XERAY_TEST_IMAGES") != "1":
        pytest.skip("takes a minute and the network: set XERAY_TEST_IMAGES=1")
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        pytest.skip("needs root and Debian's mmdebstrap")
    root = tmp_path / "debian"
    dockerfile.make_debian_root(root)
    shutil.copy(repository / "cluster/host-setup.sh", root / "host-setup.sh")
    image = dockerfile.Image(root)

    command = ["/bin/sh", "/host-setup.sh", "--apply", "--user", "games"]
    first, second = image.run(command), image.run(command)

    assert "change  install intel-opencl-icd" in first
    assert "change  put games into the group render" in first
    assert re.search(r"^0 changes made", second, re.M), second
    assert "change " not in second
    shutil.rmtree(root)
