"""What is not read, missing, left over or damaged is named in one line."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.core.errors import ConfigError
from serve_app.models.config import UnsupportedArchitectureError
from serve_app.models.loading.loader import load_model
from serve_app.models.loading.quantization.methods import QUANTIZATION_METHODS
from serve_app.models.loading.quantization.table import FORMATS
from tests.unit.models.loading.checkpoints import gptq, rewrite
from tests.unit.models.loading.quantization.formats import (
    AUTO_ROUND,
    AWQ,
    FP8,
    GPTQ,
    HEAD,
    compressed,
    quantize,
)


def test_the_table_has_each_method_that_the_config_admits():
    assert tuple(FORMATS) == QUANTIZATION_METHODS


def test_neural_compressors_pickle_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "quantized_weight.pt")
    with pytest.raises(ConfigError, match="pickle") as error:
        load_model(folder)
    assert 'format="huggingface"' in str(error.value)
    assert "\n" not in str(error.value)


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


LAYER = "model.layers.1.mlp.down_proj"


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, value):
    return lambda weights: weights.update({name: value})


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
