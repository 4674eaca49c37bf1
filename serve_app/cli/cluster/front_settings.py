"""Settings of what stands before the machines: nginx, HAProxy, and each machine's firewall."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from serve_app.cli.cluster.fields import Port, Section
from serve_app.config.schema import IngressSection

_MIB = 1 << 20
_LISTEN = r"^([0-9A-Za-z.*_-]+:|\[[0-9A-Fa-f:]+\]:)?[0-9]{1,5}$"
_FILE = r"^/[^\s;{}'\"\\]+$"
_ACCOUNT = r"^[a-z_][a-z0-9_-]*$"
_MAX_BODY_BYTES: int = IngressSection.model_fields["max_body_bytes"].default


def _checked_network(value: str) -> str:
    try:
        return str(ip_network(value))
    except ValueError:
        raise ValueError(
            f"expected an address, or a network such as 10.0.0.0/24, got {value!r}"
        ) from None


Network = Annotated[str, AfterValidator(_checked_network)]


class Front(Section):
    """A proxy in front of the machines: where it listens, what it passes on, its TLS."""

    listen: str | None = Field(
        None, pattern=_LISTEN, description="[address:]port; default: 443 with TLS, 80 without."
    )
    service_port: Port = Field(8000, description="http_options.port of the config that is served.")
    backup: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.:\[\]-]+:[0-9]+$",
        description="host:port of a second, independent cluster that stands by.",
    )
    connect_timeout_s: Annotated[int, Field(ge=1)] = 2
    longest_silence_s: Annotated[int, Field(ge=1)] = Field(
        3600, description="Longest pause of an answer; above ingress.request_timeout_s."
    )
    max_body_mb: Annotated[int, Field(ge=1)] = Field(
        max(1, _MAX_BODY_BYTES // _MIB),
        description="Largest request in MiB: ingress.max_body_bytes of the config.",
    )
    certificate: str | None = Field(
        None, pattern=_FILE, description="PEM file, chain included; none: plain HTTP."
    )
    certificate_key: str | None = Field(None, pattern=_FILE, description="Its private key, PEM.")
    minimum_tls: Literal["1.2", "1.3"] = Field("1.2", description="Oldest TLS that is accepted.")
    hsts_max_age_s: Annotated[int, Field(ge=0)] = Field(
        0, description="Strict-Transport-Security: how long browsers insist on TLS; 0: not sent."
    )
    redirect_listen: str | None = Field(
        "80", pattern=_LISTEN, description="Where plain HTTP is sent on to TLS; null: nowhere."
    )
    trusted_proxies: tuple[Network, ...] = Field(
        (), description="Networks of proxies before this one whose X-Forwarded-For is believed."
    )

    @property
    def has_tls(self) -> bool:
        """Whether it speaks TLS."""
        return self.certificate is not None

    @property
    def bind(self) -> str:
        """Where it listens: [address:]port."""
        return self.listen or ("443" if self.has_tls else "80")

    @property
    def port_suffix(self) -> str:
        """What follows the host's name in its URLs: nothing for TLS' own port."""
        port = self.bind.rpartition(":")[2]
        return "" if port == "443" else f":{port}"

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mb` in bytes."""
        return self.max_body_mb * _MIB

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if self.certificate is None and self.certificate_key is not None:
            raise ValueError("certificate_key needs certificate, the file it belongs to")
        if self.certificate is None and self.hsts_max_age_s:
            raise ValueError("hsts_max_age_s needs certificate: without TLS browsers ignore it")
        return self


class Nginx(Front):
    """nginx in front of the machines."""

    server_name: str = Field(
        "_", pattern=r"^[A-Za-z0-9_.* -]+$", description="Names it answers to."
    )
    max_fails: Annotated[int, Field(ge=1)] = Field(
        1, description="Failures after which a machine is left out for fail_timeout_s."
    )
    fail_timeout_s: Annotated[int, Field(ge=1)] = 5

    @model_validator(mode="after")
    def _check_certificate(self) -> Self:
        if self.certificate is not None and self.certificate_key is None:
            raise ValueError("certificate and certificate_key belong together")
        return self


class HAProxy(Front):
    """A HAProxy of one's own in front of the machines; Serve's own one speaks HTTP only."""

    check_interval_s: Annotated[int, Field(ge=1)] = Field(
        1, description="How often each machine's /readyz is asked."
    )
    max_connections: Annotated[int, Field(ge=1)] = 4096
    user: str | None = Field(
        "haproxy", pattern=_ACCOUNT, description="Whom it runs as; null where not root starts it."
    )
    group: str = Field("haproxy", pattern=_ACCOUNT)

    @model_validator(mode="after")
    def _check_key_file(self) -> Self:
        """HAProxy finds a key by its certificate's name alone."""
        if self.certificate is None or self.certificate_key is None:
            return self
        beside = {f"{self.certificate}.key", f"{self.certificate.removesuffix('.crt')}.key"}
        if self.certificate_key not in beside:
            raise ValueError(
                f"certificate_key: HAProxy reads the key from {' or '.join(sorted(beside))};"
                " or put it into the certificate's file and leave certificate_key out"
            )
        return self


class Firewall(Section):
    """nftables on each machine: the nodes among themselves, the API, and what is named here."""

    clients: tuple[Network, ...] = Field(
        ("0.0.0.0/0", "::/0"),
        description="Networks that may reach the API's port; the addresses of nginx or HAProxy.",
    )
    monitoring: tuple[Network, ...] = Field(
        (), description="Networks that may scrape the metrics' ports, such as Prometheus' host."
    )
    administration: tuple[Network, ...] = Field(
        ("0.0.0.0/0", "::/0"), description="Networks that may reach sshd."
    )
    allowed_tcp: tuple[Port, ...] = Field((), description="More TCP ports open to everyone.")
    allowed_udp: tuple[Port, ...] = Field((), description="More UDP ports open to everyone.")
    service_port: Port = Field(8000, description="http_options.port of the config that is served.")
    exporter_port: Port = Field(9410, description="Port of `xeray exporter`.")

    @field_validator("clients", "administration")
    @classmethod
    def _check_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected at least one network: with none nobody gets in")
        return value
