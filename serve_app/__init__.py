"""XeRay: DeepSeek-family language models on Intel workstations, served with Ray Serve.

`serve_app:build_app` is the application that `serve run` and `serve deploy` start.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Ray is imported only where the application is built: the engine's process starts fast.
    if name == "build_app":
        return importlib.import_module("serve_app.deployments.graph").build_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
