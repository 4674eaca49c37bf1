"""Administration: for holders of an admin key, or without keys for the machine's own users."""

from __future__ import annotations

import ipaddress
import time
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from serve_app import __version__
from serve_app.api.context import ApiContext, context_of, resolve_model
from serve_app.api.errors import json_response
from serve_app.api.protocol.service import (
    AdminStats,
    DrainAnswer,
    KeyUsageEntry,
    KeyUsageReport,
    ReloadAnswer,
)
from serve_app.api.routes.service import health_answer, service_health
from serve_app.core.errors import PermissionDeniedError

_PROXY_HEADERS = ("forwarded", "via", "x-real-ip")
"""What proxies add beside X-Forwarded-For; whose request it is they do not surely tell."""
_DENIED = "Administration is open to clients on this machine only."


async def drain(request: Request) -> Response:
    """Take no new requests; those that run go on to their end."""
    context = context_of(request)
    require_admin(context, request)
    context.admission.drain()
    await context.backend.drain()
    return json_response(DrainAnswer(in_flight=context.admission.num_in_flight).model_dump())


async def stats(request: Request) -> Response:
    """Tell how this ingress replica and the model replicas are doing."""
    context = context_of(request)
    require_admin(context, request)
    answer = AdminStats(
        version=__version__,
        is_draining=context.admission.is_draining,
        in_flight=context.admission.num_in_flight,
        max_ongoing_requests=context.admission.max_ongoing_requests,
        uptime_s=round(time.monotonic() - context.started_s, 3),
        health=health_answer(await service_health(context)),
    )
    return json_response(answer.model_dump())


async def reload(request: Request) -> Response:
    """Load a model's files anew, one replica after the other; answered when all are back."""
    context = context_of(request)
    require_admin(context, request)
    card = await resolve_model(context.backend, request.path_params["id"])
    replicas = await context.backend.reload(card.id)
    return json_response(ReloadAnswer(model=card.id, replicas=replicas).model_dump())


async def usage(request: Request) -> Response:
    """Tell what each key did on this ingress replica since it started; /metrics has them all."""
    context = context_of(request)
    require_admin(context, request)
    rows = [
        KeyUsageEntry(
            name=name,
            requests=use.num_requests,
            tokens=use.num_tokens,
            refused=use.num_refused,
            in_flight=use.num_in_flight,
        )
        for name, use in sorted(context.keys.usage().items())
    ]
    return json_response(KeyUsageReport(data=rows).model_dump())


def require_admin(context: ApiContext, request: Request) -> None:
    """Raise PermissionDeniedError unless an admin key was shown, or no keys exist and it is local.

    Where keys are configured, the layer above has checked the scope already.
    """
    if not context.keys.is_required:
        require_local(context, request)


def require_local(context: ApiContext, request: Request) -> None:
    """Raise PermissionDeniedError unless the request surely comes from this machine.

    The peer must be loopback, no proxy may have forwarded it (X-Forwarded-For may name this machine
    alone), the Host must be loopback (a foreign name that resolves here is not), and a page of
    another origin is refused.
    """
    hosts = [request.client.host if request.client else ""]
    for value in request.headers.getlist("x-forwarded-for"):
        hosts.extend(part.strip() for part in value.split(","))
    host_header = request.headers.get("host", "")
    hosts.append(urlsplit(f"//{host_header}").hostname or "")
    origin = request.headers.get("origin")
    is_foreign_page = origin is not None and urlsplit(origin).netloc != host_header
    is_forwarded = any(name in request.headers for name in _PROXY_HEADERS)
    is_direct = context.peer_is_client and not is_forwarded and not is_foreign_page
    if not is_direct or not all(map(_is_loopback, hosts)):
        raise PermissionDeniedError(_DENIED)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
