"""What every front has in common: its servers by their cards, its own errors, headers it drops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.api.errors import error_body, error_info
from serve_app.cli.cluster.front_settings import Front
from serve_app.cli.cluster.inventory import Inventory, Machine, bracketed
from serve_app.core.errors import (
    NotFoundError,
    OverloadedError,
    RequestTooLargeError,
    XeRayError,
)

CIPHERS = ":".join(
    f"ECDHE-{signature}-{cipher}"
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for signature in ("ECDSA", "RSA")
)
"""Of TLS 1.2 those with forward secrecy and authenticated encryption; TLS 1.3 has no others."""

SERVE_HEADERS = (
    "X-Request-Timeout-Seconds",
    "X-Request-Disconnect-Disabled",
    "X-Session-Id",
    "Serve-Multiplexed-Model-Id",
)
"""Ray Serve 2.60 obeys them, whoever sends them (ray/serve/_private/constants.py)."""


@dataclass(frozen=True, slots=True)
class Server:
    """A machine as a front sees it: host:port, its share of the streams, where that comes from."""

    name: str
    address: str
    weight: int
    comment: str


def values(inventory: Inventory, settings: Front) -> dict[str, Any]:
    """Return what the template of any front is filled with."""
    servers = [_server(machine, settings.service_port) for machine in inventory.machines]
    return {
        "upstream": inventory.cluster.name.replace("-", "_"),
        "servers": servers,
        "tries": len(servers) + (settings.backup is not None),
        "ciphers": CIPHERS,
        "serve_headers": SERVE_HEADERS,
        "errors": _errors(settings),
    }


def _errors(settings: Front) -> Mapping[str, str]:
    """Return the bodies of a front's own answers: word for word those of the API."""
    size = settings.max_body_bytes
    return {
        "not_found": _body(NotFoundError("There is no such route.")),
        "too_large": _body(
            RequestTooLargeError(f"The request body is larger than the {size} bytes allowed here.")
        ),
        "unreachable": _body(
            OverloadedError("No machine of the service can be reached.", code="no_replica")
        ),
    }


def _body(error: XeRayError) -> str:
    text = json.dumps(error_body(error_info(error)))
    assert "'" not in text, "in single quotes in the configuration"
    return text


def _server(machine: Machine, port: int) -> Server:
    weight, why = _weight(machine)
    address = f"{bracketed(machine.ray_address)}:{port}"
    return Server(machine.name, address, weight, f"{machine.name}: {why}")


def _weight(machine: Machine) -> tuple[int, str]:
    """Return a machine's share of the streams: its cards, 1 without any or where `auto` counts."""
    if machine.nginx_weight is not None:
        return machine.nginx_weight, "nginx_weight"
    if machine.cards is None:
        return 1, "cards: auto; nginx_weight says more"
    count = machine.cards.arc_gpu + machine.cards.igpu
    return max(1, count), f"{count} cards"
