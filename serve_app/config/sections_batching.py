"""Config sections of what changes at run time: batching of steps, and of prompts to prepare."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serve_app.config.section import OFF_IS_A_WORD, PositiveInt, Section


class BatchingSection(Section):
    """Run-time toggles of the model's batching; changed through the deployment's user_config."""

    mode: Annotated[Literal["continuous", "static", "off"], OFF_IS_A_WORD] = Field(
        "continuous",
        description="continuous: join at any step; static: whole batches; off: one by one.",
    )
    max_num_seqs: PositiveInt | None = Field(None, description="At most the engine's max_num_seqs.")
    max_num_batched_tokens: PositiveInt | None = Field(
        None, description="Token budget of one step."
    )


class MicroBatchingSection(Section):
    """Run-time toggles of the Preprocessor's micro-batching (`@serve.batch`)."""

    enabled: bool = Field(True, description="Off: every call runs alone and at once.")
    max_batch_size: PositiveInt = Field(16, description="Most requests in one batch.")
    batch_wait_timeout_s: float = Field(
        0.002, ge=0, description="Longest wait for a batch to fill."
    )
