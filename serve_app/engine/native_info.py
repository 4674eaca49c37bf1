"""What the native engine tells of itself once it has started."""

from __future__ import annotations

import torch

from serve_app.config.schema import EngineSection
from serve_app.core.events import EngineCapabilities, EngineInfo
from serve_app.engine.devices import device_name
from serve_app.models.interface import LoadedModel


def describe_engine(
    model: LoadedModel,
    section: EngineSection,
    *,
    max_model_len: int,
    max_num_batched_tokens: int,
    num_blocks: int,
    startup_s: dict[str, float],
) -> EngineInfo:
    """Return the facts of an engine whose cache has `num_blocks` blocks, the scratch block apart.

    `startup_s`: seconds by stage.
    """
    network = model.network
    block_bytes = section.block_size * network.kv_spec.bytes_per_token
    return EngineInfo(
        engine="native",
        model=model.name,
        device=str(network.device),
        device_name=device_name(network.device),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=network.vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=section.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=section.block_size,
        num_blocks=num_blocks,
        capabilities=EngineCapabilities(batch_invariant=section.batch_invariant),
        startup_s=startup_s,
        weights_bytes=model.weights_bytes,
        kv_cache_bytes=(num_blocks + 1) * block_bytes,
        details={
            "architecture": model.architecture,
            "weight_format": model.weight_format,
            "num_threads": str(torch.get_num_threads()),
            "speculative": section.speculative.method,
        },
    )
