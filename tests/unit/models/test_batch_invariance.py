"""Loaded and asked for `batch_invariant`, a sequence's logits are the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.loading.loader import load_model


@pytest.fixture(params=["float32", "bfloat16", "int4"])
def network(request, saved, device):
    dtype = "float32" if request.param == "float32" else "bfloat16"
    weight_format = "int4" if request.param == "int4" else "auto"
    return load_model(
        saved("llama"),
        device=device,
        dtype=dtype,
        weight_format=weight_format,
        batch_invariant=True,
    ).network


def started(paged_runner, network, texts, **options):
    runner = paged_runner(network, num_blocks=400, batch_invariant=True, **options)
    for name, ids in texts.items():
        runner.prefill(name, ids[:-1], 32)
    return runner


def test_decode_rows(network, paged_runner, prompt):
    texts = {str(n): prompt(20 + 7 * n, seed=n) for n in range(33)}
    alone = {}
    runner = started(paged_runner, network, texts)
    for name, ids in texts.items():
        alone |= runner.step([(name, ids[-1])], max_context_len=256)
    for count in (2, 3, 7, 8, 16, 17, 31, 32, 33):
        names = list(texts)[-count:]
        runner = started(paged_runner, network, {name: texts[name] for name in names}, seed=count)
        together = runner.step([(name, texts[name][-1]) for name in names], max_context_len=256)
        for name in names:
            assert torch.equal(together[name], alone[name]), (count, name)


def test_prefill_chunks_beside_decodes_and_other_chunks(network, paged_runner, prompt):
    texts = {name: prompt(50, seed=seed) for seed, name in enumerate("abcd")}
    alone = paged_runner(network, batch_invariant=True)
    expected = {name: alone.step(chunks=[(name, ids)])[name] for name, ids in texts.items()}
    for name in "ab":
        expected[f"next {name}"] = alone.step([(name, 5)], max_context_len=256)[name]
    mixed = paged_runner(network, batch_invariant=True, seed=7)
    first = mixed.step(chunks=[(name, texts[name]) for name in "ab"])
    second = mixed.step([("a", 5), ("b", 5)], [(name, texts[name]) for name in "cd"], 0, 256)
    for name in "ab":
        assert torch.equal(first[name], expected[name])
        assert torch.equal(second[name], expected[f"next {name}"])
    for name in "cd":
        assert torch.equal(second[name], expected[name])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_whatever_the_number_of_threads(num_threads, saved, paged_runner, prompt):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        network = load_model(saved("qwen2"), dtype="float32", batch_invariant=True).network
        texts = {str(n): prompt(30, seed=n) for n in range(9)}
        runner = started(paged_runner, network, texts)
        together = runner.step([(name, ids[-1]) for name, ids in texts.items()])
        runner = started(paged_runner, network, texts)
        for name, ids in texts.items():
            assert torch.equal(runner.step([(name, ids[-1])])[name], together[name])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_of_a_row_is_the_same_bits_in_any_batch(num_threads, dtype):
    from serve_app.models.layers import row_invariant_silu_and_mul, silu_and_mul

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        x = torch.randn(100, 2 * 4864, generator=torch.Generator().manual_seed(0)).to(dtype)
        alone = torch.cat([silu_and_mul(row) for row in x.split(1)])
        for count in (1, 2, 6, 7, 8, 13, 50, 100):
            assert torch.equal(row_invariant_silu_and_mul(x[:count]), alone[:count])
    finally:
        torch.set_num_threads(before)


def test_the_network_must_have_been_loaded_for_it(saved, paged_runner, prompt):
    network = load_model(saved("llama")).network
    with pytest.raises(AssertionError, match="batch_invariant"):
        paged_runner(network, batch_invariant=True).prefill("a", prompt(5))


def test_q8_0_and_q4_1_files(tmp_path, device, paged_runner, prompt, gguf_writer):
    for kind in ("Q8_0", "Q4_1"):
        path = gguf_writer(tmp_path / f"{kind}.gguf", kind)
        network = load_model(path, device=device, dtype="bfloat16", batch_invariant=True).network
        texts = {str(n): prompt(20, seed=n) for n in range(11)}
        together = started(paged_runner, network, texts).step(
            [(name, ids[-1]) for name, ids in texts.items()]
        )
        runner = started(paged_runner, network, texts)
        for name, ids in texts.items():
            assert torch.equal(runner.step([(name, ids[-1])])[name], together[name])
