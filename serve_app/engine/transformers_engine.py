"""Adapter over transformers' ContinuousBatchingManager, for networks that `models` does not know.

The manager runs its own thread; `step` gathers what it has produced. What it can do per request is
temperature, top-k and top-p, and that is all that the capabilities claim.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from serve_app.config.schema import EngineSection
from serve_app.core.errors import ConfigError, EngineError
from serve_app.core.events import (
    BASIC_CAPABILITIES,
    BatchingOptions,
    EngineInfo,
    EngineStats,
    FinishReason,
    TokenEvent,
)
from serve_app.core.sampling import SamplingParams
from serve_app.engine.adapter_stats import AdapterStats
from serve_app.engine.admission import Admission
from serve_app.engine.devices import device_name
from serve_app.engine.sizing import choose_num_blocks, free_memory_bytes
from serve_app.engine.validation import check_request

_LOG = logging.getLogger(__name__)
_RESULT_WAIT_S = 0.05
_DEFAULT_BUDGET = {"cpu": 256}


@dataclass(slots=True)
class _Request:
    """`manager_id` is never used again: a late result of an aborted request finds nobody."""

    request_id: str
    manager_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    num_seen: int = 0
    submitted_s: float = field(default_factory=time.monotonic)
    handed_over_s: float = 0.0


class TransformersEngine:
    """Serves any causal language model that transformers can load, on the manager's own thread.

    Args:
        model: the network in transformers, on its device.
        section: limits; `block_size` becomes the manager's page size.
        name: the model's name.
        max_model_len: longest prompt + answer asked for; None is what the model was made for.
        load_s: seconds that loading took.
    """

    def __init__(
        self,
        model: Any,
        section: EngineSection,
        *,
        name: str,
        max_model_len: int | None = None,
        load_s: float = 0.0,
    ) -> None:
        started = time.perf_counter()
        self._info = _describe(model, section, name, max_model_len)
        self._manager = _start_manager(model, section, self._info)
        self._requests: dict[str, _Request] = {}
        self._admission: Admission[_Request] = Admission(section.max_num_seqs)
        self._numbers = itertools.count()
        self._events: list[TokenEvent] = []
        self._stats = AdapterStats()
        self._is_paused = False
        self._dead: EngineError | None = None
        if section.warmup:
            self._warm_up()
        seconds = {"load_s": load_s, "warmup_s": time.perf_counter() - started}
        self._info = replace(self._info, startup_s=seconds)

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._info

    def submit(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        """Queue a request. Raises ClientError as `check_request` does."""
        check_request(self._info, prompt_token_ids, sampling)
        room = self._info.max_model_len - len(prompt_token_ids)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        manager_id = f"{next(self._numbers)}"
        request = _Request(request_id, manager_id, list(prompt_token_ids), sampling)
        self._admission.waiting[request_id] = request
        self._stats.count(num_prompt_tokens_total=len(prompt_token_ids))

    def abort(self, request_id: str) -> None:
        """End a request; the manager sends no last event for it, so this makes one."""
        request = self._admission.remove(request_id)
        if request is None:
            return
        if self._requests.pop(request.manager_id, None) is not None:
            self._manager.cancel_request(request.manager_id)
        self._stats.count(num_aborted_total=1)
        self._events.append(TokenEvent(request_id, finish_reason=FinishReason.ABORTED))

    def configure(self, batching: BatchingOptions) -> None:
        """Change the batching toggles; they decide who is handed to the manager."""
        self._admission.configure(batching)

    def pause(self) -> None:
        """Hand out nothing more; what the manager has begun goes on, unheard until `resume`."""
        self._is_paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._is_paused = False

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        if self._events or self._dead:
            return True
        return not self._is_paused and bool(self._admission.waiting or self._admission.running)

    def step(self) -> list[TokenEvent]:
        """Hand over what may run, and gather results; waits at most 50 ms for the first.

        Raises EngineError once the manager is dead and every request has had its last event.
        """
        if self._dead is not None:
            raise self._dead
        if not self._is_paused:
            self._hand_over()
            self._gather()
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """Counters and gauges; blocks as this side sees them: those that running requests fill."""
        lengths = [
            len(request.prompt_token_ids) + request.num_seen
            for request in self._admission.running.values()
        ]
        return self._stats.snapshot(self._admission, self._info, lengths, is_paused=self._is_paused)

    def close(self) -> None:
        """Stop the manager's thread."""
        self._manager.stop(block=True, timeout=10, hard_stop=True)

    def _hand_over(self) -> None:
        for request in self._admission.admit():
            sampling = request.sampling
            request.handed_over_s = time.monotonic()
            accepted = self._manager.add_request(
                request.prompt_token_ids,
                request_id=request.manager_id,
                max_new_tokens=sampling.max_tokens,
                streaming=True,
                eos_token_id=list(sampling.stop_token_ids),
                **_warpers(sampling, self._info.vocab_size),
            )
            if accepted is None:
                self._die("it no longer takes requests")
                return
            self._requests[request.manager_id] = request

    def _gather(self) -> None:
        if not self._admission.running:
            return
        result = self._manager.get_result(timeout=_RESULT_WAIT_S)
        if result is None and not self._manager.is_running():
            self._die("its thread has ended")
            return
        while result is not None:
            self._take(result)
            is_empty = self._manager.output_router.output_queue.empty()
            result = None if is_empty else self._manager.get_result(timeout=_RESULT_WAIT_S)

    def _take(self, result: Any) -> None:
        request = self._requests.get(result.request_id)
        if request is None:
            return
        if result.error is not None:
            _LOG.error("transformers failed on a request: %s", result.error)
            self._fail(request, "the engine failed on this request")
            return
        ids = tuple(result.generated_tokens[request.num_seen :])
        queue_time_s = None if request.num_seen else _queue_time(request, result)
        request.num_seen += len(ids)
        self._stats.count(num_steps_total=1, num_generation_tokens_total=len(ids))
        event = TokenEvent(request.request_id, ids, queue_time_s=queue_time_s)
        if not result.is_finished():
            if ids:
                self._events.append(event)
            return
        is_stop = bool(ids) and ids[-1] in request.sampling.stop_token_ids
        self._forget(request)
        self._events.append(
            replace(
                event,
                finish_reason=FinishReason.STOP if is_stop else FinishReason.LENGTH,
                stop_token_id=ids[-1] if is_stop else None,
            )
        )

    def _fail(self, request: _Request, message: str) -> None:
        self._forget(request)
        info = EngineError(message).info()
        self._events.append(
            TokenEvent(request.request_id, finish_reason=FinishReason.ERROR, error=info)
        )

    def _forget(self, request: _Request) -> None:
        self._admission.remove(request.request_id)
        self._requests.pop(request.manager_id, None)

    def _die(self, why: str) -> None:
        cause = self._manager.background_thread_status.fatal_error
        _LOG.error("transformers' manager is dead: %s", why, exc_info=cause)
        for request in [*self._admission.running.values(), *self._admission.waiting.values()]:
            self._fail(request, "the engine died")
        self._dead = EngineError(f"transformers' manager is dead: {why}")

    def _warm_up(self) -> None:
        self.submit("warm-up", [0], SamplingParams(temperature=0.0, max_tokens=2))
        while self.has_work():
            self.step()
        self._admission.max_num_running = 0
        self._stats.reset()


def _queue_time(request: _Request, result: Any) -> float | None:
    """Seconds until it ran: on this side, then in the manager, whose clock is another one."""
    started_s, _ = result.lifespan
    if started_s < 0:  # the manager has not noted a start
        return None
    waited_s: float = started_s - result.created_time
    return request.handed_over_s - request.submitted_s + waited_s


def _warpers(sampling: SamplingParams, vocab_size: int) -> dict[str, Any]:
    """Per-request arguments of the manager's logit warpers; greedy is the best one of one."""
    if sampling.is_greedy:
        return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    top_k = min(sampling.top_k, vocab_size) if sampling.top_k > 0 else vocab_size
    return {"temperature": sampling.temperature, "top_k": top_k, "top_p": sampling.top_p}


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _describe(
    model: Any, section: EngineSection, name: str, max_model_len: int | None
) -> EngineInfo:
    config = _text_config(model)
    made_for = getattr(config, "max_position_embeddings", None) or 2048
    wanted_len = min(max_model_len or made_for, made_for)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    num_blocks = choose_num_blocks(
        kv_cache_tokens=section.kv_cache_tokens,
        memory_fraction=section.kv_cache_memory_fraction,
        free_bytes=free_memory_bytes(model.device),
        bytes_per_token=bytes_per_token,
        block_size=section.block_size,
        max_num_seqs=section.max_num_seqs,
        max_model_len=wanted_len,
    )
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = _DEFAULT_BUDGET.get(model.device.type, 2048)
    return EngineInfo(
        engine="transformers",
        model=name,
        device=str(model.device),
        device_name=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        max_model_len=min(wanted_len, num_blocks * section.block_size),
        max_num_seqs=section.max_num_seqs,
        max_num_batched_tokens=max(section.max_num_batched_tokens or budget, section.max_num_seqs),
        block_size=section.block_size,
        num_blocks=num_blocks,
        capabilities=BASIC_CAPABILITIES,
        weights_bytes=weights_bytes,
        kv_cache_bytes=num_blocks * section.block_size * bytes_per_token,
        details={"architecture": config.model_type, "weight_format": "dense"},
    )


def _start_manager(model: Any, section: EngineSection, info: EngineInfo) -> Any:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    # The manager makes a warper only where the defaults differ from "off": each request then
    # overrides all three.
    make_config: Any = GenerationConfig
    generation = make_config(
        do_sample=True, temperature=0.5, top_k=50, top_p=0.5, max_new_tokens=16, eos_token_id=-1
    )
    is_cpu = model.device.type == "cpu"
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    if "per_request_processors" not in known:
        raise ConfigError(
            "engine.kind: this version of transformers cannot sample each request its own way;"
            " run: pip install 'transformers>=5.17'",
            param="engine.kind",
        )
    # Before 5.18 the page was called a block.
    page: dict[str, Any] = {"page_size" if "page_size" in known else "block_size": info.block_size}
    config = ContinuousBatchingConfig(
        **page,
        num_blocks=info.num_blocks,
        max_batch_tokens=info.max_num_batched_tokens,
        max_requests_per_batch=info.max_num_seqs,
        allow_block_sharing=section.enable_prefix_caching,
        per_request_processors=True,
        use_cuda_graph=False if is_cpu else section.capture_graphs,
        use_async_batching=False if is_cpu else None,
    )
    manager = model.init_continuous_batching(generation, config)
    manager.start()
    return manager


def load_transformers_model(
    path: Path, device: torch.device, dtype: torch.dtype, *, trust_pickle: bool
) -> Any:
    """Load a Hugging Face folder. Raises ConfigError, one line, where transformers cannot."""
    import transformers

    # Renamed in 4.56; the ipex extra brings 4.51.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype_name = "dtype" if version >= (4, 56) else "torch_dtype"
    arguments: dict[str, Any] = {dtype_name: dtype}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            **arguments,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=None if trust_pickle else True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model.path: transformers cannot load {path.name}: {reason}", param="model.path"
        ) from error
    network: Any = model
    return network.to(device).eval()
