"""Which services run on this machine: found while they live, forgotten after."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.cli.rollout import _address
from serve_app.core.errors import ConfigError
from serve_app.deployments.running import (
    RunningService,
    announce,
    find_service,
    ray_variables,
    running_services,
    service_at,
)
from serve_app.hardware.card_lock import CardLock

SERVICE = RunningService("xeray", "http://127.0.0.1:8000", "127.0.0.1:4000", {"RAY_X": "1"})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "xeray" / "running"


def test_a_service_is_found_until_it_takes_that_back(folder: Path) -> None:
    assert running_services() == []
    take_back = announce(SERVICE)
    assert running_services() == [SERVICE]
    assert find_service(None) == find_service("xeray") == service_at("127.0.0.1:4000") == SERVICE
    assert find_service("other") is None
    assert service_at("127.0.0.1:4001") is None
    take_back()
    assert running_services() == []
    assert list(folder.iterdir()) == []


def test_one_that_was_killed_is_forgotten(folder: Path) -> None:
    program = (
        "import os; from serve_app.deployments.running import RunningService, announce;"
        "announce(RunningService('gone', 'u', 'a:1', {})); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert len(list(folder.glob("*.json"))) == 1
    assert running_services() == []
    assert list(folder.iterdir()) == []


def test_two_of_a_name_have_to_be_told_apart(folder: Path) -> None:
    take_back = announce(SERVICE)
    twin = folder / f"{os.getpid()}-twin.json"
    lock = CardLock(twin.stem, folder)  # as a second process holds it
    assert lock.try_acquire()
    twin.write_text(json.dumps({**_facts(SERVICE), "address": "127.0.0.1:5000"}))
    with pytest.raises(ConfigError, match=r"several services run.*--address 127.0.0.1:5000"):
        find_service("xeray")
    lock.release()
    take_back()


def test_what_another_version_wrote_is_passed_over(folder: Path) -> None:
    take_back = announce(SERVICE)
    (folder / f"{os.getpid()}.json").write_text('{"name": "later"}')
    assert running_services() == []
    take_back()


def test_only_what_reaches_the_same_ray_is_noted() -> None:
    noted = ray_variables({"RAY_AUTH_MODE": "token", "HOME": "/root", "RAY_SERVE_X": "1"})
    assert noted == {"RAY_AUTH_MODE": "token"}


def test_a_rollout_takes_the_address_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_X", "RAY_gcs_server_port_wait_time_s"):
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    assert _address(argparse.Namespace(address="auto", app=None)) == "auto"
    take_back = announce(SERVICE)
    assert _address(argparse.Namespace(address="auto", app=None)) == "127.0.0.1:4000"
    assert os.environ["RAY_X"] == "1"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert _address(argparse.Namespace(address="auto", app=None)) == "10.0.0.1:6379"
    take_back()


def _facts(service: RunningService) -> dict[str, object]:
    return {name: getattr(service, name) for name in ("app_name", "url", "address", "environment")}
