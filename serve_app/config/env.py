"""The environment variables that XeRay reads: one table, one way to read each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EnvVar:
    """An environment variable: its name, what holds when it is unset, and what it does."""

    name: str
    default: str
    description: str


SIMULATED_ARC_CARDS = EnvVar(
    "XERAY_SIMULATED_ARC_CARDS",
    "0",
    "Number of simulated Arc cards, each backed by CPU; replaces the real ones. Set it before Ray"
    " starts.",
)
SIMULATED_IGPUS = EnvVar(
    "XERAY_SIMULATED_IGPUS",
    "0",
    "Number of simulated integrated GPUs (0 or 1), backed by CPU. Set before Ray starts.",
)
LOCK_DIR = EnvVar(
    "XERAY_LOCK_DIR",
    "/run/lock/xeray, else xeray-locks in the temporary directory",
    "Folder of the locks that keep a card or a core to one process; one per host, shared by all"
    " containers.",
)
CARD_LOCK_TIMEOUT_S = EnvVar(
    "XERAY_CARD_LOCK_TIMEOUT_S",
    "30",
    "Seconds a replica waits for its card when another process still holds it.",
)
NUM_CORES = EnvVar(
    "XERAY_NUM_CORES",
    "what the process may run on",
    "Number of physical cores to declare as the Ray resource xeon_cores.",
)

API_KEYS = EnvVar(
    "XERAY_API_KEYS",
    "",
    "API keys, separated by commas, that may use the models; more can be said in auth.keys_file.",
)

PROXY_SEND_TIMEOUT_S = EnvVar(
    "XERAY_PROXY_SEND_TIMEOUT_S",
    "60",
    "Seconds that a client may leave bytes of an answer unread before Serve's HTTP server resets"
    " its connection; 0: the kernel's own quarter of an hour. `xeray serve` sets it to"
    " ingress.send_timeout_s. Set it before Ray starts.",
)

TABLE: tuple[EnvVar, ...] = (
    SIMULATED_ARC_CARDS,
    SIMULATED_IGPUS,
    LOCK_DIR,
    CARD_LOCK_TIMEOUT_S,
    NUM_CORES,
    API_KEYS,
    PROXY_SEND_TIMEOUT_S,
)
"""Every variable of ours; `xeray config env` and configs/README.md are made from it."""


def read_count(variable: EnvVar, env: Mapping[str, str] | None = None) -> int | None:
    """Return the variable as a count, None where it is unset. Raises ConfigError else."""
    text = (os.environ if env is None else env).get(variable.name, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(
            f"{variable.name}: expected a whole number ≥ 0, got {text!r}", param=variable.name
        )
    return int(text)


def read_seconds(variable: EnvVar, env: Mapping[str, str] | None = None) -> float:
    """Return the variable in seconds, its default where unset. Raises ConfigError else."""
    text = (os.environ if env is None else env).get(variable.name, "").strip() or variable.default
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(
            f"{variable.name}: expected seconds ≥ 0, got {text!r}", param=variable.name
        )
    return seconds


def read_path(variable: EnvVar, env: Mapping[str, str] | None = None) -> Path | None:
    """Return the variable as a path, None where it is unset."""
    text = (os.environ if env is None else env).get(variable.name, "").strip()
    return Path(text).expanduser() if text else None
