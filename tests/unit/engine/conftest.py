"""A tiny random Llama: transformers' as the reference, and the same weights behind `CausalLM`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from serve_app.config.schema import EngineSection
from serve_app.core.events import TokenEvent
from serve_app.core.sampling import SamplingParams
from serve_app.engine.native import NativeEngine
from serve_app.engine.protocol import Engine
from serve_app.models.interface import AttentionMetadata, KVCacheSpec, LoadedModel

# Tiny matrices gain nothing from more threads, and on a busy machine they wait for each other.
torch.set_num_threads(1)

VOCAB_SIZE = 320
MAX_POSITION = 512


class TinyLlama:
    """Plain paged attention; `by_row` multiplies row by row, which is batch-invariant."""

    def __init__(self, reference: torch.nn.Module, by_row: bool = False) -> None:
        config = reference.config
        self.weights = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
        self.vocab_size = config.vocab_size
        self.max_position = config.max_position_embeddings
        self.device = torch.device("cpu")
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_layers = config.num_hidden_layers
        self.eps = config.rms_norm_eps
        self.kv_spec = KVCacheSpec(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim, torch.float32
        )
        self.by_row = by_row
        places = torch.arange(self.max_position, dtype=torch.float32)
        half = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        angles = torch.outer(places, 1.0 / 10000.0**half)
        self.cos, self.sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> torch.Tensor:
        spec = self.kv_spec
        return torch.zeros(
            spec.num_layers, 2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        hidden = self.weights["model.embed_tokens.weight"][input_ids]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            normed = self._norm(hidden, prefix + "input_layernorm")
            attended = self._attend(layer, normed, positions, kv_cache[layer], metadata)
            hidden = hidden + attended
            normed = self._norm(hidden, prefix + "post_attention_layernorm")
            gate = functional.silu(self._linear(normed, prefix + "mlp.gate_proj"))
            up = self._linear(normed, prefix + "mlp.up_proj")
            hidden = hidden + self._linear(gate * up, prefix + "mlp.down_proj")
        return self._norm(hidden, "model.norm")

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._linear(hidden, "lm_head").float()

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.weights[name + ".weight"]
        if not self.by_row:
            return functional.linear(x, weight)
        return torch.cat([functional.linear(row, weight) for row in x.split(1)])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weights[name + ".weight"]

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    def _attend(
        self,
        layer: int,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        prefix = f"model.layers.{layer}.self_attn."
        query, key, value = (
            self._linear(x, prefix + name).view(len(x), -1, self.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        flat = cache.view(2, -1, *cache.shape[-2:])
        flat[0, metadata.slot_mapping] = key
        flat[1, metadata.slot_mapping] = value
        out = torch.empty_like(query)
        for row in range(metadata.num_decodes):
            context_len = int(metadata.decode_context_lens[row])
            assert context_len <= metadata.max_decode_context_len
            table = metadata.decode_block_tables[row]
            out[row : row + 1] = self._attend_one(query[row : row + 1], cache, table, context_len)
        for chunk in metadata.prefill_chunks:
            rows = slice(chunk.start, chunk.start + chunk.length)
            out[rows] = self._attend_one(query[rows], cache, chunk.block_table, chunk.context_len)
        return self._linear(out.flatten(1), prefix + "o_proj")

    def _attend_one(
        self, query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, context_len: int
    ) -> torch.Tensor:
        key, value = (cache[i][table].flatten(0, 1)[:context_len] for i in (0, 1))
        repeats = self.num_heads // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / self.head_dim**0.5
        last_places = torch.arange(context_len - len(query), context_len)
        visible = torch.arange(context_len) <= last_places.unsqueeze(-1)
        scores = scores.masked_fill(~visible, float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


class Reference:
    """transformers on the same weights, one prompt at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Greedy continuation without EOS."""
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Log-softmax [T, V] of each position's logits."""
        return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama saved as safetensors in Hugging Face form."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_POSITION,
        initializer_range=0.35,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tiny_folder: Path) -> Reference:
    """The tiny model in transformers."""
    from transformers import LlamaForCausalLM

    return Reference(LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval())


@pytest.fixture(scope="session")
def load_tiny(reference: Reference) -> Callable[..., LoadedModel]:
    """Make the tiny model behind `CausalLM`."""

    def load(by_row: bool = False) -> LoadedModel:
        network = TinyLlama(reference.model, by_row)
        return LoadedModel(network, "tiny", "llama", torch.float32, 1000, "dense", (2,))

    return load


@pytest.fixture
def make_engine(load_tiny: Callable[..., LoadedModel]) -> Callable[..., NativeEngine]:
    """Make a NativeEngine on the tiny model; keywords go to EngineSection."""

    def make(by_row: bool = False, graphs: object = None, **section: object) -> NativeEngine:
        settings: dict[str, object] = {
            "kv_cache_tokens": 2048,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "warmup": False,
        }
        settings.update(section)
        return NativeEngine(load_tiny(by_row), EngineSection(**settings), graphs=graphs)

    return make


class Collected:
    """Events of several requests, gathered by id."""

    def __init__(self) -> None:
        self.events: dict[str, list[TokenEvent]] = {}

    def add(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events.setdefault(event.request_id, []).append(event)

    def ids(self, request_id: str) -> list[int]:
        return [i for event in self.events.get(request_id, []) for i in event.new_token_ids]

    def end(self, request_id: str) -> TokenEvent:
        """The one terminal event, which must be the last."""
        events = self.events[request_id]
        terminal = [event for event in events if event.finish_reason is not None]
        assert len(terminal) == 1, f"{request_id}: {len(terminal)} terminal events"
        assert events[-1] is terminal[0]
        return terminal[0]


@pytest.fixture
def run_all() -> Callable[..., Collected]:
    """Submit requests {id: (prompt, params)} at once and step until all are done."""

    def run(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> Collected:
        collected = Collected()
        for request_id, (prompt, params) in requests.items():
            engine.submit(request_id, prompt, params)
        while engine.has_work():
            collected.add(engine.step())
        return collected

    return run


@pytest.fixture
def random_prompts() -> Callable[[int, int], list[list[int]]]:
    """Random prompts of 1–150 ids, half of them sharing prefixes."""

    def make(count: int, seed: int) -> list[list[int]]:
        rng = random.Random(seed)
        shared = [[rng.randrange(3, VOCAB_SIZE) for _ in range(80)] for _ in range(3)]
        prompts = []
        for i in range(count):
            own = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 70))]
            prompts.append(rng.choice(shared)[: rng.randint(20, 80)] + own if i % 2 else own)
        return prompts

    return make
