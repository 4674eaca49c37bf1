"""Which `xeray serve` of this user run on this machine, so that other commands find their Ray.

Ray itself cannot tell: it knows of nodes that `ray start` made, takes any other at random, and
looks for it at this machine's address in the network, where a loopback-only one does not listen.
Each service leaves a file, and holds a lock beside it for as long as its process lives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from serve_app.config.cache_folder import cache_folder
from serve_app.core.errors import ConfigError
from serve_app.deployments.environment import serve_environment
from serve_app.hardware.card_lock import CardLock

_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service: its application, its URL, its Ray's host:port, and what to export to reach it."""

    app_name: str
    url: str
    address: str
    environment: dict[str, str]


def ray_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of `environ` that a program needs as well to talk to the same Ray."""
    names = (*serve_environment("haproxy", loopback=True), *_AUTH_VARIABLES)
    return {name: environ[name] for name in names if name in environ}


def announce(service: RunningService) -> Callable[[], None]:
    """Let other commands find the service of this process; returns what takes that back.

    Raises OSError or ConfigError where the user's cache folder cannot be written.
    """
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    lock = CardLock(str(os.getpid()), folder)
    path = folder / f"{lock.name}.json"
    lock.try_acquire()
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(service)), encoding="utf-8")
    draft.replace(path)

    def take_back() -> None:
        path.unlink(missing_ok=True)
        lock.path.unlink(missing_ok=True)
        lock.release()

    return take_back


def running_services() -> list[RunningService]:
    """Return the services whose process lives; what dead ones have left is removed."""
    found = []
    for path in sorted(_folder().glob("*.json")):
        lock = CardLock(path.stem, path.parent)
        if lock.try_acquire(notes_holder=False):  # nobody holds it any more
            path.unlink(missing_ok=True)
            lock.path.unlink(missing_ok=True)
            lock.release()
            continue
        try:
            found.append(RunningService(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # gone just now, or another version's
    return found


def find_service(app_name: str | None) -> RunningService | None:
    """Return the only running service, or the only one of that name; None where there is none.

    Raises ConfigError where several fit.
    """
    fitting = [s for s in running_services() if app_name is None or s.app_name == app_name]
    if len(fitting) > 1:
        each = ", ".join(f"{s.app_name} at {s.url} (--address {s.address})" for s in fitting)
        raise ConfigError(f"several services run on this machine: {each}; name one")
    return fitting[0] if fitting else None


def service_at(address: str) -> RunningService | None:
    """Return the running service whose Ray has that host:port, None where none of ours has."""
    return next((s for s in running_services() if s.address == address), None)


def _folder() -> Path:
    return cache_folder("running")
