"""Adapter over OpenVINO GenAI's ContinuousBatchingPipeline: Xeon and Core CPUs, Arc and iGPUs.

The pipeline schedules and samples; this side admits under the toggles, hands in ids, and reads each
request's handle after a step. `step()` holds the GIL: the engine has its process to itself.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from serve_app.config.schema import EngineSection
from serve_app.core.errors import ConfigError, EngineError, UnsupportedParameterError
from serve_app.core.events import (
    BatchingOptions,
    EngineInfo,
    EngineStats,
    FinishReason,
    TokenEvent,
    TokenLogprob,
)
from serve_app.core.sampling import SamplingParams
from serve_app.engine.adapter_stats import AdapterStats
from serve_app.engine.admission import Admission
from serve_app.engine.openvino_model import OpenVinoModel, last_line
from serve_app.engine.openvino_runtime import import_openvino
from serve_app.engine.openvino_settings import (
    describe,
    generation_config,
    plugin_properties,
    start_pipeline,
)
from serve_app.engine.validation import check_request

_LOG = logging.getLogger(__name__)
_MAX_FAILED_STEPS = 3


@dataclass(slots=True)
class _Request:
    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    handle: Any = None
    num_generated: int = 0
    submitted_s: float = field(default_factory=time.monotonic)
    queue_time_s: float | None = None


class OpenVinoEngine:
    """Serves a folder of OpenVINO IR.

    Args:
        model: the IR and the shape of its network.
        section: limits and toggles; a block has the tokens that GenAI gives it.
        device: CPU or GPU, as OpenVINO names it.
        name: the model's name.
        max_model_len: longest prompt + answer asked for; None is what the model was made for.
        properties: of OpenVINO's plug-in; None takes `plugin_properties`.
        load_s: seconds that reading and converting the model took.
    """

    def __init__(
        self,
        model: OpenVinoModel,
        section: EngineSection,
        *,
        device: str,
        name: str,
        max_model_len: int | None = None,
        properties: dict[str, Any] | None = None,
        load_s: float = 0.0,
    ) -> None:
        started = time.perf_counter()
        self._openvino, self._genai = import_openvino()
        if properties is None:
            properties = plugin_properties(section, device)
        self._info = describe(model, section, device, name, max_model_len, properties)
        self._pipeline = start_pipeline(self._genai, model, section, self._info, device, properties)
        self._admission: Admission[_Request] = Admission(section.max_num_seqs)
        self._numbers = itertools.count()
        self._events: list[TokenEvent] = []
        self._stats = AdapterStats()
        self._num_failed_in_a_row = 0
        self._is_paused = False
        self._dead: EngineError | None = None
        loaded_s = load_s + time.perf_counter() - started
        started = time.perf_counter()
        if section.warmup:
            self._warm_up()
        seconds = {"load_s": loaded_s, "warmup_s": time.perf_counter() - started}
        self._info = replace(self._info, startup_s=seconds)

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._info

    def submit(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        """Queue a request. Raises ClientError as `check_request` does.

        GenAI's log-probabilities are those after temperature and penalties: only where neither is
        in use are they the model's own, and only there they are given.
        """
        check_request(self._info, prompt_token_ids, sampling)
        if sampling.logprobs is not None and (not sampling.is_greedy or sampling.has_penalties):
            raise UnsupportedParameterError(
                "logprobs: the openvino engine gives them only at temperature 0 without penalties",
                param="logprobs",
            )
        room = self._info.max_model_len - len(prompt_token_ids)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        self._admission.waiting[request_id] = _Request(
            request_id, tuple(prompt_token_ids), sampling
        )
        self._stats.count(num_prompt_tokens_total=len(prompt_token_ids))

    def abort(self, request_id: str) -> None:
        """End a request; the pipeline frees its blocks in its next step."""
        request = self._admission.remove(request_id)
        if request is None:
            return
        if request.handle is not None:
            request.handle.cancel()
        self._stats.count(num_aborted_total=1)
        self._events.append(TokenEvent(request_id, finish_reason=FinishReason.ABORTED))

    def configure(self, batching: BatchingOptions) -> None:
        """Change the batching toggles. Raises ConfigError beyond the limits.

        GenAI fixes its token budget when it starts: another one needs another start.
        """
        budget = batching.max_num_batched_tokens
        if budget is not None and budget != self._info.max_num_batched_tokens:
            raise ConfigError(
                "batching.max_num_batched_tokens: the openvino engine cannot change it while it"
                f" runs (it is {self._info.max_num_batched_tokens}); set"
                " engine.max_num_batched_tokens",
                param="batching.max_num_batched_tokens",
            )
        self._admission.configure(batching)

    def pause(self) -> None:
        """Stop admitting and stepping; requests keep their place."""
        self._is_paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._is_paused = False

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        if self._events or self._dead:
            return True
        if self._is_paused:
            return False
        return bool(self._admission.waiting or self._has_open())

    def step(self) -> list[TokenEvent]:
        """Hand over what may run, step the pipeline, read what it made.

        Raises EngineError once the pipeline keeps failing and every request had its last event.
        """
        if self._dead is not None:
            raise self._dead
        if not self._is_paused:
            started = time.perf_counter()
            self._hand_over()
            if self._has_open():
                self._run_step()
                self._stats.count_step(
                    time.perf_counter() - started,
                    weight_bytes_read_total=self._info.weights_bytes,
                )
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """Counters and gauges. Blocks as this side sees them: those that running requests fill."""
        lengths = [
            len(request.prompt_token_ids) + request.num_generated
            for request in self._admission.running.values()
        ]
        return self._stats.snapshot(self._admission, self._info, lengths, is_paused=self._is_paused)

    def close(self) -> None:
        """Drop the pipeline and all requests."""
        for request in self._admission.running.values():
            request.handle.cancel()
        self._admission.running.clear()
        self._admission.waiting.clear()
        del self._pipeline

    def _has_open(self) -> bool:
        return bool(self._pipeline.has_non_finished_requests())

    def _hand_over(self) -> None:
        for request in self._admission.admit():
            ids = np.array([request.prompt_token_ids], dtype=np.int64)
            try:
                request.handle = self._pipeline.add_request(
                    next(self._numbers),
                    self._openvino.Tensor(ids),
                    generation_config(self._genai, request.sampling),
                )
            except RuntimeError as error:
                self._fail(request, f"OpenVINO refused the request: {last_line(error)}")

    def _run_step(self) -> None:
        began_s = time.monotonic()
        try:
            self._pipeline.step()
        except RuntimeError as error:
            self._fail_all(error)
            return
        self._num_failed_in_a_row = 0
        self._note_starts(began_s)
        for request in list(self._admission.running.values()):
            self._read(request)

    def _note_starts(self, began_s: float) -> None:
        """Note how long those have waited that the step of `began_s` was the first to compute.

        GenAI tells how many requests it computed, not which: those that decode come first, then
        prompts in the order of their arrival, as far as the token budget goes.
        """
        prompts = [each for each in self._admission.running.values() if not each.num_generated]
        if all(request.queue_time_s is not None for request in prompts):
            return
        num_decoding = len(self._admission.running) - len(prompts)
        num_prompts = self._pipeline.get_metrics().scheduled_requests - num_decoding
        for request in prompts[: max(0, num_prompts)]:
            if request.queue_time_s is None:
                request.queue_time_s = began_s - request.submitted_s

    def _read(self, request: _Request) -> None:
        ids: list[int] = []
        logprobs: list[float] = []
        reason = self._genai.GenerationFinishReason.NONE
        while request.handle.can_read():
            (output,) = request.handle.read().values()
            ids += output.generated_ids
            logprobs += output.generated_log_probs
            reason = output.finish_reason
        statuses = self._genai.GenerationStatus
        queue_time_s = None if request.num_generated else request.queue_time_s
        request.num_generated += len(ids)
        self._stats.count(num_generation_tokens_total=len(ids), num_scheduled_tokens_total=len(ids))
        event = TokenEvent(request.request_id, tuple(ids), queue_time_s=queue_time_s)
        if request.sampling.logprobs is not None and ids:
            pairs = zip(ids, logprobs, strict=True)
            event = replace(event, logprobs=tuple(TokenLogprob(*pair) for pair in pairs))
        if request.handle.get_status() == statuses.RUNNING:
            if ids:
                self._events.append(event)
            return
        if reason == self._genai.GenerationFinishReason.NONE:
            if ids:
                self._events.append(event)
            self._fail(request, "OpenVINO ended the request: its KV cache is too small for it")
            return
        self._admission.remove(request.request_id)
        is_stop = reason == self._genai.GenerationFinishReason.STOP
        self._events.append(
            replace(
                event,
                finish_reason=FinishReason.STOP if is_stop else FinishReason.LENGTH,
                stop_token_id=ids[-1] if is_stop and ids else None,
            )
        )

    def _fail(self, request: _Request, message: str) -> None:
        self._admission.remove(request.request_id)
        info = EngineError(message).info()
        self._events.append(
            TokenEvent(request.request_id, finish_reason=FinishReason.ERROR, error=info)
        )

    def _fail_all(self, error: Exception) -> None:
        """End every running request: nothing tells which of them a failed step was about."""
        _LOG.error("a step of OpenVINO failed", exc_info=error)
        self._num_failed_in_a_row += 1
        for request in list(self._admission.running.values()):
            request.handle.cancel()
            self._fail(request, f"the engine failed on this request ({last_line(error)})")
        if self._num_failed_in_a_row >= _MAX_FAILED_STEPS:
            for request in list(self._admission.waiting.values()):
                self._fail(request, "the engine died")
            self._dead = EngineError(f"OpenVINO no longer works: {last_line(error)}")

    def _warm_up(self) -> None:
        length = min(self._info.max_num_batched_tokens, self._info.max_model_len - 2)
        sampling = SamplingParams(temperature=0.0, max_tokens=2)
        self.submit("warm-up", [0] * length, sampling)
        while self.has_work():
            for event in self.step():
                if event.error is not None:
                    raise EngineError(event.error.message)
        self._admission.max_num_running = 0
        self._stats.reset()
