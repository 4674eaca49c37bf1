"""XeRay: DeepSeek-family language models on Intel workstations, served with Ray Serve.

`serve_app:build_app` is the application that `serve run` and `serve deploy` start.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Ray is imported only where the application is built: the engine's process starts fast.
    if name == "build_app":
        try:
            return importlib.import_module("serve_app.deployments.graph").build_app
        except ImportError as error:
            _end_serve_run(f"XeRay is not installed completely: {error}; install it again", name)
            raise
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is None:
        _end_serve_run(
            f"import_path: {__name__}:{name} does not exist; write {__name__}:build_app", name
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _end_serve_run(message: str, builder: str) -> None:
    """Tell the `serve run` that waits for the application `builder`; outside of Ray nothing."""
    if "RAY_RAYLET_PID" not in os.environ:
        return
    try:
        preflight = importlib.import_module("serve_app.deployments.preflight")
    except ImportError:  # then Ray's log alone tells
        return
    preflight.fail_serve_run(message, lambda args: True, f"{__name__}:{builder}")
