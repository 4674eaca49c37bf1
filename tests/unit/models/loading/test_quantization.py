"""Checkpoints in each quantized format against the dense model that they stand for."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.core.errors import ConfigError
from serve_app.models.config import UnsupportedArchitectureError
from serve_app.models.loading.loader import load_model
from serve_app.models.loading.quantization.methods import QUANTIZATION_METHODS
from serve_app.models.loading.quantization.table import FORMATS, open_folder
from serve_app.models.quantized import QuantizedWeight
from tests.unit.models.loading import checkpoints
from tests.unit.models.loading.checkpoints import (
    awq,
    fp8_blocks,
    gptq,
    int_quantized,
    pack_quantized,
    rewrite,
    round_layer,
)

DOWN = "model.layers.1.mlp.down_proj.weight"
HEAD = "lm_head.weight"
SINGLE = "model.safetensors"
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int"}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def compressed(form, *, bits=4, group_size=32, sym=True, kind="int"):
    weights = {"num_bits": bits, "type": kind, "symmetric": sym, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": weights | {"group_size": group_size}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.fixture(scope="module")
def model():
    import transformers

    torch.manual_seed(0)
    with torch.inference_mode(False):
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def quantize(folder, config, write, *, head=False, **rounding):
    """Rewrite the decoder's linear layers (and the head) by `write`; the dense weights."""

    def change(layer, weight):
        if "_proj" not in layer and not (head and layer == "lm_head"):
            return None
        rounded = round_layer(weight, **rounding)
        return write(rounded), rounded.dense

    return rewrite(folder, config, change)


def expected_logits(model, dense, ids):
    missing, unexpected = model.load_state_dict(dense, strict=True)
    assert not missing
    assert not unexpected
    return model(torch.tensor([ids])).logits[0]


@pytest.fixture
def check(model, folder, paged_runner, prompt, device):
    """A function (dense): the file means it, exactly, and both networks compute it."""

    def run(dense, *, packed="int4", similarity=0.999):
        target = torch.device(device)
        source = open_folder(folder, target, torch.float32, dense)
        assert source.names() == dense.keys()
        for name, weight in dense.items():
            read = source.read(name)
            if isinstance(read, QuantizedWeight):
                read = read.dequantize(torch.float32)
            torch.testing.assert_close(read.float().cpu(), weight, rtol=2e-7, atol=1e-7)
        assert isinstance(source.read(DOWN), QuantizedWeight) == (packed != "dense")
        ids = prompt(40)
        expected = expected_logits(model, dense, ids)
        loaded = load_model(folder, device=target, dtype="float32")
        logits = paged_runner(loaded.network).prefill("a", ids)
        assert (logits - expected).abs().max() < (1e-4 if device == "cpu" else 1e-3)
        loaded = load_model(folder, device=target, dtype="bfloat16")
        assert loaded.weight_format == packed or device != "cpu"
        logits = paged_runner(loaded.network).prefill("a", ids)
        found = torch.nn.functional.cosine_similarity(logits, expected, dim=-1)
        assert found.mean() > similarity
        assert found.min() > 1 - 10 * (1 - similarity)

    return run


@pytest.fixture(autouse=True)
def _restored(model):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    yield
    model.load_state_dict(weights)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq(folder, check, group_size, sym):
    config = GPTQ | {"group_size": group_size, "sym": sym}
    dense = quantize(folder, config, gptq, group_size=group_size, sym=sym)
    check(dense)


@pytest.mark.parametrize(("bits", "packed"), [(2, "int4"), (8, "int8")])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_of_other_widths(folder, check, bits, packed, sym):
    dense = quantize(folder, GPTQ | {"bits": bits}, gptq, bits=bits, sym=sym)
    # Two bits leave a network that hardly damps the rounding of bfloat16.
    check(dense, packed=packed, similarity=0.95 if bits == 2 else 0.999)


def test_gptq_version_2_stores_the_zeros_themselves(folder, check):
    config = GPTQ | {"checkpoint_format": "gptq_v2"}
    dense = quantize(folder, config, lambda layer: gptq(layer, version=2), sym=False, head=True)
    check(dense)


def test_gptq_with_activation_order_is_dense_and_says_so(folder, check, caplog):
    dense = quantize(folder, GPTQ | {"desc_act": True}, gptq, shuffled=True, sym=False)
    check(dense, packed="dense")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3  # one for each source that `check` opens
    assert "are held as float32" in told[0]


def test_what_neural_compressor_writes(folder, check):
    """GPTQ's packing with an empty bias for each layer, and a scale of another device."""

    def write(layer):
        extra = {"scale_bf16_to_fp8": torch.zeros(1, dtype=torch.bfloat16)}
        return gptq(layer, with_index=False) | extra

    dense = quantize(folder, GPTQ | {"damp_percent": 0}, write)
    path = folder / "model.safetensors"
    weights = load_file(path)
    layers = {name.removesuffix(".qweight") for name in weights if name.endswith(".qweight")}
    for layer in layers:
        weights.setdefault(f"{layer}.bias", torch.zeros(dense[f"{layer}.weight"].shape[0]))
    save_file(weights, path)
    check(dense)
    weights["model.layers.0.mlp.up_proj.bias"][3] = 1.0
    save_file(weights, path)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.up_proj\.bias"):
        load_model(folder)


def test_neural_compressors_pickle_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "quantized_weight.pt")
    with pytest.raises(ConfigError, match="pickle") as error:
        load_model(folder)
    assert 'format="huggingface"' in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_awq(folder, check, group_size):
    config = AWQ | {"group_size": group_size, "modules_to_not_convert": ["lm_head"]}
    dense = quantize(folder, config, awq, group_size=group_size, sym=False)
    check(dense)


@pytest.mark.parametrize(
    ("packing", "write"),
    [
        ("auto_round:auto_gptq", gptq),
        ("auto_round:auto_awq", awq),
        ("auto_round", lambda layer: gptq(layer, version=2)),
        ("auto_round:llm_compressor", lambda layer: pack_quantized(layer, sym=False)),
    ],
)
def test_auto_round(folder, check, packing, write):
    rounding = {"sym": False}
    if "llm_compressor" in packing:
        rounding["scale_type"] = bfloat16
    dense = quantize(folder, AUTO_ROUND | {"packing_format": packing}, write, **rounding)
    check(dense)


def test_auto_round_with_other_bits_and_groups_per_layer(folder, check):
    extra = {
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64},
        "model.layers.0.mlp.up_proj": {"bits": 16},
        "lm_head": {"bits": 8, "group_size": 128},
    }

    def change(layer, weight):
        own = extra.get(layer, {})
        if own.get("bits") == 16 or not ("_proj" in layer or layer == "lm_head"):
            return None
        rounded = round_layer(weight, own.get("bits", 4), own.get("group_size", 32), sym=False)
        return gptq(rounded), rounded.dense

    config = AUTO_ROUND | {"packing_format": "auto_round:auto_gptq", "extra_config": extra}
    dense = rewrite(folder, config, change)
    source = open_folder(folder, torch.device("cpu"), torch.float32, dense)
    assert source.read("model.layers.0.mlp.down_proj.weight").bits == 8
    assert isinstance(source.read("model.layers.0.mlp.up_proj.weight"), torch.Tensor)
    assert source.read(HEAD).bits == 8
    check(dense)


def bfloat16(values):
    return torch.from_numpy(np.asarray(values)).to(torch.bfloat16).double().numpy()


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_packed(folder, check, group_size, sym, bits):
    config = compressed("pack-quantized", bits=bits, group_size=group_size, sym=sym)
    dense = quantize(
        folder,
        config,
        lambda layer: pack_quantized(layer, sym=sym),
        bits=bits,
        group_size=group_size,
        sym=sym,
        scale_type=bfloat16,
    )
    check(dense, packed=f"int{bits}")


def test_compressed_tensors_with_activation_order(folder, check):
    dense = quantize(
        folder,
        compressed("pack-quantized"),
        lambda layer: pack_quantized(layer, sym=True, with_index=True),
        shuffled=True,
        scale_type=bfloat16,
    )
    check(dense, packed="dense")


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (8, 64), (4, 32)])
@pytest.mark.parametrize("sym", [True, False])
def test_compressed_tensors_of_one_byte(folder, check, bits, group_size, sym):
    config = compressed("int-quantized", bits=bits, group_size=group_size, sym=sym)
    dense = quantize(
        folder,
        config,
        lambda layer: int_quantized(layer, sym=sym),
        bits=bits,
        group_size=group_size,
        sym=sym,
        scale_type=bfloat16,
    )
    check(dense, packed=f"int{bits}")


@pytest.mark.parametrize("powers", [False, True])
def test_fp8_blocks(folder, check, powers):
    """192 is no multiple of 128: the last block of down's columns and of up's rows is partial."""

    def change(layer, weight):
        return fp8_blocks(weight, powers=powers) if "_proj" in layer else None

    config = FP8 | ({"scale_fmt": "ue8m0"} if powers else {})
    dense = rewrite(folder, config, change)
    check(dense, packed="dense")


def test_fp8_agrees_with_transformers(model, folder, tmp_path_factory, paged_runner, prompt):
    import transformers

    dense = rewrite(
        folder,
        FP8 | {"weight_block_size": [64, 64]},
        lambda layer, weight: fp8_blocks(weight, 64) if "_proj" in layer else None,
    )
    config = transformers.FineGrainedFP8Config(weight_block_size=(64, 64), dequantize=True)
    with torch.inference_mode(False):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        ).eval()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(weight, dense[name], rtol=1e-6, atol=1e-7)
    ids = prompt(40)
    logits = paged_runner(load_model(folder, dtype="float32").network).prefill("a", ids)
    assert (logits - theirs(torch.tensor([ids])).logits[0]).abs().max() < 1e-4


def test_auto_rounds_own_packing_is_read():
    """What auto-round packs, read back: our writer and its agree on the format."""
    linear = pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp")
    with torch.inference_mode(False):
        layer = torch.nn.Linear(128, 96, bias=False)
        rounded = round_layer(layer.weight.detach(), 4, 32, sym=False)
        rounded.zeros = np.maximum(rounded.zeros, 1)  # its packing knows no zero of 0
        layer.weight.data = rounded.dense
        theirs = linear.QuantLinear(4, 32, 128, 96, bias=False)
        theirs.pack(layer, torch.from_numpy(rounded.scales), torch.from_numpy(rounded.zeros))
    parts = {f".{name}": getattr(theirs, name) for name in ("qweight", "qzeros", "scales")}
    weight = FORMATS["auto-round"](AUTO_ROUND).unpack(parts, torch.float32)
    torch.testing.assert_close(weight.dequantize(torch.float32), rounded.dense)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_own_packing_is_read(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rounded = round_layer(torch.randn(24, 64), bits, 32, sym=False, scale_type=bfloat16)
    half = 2 ** (bits - 1)
    codes, zeros = (
        torch.from_numpy((values.astype(np.int16) - half).astype(np.int8))
        for values in (rounded.codes, rounded.zeros)
    )
    parts = {
        ".weight_packed": helpers.pack_to_int32(codes, bits),
        ".weight_scale": torch.from_numpy(rounded.scales),
        ".weight_shape": torch.tensor(codes.shape),
        ".weight_zero_point": helpers.pack_to_int32(zeros, bits, packed_dim=0).contiguous(),
    }
    for name, part in pack_quantized(rounded, sym=False).items():
        assert torch.equal(part, parts[f".{name}"].to(part.dtype))
    form = FORMATS["compressed-tensors"](compressed("pack-quantized", bits=bits))
    weight = form.unpack(parts, torch.float32).dequantize(torch.float32)
    torch.testing.assert_close(weight, rounded.dense)


def test_the_table_has_each_method_that_the_config_admits():
    assert tuple(FORMATS) == QUANTIZATION_METHODS


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "bitsandbytes"}, ("bitsandbytes", "gptq, awq")),
        (GPTQ | {"checkpoint_format": "marlin"}, ("marlin", "gptq_v2")),
        (AWQ | {"version": "gemv"}, ("gemv", "gemm")),
        (AUTO_ROUND | {"packing_format": "auto_round:fp8_static"}, ("fp8_static", "auto_awq")),
        (AUTO_ROUND | {"data_type": "mx_fp", "act_bits": 8}, ("mx_fp", "data_type int")),
        (compressed("marlin-24"), ("marlin-24", "pack-quantized")),
        (compressed("nvfp4-pack-quantized"), ("nvfp4", "int-quantized")),
        (FP8 | {"activation_scheme": "static"}, ("static", "dynamic")),
        (FP8 | {"fmt": "e5m2"}, ("e5m2", "e4m3")),
    ],
)
def test_what_is_not_read_is_named_in_one_line(folder, config, named):
    dense = rewrite(folder, config, lambda layer, weight: None)
    assert HEAD in dense
    with pytest.raises(UnsupportedArchitectureError) as error:
        load_model(folder)
    for part in (*named, "engine.kind: transformers"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, value):
    return lambda weights: weights.update({name: value})


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (drop(f"{LAYER}.scales"), f"lacks {LAYER}.scales"),
        (drop(f"{LAYER}.qweight"), f"{LAYER}.g_idx"),
        (put(f"{LAYER}.scales", torch.zeros(7, 128)), "groups"),
        (put(f"{LAYER}.scales", torch.zeros(6, 120)), "words"),
        (put(f"{LAYER}.qweight", torch.zeros(12, 128, dtype=torch.int32)), "group indices"),
        (put(f"{LAYER}.g_idx", torch.full((192,), 6, dtype=torch.int32)), "6 groups"),
        (put(f"{LAYER}.weight", torch.zeros(128, 192)), "both quantized and dense"),
        (put(f"{LAYER}.extra", torch.zeros(1)), f"{LAYER}.extra"),
        (put(HEAD, torch.zeros(96, 128, dtype=torch.int8)), "int8"),
    ],
)
def test_tensors_that_are_missing_left_over_or_do_not_fit(folder, damage, named):
    quantize(folder, GPTQ, gptq)
    path = folder / "model.safetensors"
    weights = load_file(path)
    damage(weights)
    save_file(weights, path)
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_in_a_file_of_its_own(folder, check):
    """AutoGPTQ's older checkpoints have quantize_config.json instead."""
    dense = quantize(folder, GPTQ, gptq)
    config = json.loads((folder / "config.json").read_text())
    values = config.pop("quantization_config")
    del values["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(values))
    check(dense)


def test_columns_that_groups_of_32_cannot_hold_become_dense():
    rounded = round_layer(torch.randn(8, 48), 4, 16, sym=False)
    weight = FORMATS["gptq"](GPTQ | {"group_size": 16}).unpack(
        {f".{name}": part for name, part in gptq(rounded).items()}, torch.float32
    )
    assert isinstance(weight, torch.Tensor)
    torch.testing.assert_close(weight, rounded.dense)


def test_a_last_group_may_be_shorter():
    rounded = round_layer(torch.randn(8, 96), 4, 64, sym=False)
    weight = FORMATS["gptq"](GPTQ | {"group_size": 64}).unpack(
        {f".{name}": part for name, part in gptq(rounded).items()}, torch.float32
    )
    torch.testing.assert_close(weight.dequantize(torch.float32), rounded.dense)


def test_the_writers_words():
    """The packing orders, spelled out: what the other tests rest on."""
    words = checkpoints.pack(np.arange(8)[None], 4)
    assert int(words[0, 0]) & 0xFFFFFFFF == 0x76543210
    words = checkpoints.pack(np.arange(8)[None], 4, checkpoints.AWQ_ORDER)
    assert int(words[0, 0]) & 0xFFFFFFFF == 0x75316420


@pytest.mark.parametrize("family", ["deepseek-v3", "qwen3-moe"])
@pytest.mark.parametrize("method", ["fp8", "gptq", "compressed-tensors"])
def test_experts(saved, tmp_path, paged_runner, prompt, family, method):
    """Networks with experts from quantized layers compute what they do from the dense ones."""
    folder, plain = (shutil.copytree(saved(family), tmp_path / name) for name in ("q", "dense"))
    config = {"fp8": FP8, "gptq": GPTQ, "compressed-tensors": compressed("pack-quantized")}[method]

    def change(layer, weight):
        if "_proj" not in layer:
            return None
        if method == "fp8":
            return fp8_blocks(weight)
        if method == "gptq":
            rounded = round_layer(weight, sym=False)
            return gptq(rounded), rounded.dense
        rounded = round_layer(weight, scale_type=bfloat16)
        return pack_quantized(rounded, sym=True), rounded.dense

    dense = rewrite(folder, config, change)
    assert any(".experts.3." in name for name in dense)
    save_file({name: weight.contiguous() for name, weight in dense.items()}, plain / SINGLE)
    ids = prompt(40)
    logits, expected = (
        paged_runner(load_model(each, dtype="float32").network).prefill("a", ids)
        for each in (folder, plain)
    )
    assert (logits - expected).abs().max() < 1e-4
    packed = load_model(folder, dtype="bfloat16")
    logits = paged_runner(packed.network).prefill("a", ids)
    assert torch.nn.functional.cosine_similarity(logits, expected, dim=-1).mean() > 0.98
