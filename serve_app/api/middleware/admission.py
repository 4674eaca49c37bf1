"""Inference requests pass one by one through the admission control; everything else walks by."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.limits import Admission


class AdmissionMiddleware:
    """Holds a place for each POST to `paths`. Raises OverloadedError where there is none."""

    def __init__(self, app: ASGIApp, admission: Admission, paths: frozenset[str]) -> None:
        self._app = app
        self._admission = admission
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other kinds of scope pass through."""
        if scope["type"] != "http" or scope["method"] != "POST" or not self._counts(scope):
            await self._app(scope, receive, send)
            return
        self._admission.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._admission.leave()

    def _counts(self, scope: Scope) -> bool:
        return scope["path"].removeprefix(scope.get("root_path", "")) in self._paths
