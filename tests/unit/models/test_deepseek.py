"""The sparse networks against transformers: equal logits and the same experts, however paged."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.core.errors import ConfigError
from serve_app.models import moe
from serve_app.models.loading.loader import load_model
from serve_app.models.quantized import GROUP_SIZE, quantize
from serve_app.models.sparse_config import MixtureConfig

FAMILIES = (
    "deepseek-v2-lite",
    "deepseek-v2",
    "deepseek-v3",
    "deepseek-v3-half-split",
    "qwen3-moe",
    "qwen3-moe-mixed",
    "qwen2-moe",
)
pytestmark = pytest.mark.usefixtures("reference_kernels")

TOLERANCE = {"cpu": 1e-4, "cuda": 3e-4, "xpu": 3e-4}
"""The reference runs on the CPU; cards add float32 in another order."""


def load(folder, device="cpu", **options):
    return load_model(folder, device=device, **{"dtype": "float32", **options}).network


def reference_logits(model, ids):
    return model(torch.tensor([ids])).logits[0]


@pytest.fixture
def chosen(monkeypatch):
    """The experts that our routers choose, int64 [rows, k] sorted, layer after layer."""
    seen = []
    choose = moe.choose_experts

    def record(*args):
        weights, indices = choose(*args)
        seen.append(indices.sort(-1).values.cpu())
        return weights, indices

    monkeypatch.setattr(moe, "choose_experts", record)
    return seen


def reference_choices(model, ids):
    """Logits, and the experts of each sparse layer, int64 [rows, k] sorted."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda *args: seen.append(args[2][2].sort(-1).values))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    logits = reference_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return logits, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_experts_equal_transformers(
    family, device, references, saved, paged_runner, prompt, chosen
):
    ids = prompt(75)
    expected, experts = reference_choices(references(family), ids)
    logits = paged_runner(load(saved(family), device)).prefill("a", ids)
    assert len(chosen) == len(experts) > 0
    for ours, theirs in zip(chosen, experts, strict=True):
        assert torch.equal(ours, theirs)
    assert (logits - expected).abs().max() < TOLERANCE[device]


@pytest.mark.parametrize("family", ["deepseek-v2-lite", "deepseek-v3", "qwen3-moe"])
@pytest.mark.parametrize(("chunk_size", "block_size"), [(7, 16), (33, 32), (1, 16), (40, 16)])
def test_chunked_prefill_equals_transformers(
    family, chunk_size, block_size, device, references, saved, paged_runner, prompt
):
    ids = prompt(70, seed=chunk_size)
    expected = reference_logits(references(family), ids)
    runner = paged_runner(load(saved(family), device), block_size, poison=1e3)
    assert (runner.prefill("a", ids, chunk_size) - expected).abs().max() < TOLERANCE[device]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decode_equals_transformers(family, device, references, saved, paged_runner, prompt):
    network = load(saved(family), device)
    prompts = [prompt(20, seed=seed) for seed in range(12)]
    texts = [paged_runner(network).greedy("a", ids, 40) for ids in prompts]
    ids, tokens = max(zip(prompts, texts, strict=True), key=lambda pair: len(set(pair[1])))
    assert len(set(tokens)) >= 16, "a text that repeats itself proves little"
    expected = reference_logits(references(family), ids + tokens[:-1])[len(ids) - 1 :]
    assert tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3", "qwen2-moe"])
def test_decodes_and_chunks_in_one_step_equal_transformers(
    family, device, references, saved, paged_runner, prompt
):
    runner = paged_runner(load(saved(family), device), poison=1e3)
    texts = {name: prompt(length, seed=length) for name, length in (("a", 3), ("b", 90), ("c", 40))}
    texts |= {"d": prompt(50, seed=9), "e": prompt(33, seed=8)}
    for name in ("a", "b", "c"):
        runner.prefill(name, texts[name][:-1])
    decodes = [(name, texts[name][-1]) for name in ("a", "b", "c")]
    runner.step(chunks=[("d", texts["d"][:20])])
    logits = runner.step(decodes, [("d", texts["d"][20:]), ("e", texts["e"])])
    for name, ids in texts.items():
        expected = reference_logits(references(family), ids)[-logits[name].shape[0] :]
        assert (logits[name] - expected).abs().max() < TOLERANCE[device], name


@pytest.mark.parametrize("family", ["deepseek-v2-lite", "qwen3-moe"])
def test_padding_rows_change_nothing_and_poison_nothing(
    family, device, saved, paged_runner, prompt
):
    network = load(saved(family), device)
    plain, padded = paged_runner(network), paged_runner(network)
    for runner in (plain, padded):
        runner.prefill("a", prompt(20))
    for token in (5, 6, 7):
        expected = plain.step([("a", token)])["a"]
        logits = padded.step([("a", token)], num_padding=3)["a"]
        assert (logits - expected).abs().max() < TOLERANCE[device]
    assert torch.isfinite(padded.cache).all()


def test_the_cache_holds_one_latent_per_token_and_layer(device, saved):
    network = load(saved("deepseek-v2-lite"), device)
    cache = network.allocate_kv_cache(5, 16)
    assert cache.shape == (3, 1, 5, 16, 1, 32 + 8)
    assert network.kv_spec.bytes_per_token == 3 * (32 + 8) * 4 == cache[:, :, 0, 0].nbytes


@pytest.mark.parametrize("num_experts", [8, 60, 256])
def test_a_rows_scores_have_the_same_bits_in_any_batch(num_experts):
    config = MixtureConfig(num_experts, 2, 16, (True,), scoring="sigmoid")
    logits = torch.randn(64, num_experts)
    alone = [moe.choose_experts(row, None, config) for row in logits.split(1)]
    for num_rows in (2, 9, 31, 64):
        weights, indices = moe.choose_experts(logits[:num_rows], None, config)
        assert torch.equal(weights, torch.cat([each for each, _ in alone[:num_rows]]))
        assert torch.equal(indices, torch.cat([each for _, each in alone[:num_rows]]))


@pytest.mark.parametrize("weight_format", ["auto", "int4"])
@pytest.mark.parametrize("family", ["deepseek-v2-lite", "deepseek-v3", "qwen3-moe"])
def test_batch_invariant_rows_are_the_same_bits_in_any_company(
    family, weight_format, device, saved, paged_runner, prompt
):
    dtype = "float32" if weight_format == "auto" else "bfloat16"
    network = load(
        saved(family), device, dtype=dtype, weight_format=weight_format, batch_invariant=True
    )
    texts = {str(n): prompt(20 + 7 * n, seed=n) for n in range(9)}

    def started(seed):
        runner = paged_runner(network, num_blocks=400, batch_invariant=True, seed=seed)
        for name, ids in texts.items():
            runner.prefill(name, ids[:-1], 32)
        return runner

    runner, alone = started(0), {}
    for name, ids in texts.items():
        alone |= runner.step([(name, ids[-1])], max_context_len=256)
    for count in (2, 5, 9):
        names = list(texts)[-count:]
        beside = [("new", prompt(40, seed=1))] if count == 5 else []
        decodes = [(name, texts[name][-1]) for name in names]
        together = started(count).step(decodes, beside, 0, 256)
        for name in names:
            assert torch.equal(together[name], alone[name]), (count, name)


@pytest.mark.parametrize("weight_format", ["auto", "int4"])
@pytest.mark.parametrize("family", ["deepseek-v2-lite", "deepseek-v3", "qwen3-moe"])
def test_bfloat16_and_int4_agree_with_transformers_teacher_forced(
    family, weight_format, device, references, paged_runner, prompt, tmp_path, chosen
):
    model = well_conditioned(references(family))
    model.save_pretrained(tmp_path)
    if weight_format == "int4":
        round_to_4_bits(model)
    network = load(tmp_path, device, dtype="bfloat16", weight_format=weight_format)
    divergence, agreement, gaps, same_experts = [], [], [], []
    for seed in range(8):
        ids = prompt(150, seed=seed)
        logits, experts = reference_choices(model, ids)
        chosen.clear()
        result = paged_runner(network).prefill("a", ids, 64).log_softmax(-1)
        by_layer = [torch.cat(chosen[layer :: len(experts)]) for layer in range(len(experts))]
        same = (torch.stack(by_layer) == torch.stack(experts)).all(-1)
        same_experts.append(same)
        expected = logits.log_softmax(-1)
        divergence.append((expected.exp() * (expected - result)).sum(-1))
        agreement.append(result.argmax(-1) == expected.argmax(-1))
        best = expected.topk(2, dim=-1).values
        gaps.append((best[:, 0] - best[:, 1])[~agreement[-1] & same.all(0)])
    mean = float(torch.cat(divergence).mean())
    share = float(torch.cat(agreement).float().mean())
    same_share = float(torch.cat(same_experts, 1).float().mean())
    print(
        f"{family} {weight_format}: top-1 agreement {share:.4f}, KL per token {mean:.2e}, the same"
        f" experts {same_share:.4f}"
    )
    assert share >= 0.99
    assert same_share >= 0.99
    assert mean < 2e-4
    # A random network has many near-ties: only those may fall to the other side, of tokens and of
    # experts (which may then move the logits by more).
    assert torch.cat(gaps).le(0.05).all()


def well_conditioned(model):
    """A copy whose layers add a hundredth: rounding errors then stay errors of rounding.

    Without it a bfloat16 score flips an expert, and the random network amplifies the difference.
    Its weights are bfloat16's values, as those of the families' published checkpoints are: rounding
    others to bfloat16 costs three times what computing in it does.
    """
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            parameter.mul_(0.01)
        parameter.copy_(parameter.bfloat16())
    return model


def round_to_4_bits(model):
    """Round what `weight_format: int4` rounds: all matrices of layers but gates and kv_b_proj."""
    for name, parameter in model.named_parameters():
        is_kept = ("kv_b_proj", "mlp.gate.", "shared_expert_gate", "embed", "lm_head")
        has_groups = parameter.ndim >= 2 and parameter.shape[-1] % GROUP_SIZE == 0
        if has_groups and not any(part in name for part in is_kept):
            rows = parameter.flatten(0, -2)
            parameter.copy_(quantize(rows, 4).dequantize(torch.float32).view_as(parameter))


def test_a_missing_expert_is_an_error(saved, tmp_path):
    copy_of(saved("deepseek-v2-lite"), tmp_path, drop=".experts.3.down_proj.weight")
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.experts\.3\.down_proj"):
        load(tmp_path)


def test_an_unused_weight_is_named(saved, tmp_path):
    copy_of(saved("deepseek-v3"), tmp_path, add="model.layers.1.mlp.experts.99.up_proj.weight")
    with pytest.raises(ConfigError, match=r"has model\.layers\.1\.mlp\.experts\.99\.up_proj"):
        load(tmp_path)


def test_layers_that_predict_further_tokens_are_skipped_by_name(
    saved, tmp_path, caplog, paged_runner, prompt
):
    copy_of(saved("deepseek-v3"), tmp_path, add="model.layers.3.eh_proj.weight")
    with caplog.at_level(logging.INFO):
        network = load(tmp_path)
    assert "skipped model.layers.3.eh_proj.weight" in caplog.text
    expected = paged_runner(load(saved("deepseek-v3"))).prefill("a", prompt(20))
    assert torch.equal(paged_runner(network).prefill("a", prompt(20)), expected)


def copy_of(folder, target, drop=None, add=None):
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if not (drop and drop in name)}
    if add:
        weights[add] = torch.zeros(4, 4)
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
