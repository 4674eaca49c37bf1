"""The chat page, the docs and their assets: read once, local, under a strict content policy."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.openapi import openapi_document
from serve_app.api.sse import json_bytes

WEB_FOLDER = Path(__file__).resolve().parents[2] / "web"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_CACHED_FOR_EVER = "public, max-age=31536000, immutable"
_REVALIDATED = "no-cache"
_ASSET = re.compile(r'(?<=")static/([\w.-]+)(?=")')


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent: `digest` names its content, in its ETag and in the links to it."""

    body: bytes
    media_type: str
    digest: str


class WebPages:
    """The files of `folder`. Pages link to assets by content, so that those are cached for ever."""

    def __init__(self, folder: Path = WEB_FOLDER) -> None:
        self._assets = {
            path.name: _asset(path.read_bytes(), path.suffix)
            for path in sorted(folder.iterdir())
            if path.suffix in _MEDIA_TYPES
        }
        for name, asset in list(self._assets.items()):
            if name.endswith(".html"):
                self._assets[name] = _asset(self._link(asset.body), ".html")

    async def chat(self, request: Request) -> Response:
        """Send the chat page."""
        return _respond(request, self._assets["index.html"], _REVALIDATED)

    async def docs(self, request: Request) -> Response:
        """Send the page that shows /openapi.json."""
        return _respond(request, self._assets["docs.html"], _REVALIDATED)

    async def status(self, request: Request) -> Response:
        """Send the page that shows /status.json as it changes."""
        return _respond(request, self._assets["status.html"], _REVALIDATED)

    async def static(self, request: Request) -> Response:
        """Send an asset; a link with the right digest never needs to be asked for again."""
        asset = self._assets.get(request.path_params["name"])
        if asset is None or asset.media_type.startswith("text/html"):
            raise HTTPException(404)
        is_exact = request.query_params.get("v") == asset.digest
        return _respond(request, asset, _CACHED_FOR_EVER if is_exact else _REVALIDATED)

    def _link(self, page: bytes) -> bytes:
        def versioned(match: re.Match[str]) -> str:
            asset = self._assets.get(match.group(1))
            return f"{match.group()}?v={asset.digest}" if asset else match.group()

        return _ASSET.sub(versioned, page.decode()).encode()


async def openapi(_request: Request) -> Response:
    """Send the OpenAPI document."""
    return Response(json_bytes(openapi_document()), media_type="application/json")


def _asset(body: bytes, suffix: str) -> Asset:
    return Asset(body, _MEDIA_TYPES[suffix], hashlib.sha256(body).hexdigest()[:16])


def _respond(request: Request, asset: Asset, cache_control: str) -> Response:
    etag = f'"{asset.digest}"'
    headers = {**SECURITY_HEADERS, "ETag": etag, "Cache-Control": cache_control}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(asset.body, headers=headers, media_type=asset.media_type)
