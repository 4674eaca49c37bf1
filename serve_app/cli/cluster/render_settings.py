"""Settings of what is rendered: limits of the units, the RayService and its pods."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from serve_app import __version__
from serve_app.cli.cluster.fields import Count, Section, checked_labels, checked_name

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


class Security(Section):
    """What the profiles of AppArmor and SELinux let a node read besides its own."""

    model_folders: tuple[Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_.-]+)+$")], ...] = Field(
        ("/srv/models",), description="Folders with models, on each machine."
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
    seccomp_profile: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_./-]*$",
        description="Path of xeray-seccomp.json below the kubelet's folder seccomp, on each node;"
        " default: the container runtime's own profile.",
    )
    tmp_size: str = Field(
        "16Gi", pattern=_QUANTITY, description="Most that a pod writes to /tmp, and to its home."
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
