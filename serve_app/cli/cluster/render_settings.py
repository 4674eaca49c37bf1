"""Settings of what is rendered: limits of the units, the RayService and its pods."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from serve_app import __version__
from serve_app.cli.cluster.fields import Count, Port, Section, checked_labels, checked_name

RAY_VERSION = "2.60.0"
"""Ray in the images: the same in each, whenever it is built, or its nodes could not join."""

DEFAULT_IMAGE = f"xeray:{__version__}-cpu"
_QUANTITY = r"^\d+(Mi|Gi|Ti)$"


class Systemd(Section):
    """Limits of the systemd units."""

    cpu_weight: Annotated[int, Field(ge=1, le=10000)] = Field(
        200, description="Share of the processor where it is scarce; other services have 100."
    )
    memory_max: str = Field(
        "90%", pattern=r"^\d+[%KMGT]?$", description="Most memory, as systemd's MemoryMax."
    )
    drain_s: Annotated[int, Field(ge=0)] = Field(
        60, description="Time for replicas to move to other machines before a stop."
    )


class PodGroup(Section):
    """Worker pods that are alike."""

    name: str
    image: str = Field(DEFAULT_IMAGE, description="Image of cluster/docker.")
    replicas: Annotated[int, Field(ge=1)] = 1
    cards: Count = Field(0, description="Arc cards of each pod.")
    driver: Literal["i915", "xe"] | None = Field(
        None, description="Kernel driver of the cards: i915 for the A series, xe for the B series."
    )
    cpu: Annotated[int, Field(ge=1)] = Field(8, description="CPU limit of each pod.")
    memory: str = Field("64Gi", pattern=_QUANTITY, description="Memory limit of each pod.")
    xeon_cores: Count = Field(2, description="Cores of those for Preprocessors.")
    labels: dict[str, str] = Field(default_factory=dict, description="More labels of its nodes.")
    node_selector: dict[str, str] = Field(
        default_factory=dict, description="Labels of the Kubernetes nodes to run on."
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return checked_name(value)

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_labels(value)

    @model_validator(mode="after")
    def _check_driver(self) -> Self:
        if self.cards and self.driver is None:
            raise ValueError(
                "cards need driver: i915 or xe; the device plugin's resource is named after it"
            )
        if self.xeon_cores > self.cpu:
            raise ValueError(f"xeon_cores ({self.xeon_cores}) exceeds cpu ({self.cpu})")
        return self


class Kubernetes(Section):
    """The RayService."""

    namespace: str = "xeray"
    operator_namespace: str = Field("kuberay-system", description="Where KubeRay's operator runs.")
    config: str = Field("cpu", description="Config of configs/, or a path, to deploy.")
    model: str | None = Field(None, description="XERAY_MODEL in the pods, such as /models/a.gguf.")
    models_claim: str | None = Field(
        None, description="PersistentVolumeClaim with models, mounted at /models."
    )
    render_gid: Count = Field(992, description="Group of /dev/dri/renderD* on the nodes.")
    head_image: str = DEFAULT_IMAGE
    head_cpu: Annotated[int, Field(ge=1)] = 8
    head_memory: str = Field("64Gi", pattern=_QUANTITY)
    termination_grace_s: Annotated[int, Field(ge=0)] = Field(
        120, description="Time for streams to end when a pod is told to."
    )
    groups: tuple[PodGroup, ...] = Field(
        (PodGroup(name="cpu"),), min_length=1, description="Groups of worker pods."
    )

    @field_validator("namespace", "operator_namespace")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return checked_name(value)


class Nginx(Section):
    """nginx in front of the machines."""

    listen: str = Field("80", pattern=r"^[0-9A-Fa-f.:\[\]*]+$", description="[address:]port.")
    server_name: str = Field(
        "_", pattern=r"^[A-Za-z0-9_.* -]+$", description="Names it answers to."
    )
    service_port: Port = Field(8000, description="http_options.port of the config that is served.")
    backup: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.:\[\]-]+:[0-9]+$",
        description="host:port of a second, independent cluster that stands by.",
    )
    max_fails: Annotated[int, Field(ge=1)] = Field(
        1, description="Failures after which a machine is left out for fail_timeout_s."
    )
    fail_timeout_s: Annotated[int, Field(ge=1)] = 5
    connect_timeout_s: Annotated[int, Field(ge=1)] = 2
    longest_silence_s: Annotated[int, Field(ge=1)] = Field(
        3600, description="Longest pause of an answer; above ingress.request_timeout_s."
    )
    max_body_mb: Annotated[int, Field(ge=1)] = 8
    certificate: str | None = Field(
        None, pattern=r"^/[^\s;{}]+$", description="Certificate (chain) file; none: plain HTTP."
    )
    certificate_key: str | None = Field(None, pattern=r"^/[^\s;{}]+$")

    @model_validator(mode="after")
    def _check_certificate(self) -> Self:
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("certificate and certificate_key belong together")
        return self
