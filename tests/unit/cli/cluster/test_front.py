"""The settings of nginx and HAProxy, and what is rendered of them; tests/cluster runs both."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from serve_app.cli.cluster.inventory import parse_inventory
from serve_app.cli.cluster.render import RENDERERS
from serve_app.core.errors import ConfigError


def rendered(kind: str, settings: dict[str, Any]) -> str:
    machines = [{"name": "one", "address": "127.0.0.1", "role": "head"}]
    inventory = parse_inventory(yaml.safe_dump({"machines": machines, kind: settings}), "test")
    (text,) = RENDERERS[kind](inventory).values()
    return text


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("nginx", "{certificate: /c.pem}", "belong together"),
        ("nginx", "{certificate_key: /c.key}", "needs certificate"),
        ("nginx", "{hsts_max_age_s: 1}", "without TLS"),
        ("haproxy", "{certificate: /c.pem, certificate_key: /k.pem}", r"/c\.pem\.key"),
        ("haproxy", "{trusted_proxies: [proxy]}", "an address, or a network"),
        ("haproxy", "{certificate: '/c.pem; evil'}", "certificate"),
    ],
)
def test_settings_that_cannot_work_are_refused(kind: str, settings: str, words: str) -> None:
    text = f"machines: [{{address: a, role: head}}]\n{kind}: {settings}"
    with pytest.raises(ConfigError, match=words):
        parse_inventory(text, "test")


@pytest.mark.parametrize(
    ("kind", "tls", "plain", "redirect", "newest_only"),
    [
        (
            "nginx",
            "listen 443 ssl;",
            "listen 80;",
            "return 308 https://$host$req",
            "_protocols TLSv1.3;",
        ),
        ("haproxy", "bind :443 ssl", "bind :80", "host_only]%[capture", "ssl-min-ver TLSv1.3"),
    ],
)
def test_with_a_certificate_the_usual_ports_are_taken(
    kind: str, tls: str, plain: str, redirect: str, newest_only: str
) -> None:
    key = {"certificate_key": "/c.pem.key"}
    text = rendered(kind, {"certificate": "/c.pem", **key})
    assert all(words in text for words in (tls, plain, redirect))
    strict = {"minimum_tls": "1.3", "redirect_listen": None}
    text = rendered(kind, {"certificate": "/c.pem", **key, **strict})
    assert newest_only in text
    assert plain not in text
    without = rendered(kind, {})
    assert plain in without
    assert "ssl" not in without


def test_proxies_that_are_trusted_tell_the_client() -> None:
    settings = {"trusted_proxies": ["10.0.0.0/8", "fd00::1"]}
    nginx = rendered("nginx", settings)
    assert "set_real_ip_from 10.0.0.0/8;" in nginx
    assert "set_real_ip_from fd00::1/128;" in nginx
    assert "if { src 10.0.0.0/8 fd00::1/128 }" in rendered("haproxy", settings)
