"""AutoRound's own exports: GPTQ's or AWQ's packing, named by `packing_format`.

Format: https://github.com/intel/auto-round. "auto_round:auto_gptq" stores zero - 1, "auto_round"
and "auto_round:gptqmodel" the zero itself. Layers may differ in bits and group (`extra_config`),
which the tensors' shapes show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.models.loading.quantization.awq import AWQ
from serve_app.models.loading.quantization.compressed_tensors import CompressedTensors
from serve_app.models.loading.quantization.gptq import GPTQ
from serve_app.models.loading.quantization.layout import QuantizationFormat, unsupported

_GPTQ_VERSIONS = {
    "auto": "gptq",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_LLM_COMPRESSOR = "auto_round:llm_compressor"


def auto_round(values: Mapping[str, Any]) -> QuantizationFormat:
    """quant_method "auto-round": the format that its weights are packed in."""
    packing = str(values.get("packing_format") or "auto_round:auto_gptq")
    data_type = str(values.get("data_type", "int"))
    if not data_type.startswith("int") or values.get("act_bits", 16) < 16:
        raise unsupported(
            f"AutoRound of data_type {data_type!r} with {values.get('act_bits', 16)} bits for"
            " activations",
            "data_type int with weights alone quantized",
        )
    if packing in _AWQ:
        return AWQ(values | {"version": "gemm"})
    if packing == _LLM_COMPRESSOR:
        return CompressedTensors({"format": "pack-quantized"})
    if packing not in _GPTQ_VERSIONS:
        known = ", ".join((*_GPTQ_VERSIONS, *_AWQ, _LLM_COMPRESSOR))
        raise unsupported(f"AutoRound of packing_format {packing!r}", known)
    return GPTQ(values | {"checkpoint_format": _GPTQ_VERSIONS[packing]})
