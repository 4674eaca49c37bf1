"""How large the KV cache and the token budget may be on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from serve_app.config.schema import EngineSection
from serve_app.core.errors import ConfigError
from serve_app.hardware.memory import available_memory_bytes
from serve_app.models.interface import CausalLM

MAX_STEP_S = 0.25
"""A step aims to stay below this, so that running streams do not stutter while a prompt is read."""

LARGEST_BUDGET = 8192
_SMALLEST_BUDGET = 16


def free_memory_bytes(device: torch.device) -> int:
    """Free bytes of the device; for the CPU what the host and the cgroup leave to this process."""
    if device.type == "cpu":
        return available_memory_bytes()
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free)


def choose_num_blocks(
    *,
    kv_cache_tokens: int | None,
    memory_fraction: float,
    free_bytes: int,
    bytes_per_token: int,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
) -> int:
    """Blocks of the KV cache: what was asked for, else a share of free memory.

    Never more than all sequences at full length can fill. Raises ConfigError, with the arithmetic,
    where not even one block fits.
    """
    if kv_cache_tokens is not None:
        num_blocks = -(-kv_cache_tokens // block_size)
        needed = (num_blocks + 1) * block_size * bytes_per_token
        if needed > free_bytes:
            raise ConfigError(
                f"engine.kv_cache_tokens: {kv_cache_tokens} tokens × {bytes_per_token} bytes need"
                f" {needed >> 20} MiB but {free_bytes >> 20} MiB are free; lower kv_cache_tokens",
                param="engine.kv_cache_tokens",
            )
        return num_blocks
    fitting = int(free_bytes * memory_fraction) // (block_size * bytes_per_token) - 1
    useful = max_num_seqs * -(-max_model_len // block_size)
    if fitting < 1:
        raise ConfigError(
            f"no room for a KV cache: {memory_fraction:g} of {free_bytes >> 20} MiB free is less"
            f" than two blocks of {block_size} tokens × {bytes_per_token} bytes; use a smaller"
            " model, or raise engine.kv_cache_memory_fraction",
            param="engine.kv_cache_memory_fraction",
        )
    return min(fitting, useful)


def measure_budget(
    run_prefill: Callable[[int], None],
    *,
    largest: int,
    decode_step_s: float,
    max_step_s: float = MAX_STEP_S,
) -> int:
    """Largest power-of-two prefill that, beside a full decode step, stays within `max_step_s`.

    `run_prefill(n)` runs n tokens and waits. Doubling stops at the first size that is too slow, so
    measuring costs about two steps. At least 16.
    """
    budget = num_tokens = _SMALLEST_BUDGET
    allowed_s = max(max_step_s - decode_step_s, max_step_s / 4)
    while num_tokens <= largest:
        elapsed = _time_of(run_prefill, num_tokens)
        if elapsed > allowed_s:
            # The first run of a shape may include set-up that later ones do not pay.
            elapsed = _time_of(run_prefill, num_tokens)
        if elapsed > allowed_s:
            break
        budget = num_tokens
        # The next size takes at least twice as long: no use in trying what cannot fit.
        if 2 * elapsed > allowed_s and num_tokens >= 64:
            break
        num_tokens *= 2
    return budget


def _time_of(run_prefill: Callable[[int], None], num_tokens: int) -> float:
    started = time.perf_counter()
    run_prefill(num_tokens)
    return time.perf_counter() - started


def fit_kv_cache(network: CausalLM, section: EngineSection, max_model_len: int) -> int:
    """Blocks of the KV cache beside the weights that are loaded."""
    return choose_num_blocks(
        kv_cache_tokens=section.kv_cache_tokens,
        memory_fraction=section.kv_cache_memory_fraction,
        free_bytes=free_memory_bytes(network.device),
        bytes_per_token=network.kv_spec.bytes_per_token,
        block_size=section.block_size,
        max_num_seqs=section.max_num_seqs,
        max_model_len=max_model_len,
    )
