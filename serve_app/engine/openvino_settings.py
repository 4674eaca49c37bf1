"""What OpenVINO GenAI is given: plug-in properties, scheduler limits, each request's sampling."""

from __future__ import annotations

import secrets
from typing import Any

from serve_app.config.schema import EngineSection
from serve_app.core.errors import ConfigError
from serve_app.core.events import EngineCapabilities, EngineInfo
from serve_app.core.sampling import SamplingParams
from serve_app.engine.openvino_model import OpenVinoModel, last_line
from serve_app.engine.openvino_runtime import import_openvino, openvino_version
from serve_app.engine.sizing import choose_num_blocks
from serve_app.hardware.memory import available_memory_bytes
from serve_app.models.config import NetworkConfig

_BLOCK_TOKENS = {"CPU": 32, "GPU": 16}
"""Tokens of a KV block; GenAI's own choice for each device."""
_DEFAULT_BUDGET = {"CPU": 256, "GPU": 2048}
CAPABILITIES = EngineCapabilities(
    top_logprobs=False,
    prompt_logprobs=False,
    logit_bias=False,
    seed=False,
    min_tokens=False,
    cache_salt=False,
)


def plugin_properties(section: EngineSection, device: str) -> dict[str, Any]:
    """Return the plug-in's properties for this machine.

    Activations are quantised in groups of 32, which is how .gguf files group their weights. Threads
    are this process's (its affinity says which cores): OpenVINO must not bind them again.
    """
    if device != "CPU":
        return {}
    import torch

    precision = {"auto": None, "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    properties: dict[str, Any] = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,
        "INFERENCE_NUM_THREADS": section.num_threads or torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,
    }
    if (hint := precision[section.dtype]) is not None:
        properties["INFERENCE_PRECISION_HINT"] = hint
    return properties


def generation_config(genai: Any, sampling: SamplingParams) -> Any:
    """Return GenAI's form of `sampling`."""
    config = genai.GenerationConfig()
    config.max_new_tokens = sampling.max_tokens
    # Stop ids are all that stops: the model's own end is among them where it was wanted.
    # GenAI wants some id there; with `ignore_eos` none of them stops anything.
    config.ignore_eos = not sampling.stop_token_ids
    stop_ids = sampling.stop_token_ids or (0,)
    config.stop_token_ids = set(stop_ids)
    config.set_eos_token_id(stop_ids[0])
    config.repetition_penalty = sampling.repetition_penalty
    config.frequency_penalty = sampling.frequency_penalty
    config.presence_penalty = sampling.presence_penalty
    config.logprobs = 0 if sampling.logprobs is None else 1
    config.do_sample = not sampling.is_greedy
    if not sampling.is_greedy:
        config.temperature = sampling.temperature
        config.top_p = sampling.top_p
        config.min_p = sampling.min_p
        if sampling.top_k > 0:
            config.top_k = sampling.top_k
        # Every request seeds the generator that all of them share; the default would repeat itself.
        config.rng_seed = secrets.randbits(63)
    return config


def describe(
    model: OpenVinoModel,
    section: EngineSection,
    device: str,
    name: str,
    max_model_len: int | None,
    properties: dict[str, Any],
) -> EngineInfo:
    """Return the engine's facts, its KV cache sized as `choose_num_blocks` does."""
    config = model.config
    block = _BLOCK_TOKENS[device]
    wanted_len = min(max_model_len or config.max_position, config.max_position)
    bytes_per_token = config.num_layers * config.num_kv_heads * _bytes_per_head(config, device)
    num_blocks = choose_num_blocks(
        kv_cache_tokens=section.kv_cache_tokens,
        memory_fraction=section.kv_cache_memory_fraction,
        free_bytes=available_memory_bytes(),
        bytes_per_token=bytes_per_token,
        block_size=block,
        max_num_seqs=section.max_num_seqs,
        max_model_len=wanted_len,
    )
    openvino, _ = import_openvino()
    budget = section.max_num_batched_tokens or _DEFAULT_BUDGET[device]
    return EngineInfo(
        engine="openvino",
        model=name,
        device=device,
        device_name=str(openvino.Core().get_property(device, "FULL_DEVICE_NAME")).strip(),
        dtype=str(properties.get("INFERENCE_PRECISION_HINT", "auto")),
        vocab_size=config.vocab_size,
        max_model_len=min(wanted_len, num_blocks * block),
        max_num_seqs=section.max_num_seqs,
        max_num_batched_tokens=max(budget, section.max_num_seqs),
        block_size=block,
        num_blocks=num_blocks,
        capabilities=CAPABILITIES,
        weights_bytes=model.weights_bytes,
        kv_cache_bytes=num_blocks * block * bytes_per_token,
        details={
            "architecture": config.architecture,
            "openvino": openvino_version(),
            **{key.lower(): str(value) for key, value in properties.items()},
        },
    )


def _bytes_per_head(config: NetworkConfig, device: str) -> int:
    """KV bytes of one token in one head of one layer.

    On the CPU both have eight bits, with a float32 scale and zero point per channel of a block for
    keys and per token for values; elsewhere float16. (Counted: `PipelineMetrics` tells the same.)
    """
    if device != "CPU":
        return 4 * config.head_dim
    return 2 * config.head_dim + config.head_dim * 8 // _BLOCK_TOKENS[device] + 8


def start_pipeline(
    genai: Any,
    model: OpenVinoModel,
    section: EngineSection,
    info: EngineInfo,
    device: str,
    properties: dict[str, Any],
) -> Any:
    """Load the IR. Raises ConfigError, one line, where the device cannot run it."""
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = info.num_blocks
    scheduler.max_num_seqs = info.max_num_seqs
    scheduler.max_num_batched_tokens = info.max_num_batched_tokens
    scheduler.enable_prefix_caching = section.enable_prefix_caching
    try:
        return genai.ContinuousBatchingPipeline(model.folder, scheduler, device, properties)
    except RuntimeError as error:
        raise ConfigError(
            f"model.path: OpenVINO cannot run {info.model} on {device}: {last_line(error)};"
            " set engine.kind: native",
            param="model.path",
        ) from None
