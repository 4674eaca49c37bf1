"""What every route works with, and what is known of the request at hand."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request
from starlette.types import Scope

from serve_app.api.backend import Backend
from serve_app.api.keys import KeyEntry, KeyLease, KeyRing
from serve_app.api.limits import Admission
from serve_app.config.schema import AppConfig
from serve_app.core.errors import NotFoundError, PermissionDeniedError
from serve_app.core.requests import ModelCard
from serve_app.observability.metrics import IngressMetrics
from serve_app.observability.tracing import Tracing

_SCOPE_KEY = "xeray.request"


@dataclass(slots=True)
class ApiContext:
    """The application's parts.

    `peer_is_client`: False where a proxy hides the client's address. `host_echoes_id`: the server
    around us answers with the X-Request-Id that it received.
    """

    backend: Backend
    config: AppConfig
    metrics: IngressMetrics
    admission: Admission
    keys: KeyRing
    peer_is_client: bool = True
    host_echoes_id: bool = False
    tracing: Tracing = field(default_factory=Tracing)
    started_s: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class RequestInfo:
    """A request's id, its arrival (monotonic seconds), and its endpoint's template for metrics.

    `key` and `lease` are there where a key was asked for; the lease where its use is limited.
    """

    request_id: str
    arrival_s: float
    endpoint: str = "other"
    is_client_gone: bool = False
    key: KeyEntry | None = None
    lease: KeyLease | None = None


def context_of(request: Request) -> ApiContext:
    """Return the application's context."""
    return cast(ApiContext, request.app.state.context)


def attach_info(scope: Scope, info: RequestInfo) -> None:
    """Remember `info` with the request."""
    scope[_SCOPE_KEY] = info


def info_of(scope: Scope) -> RequestInfo:
    """Return what `attach_info` remembered."""
    return cast(RequestInfo, scope[_SCOPE_KEY])


async def resolve_model(backend: Backend, name: str | None) -> ModelCard:
    """Return the model that `name` (an id, an alias, or None for the first) stands for.

    Raises NotFoundError (model_not_found), naming the models that exist.
    """
    cards = await backend.models()
    if name is None and cards:
        return cards[0]
    for card in cards:
        if name == card.id or name in card.aliases:
            return card
    for card in cards:
        if "*" in card.aliases:
            return card
    served = ", ".join(card.id for card in cards[:5])
    raise NotFoundError(
        f"There is no such model here. Served: {served or 'none yet'}.",
        param="model",
        code="model_not_found",
    )


def check_model_allowed(info: RequestInfo, card: ModelCard) -> None:
    """Raise PermissionDeniedError where the request's key may not use the model."""
    if info.key is not None and not info.key.allows_model(card.id):
        raise PermissionDeniedError("This key may not use the model.", param="model")
