"""POST /v1/responses: stateless, a translation onto chat completions."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.context import context_of, info_of
from serve_app.api.protocol.base import parse_request
from serve_app.api.protocol.responses import ResponsesRequest
from serve_app.api.responses_input import in_our_names, to_chat
from serve_app.api.responses_output import AnswerHead, ResponsesOutput, ResponsesResponse
from serve_app.api.routes.chat import open_chat
from serve_app.core.errors import ClientError


async def responses(request: Request) -> Response:
    """Answer a string or items."""
    context, info = context_of(request), info_of(request.scope)
    body = parse_request(ResponsesRequest, await request.body())
    chat_body = to_chat(body)
    try:
        job, chat = await open_chat(request, chat_body, "resp")
    except ClientError as error:
        raise in_our_names(error) from None
    head = AnswerHead(job.id, job.created, job.card.id)
    return ResponsesResponse(context, info, job, ResponsesOutput(head, chat, body))
