from __future__ import annotations

import copy
import json
import shutil

import gguf
import numpy as np
import pytest
import torch

from serve_app.core.errors import ConfigError
from serve_app.models.config import UnsupportedArchitectureError
from serve_app.models.loading.loader import gguf_eos, hugging_face_eos, load_model


def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0]


def assert_one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the tiny llama's folder, to be damaged."""
    return shutil.copytree(saved("llama"), tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def resave(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_facts(saved):
    progress = []
    loaded = load_model(
        saved("llama"), dtype="float32", progress=lambda *args: progress.append(args)
    )
    assert loaded.architecture == "llama"
    assert loaded.name == saved("llama").name
    assert loaded.dtype == torch.float32
    assert loaded.weight_format == "dense"
    assert loaded.eos_token_ids == (2,)
    file_bytes = (saved("llama") / "model.safetensors").stat().st_size
    assert 0.95 * file_bytes < loaded.weights_bytes <= file_bytes
    done, totals = zip(*progress, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1] == loaded.weights_bytes


def test_shards_equal_one_file(references, saved, tmp_path, paged_runner, prompt):
    references("qwen2").save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = prompt(30)
    sharded, single = (
        paged_runner(load_model(path, dtype="float32").network).prefill("a", ids)
        for path in (tmp_path, saved("qwen2"))
    )
    assert torch.equal(sharded, single)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision(stored, references, folder, paged_runner, prompt):
    resave(folder, lambda weights: weights.update({k: v.to(stored) for k, v in weights.items()}))
    model = copy.deepcopy(references("llama"))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).float()
    ids = prompt(30)
    logits = paged_runner(load_model(folder, dtype="float32").network).prefill("a", ids)
    assert (logits - logits_of(model, ids)).abs().max() < 1e-4


def test_the_file_is_not_copied(tmp_path):
    import transformers

    from serve_app.models.loading.safetensors_source import SafetensorsSource

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=512, num_hidden_layers=1, intermediate_size=512
    )
    with torch.inference_mode(False):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    source = SafetensorsSource(tmp_path)
    weight = source.read("model.embed_tokens.weight")
    again = source.read("model.embed_tokens.weight")
    assert weight.data_ptr() == again.data_ptr()
    before = anonymous_bytes()
    loaded = load_model(tmp_path, dtype="float32")
    assert anonymous_bytes() - before < 0.5 * loaded.weights_bytes


def anonymous_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_missing_weight(folder):
    resave(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    assert_one_line(error, "lacks model.layers.1.mlp.up_proj.weight")


def test_unexpected_weight(folder):
    resave(folder, lambda weights: weights.update(adapter=torch.zeros(3)))
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    assert_one_line(error, "adapter", "does not use")


def test_wrong_shape(folder):
    resave(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    assert_one_line(error, "model.norm.weight", "[3]", "[64]")


def test_weights_of_a_type_that_is_not_read(folder):
    resave(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(64).double()}))
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    assert_one_line(error, "F64", "model.norm.weight")


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.999])
def test_truncated_safetensors(folder, share):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    assert_one_line(error, "model.safetensors")


def test_damaged_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"oops"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    assert_one_line(error, "header")


def test_missing_shard_and_incomplete_index(references, tmp_path):
    references("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model.norm.weight", "model.norm.other"))
    with pytest.raises(ConfigError) as error:
        load_model(tmp_path)
    assert_one_line(error, "model.norm.other", "index")
    index.write_text(text)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ConfigError) as error:
        load_model(tmp_path)
    assert_one_line(error, shard.name, "No such file")


def test_index_never_leaves_the_folder(references, tmp_path):
    references("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as error:
        load_model(tmp_path)
    assert_one_line(error, "weight_map")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    assert_one_line(error, "has neither model.safetensors")


def test_unknown_architecture_is_its_own_error(folder):
    edit_config(folder, model_type="gpt_neox")
    with pytest.raises(UnsupportedArchitectureError) as error:
        load_model(folder)
    assert_one_line(error, "gpt_neox", "engine.kind: transformers")


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    assert_one_line(error, "config.json")


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-tied", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_equals_transformers_on_the_rounded_weights(
    family, kind, tmp_path, device, gguf_writer, references, paged_runner, prompt
):
    path = gguf_writer(tmp_path / "m.gguf", kind, family)
    model = copy.deepcopy(references(family))
    model.load_state_dict(gguf_writer.rounded, strict=family != "llama-tied")
    ids = prompt(40)
    loaded = load_model(path, device=device, dtype="float32", weight_format="dense")
    logits = paged_runner(loaded.network).prefill("a", ids)
    assert (logits - logits_of(model, ids)).abs().max() < 1e-4
    assert loaded.architecture == model.config.model_type
    assert loaded.name == "m"


@pytest.mark.parametrize(
    ("kind", "expected"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4"), ("F16", "dense")]
)
def test_gguf_blocks_stay_packed_on_the_cpu(
    kind, expected, tmp_path, gguf_writer, paged_runner, prompt
):
    path = gguf_writer(tmp_path / "m.gguf", kind)
    packed = load_model(path, dtype="bfloat16")
    dense = load_model(path, dtype="bfloat16", weight_format="dense")
    assert packed.weight_format == expected
    assert dense.weight_format == "dense"
    ids = prompt(20)
    runners = [paged_runner(loaded.network) for loaded in (packed, dense)]
    exact = paged_runner(load_model(path, dtype="float32").network)
    for runner in (*runners, exact):
        runner.prefill("a", ids)
    ours, theirs, reference = (r.step([("a", 5)])["a"] for r in (*runners, exact))
    assert (ours - reference).norm() < 2 * (theirs - reference).norm() + 0.02 * reference.norm()


@pytest.mark.parametrize("weight_format", ["int4", "int8"])
def test_dense_weights_are_rounded_when_asked(weight_format, saved, paged_runner, prompt):
    loaded = load_model(saved("llama"), dtype="bfloat16", weight_format=weight_format)
    assert loaded.weight_format == weight_format
    ids = prompt(30)
    expected = paged_runner(load_model(saved("llama"), dtype="float32").network).prefill("a", ids)
    logits = paged_runner(loaded.network).prefill("a", ids)
    limit = {"int4": 0.6, "int8": 0.08}[weight_format]
    assert (logits - expected).norm() / expected.norm() < limit


def test_more_bits_than_the_file_has_are_refused(tmp_path, gguf_writer):
    path = gguf_writer(tmp_path / "m.gguf", "Q4_1")
    with pytest.raises(ConfigError) as error:
        load_model(path, weight_format="int8")
    assert_one_line(error, "int8 is wider than the 4 bits")
    assert error.value.param == "engine.weight_format"


def test_float32_by_name_is_the_reference(tmp_path, gguf_writer):
    path = gguf_writer(tmp_path / "m.gguf", "Q4_1")
    assert load_model(path, dtype="float32").weight_format == "dense"


def test_rope_factors_of_a_gguf_file(tmp_path, gguf_writer, references, paged_runner, prompt):
    """The file's divisors do what config.json's llama3 scaling does."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = references("llama3-rope")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    factors = {"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)}
    path = gguf_writer(tmp_path / "m.gguf", family="llama3-rope", extra=factors)
    ids = prompt(60)
    logits = paged_runner(load_model(path, dtype="float32").network).prefill("a", ids)
    assert (logits - logits_of(model, ids)).abs().max() < 1e-4


def test_gguf_missing_and_unknown_tensors(tmp_path, gguf_writer):
    path = gguf_writer(tmp_path / "m.gguf", drop=["blk.1.ffn_up.weight"])
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert_one_line(error, "m.gguf lacks model.layers.1.mlp.up_proj.weight")
    path = gguf_writer(tmp_path / "n.gguf", drop=["token_embd.weight"])
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert_one_line(error, "model.embed_tokens.weight")
    extra = {"blk.0.ffn_extra.weight": np.zeros(3, dtype=np.float32)}
    path = gguf_writer(tmp_path / "o.gguf", extra=extra)
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert_one_line(error, "blk.0.ffn_extra.weight")


def test_gguf_type_that_is_not_read(tmp_path, gguf_writer):
    blocks = np.zeros((1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.F64][1]), np.uint8)
    extra = {"blk.0.ffn_extra.weight": blocks.view(np.float64)}
    path = gguf_writer(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert_one_line(error, "F64", "Q4_1")


def test_gguf_truncated_and_not_gguf(tmp_path, gguf_writer):
    path = gguf_writer(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert_one_line(error, "truncated")
    path.write_bytes(b"ELF?" * 100)
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert_one_line(error, "does not begin with GGUF")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 2}, (7, 8)),
        ({"eos_token_id": 7}, {"eos_token_id": 2}, (7,)),
        ({}, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": [3, 4]}, (3, 4)),
        (None, {}, ()),
    ],
)
def test_hugging_face_eos(tmp_path, generation, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert hugging_face_eos(tmp_path) == expected


def test_gguf_eos():
    metadata = {
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.tokens": ["a", "</s>", "<eot>", "<|im_end|>", "<|eot_id|>"],
        "tokenizer.ggml.token_type": np.array([1, 3, 3, 3, 1], dtype=np.int32),
    }
    assert gguf_eos(metadata) == (1, 2, 3)
    assert gguf_eos({}) == ()
