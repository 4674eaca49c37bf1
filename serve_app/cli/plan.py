"""`xeray plan`: whether a model fits a device, with the arithmetic, and what would fit."""

from __future__ import annotations

import argparse
import json
import shutil
from typing import Any

from serve_app.cli.model_shapes import ModelFacts, read_model
from serve_app.cli.units import format_bytes, format_count, parse_size, positive_int
from serve_app.core.errors import ConfigError
from serve_app.hardware.capacity import (
    FORMATS,
    MemoryPlan,
    alternatives,
    default_dtype,
    default_step_tokens,
    smallest_memory_bytes,
)
from serve_app.hardware.memory import DTYPE_BYTES, FORMAT_BITS

DEVICES = ("auto", "cpu", "xpu", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `xeray plan`; None means: the config's value, else the default."""
    parser.add_argument("config", nargs="?", help="config whose model and engine settings to take")
    parser.add_argument(
        "--model",
        help="'embedded', a .gguf file, a model folder, or a name such as"
        " deepseek-r1-distill-qwen-7b",
    )
    parser.add_argument(
        "--device", choices=DEVICES, help="auto: what torch finds; xpu where --memory is given"
    )
    parser.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="memory to fit in, such as 16GiB; default: what is free on the device",
    )
    parser.add_argument(
        "--weights", choices=("auto", *FORMATS), help="auto: as the files hold them"
    )
    parser.add_argument("--dtype", choices=("auto", *DTYPE_BYTES), help="compute and KV type")
    parser.add_argument("--max-model-len", type=positive_int, metavar="N", help="longest sequence")
    parser.add_argument("--max-num-seqs", type=positive_int, metavar="N", help="sequences at once")
    parser.add_argument(
        "--max-num-batched-tokens", type=positive_int, metavar="N", help="token budget of a step"
    )
    parser.add_argument(
        "--kv-cache-tokens",
        type=positive_int,
        metavar="N",
        help="KV cache size; default: half of what the weights leave",
    )
    parser.add_argument(
        "--devices",
        action="store_true",
        help="models of 3B, 7B and 13B, or --model, against a table of cards and integrated GPUs;"
        " --memory is then the system's that the latter share (16 GiB and 32 GiB)",
    )
    parser.add_argument("--on", metavar="DEVICE", help="only this device of the table")
    parser.add_argument(
        "--write", metavar="FILE", help="write a config for --model on the device --on"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan; 0 when it fits, 1 when it cannot."""
    if options.devices or options.on or options.write:
        from serve_app.cli.plan_devices import run as run_devices

        return run_devices(options)
    plan = make_plan(options)
    if options.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        print("\n".join(report(plan)))
    return 0 if plan.fits else 1


def make_plan(options: argparse.Namespace) -> MemoryPlan:
    """Merge the command line over the config over the defaults. Raises ConfigError."""
    model, engine = _config_sections(options.config)
    facts = read_model(options.model or model.path)
    device, memory_bytes = _device_and_memory(options.device or engine.device, options.memory)
    asked_dtype = _explicit(options.dtype, engine.dtype)
    dtype = asked_dtype or default_dtype(device, _has_fast_bfloat16())
    max_model_len = options.max_model_len or model.max_model_len or facts.shape.max_position
    if max_model_len > facts.shape.max_position:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than {facts.shape.name} was made for:"
            f" {facts.shape.max_position}",
            param="max_model_len",
        )
    # The compiled kernels read packed weights; float32 by name is the reference, which is dense.
    serves_packed = device == "cpu" and asked_dtype != "float32" and shutil.which("g++") is not None
    path = options.model or model.path
    return MemoryPlan(
        shape=facts.shape,
        device=device,
        memory_bytes=memory_bytes,
        weight_format=_weight_format(options.weights, engine.weight_format, facts),
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs or engine.max_num_seqs,
        num_batched_tokens=options.max_num_batched_tokens
        or engine.max_num_batched_tokens
        or default_step_tokens(device),
        kv_fraction=engine.kv_cache_memory_fraction,
        kv_cache_tokens=options.kv_cache_tokens or engine.kv_cache_tokens,
        serves_packed=serves_packed,
        maps_embedding=serves_packed and (path == "embedded" or path.endswith(".gguf")),
    )


def _config_sections(config: str | None) -> tuple[Any, Any]:
    from serve_app.config.schema import EngineSection, ModelSection

    if config is None:
        return ModelSection(), EngineSection()
    from serve_app.config.load import load_serve_file
    from serve_app.config.resources import find_config

    app = load_serve_file(find_config(config)).app
    return app.model, app.engine


def _explicit(*values: str | None) -> str | None:
    return next((value for value in values if value not in (None, "auto")), None)


def _weight_format(option: str | None, configured: str, facts: ModelFacts) -> str:
    return _explicit(option, configured) or facts.stored_format


def _device_and_memory(device: str, memory_bytes: int | None) -> tuple[str, int]:
    if memory_bytes is not None:
        return ("xpu" if device == "auto" else device), memory_bytes
    if device != "cpu":
        from serve_app.hardware.accelerators import list_accelerators

        found = [each for each in list_accelerators() if device in ("auto", each.kind)]
        if found:
            free = found[0].free_bytes
            return found[0].kind, found[0].memory_bytes if free is None else free
        if device != "auto":
            raise ConfigError(
                f"--device {device}: torch sees none here; name its memory: --memory 16GiB",
                param="device",
            )
    from serve_app.hardware.memory import available_memory_bytes

    return "cpu", available_memory_bytes()


def _has_fast_bfloat16() -> bool:
    from serve_app.hardware.cpu import read_cpu_info

    return read_cpu_info().has_fast_bfloat16


def report(plan: MemoryPlan) -> list[str]:
    """Return the plan as lines: the setting, a table with the arithmetic, the verdict."""
    shape = plan.shape
    rows = [(label, format_bytes(size), how) for label, size, how in _terms(plan)]
    rows.append(
        ("Needed", format_bytes(plan.needed_bytes), f"of {format_bytes(plan.memory_bytes)}")
    )
    label = "Left" if plan.left_bytes >= 0 else "Short of"
    rows.append((label, format_bytes(abs(plan.left_bytes)), ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [
        f"{shape.name}: {format_count(shape.num_params)} weights, {shape.num_layers} layers of"
        f" {shape.hidden_size}, {shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}",
        f"on {plan.device} with {format_bytes(plan.memory_bytes)}: {plan.dtype}, weights"
        f" {plan.weight_format}, max_model_len {plan.max_model_len},"
        f" max_num_seqs {plan.max_num_seqs}, {plan.num_batched_tokens} tokens a step",
        "",
        *(f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows),
        "",
        *_verdict(plan),
    ]


def _terms(plan: MemoryPlan) -> list[tuple[str, int, str]]:
    shape, width = plan.shape, DTYPE_BYTES[plan.dtype]
    kv_values = f"2 × {shape.num_layers} layers × {shape.num_kv_heads} heads × {shape.head_dim}"
    if shape.latent_dim:
        kv_values = f"{shape.num_layers} layers × {shape.latent_dim} values of latent and key"
    kv_how = f"{plan.kv_tokens} tokens × {plan.kv_bytes_per_token} B ({kv_values} × {width} B)"
    step_how = (
        f"{plan.num_batched_tokens} rows of a layer × {width} B,"
        f" logits 3 × {plan.max_num_seqs} × {shape.vocab_size} × 4 B"
    )
    copy_how = f"of {format_count(shape.num_linear_params)} weights, for large batches"
    copies = [("Dense copy", plan.dense_copy_bytes, copy_how)] if plan.dense_copy_bytes else []
    return [
        ("Weights", plan.weights_bytes, _weights_how(plan)),
        *copies,
        ("Runtime", plan.runtime_bytes, f"libraries, context and workspace on {plan.device}"),
        ("Activations", plan.activations_bytes, step_how),
        ("KV cache", plan.kv_bytes, kv_how),
    ]


def _weights_how(plan: MemoryPlan) -> str:
    shape, dense_bits = plan.shape, 8 * DTYPE_BYTES[plan.dtype]
    if plan.weight_format == "dense":
        return f"{format_count(shape.num_params)} × {dense_bits} bits"
    linear = format_count(shape.num_linear_params + shape.num_embedding_params)
    embedding = format_count(shape.num_embedding_params)
    bits = FORMAT_BITS[plan.weight_format]
    return f"{linear} × {bits:g} bits, {embedding} of embeddings × {dense_bits} bits"


def _verdict(plan: MemoryPlan) -> list[str]:
    if plan.fits:
        each = plan.kv_tokens // plan.max_num_seqs
        lines = [
            f"Fits: {plan.num_full_sequences} sequences of {plan.max_model_len} tokens at once"
        ]
        if plan.num_full_sequences < plan.max_num_seqs:
            lines[0] += f", or {plan.max_num_seqs} of {each}"
        return lines
    if plan.left_bytes >= 0:
        reason = f"the KV cache holds no sequence of {plan.max_model_len} tokens"
    else:
        reason = f"{format_bytes(-plan.left_bytes)} are missing"
    lines = [f"Does not fit: {reason}."]
    lines += [
        f"  Fits with {change}: {other.num_full_sequences} × {other.max_model_len} tokens,"
        f" {format_bytes(other.left_bytes)} left"
        for change, other in alternatives(plan)
    ]
    smallest = format_bytes(smallest_memory_bytes(plan))
    lines.append(f"  As it is, it takes a device with {smallest} for one sequence at a time.")
    return lines


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """Return the plan as JSON values: bytes and tokens as numbers."""
    return {
        "model": plan.shape.name,
        "device": plan.device,
        "dtype": plan.dtype,
        "weight_format": plan.weight_format,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": plan.num_batched_tokens,
        "memory_bytes": plan.memory_bytes,
        "weights_bytes": plan.weights_bytes,
        "dense_copy_bytes": plan.dense_copy_bytes,
        "runtime_bytes": plan.runtime_bytes,
        "activations_bytes": plan.activations_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_cache_tokens": plan.kv_tokens,
        "kv_cache_bytes": plan.kv_bytes,
        "needed_bytes": plan.needed_bytes,
        "left_bytes": plan.left_bytes,
        "num_full_sequences": plan.num_full_sequences,
        "fits": plan.fits,
        "alternatives": [] if plan.fits else [change for change, _ in alternatives(plan)],
    }
