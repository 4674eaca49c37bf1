"""Config of tracing."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from serve_app.config.section import Section


class TracingSection(Section):
    """Spans of each request, sent to an OpenTelemetry collector. Off without endpoint.

    Needs the extra `tracing`. Spans hold names, counts and times, never text of a prompt or answer.
    """

    endpoint: str | None = Field(
        None, description="OTLP/HTTP URL, such as http://127.0.0.1:4318/v1/traces."
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of traces kept where the caller did not decide."
    )
    service_name: str = Field("xeray", min_length=1, description="`service.name` of the spans.")

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"expected an http:// or https:// URL, got {value!r}")
        return value
