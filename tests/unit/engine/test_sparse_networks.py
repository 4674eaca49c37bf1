"""The engine over networks with latent attention and experts, against transformers' generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import ConfigError
from serve_app.core.sampling import SamplingParams
from serve_app.engine.factory import create_engine
from serve_app.engine.native import NativeEngine

DEVICES = [
    "cpu",
    *(name for name in ("cuda", "xpu") if torch.get_device_module(name).is_available()),
]
COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK: dict[str, Any] = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-lite": ("DeepseekV2", DEEPSEEK | {"q_lora_rank": None, "n_shared_experts": 2}),
    "v3": (
        "DeepseekV3",
        DEEPSEEK
        | {"q_lora_rank": 48, "n_shared_experts": 1}
        | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}
        | {"norm_topk_prob": True},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from name to (transformers model, its folder)."""
    import transformers

    made: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in made:
            prefix, own = MODELS[name]
            torch.manual_seed(3)
            config = getattr(transformers, f"{prefix}Config")(**(COMMON | own))
            model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = (model, folder)
        return made[name]

    return get


def make(folder: Path, device: str = "cpu", **section: object) -> NativeEngine:
    settings = {
        "device": device,
        "dtype": "float32",
        "kv_cache_tokens": 384,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 96,
        **section,
    }
    engine = create_engine(ModelSection(path=str(folder)), EngineSection(**settings))
    assert isinstance(engine, NativeEngine)
    return engine


def generate(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(MODELS))
def test_greedy_output_is_transformers(name, device, models, run_all, random_prompts):
    model, folder = models(name)
    prompts = random_prompts(14, seed=11) + [[*range(100, 170), 3 + i] for i in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=20)
    engine = make(folder, device)
    collected = run_all(engine, {f"r{i}": (p, params) for i, p in enumerate(prompts)})
    late = [*range(100, 170), 9]
    collected.add(run_all(engine, {"late": (late, params)}).events["late"])
    engine.check_integrity()
    stats = engine.stats()
    assert stats.num_preemptions_total > 0
    assert stats.num_chunked_prefills_total > 0
    assert stats.num_prefix_hit_tokens_total > 0
    assert stats.num_used_blocks == 0
    distinct = set()
    for name_of_request, prompt in [(f"r{i}", p) for i, p in enumerate(prompts)] + [("late", late)]:
        ids = collected.ids(name_of_request)
        assert ids == generate(model, prompt, 20), name_of_request
        distinct |= set(ids)
    assert len(distinct) >= 16, "texts that repeat themselves prove little"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariance_alone_and_together(dtype, device, models, run_all, random_prompts):
    _, folder = models("v2-lite")
    prompts = random_prompts(6, seed=12) + [[*range(100, 170), 3 + i] for i in range(5)]
    requests = {
        f"r{i}": (p, SamplingParams(max_tokens=10, temperature=float(i % 2), seed=i))
        for i, p in enumerate(prompts)
    }
    section = {"dtype": dtype, "batch_invariant": True, "kv_cache_tokens": 320}
    crowd = run_all(make(folder, device, **section), requests)
    alone = make(folder, device, **section)
    for name, request in requests.items():
        assert run_all(alone, {name: request}).ids(name) == crowd.ids(name), name


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_logits_that_are_not_finite_refuse_the_model(value, models, tmp_path):
    _, folder = models("v2-lite")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.shared_experts.up_proj.weight"].fill_(value)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="no finite numbers"):
        make(tmp_path)
