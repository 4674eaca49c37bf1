"""The key of a request: found, its scope checked, its limits counted, before the body is read."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.context import info_of
from serve_app.api.keys import KeyEntry, KeyRing
from serve_app.api.keys import Scope as KeyScope
from serve_app.core.errors import PermissionDeniedError

_OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/version"})
"""Never authenticated: what probes ask. The pages and /docs hold no data of anyone either."""
_OPEN_PAGES = frozenset({"/", "/docs", "/status", "/openapi.json"})
_BEARER = "bearer "


class AuthMiddleware:
    """Raises AuthenticationError (401), PermissionDeniedError (403) or RateLimitError (429)."""

    def __init__(
        self, app: ASGIApp, keys: KeyRing, limited: frozenset[str], protect_metrics: bool
    ) -> None:
        self._app = app
        self._keys = keys
        self._limited = limited
        self._protect_metrics = protect_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other kinds of scope pass through."""
        if scope["type"] != "http" or not self._keys.is_required:
            await self._app(scope, receive, send)
            return
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        needed = self._scope_of(path)
        if needed is None or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        entry = self._keys.authenticate(_token(scope))
        _check_scope(entry, needed)
        info = info_of(scope)
        info.key = entry
        if path not in self._limited:
            await self._app(scope, receive, send)
            return
        info.lease = self._keys.admit(entry)
        try:
            await self._app(scope, receive, send)
        finally:
            info.lease.close()

    def _scope_of(self, path: str) -> KeyScope | None:
        if path in _OPEN_PATHS or path in _OPEN_PAGES or path.startswith("/static/"):
            return None
        if path == "/metrics":
            return "metrics" if self._protect_metrics else None
        if path == "/status.json":  # tells request ids and who serves: never for everyone
            return "metrics"
        return "admin" if path.startswith("/admin/") else "inference"


def _check_scope(entry: KeyEntry, needed: KeyScope) -> None:
    if needed == "metrics" and "admin" in entry.scopes:
        return  # whoever may stop the service may watch it
    if needed not in entry.scopes:
        raise PermissionDeniedError(f"This key does not have the scope {needed}.")


def _token(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            text: str = value.decode("latin-1").strip()
            if text.lower().startswith(_BEARER):
                return text[len(_BEARER) :].strip()
        elif name == b"x-api-key":
            return str(value, "latin-1").strip()
    return None
