"""transformers' continuous batching on the same weights, with the same torch as XeRay.

It runs in XeRay's own environment, whose packages both share: a second torch of the same version
would measure nothing else.
"""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from loop import Run, RunnerOptions, Times, serve

from serve_app.engine.devices import resolve_dtype

_PAGE_TOKENS = 32
_WAIT_S = 0.2


def start(options: RunnerOptions) -> tuple[dict[str, Any], Run]:
    """Load a .gguf file (dequantized) or a Hugging Face folder, dense."""
    torch.set_num_threads(options.num_threads)
    dtype = resolve_dtype(options.settings.get("dtype", "auto"), torch.device("cpu"))
    path = Path(options.model)
    model = _from_gguf(path, dtype) if path.is_file() else _from_folder(path, dtype)
    manager = _start_manager(model, options)
    names = iter(range(1 << 62))

    def run(prompts: list[list[int]], num_output: int) -> Times:
        return _run(manager, prompts, num_output, names)

    dtype_name = str(dtype).removeprefix("torch.")
    return {"version": transformers.__version__, "settings": {"dtype": dtype_name}}, run


def _from_folder(path: Path, dtype: torch.dtype) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


def _from_gguf(path: Path, dtype: torch.dtype) -> Any:
    """A LlamaForCausalLM with the file's weights: the reader of XeRay, the network of theirs."""
    from serve_app.models.gguf import GGUFFile
    from serve_app.models.gguf_config import config_from_gguf
    from serve_app.models.loading.gguf_source import GGUFSource
    from serve_app.models.packed import PackedRows
    from serve_app.models.quantized import QuantizedWeight

    file = GGUFFile(path)
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    config = config_from_gguf(file.metadata, vocab_size, frozenset(file.tensors))
    source = GGUFSource(file, config)
    state = {}
    for name in source.names():
        weight: Any = source.read(name)
        if isinstance(weight, PackedRows):
            weight = weight.unpack()
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize(torch.float32)
        state[name] = weight.to(dtype, copy=True)
    make_config: Any = transformers.LlamaConfig
    theirs = make_config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.rms_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
    )
    if config.architecture != "llama":
        raise ValueError(f"a {config.architecture} .gguf is not compared; name its folder")
    make_network: Any = transformers.LlamaForCausalLM
    network = make_network(theirs).to(dtype)
    missing, unknown = network.load_state_dict(state, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights do not match: {[*missing, *unknown][:4]}")
    network.tie_weights()
    return network.eval()


def _start_manager(model: Any, options: RunnerOptions) -> Any:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    known = {field.name for field in fields(ContinuousBatchingConfig)}
    # Before 5.18 the page was called a block.
    page: dict[str, Any] = {"page_size" if "page_size" in known else "block_size": _PAGE_TOKENS}
    pages = options.max_num_seqs * -(-options.max_model_len // _PAGE_TOKENS) + options.max_num_seqs
    config = ContinuousBatchingConfig(
        **page,
        num_blocks=pages,
        max_batch_tokens=options.settings.get("max_batch_tokens", 256),
        max_requests_per_batch=options.max_num_seqs,
        allow_block_sharing=False,
        use_cuda_graph=False,
    )
    make_config: Any = transformers.GenerationConfig
    generation = make_config(do_sample=False, max_new_tokens=16, eos_token_id=-1)
    manager = model.init_continuous_batching(generation, config)
    manager.start()
    return manager


def _run(manager: Any, prompts: list[list[int]], num_output: int, names: Any) -> Times:
    begin_s = time.perf_counter()
    rows: dict[str, list[float]] = {str(next(names)): [] for _ in prompts}
    for name, prompt in zip(rows, prompts, strict=True):
        manager.add_request(
            prompt, request_id=name, max_new_tokens=num_output, streaming=True, eos_token_id=-1
        )
    num_open = len(prompts)
    while num_open:
        result = manager.get_result(timeout=_WAIT_S)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the manager's thread has ended")
            continue
        if result.error is not None:
            raise RuntimeError(result.error)
        row = rows[result.request_id]
        now_s = time.perf_counter() - begin_s
        row += [now_s] * (len(result.generated_tokens) - len(row))
        num_open -= result.is_finished()
    return list(rows.values())


if __name__ == "__main__":
    serve(start)
