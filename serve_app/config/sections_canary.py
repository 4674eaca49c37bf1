"""`user_config` of the deployment Ingress: which share of the requests a new version takes."""

from __future__ import annotations

from pydantic import Field

from serve_app.config.section import Section


class CanarySection(Section):
    """A second application that holds the new version of the model."""

    application: str = Field(description="Its name in Serve; it has deployments of its own.")
    percent: float = Field(0.0, ge=0, le=100, description="Share of the requests that it takes.")
    deployments: tuple[str, ...] = Field(
        ("ModelReplica",), min_length=1, description="Its pools, best first."
    )


class IngressUserConfig(Section):
    """What changes on a running Ingress."""

    canary: CanarySection | None = Field(None, description="None: the application's own model.")
