"""The application: routes, layers and the context they share.

Layers, outermost first::

    CORS (by config) > request scope (id, errors, log, metrics) > keys > patience > body limit
    > fallback (by config) > admission > routes

It starts nothing of its own, in its lifespan or elsewhere, so it runs the same under a test's
transport, uvicorn, and Ray Serve's ingress.
"""

from __future__ import annotations

import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.backend import Backend
from serve_app.api.context import ApiContext, info_of
from serve_app.api.errors import error_response
from serve_app.api.fallback.policy import FallbackPolicy
from serve_app.api.fallback.upstream import Upstream
from serve_app.api.keys import KeyRing
from serve_app.api.limits import Admission
from serve_app.api.middleware.admission import AdmissionMiddleware
from serve_app.api.middleware.auth import AuthMiddleware
from serve_app.api.middleware.body_limit import BodyLimitMiddleware
from serve_app.api.middleware.fallback import FallbackMiddleware
from serve_app.api.middleware.patience import PatienceMiddleware
from serve_app.api.middleware.request_scope import RequestScopeMiddleware
from serve_app.api.routes import (
    admin,
    chat,
    completions,
    embeddings,
    models,
    pages,
    profile,
    responses,
    service,
    status,
    tokens,
)
from serve_app.config.schema import AppConfig
from serve_app.observability.metrics import IngressMetrics
from serve_app.observability.tracing import Tracing

GENERATION_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate"}
)
TIMED_PATHS = GENERATION_PATHS | {"/v1/embeddings"}
ADMITTED_PATHS = TIMED_PATHS | {"/tokenize", "/detokenize"}


def create_app(
    backend: Backend,
    config: AppConfig,
    *,
    metrics: IngressMetrics | None = None,
    peer_is_client: bool = True,
    host_echoes_id: bool = False,
    tracing: Tracing | None = None,
) -> Starlette:
    """Return the HTTP surface over `backend`.

    Pass `peer_is_client=False` where a proxy connects on the clients' behalf without telling their
    addresses (HAProxy mode): administration by loopback is closed then. Pass `host_echoes_id=True`
    where the server around the application answers with the X-Request-Id that it received.
    `tracing` makes the spans of requests; off without.
    """
    keys_file = config.auth.keys_file
    metrics = metrics or IngressMetrics(config.model.name or "default", slo=config.slo)
    context = ApiContext(
        backend=backend,
        config=config,
        metrics=metrics,
        admission=Admission(config.ingress.max_ongoing_requests, metrics),
        keys=KeyRing(
            Path(keys_file).expanduser() if keys_file else None,
            num_shares=config.ingress.num_replicas,
        ),
        peer_is_client=peer_is_client,
        host_echoes_id=host_echoes_id,
        tracing=tracing or Tracing(),
    )
    routes = _routes(with_web=config.ingress.web)
    app = Starlette(
        routes=routes,
        middleware=_layers(context, frozenset(route.path for route in routes)),
        exception_handlers={HTTPException: _on_http_exception},
    )
    app.router.redirect_slashes = False
    app.state.context = context
    return app


def _routes(with_web: bool) -> list[Route]:
    routes = [
        Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
        Route("/v1/completions", completions.completions, methods=["POST"]),
        Route("/v1/responses", responses.responses, methods=["POST"]),
        Route("/v1/embeddings", embeddings.embeddings, methods=["POST"]),
        Route("/v1/models", models.list_models),
        Route("/v1/models/{id:path}", models.get_model),
        Route("/generate", completions.generate, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokens.tokenizer_info),
        Route("/health", service.health),
        Route("/readyz", service.health),
        Route("/livez", service.livez),
        Route("/version", service.version),
        Route("/metrics", service.metrics),
        Route("/openapi.json", pages.openapi),
        Route("/status.json", status.StatusRoute().__call__),
        Route("/admin/drain", admin.drain, methods=["POST"]),
        Route("/admin/models/{id:path}/reload", admin.reload, methods=["POST"]),
        Route("/admin/stats", admin.stats),
        Route("/admin/profile", profile.profile, methods=["POST"]),
        Route("/admin/usage", admin.usage),
    ]
    if with_web:
        web = pages.WebPages()
        routes += [
            Route("/", web.chat),
            Route("/docs", web.docs),
            Route("/status", web.status),
            Route("/static/{name}", web.static),
        ]
    return routes


def _layers(context: ApiContext, endpoints: frozenset[str]) -> list[Middleware]:
    ingress = context.config.ingress
    layers = [
        Middleware(
            RequestScopeMiddleware,
            metrics=context.metrics,
            endpoints=endpoints,
            timed=TIMED_PATHS,
            host_echoes_id=context.host_echoes_id,
            tracing=context.tracing,
        ),
        Middleware(
            AuthMiddleware,
            keys=context.keys,
            limited=ADMITTED_PATHS,
            protect_metrics=context.config.auth.protect_metrics,
        ),
        Middleware(
            PatienceMiddleware,
            receive_timeout_s=ingress.receive_timeout_s,
            send_timeout_s=ingress.send_timeout_s,
        ),
        Middleware(BodyLimitMiddleware, max_body_bytes=ingress.max_body_bytes),
        Middleware(AdmissionMiddleware, admission=context.admission, paths=ADMITTED_PATHS),
    ]
    if context.config.fallback.url is not None:
        layers.insert(-1, _fallback(context))
    if ingress.cors_origins:
        # Outermost, so that errors carry its headers too.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=ingress.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
        layers.insert(0, cors)
    return layers


def _fallback(context: ApiContext) -> Middleware:
    section = context.config.fallback
    policy = FallbackPolicy(section, context.config.ingress.num_replicas, time.monotonic)
    context.metrics.on_ttft = policy.latency.observe
    return Middleware(FallbackMiddleware, policy=policy, upstream=Upstream(section))


def _on_http_exception(request: Request, error: Exception) -> Response:
    return error_response(error, info_of(request.scope).request_id)
