"""Tiny random models of each family, and a runner that pages sequences through a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from serve_app.models.interface import AttentionMetadata, CausalLM, PrefillChunk

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# At an initializer_range of 0.4 attention saturates, and float32's own rounding reaches 1e-3 in the
# logits: these have 0.2.
SPARSE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (family["class"], family["config"])
    for name, family in json.loads(
        Path(__file__).with_name("sparse_families.json").read_text()
    ).items()
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = SPARSE_FAMILIES | {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "yarn-rope": ("Llama", {"rope_parameters": YARN_ROPE}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "r1-distill-qwen": (
        "Qwen2",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 1,
            "tie_word_embeddings": False,
        },
    ),
    "r1-distill-llama": (
        "Llama",
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}, "rms_norm_eps": 1e-5},
    ),
    "r1-0528-qwen3": (
        "Qwen3",
        {"head_dim": 32, "rope_parameters": YARN_ROPE | {"attention_factor": 0.8782488562869419}},
    ),
}


def available_devices() -> list[str]:
    """The CPU, and this machine's accelerator if it has one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `device` on each device of this machine."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", available_devices())


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def build_reference(family: str, seed: int = 0, **sizes: int) -> Any:
    """A tiny random transformers model, float32, eval, whose greedy text varies."""
    import transformers

    prefix, overrides = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**(TINY | overrides | sizes))
    torch.manual_seed(seed)
    with torch.inference_mode(False):
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        if family in SPARSE_FAMILIES:  # the loop over experts, on every device and in every dtype
            model.set_experts_implementation("eager")
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model


@pytest.fixture
def build_model() -> Callable[..., Any]:
    """`build_reference`: (family, seed, **sizes of the config) → model."""
    return build_reference


@pytest.fixture(scope="session")
def references() -> Callable[[str], Any]:
    """Return a function from family to its (cached) transformers model."""
    cache: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in cache:
            cache[family] = build_reference(family)
        return cache[family]

    return get


@pytest.fixture(scope="session")
def saved(references, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function from family to a folder with its safetensors."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            references(family).save_pretrained(folders[family])
        return folders[family]

    return get


class PagedRunner:
    """Drives a network as an engine does: sequences in blocks of a shuffled physical order."""

    def __init__(
        self,
        network: CausalLM,
        block_size: int = 16,
        num_blocks: int = 64,
        *,
        batch_invariant: bool = False,
        seed: int = 0,
        poison: float = 0.0,
    ) -> None:
        self.network = network
        self.block_size = block_size
        self.batch_invariant = batch_invariant
        self.cache = network.allocate_kv_cache(num_blocks, block_size)
        self.cache[:, :, 1:] = poison
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed))
        self._free = (order + 1).tolist()
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(
        self,
        decodes: Sequence[tuple[str, int]] = (),
        chunks: Sequence[tuple[str, Sequence[int]]] = (),
        num_padding: int = 0,
        max_context_len: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run one forward pass. Returns logits [rows, vocab] on the CPU per sequence."""
        device = self.network.device
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: dict[str, slice] = {}
        for name, new in [(name, [token]) for name, token in decodes] + list(chunks):
            start = self.lengths.get(name, 0)
            spans[name] = slice(len(ids), len(ids) + len(new))
            for position, token in enumerate(new, start):
                ids.append(token)
                positions.append(position)
                slots.append(self._slot(name, position))
            self.lengths[name] = start + len(new)
        padding = [0] * num_padding
        assert not (padding and chunks), "padding rows belong to pure decode steps here"
        tables = [self.tables[name] for name, _ in decodes] + [[0] for _ in padding]
        width = max(map(len, tables), default=1)
        context = [self.lengths[name] for name, _ in decodes] + [0 for _ in padding]

        def on_device(values: list[Any], *shape: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64).reshape(*shape or (-1,)).to(device)

        metadata = AttentionMetadata(
            num_decodes=len(decodes) + num_padding,
            slot_mapping=on_device(slots + padding),
            decode_block_tables=on_device(
                [table + [0] * (width - len(table)) for table in tables], -1, width
            ),
            decode_context_lens=on_device(context),
            max_decode_context_len=max_context_len or max(context, default=0),
            prefill_chunks=tuple(
                PrefillChunk(
                    spans[name].start,
                    len(new),
                    self.lengths[name],
                    on_device(self.tables[name]),
                )
                for name, new in chunks
            ),
            block_size=self.block_size,
            batch_invariant=self.batch_invariant,
        )
        hidden = self.network.forward(
            on_device(ids + padding), on_device(positions + padding), self.cache, metadata
        )
        logits = self.network.compute_logits(hidden).cpu()
        return {name: logits[span] for name, span in spans.items()}

    def prefill(self, name: str, ids: Sequence[int], chunk_size: int = 1 << 30) -> torch.Tensor:
        """Prefill alone, in chunks. Returns logits [len(ids), vocab]."""
        parts = [ids[i : i + chunk_size] for i in range(0, len(ids), chunk_size)]
        return torch.cat([self.step(chunks=[(name, part)])[name] for part in parts])

    def greedy(self, name: str, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Prefill, then decode alone."""
        tokens = [int(self.prefill(name, ids)[-1].argmax())]
        while len(tokens) < num_tokens:
            tokens.append(int(self.step([(name, tokens[-1])])[name].argmax()))
        return tokens

    def _slot(self, name: str, position: int) -> int:
        table = self.tables.setdefault(name, [])
        if position // self.block_size == len(table):
            table.append(self._free.pop())
        return table[position // self.block_size] * self.block_size + position % self.block_size


@pytest.fixture
def paged_runner() -> type[PagedRunner]:
    """The runner class."""
    return PagedRunner


def random_ids(count: int, seed: int = 0, vocab_size: int = TINY["vocab_size"]) -> list[int]:
    """Token ids of a random prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (count,), generator=generator).tolist()


@pytest.fixture
def prompt() -> Callable[..., list[int]]:
    """A function (count, seed) → token ids."""
    return random_ids


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a transformers weight."""
    stem, _, kind = name.rpartition(".")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{GGUF_NAMES[part]}.{kind}"


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Order the rows of q or k as llama GGUF files do: the halves of each head interleaved."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def gguf_writer(references) -> Callable[..., Path]:
    """A function that writes a tiny reference as GGUF, matrices in `kind`, and returns the path.

    `drop` leaves weights out, `metadata` adds or replaces keys, `extra` adds tensors. The file's
    weights, rounded, are left in `writer.rounded` under transformers' names.
    """

    def write(
        path: Path,
        kind: str = "F32",
        family: str = "llama",
        *,
        drop: Sequence[str] = (),
        extra: dict[str, np.ndarray] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Path:
        model = references(family)
        config = model.config
        architecture = config.model_type
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in (_gguf_metadata(config, architecture) | (metadata or {})).items():
            if isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_uint32(key, value)
        write.rounded = {}
        for name, parameter in model.state_dict().items():
            tied = name == "lm_head.weight" and config.tie_word_embeddings
            if not tied and gguf_name(name) not in drop:
                values = parameter.float().numpy()
                write.rounded[name] = _add_tensor(writer, name, values, kind, config)
        for name, values in (extra or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _gguf_metadata(config: Any, architecture: str) -> dict[str, Any]:
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if head_dim := getattr(config, "head_dim", None):
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str, config: Any
) -> torch.Tensor:
    """Add one weight; vectors stay F32. Returns what the file holds, in transformers' order."""
    quantization = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
    rounded = gguf.dequantize(gguf.quantize(values, quantization), quantization)
    num_heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if num_heads and config.model_type == "llama":
        values = interleave(values, num_heads)
    packed = gguf.quantize(values, quantization)
    if kind in ("F32", "F16") or values.ndim == 1:
        writer.add_tensor(gguf_name(name), packed)
    else:
        writer.add_tensor(gguf_name(name), packed, raw_dtype=quantization)
    return torch.from_numpy(rounded.copy())


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with plain operators on CPUs, in the order of transformers: differences are ours.

    The compiled operators add in another order; they have tests against the plain ones.
    """
    monkeypatch.setattr("serve_app.models.kernels.cpu._kernels", lambda dtype: None)
