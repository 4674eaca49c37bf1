"""What every test folder may use."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED_RAY = "deployments"
"""The folder whose tests wait for Ray and Serve for half of their time, and take the longest."""
ORDER = (SHARED_RAY, "cluster", "api", "fuzz", "unit", "e2e")
NICED, NICENESS = ("api", "fuzz", "unit"), 19


def folder_of(path: Path) -> str:
    """Return the first folder below tests/ that a test's file is in."""
    return path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `-n 2` one worker has the shared Ray's tests, and the other everything else."""
    from xdist.scheduler import LoadScopeScheduling

    class SharedRayTogether(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            folder = folder_of(config.rootpath / file)
            # Package-scoped fixtures, which are services, are wanted by one worker only.
            return folder if folder in (SHARED_RAY, "cluster", "e2e") else file

    config.option.loadscopereorder = False  # by number of tests: the longest would not be first
    return SharedRayTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first: the workers take what comes in this order."""
    places = {folder: place for place, folder in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(folder_of(item.path), len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the services' timing come first: beside them the other tests use what is left."""
    if "PYTEST_XDIST_WORKER" in os.environ and folder_of(item.path) in NICED:
        os.nice(max(0, NICENESS - os.nice(0)))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What this process and its children keep for later goes here, not into the user's home."""
    folder = tmp_path_factory.mktemp("cache-home")
    with pytest.MonkeyPatch.context() as patch:
        # A package that a test installs is no result of the test: pip may use its own cache.
        if home := os.environ.get("HOME"):
            patch.setenv("PIP_CACHE_DIR", os.environ.get("PIP_CACHE_DIR") or f"{home}/.cache/pip")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def find_free_port() -> Callable[[], int]:
    """A function that returns a TCP port which nothing listens on now."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture
def free_port(find_free_port: Callable[[], int]) -> int:
    """A TCP port which nothing listens on now."""
    return find_free_port()


@pytest.fixture(scope="session")
def clean_environment(cache_home: Path) -> dict[str, str]:
    """The environment less what a session's Ray, or a make around the tests, put there."""
    theirs = ("RAY_", "XERAY_", "MAKE", "MFLAGS")
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
