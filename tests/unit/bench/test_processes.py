from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.bench.processes import ProcessGroup, ProcessTime, cpu_between

TICKS = os.sysconf("SC_CLK_TCK")


def add_process(
    proc: Path, pid: int, parent: int, *, name: str = "python", ticks: int = 0, env: str = "A=1"
) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    times = f"{ticks} {ticks}"
    (folder / "stat").write_text(f"{pid} ({name}) S {parent} 0 0 0 0 0 0 0 0 0 {times} 0 0")
    (folder / "environ").write_bytes(env.encode())


def test_group_is_the_marked_and_their_descendants(tmp_path: Path) -> None:
    add_process(tmp_path, 10, 1, env="X=1\0MARK=7\0")
    add_process(tmp_path, 11, 10, name="a) b (c", ticks=3 * TICKS)
    add_process(tmp_path, 12, 11)
    add_process(tmp_path, 13, 1, env="MARK=7")  # its parent died
    add_process(tmp_path, 20, 1)
    (tmp_path / "self").mkdir()
    (tmp_path / "30").mkdir()  # gone while we looked

    found = ProcessGroup("MARK=7", tmp_path).snapshot()

    assert sorted(found) == [10, 11, 12, 13]
    assert found[11] == ProcessTime(11, 10, "a) b (c", 6.0)


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:xeray:Ingress", "Ingress"),
        ("ray::ServeReplica:xeray:ModelReplica.generate", "ModelReplica"),
        ("ray::ServeController.listen_for_change", "ServeController"),
        ("/usr/bin/python3\0-m\0serve_app.engine.worker\0" + "7", "engine"),
        ("python\0-m\0serve_app.cli.main\0serve", "xeray"),
        ("/usr/bin/python\0-u\0/ray/_private/log_monitor.py\0--x", "log_monitor"),
        ("/ray/raylet/raylet\0--socket", "comm"),
        ("", "comm"),
    ],
)
def test_a_process_is_named_by_what_it_does(tmp_path: Path, command: str, role: str) -> None:
    add_process(tmp_path, 10, 1, name="comm", env="MARK=7")
    (tmp_path / "10" / "cmdline").write_bytes(command.encode())

    assert ProcessGroup("MARK=7", tmp_path).snapshot()[10].name == role


def test_cpu_between_counts_by_name_and_counts_newcomers_whole() -> None:
    before = {1: ProcessTime(1, 0, "raylet", 5.0), 2: ProcessTime(2, 0, "python", 1.0)}
    after = {
        1: ProcessTime(1, 0, "raylet", 5.5),
        2: ProcessTime(2, 0, "python", 3.0),
        3: ProcessTime(3, 0, "python", 0.25),
    }

    assert cpu_between(before, after) == {"python": 2.25, "raylet": 0.5}


def test_real_child_is_found_by_its_mark() -> None:
    code = "print('up', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "XERAY_TEST_MARK": "q"},
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        found = ProcessGroup("XERAY_TEST_MARK=q").snapshot()

    assert child.pid in found
    assert os.getpid() not in found
