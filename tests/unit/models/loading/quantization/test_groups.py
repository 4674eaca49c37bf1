"""GPTQ, AWQ and auto-round: groups of 4-bit codes in words, against the dense model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.core.errors import ConfigError
from serve_app.models.loading.loader import load_model
from serve_app.models.loading.quantization.table import FORMATS, open_folder
from tests.unit.models.loading import checkpoints
from tests.unit.models.loading.checkpoints import awq, gptq, pack_quantized, rewrite, round_layer
from tests.unit.models.loading.quantization.formats import (
    AUTO_ROUND,
    AWQ,
    GPTQ,
    HEAD,
    bfloat16,
    quantize,
)


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
