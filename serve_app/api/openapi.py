"""The OpenAPI document, built from the protocol models, so that it cannot differ from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve_app import __version__
from serve_app.api.protocol import (
    chat,
    completions,
    embeddings,
    profile,
    responses,
    service,
    status,
    tokens,
)

_REF = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. `event` is the model of a stream's events, where the endpoint streams."""

    method: str
    path: str
    summary: str
    tag: str
    request: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    text: str | None = None


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation, streamed or whole",
        "OpenAI",
        chat.ChatCompletionRequest,
        chat.ChatCompletion,
        chat.ChatCompletionChunk,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Continue prompts, streamed or whole",
        "OpenAI",
        completions.CompletionRequest,
        completions.Completion,
        completions.Completion,
    ),
    Operation(
        "post",
        "/v1/responses",
        "Answer input items, streamed or whole; nothing is kept",
        "OpenAI",
        responses.ResponsesRequest,
        responses.ResponsesAnswer,
        responses.ResponsesEvent,
    ),
    Operation(
        "post",
        "/v1/embeddings",
        "Turn inputs into vectors, where the model is one for it",
        "OpenAI",
        embeddings.EmbeddingRequest,
        embeddings.EmbeddingAnswer,
    ),
    Operation("get", "/v1/models", "List the served models", "OpenAI", answer=service.ModelList),
    Operation("get", "/v1/models/{id}", "Show one model", "OpenAI", answer=service.ModelEntry),
    Operation(
        "post",
        "/generate",
        "Continue one prompt, in the plain form",
        "Plain",
        completions.GenerateBody,
        completions.GenerateAnswer,
        completions.GenerateEvent,
    ),
    Operation(
        "post",
        "/tokenize",
        "Turn text or a conversation into token ids",
        "Tokens",
        tokens.TokenizeRequest,
        tokens.TokenizeAnswer,
    ),
    Operation(
        "post",
        "/detokenize",
        "Turn token ids into text",
        "Tokens",
        tokens.DetokenizeRequest,
        tokens.DetokenizeAnswer,
    ),
    Operation(
        "get",
        "/tokenizer_info",
        "Tell facts about the tokenizer (off by default)",
        "Tokens",
        answer=tokens.TokenizerInfo,
    ),
    Operation("get", "/health", "Can it generate?", "Service", answer=service.HealthAnswer),
    Operation("get", "/readyz", "Should it get traffic?", "Service", answer=service.HealthAnswer),
    Operation("get", "/livez", "May waiting help?", "Service", answer=service.LiveAnswer),
    Operation("get", "/version", "Tell the version", "Service", answer=service.VersionAnswer),
    Operation(
        "get", "/status.json", "What the status page shows", "Service", answer=status.StatusAnswer
    ),
    Operation("get", "/metrics", "Prometheus metrics", "Service", text="text/plain"),
    Operation(
        "post", "/admin/drain", "Take no new requests", "Administration", answer=service.DrainAnswer
    ),
    Operation(
        "get", "/admin/stats", "How it is doing", "Administration", answer=service.AdminStats
    ),
    Operation(
        "post",
        "/admin/profile",
        "Trace some engine steps of one replica",
        "Administration",
        profile.ProfileRequest,
        profile.ProfileAnswer,
    ),
    Operation(
        "post",
        "/admin/models/{id}/reload",
        "Load a model's files anew, replica by replica",
        "Administration",
        answer=service.ReloadAnswer,
    ),
    Operation(
        "get", "/admin/usage", "What each key did", "Administration", answer=service.KeyUsageReport
    ),
)


@cache
def openapi_document() -> dict[str, Any]:
    """Return the document (OpenAPI 3.1)."""
    models: set[type[BaseModel]] = {service.ErrorAnswer}
    for operation in OPERATIONS:
        models.update(
            model for model in (operation.request, operation.answer, operation.event) if model
        )
    ordered = sorted(models, key=lambda model: model.__name__)
    references, definitions = models_json_schema(
        [(model, "validation") for model in ordered], ref_template=_REF
    )
    names: dict[Any, Any] = {model: reference for (model, _), reference in references.items()}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, names)
    return {
        "openapi": "3.1.0",
        "info": {"title": "XeRay", "version": __version__},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {})},
    }


def _describe(operation: Operation, names: dict[Any, Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    if operation.answer is not None:
        answers["application/json"] = {"schema": names[operation.answer]}
    if operation.event is not None:
        answers["text/event-stream"] = {"schema": names[operation.event]}
    if operation.text is not None:
        answers[operation.text] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": names[service.ErrorAnswer]}}
    described: dict[str, Any] = {
        "operationId": f"{operation.method}_{operation.path.strip('/').replace('/', '_')}",
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {
            "200": {"description": "Success", "content": answers},
            "default": {"description": "Error", "content": error},
        },
    }
    if operation.request is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": names[operation.request]}},
        }
    if "{id}" in operation.path:
        described["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return described
