"""Writes what starts nodes without SSH, what stands before them, and what guards them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from serve_app.cli.cluster.inventory import Inventory
from serve_app.cli.cluster.render import (
    docker,
    firewall,
    haproxy,
    kubernetes,
    nginx,
    ray_up,
    security,
    systemd,
)
from serve_app.core.errors import ConfigError

Renderer = Callable[[Inventory], dict[str, str]]

RENDERERS: dict[str, Renderer] = {
    "systemd": systemd.render,
    "ray-up": ray_up.render,
    "docker": docker.render,
    "kubernetes": kubernetes.render,
    "nginx": nginx.render,
    "haproxy": haproxy.render,
    "firewall": firewall.render,
    "security": security.render,
}
"""Kind → function that returns file name → text."""


def render(kind: str, inventory: Inventory, output: Path) -> list[Path]:
    """Write the files of a kind into `output` and return their paths. Raises ConfigError."""
    paths = []
    for name, text in RENDERERS[kind](inventory).items():
        path = output / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output: {path}: {error.strerror}") from None
        paths.append(path)
    return paths
