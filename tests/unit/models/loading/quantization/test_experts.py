"""Networks with experts from quantized layers."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from serve_app.models.loading.loader import load_model
from tests.unit.models.loading.checkpoints import (
    fp8_blocks,
    gptq,
    pack_quantized,
    rewrite,
    round_layer,
)
from tests.unit.models.loading.quantization.formats import FP8, GPTQ, bfloat16, compressed


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
    save_file(
        {name: weight.contiguous() for name, weight in dense.items()}, plain / "model.safetensors"
    )
    ids = prompt(40)
    logits, expected = (
        paged_runner(load_model(each, dtype="float32").network).prefill("a", ids)
        for each in (folder, plain)
    )
    assert (logits - expected).abs().max() < 1e-4
    packed = load_model(folder, dtype="bfloat16")
    logits = paged_runner(packed.network).prefill("a", ids)
    assert torch.nn.functional.cosine_similarity(logits, expected, dim=-1).mean() > 0.98
