"""One quantization from model to checked folder, in stages that a later run can take up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from serve_app.config.model_source import ModelFormat, ModelSource
from serve_app.core.errors import ConfigError
from serve_app.quantize.algorithms import OnBlock, check_installed, quantize_folder
from serve_app.quantize.folder import (
    FolderWriter,
    copy_companions,
    folder_bytes,
    tensor_shapes,
    write_config,
)
from serve_app.quantize.recipe import Plan, Recipe, make_plan
from serve_app.quantize.source import export_gguf
from serve_app.quantize.state import RunState, source_identity
from serve_app.quantize.texts import CALIBRATION_TEXT, bundled_text, read_texts, windows
from serve_app.quantize.verify import Verdict, verify_folder
from serve_app.text.tokenizer import load_tokenizer

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ROUTERS = ("mlp.gate", "router", "shared_expert_gate")
_EXPERT_PARTS = (".experts.", "block_sparse_moe")


@dataclass(frozen=True, slots=True)
class Result:
    """Sizes in bytes; `source_bytes` is of the weights' folder in the type that they have."""

    output: Path
    plan: Plan
    verdict: Verdict
    source_bytes: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """What to quantize, how, and where to. `calibration` None: the bundled sample."""

    source: ModelSource
    output: Path
    recipe: Recipe
    calibration: Path | None = None
    device: str = "cpu"
    restart: bool = False


def run_job(
    job: Job,
    on_line: Callable[[str], None] = lambda line: None,
    on_block: OnBlock = lambda done, total: None,
) -> Result:
    """Run what is left of the job. Raises ConfigError; `job.output` appears whole or not at all."""
    check_installed()
    _check_output(job)
    identity = {
        "recipe": job.recipe.to_dict(),
        "source": source_identity(job.source.path),
        "calibration": source_identity(job.calibration) if job.calibration else "bundled",
    }
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with RunState(job.output, identity, restart=job.restart) as state:
        if line := state.describe():
            on_line(line)
        source = _source_stage(job, state, on_line)
        plan = make_plan(linear_shapes(source), job.recipe)
        check_mixture(plan)
        for line in _plan_lines(plan):
            on_line(line)
        calibration = _calibration_stage(job, state, on_line)
        _quantize_stage(job, state, plan, source, calibration, on_line, on_block)
        verdict = _verify_stage(state, source, plan, on_line)
        result = Result(
            job.output, plan, verdict, folder_bytes(source), folder_bytes(state.path("model"))
        )
        state.path("model").rename(job.output)
        state.remove()
    return result


def _check_output(job: Job) -> None:
    if job.output.exists():
        raise ConfigError(
            f"--output: {job.output} exists; name a new folder or remove it", param="output"
        )


def _source_stage(job: Job, state: RunState, on_line: Callable[[str], None]) -> Path:
    if job.source.format is ModelFormat.HUGGING_FACE:
        state.finish("source")
        return job.source.path
    folder = state.path("source")
    if not state.is_done("source"):
        on_line(f"writing {job.source.path.name} as a folder, dequantized to bfloat16")
        state.begin("source")
        shutil.rmtree(folder, ignore_errors=True)
        export_gguf(job.source.path, folder)
        state.finish("source")
    return folder


def linear_shapes(source: Path) -> dict[str, tuple[int, ...]]:
    """Return (rows, columns) of each matrix that belongs to a linear layer, by the module's name.

    Embeddings, norms, biases and a mixture's router are left out: routers are small, and a wrong
    choice of expert costs more than rounding. Raises ConfigError for a model that is quantized.
    """
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"model: {source.name} is quantized already ({method}); name the dense model",
            param="model",
        )
    is_tied = bool(values.get("tie_word_embeddings"))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (shape, _) in tensor_shapes(source).items():
        module = name.removesuffix(".weight")
        is_embedding = "embed" in module or (is_tied and module == "lm_head")
        if module == name or len(shape) != 2 or is_embedding or module.endswith(_ROUTERS):
            continue
        shapes[module] = shape
    return shapes


def check_mixture(plan: Plan) -> None:
    """Raise ConfigError for a mixture of experts with any algorithm but AutoRound.

    transformers keeps the experts as one tensor; the others would leave them out without a word.
    """
    has_experts = any(part in m.name for m in plan.matrices for part in _EXPERT_PARTS)
    if has_experts and plan.recipe.algorithm != "autoround":
        raise ConfigError(
            f"--algorithm: {plan.recipe.algorithm} does not reach the experts of a mixture;"
            " take autoround",
            param="algorithm",
        )


def _plan_lines(plan: Plan) -> list[str]:
    recipe = plan.recipe
    kind = "symmetric" if recipe.is_symmetric else "asymmetric"
    wide = sum(matrix.bits == 8 for matrix in plan.quantized) if recipe.bits != 8 else 0
    lines = [
        f"{recipe.algorithm}: {len(plan.quantized)} matrices in {recipe.bits} bits"
        + (f" ({wide} of them in 8)" if wide else "")
        + f", groups of {recipe.group_size}, {kind}"
    ]
    unfit = [matrix for matrix in plan.dense if matrix.reason != "skipped"]
    lines += [f"  {matrix.name} stays dense: {matrix.reason}" for matrix in unfit[:3]]
    if len(unfit) > 3:
        lines.append(f"  and {len(unfit) - 3} more")
    return lines


def _calibration_stage(
    job: Job, state: RunState, on_line: Callable[[str], None]
) -> torch.Tensor | None:
    if not job.recipe.needs_calibration:
        state.finish("calibration")
        return None
    path = state.path("calibration.safetensors")
    if not state.is_done("calibration"):
        state.begin("calibration")
        param = "--calibration"
        texts = (
            read_texts(job.calibration, param)
            if job.calibration
            else [bundled_text(CALIBRATION_TEXT)]
        )
        recipe = job.recipe
        ids = windows(texts, load_tokenizer(job.source), recipe.sample_tokens, recipe.num_samples)
        save_file({"ids": ids}, path)
        state.finish("calibration")
    ids = load_file(path)["ids"]
    name = job.calibration.name if job.calibration else f"the bundled {CALIBRATION_TEXT}"
    on_line(f"calibration: {ids.shape[0]} samples of {ids.shape[1]} tokens from {name}")
    return ids


def _quantize_stage(
    job: Job,
    state: RunState,
    plan: Plan,
    source: Path,
    calibration: torch.Tensor | None,
    on_line: Callable[[str], None],
    on_block: OnBlock,
) -> None:
    folder = state.path("model")
    if state.is_done("quantize") and folder.is_dir():
        return
    state.begin("quantize")
    for leftover in (folder, state.path("work")):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    packed = quantize_folder(
        source, plan, calibration, state.path("work"), device=job.device, on_block=on_block
    )
    original = tensor_shapes(source)
    is_tied = is_head_tied(source)
    with FolderWriter(folder) as writer:
        for name, tensor in packed.tensors:
            if (kept := output_tensor(name, tensor, original, plan, is_tied=is_tied)) is not None:
                writer.add(name, kept)
    write_config(source, folder, packed.config)
    copy_companions(source, folder)
    shutil.rmtree(state.path("work"), ignore_errors=True)
    state.finish("quantize")


def output_tensor(
    name: str,
    tensor: torch.Tensor,
    original: dict[str, tuple[tuple[int, ...], str]],
    plan: Plan,
    *,
    is_tied: bool,
) -> torch.Tensor | None:
    """Return what the folder stores for a tensor of the library; None to leave it out.

    Left out: a head that is tied, biases of zeros that the source does not have, and the column
    order of groups that are in order. Dense tensors get the type that the source gave them: the
    libraries write embeddings in float32. Raises ConfigError for a tensor whose loss would matter.
    """
    module, _, part = name.rpartition(".")
    if is_tied and module == "lm_head":
        return None
    if name in original:
        return tensor.to(_TYPES.get(original[name][1], tensor.dtype))
    if part == "bias" and not tensor.any():
        return None
    if plan.bits_of(module) is not None:
        if part in ("qweight", "qzeros"):
            return tensor.to(torch.int32)
        if part == "scales":
            return tensor.to(torch.float16)
        order = torch.arange(tensor.numel()) // plan.recipe.group_size
        if part == "g_idx" and torch.equal(tensor.cpu().long(), order):
            return None
    raise ConfigError(
        f"model: {plan.recipe.algorithm} left the tensor {name}, which the source does not have",
        param="model",
    )


def is_head_tied(source: Path) -> bool:
    """Whether the output layer is the embedding."""
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return bool(values.get("tie_word_embeddings"))


def _verify_stage(
    state: RunState, source: Path, plan: Plan, on_line: Callable[[str], None]
) -> Verdict:
    state.begin("verify")
    try:
        verdict = verify_folder(state.path("model"), source, plan, is_tied=is_head_tied(source))
    except ConfigError:
        state.redo("quantize")
        raise
    on_line(
        f"verified: {verdict.num_tensors} tensors, none missing, finite logits from the"
        f" {verdict.engine} engine"
    )
    state.finish("verify")
    return verdict
