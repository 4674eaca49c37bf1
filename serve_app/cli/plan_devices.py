"""`xeray plan --devices`: models against a table of cards and integrated GPUs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.cli.model_shapes import ModelFacts, read_model
from serve_app.cli.units import format_bytes, format_count
from serve_app.core.errors import ConfigError
from serve_app.hardware.capacity import FORMATS, MemoryPlan, default_step_tokens
from serve_app.hardware.device_table import (
    DEVICES,
    REACHED_SHARE,
    SHARED_MEMORY_SHARE,
    DeviceFacts,
    Figure,
    find_device,
)
from serve_app.hardware.memory import DTYPE_BYTES, FORMAT_BITS, ModelShape

SIZES = ("llama-3.2-3b", "llama-2-7b", "llama-2-13b")
_SYSTEM_MEMORY = (16 << 30, 32 << 30)
_CONTEXT_TOKENS = 4096
_WORDS = {"dense": "FP16", "int8": "INT8", "int4": "INT4"}


@dataclass(frozen=True, slots=True)
class Fit:
    """One model in one format on one device; `tokens_per_s` is (low, high) for one sequence."""

    device: DeviceFacts
    system_bytes: int | None
    plan: MemoryPlan
    tokens_per_s: tuple[float, float] | None

    @property
    def limit(self) -> str:
        """The memory that may be used, in words."""
        if self.system_bytes is None:
            return format_bytes(self.plan.memory_bytes)
        share = f"{SHARED_MEMORY_SHARE:.0%} of {format_bytes(self.system_bytes)}"
        return f"{format_bytes(self.plan.memory_bytes)} ({share})"


def run(options: argparse.Namespace) -> int:
    """Print the table and what fits; with --on, 1 where the model does not fit that device."""
    devices = _chosen(options.on)
    models = [read_model(name) for name in ([options.model] if options.model else SIZES)]
    memories = (options.memory,) if options.memory else _SYSTEM_MEMORY
    context = options.max_model_len or _CONTEXT_TOKENS
    formats = [options.weights] if options.weights not in (None, "auto") else list(FORMATS)
    fits = [
        fit
        for device in devices
        for model in models
        for fit in fits_of(device, model, formats, memories, context, options.max_num_seqs or 1)
    ]
    if options.json:
        print(json.dumps(as_json(devices, fits), indent=2))
    else:
        print("\n".join([*device_lines(devices), "", *fit_lines(fits)]))
    if options.write is not None:
        _write(options, fits)
    return 0 if options.on is None or any(fit.plan.fits for fit in fits) else 1


def fits_of(
    device: DeviceFacts,
    model: ModelFacts,
    formats: Sequence[str],
    system_memories: Sequence[int],
    context: int,
    num_seqs: int,
) -> list[Fit]:
    """Plan a model in each format on a device, once per size of the memory that it shares."""
    shape = model.shape
    sizes: Sequence[int | None] = system_memories if device.is_integrated else (None,)
    fits = []
    for system_bytes in sizes:
        for weight_format in formats:
            length = min(context, shape.max_position)
            plan = MemoryPlan(
                shape=shape,
                device=device.torch_device,
                memory_bytes=device.usable_bytes(system_bytes or 0),
                weight_format=weight_format,
                dtype="float16" if device.torch_device != "cpu" else "bfloat16",
                max_model_len=length,
                max_num_seqs=num_seqs,
                num_batched_tokens=min(512, default_step_tokens(device.torch_device)),
                kv_cache_tokens=num_seqs * length,
            )
            fits.append(Fit(device, system_bytes, plan, tokens_per_s(device, plan)))
    return fits


def tokens_per_s(device: DeviceFacts, plan: MemoryPlan) -> tuple[float, float] | None:
    """Expected decode rate of one sequence: what is reached of bandwidth over bytes per token.

    A token reads every linear weight once and, halfway through the context, half of its KV. None
    for a mixture of experts, of which a token reads a part that the sizes do not tell.
    """
    if plan.shape.num_experts:
        return None
    most = device.bandwidth.value * 1e9 / bytes_per_token(plan)
    low, high = REACHED_SHARE
    return most * low, most * high


def bytes_per_token(plan: MemoryPlan) -> float:
    """Bytes that decoding one token of one sequence reads."""
    shape: ModelShape = plan.shape
    dense_bits = 8.0 * DTYPE_BYTES[plan.dtype]
    bits = FORMAT_BITS.get(plan.weight_format, dense_bits)
    weights = (shape.num_linear_params + shape.num_embedding_params) * bits / 8
    return weights + plan.kv_bytes_per_token * plan.max_model_len / 2


def device_lines(devices: Sequence[DeviceFacts]) -> list[str]:
    """The table of devices, then the sources of its values."""
    rows = [("device", "memory", "GB/s", "INT8 TOPS", "FP32 TFLOPS", "W", "pool")]
    rows += [
        (
            device.name,
            "shared" if device.memory is None else f"{device.memory.value:g} GiB",
            f"{device.bandwidth.value:.0f}",
            _number(device.matrix),
            _number(device.fp32),
            _number(device.power),
            device.pool,
        )
        for device in devices
    ]
    return [*_columns(rows), "", "sources:", *(line for d in devices for line in _sources(d))]


def fit_lines(fits: Sequence[Fit]) -> list[str]:
    """What fits where, with the arithmetic of what does not."""
    rows = [("model", "weights", "device", "may use", "needs", "fits", "tokens/s")]
    refused: list[str] = []
    for fit in fits:
        plan = fit.plan
        rate = "-"
        if plan.fits and fit.tokens_per_s is not None:
            rate = "{:.0f}–{:.0f}".format(*fit.tokens_per_s)
        rows.append(
            (
                plan.shape.name,
                _WORDS[plan.weight_format],
                fit.device.name,
                fit.limit,
                format_bytes(plan.needed_bytes),
                "yes" if plan.fits else "no",
                rate,
            )
        )
        if not plan.fits:
            refused.append(_refusal(fit))
    low, high = REACHED_SHARE
    rule = (
        f"tokens/s: one sequence, {low:.0%} to {high:.0%} of bandwidth over the bytes that a token"
        " reads (its weights, and the KV of half the context); where one does not fit it has none."
    )
    return [*_columns(rows), "", rule, *(["", "refused:", *refused] if refused else [])]


def _refusal(fit: Fit) -> str:
    plan = fit.plan
    parts = [
        f"weights {format_bytes(plan.weights_bytes)} ({format_count(plan.shape.num_params)} ×"
        f" {_bits(plan):g} bits)",
        f"KV {format_bytes(plan.kv_bytes)} ({plan.kv_tokens} × {plan.kv_bytes_per_token} B)",
        f"activations {format_bytes(plan.activations_bytes)}",
        f"runtime {format_bytes(plan.runtime_bytes)}",
    ]
    verdict = f"{format_bytes(-plan.left_bytes)} too much"
    return (
        f"  {plan.shape.name} {_WORDS[plan.weight_format]} on {fit.device.name}:"
        f" {' + '.join(parts)} = {format_bytes(plan.needed_bytes)} > {fit.limit}: {verdict}"
    )


def _bits(plan: MemoryPlan) -> float:
    return FORMAT_BITS.get(plan.weight_format, 8.0 * DTYPE_BYTES[plan.dtype])


def as_json(devices: Sequence[DeviceFacts], fits: Sequence[Fit]) -> dict[str, Any]:
    """Devices with the source of each value, and the plans, as JSON values."""
    return {
        "devices": [{**asdict(device), "pool": device.pool} for device in devices],
        "fits": [
            {
                "model": fit.plan.shape.name,
                "device": fit.device.name,
                "system_bytes": fit.system_bytes,
                "memory_bytes": fit.plan.memory_bytes,
                "weight_format": fit.plan.weight_format,
                "max_model_len": fit.plan.max_model_len,
                "weights_bytes": fit.plan.weights_bytes,
                "kv_cache_bytes": fit.plan.kv_bytes,
                "needed_bytes": fit.plan.needed_bytes,
                "fits": fit.plan.fits,
                "tokens_per_s": fit.tokens_per_s if fit.plan.fits else None,
            }
            for fit in fits
        ],
    }


def recommended_config(fit: Fit, model: str) -> dict[str, Any]:
    """A Serve config for a plan that fits: the device's pool and the sizes that were planned."""
    plan = fit.plan
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000, "request_timeout_s": None},
        "applications": [
            {
                "name": "xeray",
                "route_prefix": "/",
                "import_path": "serve_app:build_app",
                "args": {
                    "model": {"path": model, "max_model_len": plan.max_model_len},
                    "engine": {
                        "dtype": plan.dtype,
                        "weight_format": plan.weight_format,
                        "max_num_seqs": plan.max_num_seqs,
                        "max_num_batched_tokens": plan.num_batched_tokens,
                        "kv_cache_tokens": plan.kv_tokens,
                    },
                    "model_replica": {"pool": fit.device.pool},
                },
            }
        ],
    }


def _write(options: argparse.Namespace, fits: Sequence[Fit]) -> None:
    """Write the config of the plan with the most precise weights that fits the device."""
    if options.on is None or options.model is None:
        raise ConfigError("--write needs --on DEVICE and --model", param="write")
    fitting = [fit for fit in fits if fit.plan.fits]
    if not fitting:
        raise ConfigError(
            f"--write: {options.model} does not fit {options.on} in any format that was asked for",
            param="write",
        )
    best = fitting[0]
    head = (
        f"# {best.plan.shape.name} in {_WORDS[best.plan.weight_format]} on {best.device.name}, as"
        f" `xeray plan --devices` found it to fit:\n# {format_bytes(best.plan.needed_bytes)} of"
        f" {best.limit}.\n"
    )
    document = yaml.safe_dump(recommended_config(best, options.model), sort_keys=False)
    try:
        Path(options.write).write_text(head + document, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--write: cannot write {options.write}: {error}", param="write"
        ) from None


def _chosen(name: str | None) -> list[DeviceFacts]:
    if name is None:
        return list(DEVICES)
    device = find_device(name)
    if device is None:
        known = ", ".join(each.name for each in DEVICES)
        raise ConfigError(f"--on: {name!r} is not in the table; known: {known}", param="on")
    return [device]


def _number(figure: Figure | None) -> str:
    return "-" if figure is None else f"{figure.value:g}"


def _sources(device: DeviceFacts) -> list[str]:
    by_source: dict[str, list[str]] = {}
    for what in ("memory", "bandwidth", "matrix", "fp32", "power"):
        figure: Figure | None = getattr(device, what)
        if figure is not None:
            word = f"{what} ({figure.how})" if figure.how else what
            by_source.setdefault(figure.source, []).append(word)
    note = [f"  {device.name}: {device.note}"] if device.note else []
    return note + [f"  {device.name}: {', '.join(what)}: {s}" for s, what in by_source.items()]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
