"""Logits of a whole text from either engine's network, for evaluation and for checks."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from serve_app.core.errors import ConfigError
from serve_app.models.interface import AttentionMetadata, LoadedModel, PrefillChunk
from serve_app.models.loading.loader import DTypeName, load_model

EngineName = Literal["native", "transformers", "openvino"]
_BLOCK_SIZE = 16
_ROWS_AT_ONCE = 256


class Scorer(Protocol):
    """A loaded model. `weights_bytes` counts what it holds in memory."""

    engine: str
    dtype: str
    vocab_size: int
    max_position: int
    weights_bytes: int

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → float32 [T, vocab], on the CPU; row t sees ids[: t + 1]."""
        ...

    def decode_tokens_per_s(self, ids: torch.Tensor, num_tokens: int) -> float:
        """Greedy tokens after the prompt `ids`, one sequence, per second; the prompt not timed."""
        ...


def open_scorer(path: Path, engine: EngineName, *, device: str, dtype: DTypeName) -> Scorer:
    """Load a .gguf file or a Hugging Face folder. Raises ConfigError, one line, as the engine does.

    device: cpu, cuda, xpu or auto.
    """
    if engine == "openvino":
        from serve_app.config.schema import EngineSection
        from serve_app.quantize.openvino_scoring import OpenVinoScorer

        return OpenVinoScorer(path, device, EngineSection(dtype=dtype))
    target = _resolve(device)
    if engine == "native":
        return NativeScorer(load_model(path, device=target, dtype=dtype))
    return TransformersScorer(path, target, dtype)


def _resolve(device: str) -> torch.device:
    from serve_app.engine.devices import resolve_device

    return resolve_device(device)


class NativeScorer:
    """The engine's own network, one sequence in one chunk."""

    engine = "native"

    def __init__(self, model: LoadedModel) -> None:
        self.vocab_size = model.network.vocab_size
        self.max_position = model.network.max_position
        self.weights_bytes = model.weights_bytes
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._model = model
        self._network = model.network

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Scorer`."""
        length = ids.shape[0]
        num_blocks = -(-length // _BLOCK_SIZE)
        device = self._network.device
        cache = self._network.allocate_kv_cache(num_blocks + 1, _BLOCK_SIZE)
        positions = torch.arange(length, device=device)
        metadata = AttentionMetadata(
            num_decodes=0,
            slot_mapping=positions + _BLOCK_SIZE,
            decode_block_tables=torch.zeros(0, 1, dtype=torch.int64, device=device),
            decode_context_lens=torch.zeros(0, dtype=torch.int64, device=device),
            max_decode_context_len=0,
            prefill_chunks=(
                PrefillChunk(0, length, length, torch.arange(1, num_blocks + 1, device=device)),
            ),
            block_size=_BLOCK_SIZE,
        )
        hidden = self._network.forward(ids.to(device), positions, cache, metadata)
        parts = [self._network.compute_logits(rows).cpu() for rows in hidden.split(_ROWS_AT_ONCE)]
        return torch.cat(parts)

    def decode_tokens_per_s(self, ids: torch.Tensor, num_tokens: int) -> float:
        """See `Scorer`; through the public Engine: scheduler, blocks and sampler in the path."""
        from serve_app.config.schema import EngineSection
        from serve_app.core.sampling import SamplingParams
        from serve_app.engine.native import NativeEngine

        length = ids.shape[0] + num_tokens
        section = EngineSection(
            kv_cache_tokens=length + 2 * _BLOCK_SIZE, max_num_seqs=1, enable_prefix_caching=False
        )
        engine = NativeEngine(self._model, section, max_model_len=length)
        try:
            params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, seed=0)
            engine.submit("decode", ids.tolist(), params)
            first_s, count, is_open = 0.0, 0, True
            while is_open:
                for event in engine.step():
                    count += len(event.new_token_ids)
                    is_open = event.finish_reason is None
                if count and not first_s:
                    first_s, count = time.perf_counter(), 0
            return count / max(time.perf_counter() - first_s, 1e-9)
        finally:
            engine.close()


class TransformersScorer:
    """transformers' own model. Refuses a folder with keys missing, which it would only warn of.

    Of a GGUF file transformers reads the architectures that it knows, their weights dequantized.
    """

    engine = "transformers"

    def __init__(self, path: Path, device: torch.device, dtype: DTypeName) -> None:
        from transformers import AutoModelForCausalLM

        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent if path.is_file() else path,
                gguf_file=path.name if path.is_file() else None,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                device_map=str(device),
                local_files_only=True,
                output_loading_info=True,
            )
        except (ImportError, ValueError, OSError, KeyError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"model: transformers cannot load {path.name}: {lines[0][:300]}", param="model"
            ) from error
        missing = sorted(info.get("missing_keys") or ())
        if missing:
            raise ConfigError(
                f"model: {path.name} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""),
                param="model",
            )
        self._model: Any = model.eval()
        text = model.config.get_text_config()
        self.vocab_size = int(text.vocab_size)
        self.max_position = int(getattr(text, "max_position_embeddings", 0) or 1 << 30)
        self.dtype = str(model.dtype).removeprefix("torch.")
        tensors = [*model.parameters(), *model.buffers()]
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        self.weights_bytes = sum(sizes.values())

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Scorer`."""
        output = self._model(ids[None].to(self._model.device), use_cache=False)
        return output.logits[0].float().cpu()

    @torch.no_grad()
    def decode_tokens_per_s(self, ids: torch.Tensor, num_tokens: int) -> float:
        """See `Scorer`; `generate`, less the time of its first token."""
        prompt = ids[None].to(self._model.device)
        seconds = []
        for count in (1, num_tokens + 1):
            started = time.perf_counter()
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
            seconds.append(time.perf_counter() - started)
        gc.collect()
        return num_tokens / max(seconds[1] - seconds[0], 1e-9)
