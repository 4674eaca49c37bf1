"""FP8 checkpoints in blocks against the dense model, and against transformers."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.loading.loader import load_model
from tests.unit.models.loading.checkpoints import fp8_blocks, rewrite
from tests.unit.models.loading.quantization.formats import FP8


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
