"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.context import check_model_allowed, context_of, info_of, resolve_model
from serve_app.api.errors import json_response
from serve_app.api.protocol.service import ModelEntry, ModelList
from serve_app.core.requests import ModelCard


async def list_models(request: Request) -> Response:
    """List the served models under each of their names."""
    key = info_of(request.scope).key
    cards = await context_of(request).backend.models()
    entries = [
        _entry(card, name)
        for card in cards
        if key is None or key.allows_model(card.id)
        for name in (card.id, *(alias for alias in card.aliases if alias != "*"))
    ]
    return json_response(ModelList(data=entries).model_dump())


async def get_model(request: Request) -> Response:
    """Return one model; ids may contain slashes. Without an id it is the list that is asked for."""
    name = request.path_params["id"]
    if not name:
        return await list_models(request)
    card = await resolve_model(context_of(request).backend, name)
    check_model_allowed(info_of(request.scope), card)
    is_listed = name == card.id or name in card.aliases
    return json_response(_entry(card, name if is_listed else card.id).model_dump())


def _entry(card: ModelCard, name: str) -> ModelEntry:
    return ModelEntry(
        id=name,
        created=card.created,
        root=card.root,
        max_model_len=card.max_model_len,
        capabilities=list(card.capabilities),
    )
