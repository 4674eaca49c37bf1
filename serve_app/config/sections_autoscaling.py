"""Config of autoscaling: bounds, reaction, and the targets of our own policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from serve_app.config.section import NonNegativeInt, PositiveInt, Seconds, Section


class EngineLoadTargets(Section):
    """Targets of the autoscaling policy `engine_load`; the one that is missed most decides."""

    waiting_tokens: PositiveInt = Field(
        2048, description="Prompt tokens per replica that wait for their first token."
    )
    kv_usage: float = Field(0.8, gt=0, le=1, description="Share of KV blocks in use.")
    ttft_p95_s: float = Field(1.0, gt=0, description="p95 time to first token, seconds.")


class AutoscalingSection(Section):
    """Bounds and reaction of a deployment's autoscaling; passed on to Ray Serve."""

    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: float = Field(8.0, gt=0)
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(120.0, ge=0)
    downscale_to_zero_delay_s: float | None = Field(
        None, ge=0, description="Idle time before the last replica ends (min_replicas 0)."
    )
    look_back_period_s: Seconds = 10.0
    metrics_interval_s: Seconds = 2.0
    policy: Literal["ongoing_requests", "engine_load"] = Field(
        "ongoing_requests",
        description="engine_load: scale model replicas by waiting tokens, KV pressure and TTFT.",
    )
    targets: EngineLoadTargets = EngineLoadTargets()

    @model_validator(mode="after")
    def _check_bounds(self) -> AutoscalingSection:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is less than"
                f" min_replicas ({self.min_replicas})"
            )
        return self
