"""The parameters that chat completions, completions and /generate share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, Tag, field_validator

from serve_app.api.protocol.base import Harmless, RequestModel, is_empty, never, text_or_list
from serve_app.api.protocol.bounds import Bounded

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_NAME_CHARS = 512
_INT64 = 2**63

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Bounded(16),
]
"""Up to 16 pairs of the client's own."""


StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopString, Tag("(text)")]
    | Annotated[tuple[StopString, ...], Bounded(MAX_STOP_STRINGS), Tag("(list)")],
    text_or_list("strings"),
]

LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Bounded(MAX_LOGIT_BIAS)]


class StreamOptions(RequestModel):
    """What a stream carries besides the text."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")


class SamplingFields(RequestModel):
    """How the answer is sampled and when it stops."""

    unsupported: ClassVar[Mapping[str, Harmless]] = {
        "guided_json": never,
        "guided_regex": never,
        "guided_choice": never,
        "guided_grammar": never,
        "structured_outputs": never,
        "use_beam_search": is_empty,
        "length_penalty": lambda value: value == 1.0,
        "early_stopping": is_empty,
        "bad_words": is_empty,
        "allowed_token_ids": never,
        "prompt_logprobs": never,
        "truncate_prompt_tokens": never,
        "logits_processors": is_empty,
        "typical_p": lambda value: value == 1.0,
        "mirostat": is_empty,
    }
    ignored: ClassVar[frozenset[str]] = frozenset()

    model: str | None = Field(
        None,
        max_length=MAX_NAME_CHARS,
        description="A served model's id or alias; default: the first.",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: Stop | None = Field(None, description="A string, or up to 16.")
    max_tokens: int | None = Field(None, ge=0)
    min_tokens: int | None = Field(None, ge=0)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: LogitBias | None = Field(
        None, description="Token id (as a string) to bias, -100 to 100."
    )
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[tuple[int, ...], Bounded(1024)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=MAX_NAME_CHARS)

    @field_validator("logit_bias")
    @classmethod
    def _check_logit_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 9):
                raise ValueError("keys should be token ids, written as decimal strings")
        return value

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however they were written."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)
