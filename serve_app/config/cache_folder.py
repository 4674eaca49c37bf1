"""Where XeRay keeps what it has worked out and can work out again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return `xeray/NAME` in the user's cache folder (XDG base directories); it may not exist."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else _home() / ".cache"
    return base / "xeray" / name


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user whom the system does not know, as in a container
        return Path("/")
