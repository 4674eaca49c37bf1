"""neural-compressor's algorithms behind one function: a model's folder in, packed tensors out.

Three of them change the model in memory; AutoRound writes a folder of its own. Both come out as
tensors in GPTQ's packing (version 1) and a quantization_config in auto-round's terms, the one form
that transformers loads without further packages' conversions and XeRay reads as well. What was
found about the libraries, and met here: GPTQ needs `model_path`; the saving function refuses mixed
bits, writes values that transformers refuses, and leaves stray tensors, so tensors are taken from
the modules; AutoRound's per-layer settings reach it by `layer_config` alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from serve_app.core.errors import ConfigError
from serve_app.quantize.folder import read_tensors
from serve_app.quantize.recipe import Plan

OnBlock = Callable[[int, int], None]
GPTQ_PACKING = "auto_round:auto_gptq"
"""GPTQ's packing, version 1, as auto-round names it."""
_PACKAGES = {"neural_compressor": "neural-compressor", "auto_round": "auto-round"}
_STRAY = ("scale_bf16_to_fp8",)
_COUNTED = re.compile(r"(?:Quantizing layer|Processing block:?) (\d+) ?/ ?(\d+)", re.IGNORECASE)
_FINISHED = "layers in the block"
# Whose scale each matrix's columns share: AWQ folds it into what comes before.
_ABSORBED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


@dataclass(slots=True)
class Packed:
    """What an algorithm leaves: tensors to be read once, and the quantization_config."""

    tensors: Iterator[tuple[str, torch.Tensor]]
    config: dict[str, Any]


def check_installed() -> None:
    """Raise ConfigError, with the command that helps, where a package is missing."""
    missing = [pip for name, pip in _PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"xeray quantize needs {' and '.join(missing)}; run: pip install 'xeray[quantize]'"
        )


def quantize_folder(
    source: Path,
    plan: Plan,
    calibration: torch.Tensor | None,
    work: Path,
    *,
    device: str = "cpu",
    on_block: OnBlock = lambda done, total: None,
) -> Packed:
    """Quantize the model of the folder `source`.

    `calibration` is int64 [num_samples, sample_tokens], None for rtn. `work` takes the libraries'
    files and their log. `on_block` hears how many decoder blocks are done, of how many.
    Raises ConfigError where a package is missing or the library refuses the model.
    """
    check_installed()
    work.mkdir(parents=True, exist_ok=True)
    with _library_output(work / "log.txt", on_block) as progress:
        from transformers import AutoModelForCausalLM

        # In half precision the three would round their scales, and pack no zero points at all.
        dtype = "auto" if plan.recipe.algorithm == "autoround" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map=device, local_files_only=True
        ).eval()
        progress.num_blocks = int(getattr(model.config, "num_hidden_layers", 0))
        try:
            if plan.recipe.algorithm == "autoround":
                return _autoround(model, plan, calibration, work, device)
            return _in_memory(model, source, plan, calibration)
        except (AssertionError, ValueError, RuntimeError, NotImplementedError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"model: {plan.recipe.algorithm} failed on {source.name}: {lines[0][:300]};"
                f" the whole log is {work / 'log.txt'}",
                param="model",
            ) from error


def _in_memory(model: Any, source: Path, plan: Plan, calibration: torch.Tensor | None) -> Packed:
    """rtn, gptq, awq: the modules are replaced, their buffers are the result."""
    from neural_compressor.torch.quantization import convert, prepare

    config = _library_config(plan, source)
    example = None if calibration is None else calibration[:1]
    # RTN and AWQ follow the model's device by themselves; their rounding needs no gradient.
    with torch.no_grad():
        model = prepare(model, config, example_inputs=example)
        for row in calibration if calibration is not None else ():
            # GPTQ and AWQ end the pass after the first block, by an error that they catch.
            model(row[None].to(_device_of(model)))
        model = convert(model)
    return Packed(_packed_tensors(model, plan, source), quantization_config(plan))


def _library_config(plan: Plan, source: Path) -> Any:
    from neural_compressor.torch.quantization import AWQConfig, GPTQConfig, RTNConfig

    recipe = plan.recipe
    base = {"group_size": recipe.group_size, "use_sym": recipe.is_symmetric}
    extra: dict[str, Any] = {}
    kind: Any
    if recipe.algorithm == "gptq":
        kind = GPTQConfig
        extra = {"model_path": str(source), "act_order": recipe.act_order}
        # With the groups fixed beforehand the columns keep their places: no g_idx is needed.
        extra |= {"static_groups": recipe.act_order}
    elif recipe.algorithm == "awq":
        kind = AWQConfig
        extra = {"folding": True, "absorb_layer_dict": _ABSORBED}
    else:
        kind, extra = RTNConfig, {"use_layer_wise": False}
    config = kind(bits=recipe.bits, **base, **extra)
    for matrix in plan.dense:
        config.set_local(f"^{re.escape(matrix.name)}$", kind(dtype="fp32"))
    for matrix in plan.quantized:
        if matrix.bits != recipe.bits:
            config.set_local(f"^{re.escape(matrix.name)}$", kind(bits=matrix.bits, **base, **extra))
    return config


def _device_of(model: Any) -> torch.device:
    return next(iter(model.parameters())).device


def _packed_tensors(model: Any, plan: Plan, source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors; those of matrices that were to stay dense come from the source.

    neural-compressor 3.10's GPTQ gives a matrix that it was told to leave the first one's settings
    and quantizes it all the same; what it made of such a matrix is dropped.
    """
    state = model.state_dict()
    dense = {matrix.name for matrix in plan.dense}
    lost = {f"{name}.weight" for name in dense if f"{name}.qweight" in state}
    for name, tensor in state.items():
        is_dropped = f"{name.rpartition('.')[0]}.weight" in lost and not name.endswith(".bias")
        if not is_dropped and not name.endswith(_STRAY):
            yield name, tensor
    if lost:
        yield from (pair for pair in read_tensors(source) if pair[0] in lost)


def _autoround(
    model: Any, plan: Plan, calibration: torch.Tensor | None, work: Path, device: str
) -> Packed:
    """The one that also covers the experts of a mixture; it writes below `work`."""
    from neural_compressor.torch.quantization import AutoRoundConfig, convert, prepare

    recipe = plan.recipe
    assert calibration is not None
    config = AutoRoundConfig(
        bits=recipe.bits,
        group_size=recipe.group_size,
        use_sym=recipe.is_symmetric,
        iters=recipe.iterations,
        nsamples=len(calibration),
        seqlen=calibration.shape[1],
        batch_size=min(recipe.batch_size, len(calibration)),
        seed=recipe.seed,
        device_map=device,
        enable_torch_compile=False,
        export_format="auto_round",
        output_dir=str(work / "autoround"),
        reloading=False,
        layer_config=_exceptions(plan),
    )
    model = prepare(model, config)
    for row in calibration:
        model(row[None])
    done = convert(model)
    folder = Path(done.name_or_path)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packing = written["quantization_config"].get("packing_format", GPTQ_PACKING)
    return Packed(read_tensors(folder), quantization_config(plan, packing))


def _exceptions(plan: Plan) -> dict[str, dict[str, Any]]:
    """What differs from the recipe's bits, by module, in auto-round's terms."""
    layers: dict[str, dict[str, Any]] = {}
    for matrix in plan.matrices:
        if matrix.bits is None:
            layers[matrix.name] = {"bits": 16, "data_type": "float"}
        elif matrix.bits != plan.recipe.bits:
            layers[matrix.name] = {
                "bits": matrix.bits,
                "group_size": plan.recipe.group_size,
                "sym": plan.recipe.is_symmetric,
                "data_type": "int",
            }
    return layers


def quantization_config(plan: Plan, packing: str = GPTQ_PACKING) -> dict[str, Any]:
    """Return the quantization_config of the folder, in auto-round's terms.

    `extra_config` names what differs from the rest, but for lm_head: every loader leaves that dense
    unless told otherwise.
    """
    recipe = plan.recipe
    extra = {name: values for name, values in _exceptions(plan).items() if name != "lm_head"}
    values: dict[str, Any] = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "sym": recipe.is_symmetric,
        "data_type": "int",
        "iters": recipe.iterations if recipe.algorithm == "autoround" else 0,
        "xeray_recipe": recipe.to_dict(),
    }
    with contextlib.suppress(ImportError):
        values["autoround_version"] = version("auto-round")
    if extra:
        values["extra_config"] = extra
    return values


class _Progress(logging.Handler):
    """Writes the libraries' log to a file and counts blocks by what it says."""

    def __init__(self, stream: Any, on_block: OnBlock) -> None:
        super().__init__(logging.INFO)
        self.num_blocks = 0
        self._stream = stream
        self._on_block = on_block
        self._num_finished = 0

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._stream.write(message + "\n")
        self._stream.flush()
        if match := _COUNTED.search(message):
            self._on_block(int(match.group(1)) - 1, int(match.group(2)))
        elif _FINISHED in message:
            self._num_finished += 1
            self._on_block(self._num_finished, max(self.num_blocks, self._num_finished))


@contextlib.contextmanager
def _library_output(path: Path, on_block: OnBlock) -> Iterator[_Progress]:
    """Send what the libraries print and log to `path`; their bars would fight with ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with path.open("a", encoding="utf-8") as stream:
        handler = _Progress(stream, on_block)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            import neural_compressor.torch.quantization  # noqa: F401 - makes its loggers now

            loggers = [logging.getLogger(name) for name in ("neural_compressor", "autoround")]
            before = [(each.handlers[:], each.propagate) for each in loggers]
            for each in loggers:
                each.handlers[:] = [handler]
                each.propagate = False
            try:
                yield handler
            finally:
                for each, (handlers, propagates) in zip(loggers, before, strict=True):
                    each.handlers[:], each.propagate = handlers, propagates
