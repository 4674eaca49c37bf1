"""Config sections for several pools of replicas per model, and for how requests reach them."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from serve_app.config.section import Section

_SectionT = TypeVar("_SectionT", bound=Section)


class PoolSection(Section):
    """One kind of replica of the model; what it leaves out is as in `model_replica`, `engine`."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9_]{0,31}$", description="Its name in metrics and deployment names."
    )
    model_replica: dict[str, Any] = Field(
        default_factory=dict,
        description="Laid over model_replica: pool, num_replicas or autoscaling, num_cards, …",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, description="Laid over engine: max_num_seqs, kv_cache_tokens, …"
    )


class RoutingSection(Section):
    """How an ingress chooses the replica that takes a request."""

    policy: Literal["expected_start", "power_of_two"] = Field(
        "expected_start",
        description="expected_start: the replica that can begin soonest, by queue, KV room and"
        " cached prefix; power_of_two: Ray Serve's own choice, the shorter of two random queues"
        " (within the first pool).",
    )
    prefix_affinity: bool = Field(
        True, description="Count what a replica has cached of a prompt's beginning."
    )


def overlaid(section: _SectionT, changes: dict[str, Any], pool: str) -> _SectionT:
    """Return `section` with a pool's changes laid over it. Raises ValueError, naming the pool."""
    values = section.model_dump(exclude_unset=True)
    if "autoscaling" in changes:
        values.pop("num_replicas", None)
    if "num_replicas" in changes:
        values.pop("autoscaling", None)
    try:
        return type(section).model_validate({**values, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"pool {pool}: {where}: {first['msg']}") from None
