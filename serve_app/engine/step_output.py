"""What a queued step will yield, and how the host reads it once it is there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from serve_app.core.events import TokenLogprob
from serve_app.engine.sampler import SamplerOutput
from serve_app.engine.scheduled_batch import ScheduledBatch, ScheduledChunk


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of n tokens: ids int64 [n], chosen float32 [n], top_ids and top [n, N]."""

    token_ids: torch.Tensor
    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor

    def read(self, num_top: int) -> list[TokenLogprob]:
        """As plain values, the `num_top` best of each."""
        ids, chosen = self.token_ids.tolist(), self.chosen.tolist()
        top_ids, top = self.top_ids[:, :num_top].tolist(), self.top[:, :num_top].tolist()
        return [
            TokenLogprob(ids[i], chosen[i], tuple(zip(top_ids[i], top[i], strict=True)))
            for i in range(len(ids))
        ]


@dataclass(slots=True)
class StepOutput:
    """A step in flight. Host tensors are filled once `wait` has returned.

    `sampled` pairs each sampling chunk with its row of `token_ids`, behind which come those of its
    draft; `prompt_logprobs` holds each chunk's log-probabilities of the prompt tokens that follow
    its rows.
    """

    batch: ScheduledBatch
    token_ids: torch.Tensor
    sampled: list[tuple[ScheduledChunk, int]]
    logprobs: LogprobTensors | None = None
    prompt_logprobs: list[tuple[ScheduledChunk, LogprobTensors]] = field(default_factory=list)
    event: torch.Event | None = None

    def wait(self) -> None:
        """Block until the step has run. Raises what the device raised."""
        if self.event is not None:
            self.event.synchronize()

    def read_logprob(self, row: int, num_top: int) -> TokenLogprob:
        """The sampled token's log-probability at `row`."""
        assert self.logprobs is not None, "no row of this step asked for logprobs"
        tensors = self.logprobs
        one = LogprobTensors(
            tensors.token_ids[row : row + 1],
            tensors.chosen[row : row + 1],
            tensors.top_ids[row : row + 1],
            tensors.top[row : row + 1],
        )
        return one.read(num_top)[0]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Queue a copy to the host: the next step may overwrite the tensor before the host reads."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def sampler_logprobs(output: SamplerOutput, host_ids: torch.Tensor) -> LogprobTensors | None:
    """The sampler's log-probabilities on their way to the host, or None."""
    if output.logprobs is None or output.top_ids is None or output.top_logprobs is None:
        return None
    return LogprobTensors(
        host_ids, to_host(output.logprobs), to_host(output.top_ids), to_host(output.top_logprobs)
    )
