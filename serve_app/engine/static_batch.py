"""One call of transformers' `generate()` for several sequences, on a thread of its own.

`generate()` knows one setting for a whole batch. Here each row has its own: a logits processor
samples it its way, a streamer hands out its token, a stopping criterion ends it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from serve_app.core.sampling import SamplingParams


@dataclass(slots=True)
class Row:
    """One sequence of a batch; `is_done` is set by its owner, and ends it after the next token.

    `queue_time_s`: seconds until its batch began; None before.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    num_generated: int = 0
    is_done: bool = False
    submitted_s: float = field(default_factory=time.monotonic)
    queue_time_s: float | None = None


@dataclass(frozen=True, slots=True)
class BatchStep:
    """One token for each row (of those that are done, a meaningless one), and its seconds."""

    token_ids: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchEnd:
    """`generate()` has returned; `error` is what it raised."""

    error: Exception | None = None


@dataclass(slots=True)
class StaticBatch:
    """Runs `rows` until all are done, and puts a `BatchStep` per token and a last `BatchEnd`.

    The thread goes one token beyond what has been taken: `take` lets it compute the next, so that
    a row which its owner ends gets no further step.
    """

    rows: Sequence[Row]
    may_run: threading.Event
    steps: queue.SimpleQueue[BatchStep | BatchEnd] = field(default_factory=queue.SimpleQueue)
    is_cancelled: bool = False
    _last_s: float = 0.0
    _thread: threading.Thread | None = None
    _taken: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self, network: Any) -> None:
        """Begin; returns at once."""
        now_s = time.monotonic()
        for row in self.rows:
            row.queue_time_s = now_s - row.submitted_s
        self._last_s = time.perf_counter()
        self._thread = threading.Thread(
            target=self._run, args=(network,), name="static-batch", daemon=True
        )
        self._thread.start()

    def take(self, timeout_s: float) -> BatchStep | BatchEnd | None:
        """What comes next; None where nothing came in time. Answer a step with `proceed`."""
        try:
            return self.steps.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def proceed(self) -> None:
        """Let the thread look at the rows and compute their next token."""
        self._taken.release()

    def cancel(self) -> None:
        """End all rows and wait until the thread has left the network."""
        self.is_cancelled = True
        self.may_run.set()
        self._taken.release()
        if self._thread is not None:
            self._thread.join()

    def _run(self, network: Any) -> None:
        error: Exception | None = None
        try:
            self._generate(network)
        except Exception as caught:
            error = caught
        self.steps.put(BatchEnd(error))

    @torch.inference_mode()
    def _generate(self, network: Any) -> None:
        from transformers import GenerationConfig

        longest = max(len(row.prompt_token_ids) for row in self.rows)
        padding = [longest - len(row.prompt_token_ids) for row in self.rows]
        ids = [
            [0] * pad + list(row.prompt_token_ids)
            for pad, row in zip(padding, self.rows, strict=True)
        ]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        # Our own criterion stops rows: an EOS id here would pad them and end all at one length.
        make_config: Any = GenerationConfig
        config = make_config(
            max_new_tokens=max(row.sampling.max_tokens for row in self.rows),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
        network.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            generation_config=config,
            streamer=_Streamer(self._on_tokens),
            stopping_criteria=_list_of("StoppingCriteriaList", self._which_are_done),
            logits_processor=_list_of("LogitsProcessorList", self._warp),
        )

    def _on_tokens(self, token_ids: tuple[int, ...]) -> None:
        now = time.perf_counter()
        self.steps.put(BatchStep(token_ids, now - self._last_s))
        self._taken.acquire()
        self.may_run.wait()
        self._last_s = time.perf_counter()

    def _which_are_done(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Bool [B]; asked after each token."""
        done = [self.is_cancelled or row.is_done for row in self.rows]
        return torch.tensor(done, device=input_ids.device)

    def _warp(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Float [B, V] logits as each row's own sampling wants them."""
        rows = [
            warp_row(logits, row.sampling)
            for row, logits in zip(self.rows, scores.float(), strict=True)
        ]
        return torch.stack(rows)


def warp_row(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Logits [V] after temperature, top-k and top-p (the smallest set whose mass reaches top_p)."""
    if sampling.is_greedy:
        best = logits.argmax()
        return torch.full_like(logits, float("-inf")).index_fill_(0, best, 0.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        least = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, places = logits.sort(descending=True)
        shares = ordered.softmax(-1)
        is_beyond = shares.cumsum(-1) - shares >= sampling.top_p
        logits = logits.index_fill(0, places[is_beyond], float("-inf"))
    return logits


class _Streamer:
    """transformers' streamer: the prompt comes first, then one id per row and step."""

    def __init__(self, on_tokens: Callable[[tuple[int, ...]], None]) -> None:
        self._on_tokens = on_tokens
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt [B, T], then with ids [B]."""
        if self._has_prompt:
            self._on_tokens(tuple(value.tolist()))
        self._has_prompt = True

    def end(self) -> None:
        """Called after the last token; the batch's end tells it."""


def _list_of(name: str, function: Callable[..., torch.Tensor]) -> Any:
    """transformers' list class `name` with one member: a plain callable is all that it asks for."""
    import transformers

    return getattr(transformers, name)([function])
