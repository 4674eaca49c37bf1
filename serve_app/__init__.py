"""XeRay: DeepSeek-family language models on Intel workstations, served with Ray Serve.

`serve_app:build_app` is the application that `serve run` and `serve deploy` start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from serve_app.deployments.graph import build_app as build_app


def __getattr__(name: str) -> Any:
    # Ray is imported only where the application is built: the engine's process starts fast.
    if name == "build_app":
        from serve_app.deployments.graph import build_app

        return build_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
