"""The network against transformers on the same weights: logits within 1e-4 in float32."""

from __future__ import annotations

import copy

import pytest
import torch

from serve_app.models.loading.loader import load_model

FAMILIES = (
    "llama",
    "llama-tied",
    "llama-bias",
    "llama3-rope",
    "yarn-rope",
    "qwen2",
    "qwen3",
    "mistral",
    "r1-distill-qwen",
    "r1-distill-llama",
    "r1-0528-qwen3",
)
pytestmark = pytest.mark.usefixtures("reference_kernels")

TOLERANCE = {"cpu": 1e-4, "cuda": 3e-4, "xpu": 3e-4}
"""The reference runs on the CPU; cards add float32 in another order, and logits reach ±8."""


def load(folder, device, **options):
    return load_model(folder, device=device, dtype="float32", **options).network


def reference_logits(model, ids):
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_prefill_equals_transformers(family, device, references, saved, paged_runner, prompt):
    ids = prompt(75)
    expected = reference_logits(references(family), ids)
    logits = paged_runner(load(saved(family), device)).prefill("a", ids)
    assert (logits - expected).abs().max() < TOLERANCE[device]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("chunk_size", "block_size"), [(16, 16), (7, 16), (33, 32), (1, 16)])
def test_chunked_prefill_equals_transformers(
    family, chunk_size, block_size, device, references, saved, paged_runner, prompt
):
    ids = prompt(70, seed=chunk_size)
    expected = reference_logits(references(family), ids)
    runner = paged_runner(load(saved(family), device), block_size)
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


def test_decodes_and_chunks_in_one_step_equal_transformers(
    device, references, saved, paged_runner, prompt
):
    model = references("qwen2")
    runner = paged_runner(load(saved("qwen2"), device), poison=1e3)
    texts = {name: prompt(length, seed=length) for name, length in (("a", 3), ("b", 90), ("c", 40))}
    texts |= {"d": prompt(50, seed=9), "e": prompt(33, seed=8)}
    for name in ("a", "b", "c"):
        runner.prefill(name, texts[name][:-1])
    decodes = [(name, texts[name][-1]) for name in ("a", "b", "c")]
    runner.step(chunks=[("d", texts["d"][:20])])
    logits = runner.step(decodes, [("d", texts["d"][20:]), ("e", texts["e"])])
    for name, ids in texts.items():
        expected = reference_logits(model, ids)[-logits[name].shape[0] :]
        assert (logits[name] - expected).abs().max() < TOLERANCE[device], name


def test_padding_rows_change_nothing_and_poison_nothing(device, saved, paged_runner, prompt):
    network = load(saved("llama"), device)
    plain, padded = paged_runner(network), paged_runner(network)
    for runner in (plain, padded):
        runner.prefill("a", prompt(20))
    for token in (5, 6, 7):
        expected = plain.step([("a", token)])["a"]
        logits = padded.step([("a", token)], num_padding=3)["a"]
        assert (logits - expected).abs().max() < TOLERANCE[device]
    assert torch.isfinite(padded.cache).all()


def test_a_wider_decode_than_needed_changes_nothing(device, saved, paged_runner, prompt):
    network = load(saved("llama"), device)
    plain, wide = paged_runner(network), paged_runner(network)
    for runner in (plain, wide):
        runner.prefill("a", prompt(20))
    expected = plain.step([("a", 5)])["a"]
    assert (wide.step([("a", 5)], max_context_len=200)["a"] - expected).abs().max() < TOLERANCE[
        device
    ]


def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    device, references, saved, paged_runner, prompt
):
    ids = prompt(60)
    expected = reference_logits(references("llama"), ids)
    theirs = reference_logits(copy.deepcopy(references("llama")).bfloat16(), ids)
    network = load_model(saved("llama"), device=device, dtype="bfloat16").network
    logits = paged_runner(network).prefill("a", ids)
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 1.3 * (theirs - expected).norm()


def test_contract_facts(device, saved):
    network = load(saved("qwen3"), device)
    cache = network.allocate_kv_cache(5, 16)
    assert cache.shape == (2, 2, 5, 16, 2, 32)
    assert cache.device.type == device
    assert not cache.any()
    assert network.kv_spec.bytes_per_token == 2 * 2 * 2 * 32 * 4
    assert (network.vocab_size, network.max_position) == (96, 256)


def test_decode_step_can_be_captured(saved, paged_runner, prompt):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA graphs")
    network = load_model(saved("llama"), device="cuda", dtype="bfloat16").network
    runner = paged_runner(network)
    runner.prefill("a", prompt(20))
    runner.prefill("b", prompt(30))
    captured = _Captured(runner)
    expected = runner.step([("a", 5), ("b", 6)])
    logits = captured.replay([("a", 5), ("b", 6)])
    for row, name in enumerate(("a", "b")):
        assert (logits[row] - expected[name][0]).abs().max() < 0.05


class _Captured:
    """One decode step of two rows in a CUDA graph, with static inputs."""

    def __init__(self, runner):
        from serve_app.models.interface import AttentionMetadata

        self.runner = runner
        self.ids = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.positions = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.lens = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.slots = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.tables = torch.zeros(2, 4, dtype=torch.int64, device="cuda")
        metadata = AttentionMetadata(2, self.slots, self.tables, self.lens, 64)

        def run():
            hidden = runner.network.forward(self.ids, self.positions, runner.cache, metadata)
            return runner.network.compute_logits(hidden)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = run()

    def replay(self, decodes):
        for row, (name, token) in enumerate(decodes):
            position = self.runner.lengths[name] - 1
            table = self.runner.tables[name]
            self.ids[row], self.positions[row], self.lens[row] = token, position, position + 1
            self.slots[row] = table[position // 16] * 16 + position % 16
            self.tables[row, : len(table)] = torch.tensor(table)
        self.graph.replay()
        return self.logits.cpu()
