"""HAProxy of one's own in front of the machines, with TLS: Serve's HAProxy mode has none."""

from __future__ import annotations

from serve_app.cli.cluster.inventory import Inventory
from serve_app.cli.cluster.render import front
from serve_app.cli.cluster.render.templates import MADE_BY, fill


def render(inventory: Inventory) -> dict[str, str]:
    """Return `haproxy.cfg`."""
    settings = inventory.haproxy
    values = front.values(inventory, settings)
    text = fill(
        "haproxy.cfg.j2",
        haproxy=settings,
        bind=_bind(settings.bind),
        redirect_bind=_bind(settings.redirect_listen or ""),
        **values,
    )
    return {"haproxy.cfg": MADE_BY.format(kind="haproxy") + text}


def _bind(listen: str) -> str:
    """Return `listen` as HAProxy has it: a port alone is `:80`, on all addresses."""
    return listen if ":" in listen else f":{listen}"
