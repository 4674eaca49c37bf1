"""POST /admin/profile: trace some engine steps of one model replica."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.context import context_of
from serve_app.api.errors import json_response
from serve_app.api.protocol.base import parse_request
from serve_app.api.protocol.profile import ProfileAnswer, ProfileRequest
from serve_app.api.routes.admin import require_admin


async def profile(request: Request) -> Response:
    """Trace the next steps; answered when they have run, with what they spent their time on."""
    context = context_of(request)
    require_admin(context, request)
    body = parse_request(ProfileRequest, await request.body() or b"{}")
    figures = await context.backend.profile(body.steps, body.timeout_s)
    return json_response(ProfileAnswer.model_validate(figures).model_dump())
