"""One sequence in a model replica: its span with the engine's phases, and its line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from serve_app.observability.tracing import PROVIDER_NAME, REQUEST_ID, Attribute, Tracing

_LOG = logging.getLogger(__name__)


class GenerationSpan:
    """The span of one sequence in a model replica, with the engine's steps below it."""

    def __init__(self, tracing: Tracing, carrier: Mapping[str, str], model: str) -> None:
        self._first_token_s: float | None = None
        self._span = tracing.start(
            "generate",
            carrier,
            attributes={
                "gen_ai.operation.name": "generate_content",
                "gen_ai.provider.name": PROVIDER_NAME,
                "gen_ai.request.model": model,
                "xeray.request_id": carrier.get(REQUEST_ID, ""),
            },
        )
        self._request_id = carrier.get(REQUEST_ID, "")
        self._began_s = time.time()  # not before the span itself

    def first_token(self, queue_time_s: float | None, engine_ttft_s: float) -> None:
        """Note the engine's first token: seconds in its queue, and from submission to it."""
        self._first_token_s = self._began_s + engine_ttft_s
        if queue_time_s is None:
            self._span.phase("engine.queue_and_prefill", self._began_s, self._first_token_s)
        else:
            scheduled_s = self._began_s + queue_time_s
            self._span.phase("engine.queue", self._began_s, scheduled_s)
            self._span.phase("engine.prefill", scheduled_s, self._first_token_s)
        self._span.set({"gen_ai.response.time_to_first_chunk": engine_ttft_s})

    def end(
        self, num_prompt: int, num_generated: int, num_cached: int = 0, failure: str = ""
    ) -> None:
        """End the span, with the tokens in and out; `failure` is an error's code.

        `num_cached` prompt tokens came out of the prefix cache.
        """
        if self._first_token_s is not None:
            tokens: dict[str, Attribute] = {"gen_ai.usage.output_tokens": num_generated}
            self._span.phase("engine.decode", self._first_token_s, time.time(), tokens)
        self._span.set(
            {
                "gen_ai.usage.input_tokens": num_prompt,
                "gen_ai.usage.output_tokens": num_generated,
                "gen_ai.usage.cache_read.input_tokens": num_cached,
            }
        )
        if failure:
            self._span.fail(failure)
        self._span.end()
        outcome = f"failed ({failure})" if failure else "ended"
        _LOG.debug(
            "%s: %d prompt tokens, %d of them cached, %d generated",
            outcome,
            num_prompt,
            num_cached,
            num_generated,
            extra={"request_id": self._request_id},
        )
