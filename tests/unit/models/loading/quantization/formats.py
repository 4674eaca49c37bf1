"""What checkpoints of each quantized format say in their configs, and how they are written."""

from __future__ import annotations

import numpy as np
import torch

from tests.unit.models.loading.checkpoints import rewrite, round_layer

DOWN = "model.layers.1.mlp.down_proj.weight"
HEAD = "lm_head.weight"
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


def quantize(folder, config, write, *, head=False, **rounding):
    """Rewrite the decoder's linear layers (and the head) by `write`; the dense weights."""

    def change(layer, weight):
        if "_proj" not in layer and not (head and layer == "lm_head"):
            return None
        rounded = round_layer(weight, **rounding)
        return write(rounded), rounded.dense

    return rewrite(folder, config, change)


def bfloat16(values):
    return torch.from_numpy(np.asarray(values)).to(torch.bfloat16).double().numpy()
