"""What a ModelReplica does with an engine's events: one request's tokens to chunks of text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from serve_app.core.errors import EngineError, ErrorInfo
from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.requests import GenerateChunk, GenerateRequest, LogprobItem
from serve_app.text.detokenizer import Detokenizer
from serve_app.text.logprobs import to_logprob_item, to_logprob_items
from serve_app.text.reasoning import ReasoningCounter, ReasoningKind
from serve_app.text.stop_strings import StopStringMatcher
from serve_app.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Gathered:
    """What one call of `push` puts into its chunk."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobItem] = field(default_factory=list)
    prompt_logprobs: tuple[LogprobItem | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: ErrorInfo | None = None
    embedding: bytes | None = None

    @property
    def is_empty(self) -> bool:
        return not (
            self.token_ids
            or self.texts
            or self.prompt_logprobs is not None
            or self.finish_reason is not None
            or self.error is not None
        )


class OutputProcessor:
    """Detokenises one request, watches for its stop strings and ends it.

    Chunks carry every token that was generated up to the end, the stopping one included, with its
    log-probability; the text of a stopping token or string is left out unless
    `include_stop_str_in_output`. Text can lag behind its tokens while it may be the beginning of a
    stop string or of a character.
    """

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=request.skip_special_tokens,
            is_continuation=True,
            shown_special_tokens=request.shown_special_tokens,
        )
        self._reasoning = (
            None
            if request.reasoning_kind == ReasoningKind.NONE
            else ReasoningCounter(request.reasoning_kind, request.starts_in_reasoning)
        )
        self._matcher = StopStringMatcher(request.stop, request.include_stop_str_in_output)
        self._num_generated = 0
        self._num_cached = 0
        self._queue_time_s: float | None = None
        self._is_finished = False
        # What was shown of them went out with their own chunks; what they held back is held again.
        self._take_tokens(TokenEvent("", request.generated_token_ids), _Gathered())

    @property
    def is_finished(self) -> bool:
        """Whether the last chunk was handed out; further events are ignored."""
        return self._is_finished

    @property
    def is_stopped_by_string(self) -> bool:
        """Whether a stop string ended it: the engine's sequence is to be aborted."""
        return self._matcher.matched is not None

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, the stopping one included."""
        return self._num_generated

    @property
    def num_cached(self) -> int:
        """Prompt tokens that the engine had in its prefix cache."""
        return self._num_cached

    def push(self, events: Iterable[TokenEvent]) -> GenerateChunk | None:
        """Take the request's next events; return a chunk if there is anything to tell."""
        gathered = _Gathered()
        for event in events:
            if self._is_finished:
                break
            self._take(event, gathered)
        if gathered.is_empty:
            return None
        return GenerateChunk(
            text="".join(gathered.texts),
            token_ids=tuple(gathered.token_ids),
            logprobs=tuple(gathered.logprobs) if gathered.logprobs else None,
            prompt_logprobs=gathered.prompt_logprobs,
            finish_reason=gathered.finish_reason,
            stop_reason=gathered.stop_reason,
            num_prompt=len(self._request.prompt_token_ids),
            num_generated=self._num_generated,
            num_cached=self._num_cached,
            queue_time_s=self._queue_time_s,
            error=gathered.error,
            embedding=gathered.embedding,
            num_reasoning=None if self._reasoning is None else self._reasoning.num_tokens,
        )

    def _take(self, event: TokenEvent, gathered: _Gathered) -> None:
        if not self._request.generated_token_ids:  # else its first chunk has told it
            self._num_cached = max(self._num_cached, event.num_cached_tokens)
        if event.queue_time_s is not None:
            self._queue_time_s = event.queue_time_s
        if event.embedding is not None:
            gathered.embedding = event.embedding
        if event.prompt_logprobs is not None:
            gathered.prompt_logprobs = to_logprob_items(self._tokenizer, event.prompt_logprobs)
        self._take_tokens(event, gathered)
        if not self._is_finished and event.finish_reason is not None:
            self._end(event, gathered)

    def _take_tokens(self, event: TokenEvent, gathered: _Gathered) -> None:
        """Take tokens one by one, so that a stop string ends it at the token that completes it."""
        for index, token_id in enumerate(event.new_token_ids):
            gathered.token_ids.append(token_id)
            self._num_generated += 1
            if event.logprobs is not None:
                gathered.logprobs.append(to_logprob_item(self._tokenizer, event.logprobs[index]))
            is_last = index == len(event.new_token_ids) - 1
            if is_last and self._is_stopping(event, token_id):
                if self._request.include_stop_str_in_output:
                    self._show(self._detokenizer.push((token_id,)), gathered, is_matched=False)
                return
            text = self._detokenizer.push((token_id,))
            if self._reasoning is not None:
                self._reasoning.add(text)
            self._show(text, gathered)
            if self._is_finished:
                return

    def _is_stopping(self, event: TokenEvent, token_id: int) -> bool:
        return event.finish_reason is FinishReason.STOP and event.stop_token_id == token_id

    def _show(self, text: str, gathered: _Gathered, *, is_matched: bool = True) -> None:
        if not text:
            return
        # Before min_tokens nothing may stop the sequence, a stop string neither.
        if not is_matched or self._num_generated < self._request.sampling.min_tokens:
            gathered.texts.append(self._matcher.finish() + text)
            return
        text, matched = self._matcher.push(text)
        if text:
            gathered.texts.append(text)
        if matched is not None:
            self._is_finished = True
            gathered.finish_reason = FinishReason.STOP.value
            gathered.stop_reason = matched

    def _end(self, event: TokenEvent, gathered: _Gathered) -> None:
        self._show(self._detokenizer.finish(), gathered)
        if self._is_finished:  # the last character completed a stop string
            return
        self._is_finished = True
        if held := self._matcher.finish():
            gathered.texts.append(held)
        if event.finish_reason is FinishReason.ERROR:
            gathered.error = event.error or EngineError("the engine failed on this request").info()
            return
        assert event.finish_reason is not None
        gathered.finish_reason = event.finish_reason.value
        if event.finish_reason is FinishReason.STOP:
            is_eos = event.stop_token_id in self._tokenizer.eos_token_ids
            gathered.stop_reason = None if is_eos else event.stop_token_id
