"""Decode and prefill speed of the native engine on one device, with random weights of a shape.

Requests of random prompts go through the public Engine together, the prefix cache off and the end
of sequence ignored; the wall clock stops where `step` returns, with each id read by the host. The
device's own limit stands beside each figure: what a step must read (the weights once, the context's
keys and values) over the bandwidth that a large copy reaches on this very device.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from serve_app.bench.decode_shapes import SHAPES
from serve_app.config.schema import EngineSection
from serve_app.core.errors import ConfigError, EngineError
from serve_app.core.events import FinishReason
from serve_app.core.sampling import SamplingParams
from serve_app.engine.devices import copy_bandwidth, device_name, resolve_device
from serve_app.engine.native import NativeEngine
from serve_app.hardware.power.meter import EnergyMeter
from serve_app.models.config import NetworkConfig
from serve_app.models.interface import LoadedModel
from serve_app.models.kernels.int4_pack import GROUP_SIZES
from serve_app.models.loading.builder import WeightFormat
from serve_app.models.loading.loader import DTypeName, num_linear_weights
from serve_app.models.loading.random_source import make_random_model
from serve_app.models.quantized import GROUP_SIZE

SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "penalties": {
        "temperature": 0.8,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
    },
}

_WARM_UP_TOKENS = 8
_MATMUL_SIZE = 8192
_MATMUL_SIZE_CPU = 1024


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What is measured. `long_tokens` and `prefill_tokens` of 0 leave those parts out."""

    shape: str = "qwen2-7b"
    device: str = "auto"
    weight_format: WeightFormat = "auto"
    group_size: int = GROUP_SIZE
    dtype: DTypeName = "auto"
    concurrencies: tuple[int, ...] = (1, 8, 32, 128)
    samplings: tuple[str, ...] = ("greedy",)
    prompt_tokens: int = 128
    output_tokens: int = 256
    long_tokens: int = 8192
    long_concurrency: int = 8
    prefill_tokens: int = 2048
    num_rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(
                f"--shape: {self.shape} is not among {', '.join(SHAPES)}", param="shape"
            )
        least = min(*self.concurrencies, self.prompt_tokens, self.output_tokens, self.num_rounds)
        if least < 1:
            raise ConfigError(
                f"--concurrency, --prompt-tokens, --output-tokens, --rounds: {least} is less than 1"
            )
        if self.group_size not in GROUP_SIZES:
            raise ConfigError("--group-size: one of 32, 64 and 128", param="group_size")
        if self.output_tokens < 2:
            raise ConfigError("--output-tokens: decoding starts with the second", param="output")

    @property
    def max_model_len(self) -> int:
        """The longest context of any part."""
        longest = max(self.prompt_tokens, self.long_tokens)
        return max(longest + self.output_tokens, self.prefill_tokens + 1)


@dataclass(slots=True)
class DecodeReport:
    """Figures of one run. Bandwidths in bytes/s, rates in tokens/s, `shares` of the limit."""

    device: str
    shape: str
    weight_format: str
    dtype: str
    copy_bandwidth: float
    weight_bytes: int
    build_s: float
    startup_s: float
    decode: list[dict[str, Any]] = field(default_factory=list)
    long_context: dict[str, Any] | None = None
    prefill: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(slots=True)
class _Timing:
    """What one batch took. `num_decoded` tokens came after each sequence had its first."""

    first_s: float
    decode_s: float
    num_decoded: int
    num_steps: int


def measure_decode(
    options: DecodeOptions, on_line: Callable[[str], None] = lambda line: None
) -> DecodeReport:
    """Build the network, start the engine, run each part; `on_line` gets each result's line.

    Raises ConfigError for a shape that does not fit, EngineError where a sequence fails.
    """
    device = resolve_device(options.device)
    config = SHAPES[options.shape]
    bandwidth = copy_bandwidth(device)
    started = time.perf_counter()
    model = make_random_model(
        config,
        device=device,
        dtype=options.dtype,
        weight_format=options.weight_format,
        group_size=options.group_size,
        seed=options.seed,
    )
    _synchronize(device)
    build_s = time.perf_counter() - started
    started = time.perf_counter()
    engine = NativeEngine(model, _section(options), max_model_len=options.max_model_len)
    report = DecodeReport(
        device=device_name(device),
        shape=options.shape,
        weight_format=model.weight_format,
        dtype=str(model.dtype).removeprefix("torch."),
        copy_bandwidth=bandwidth,
        weight_bytes=_bytes_of_a_step(config, model),
        build_s=build_s,
        startup_s=time.perf_counter() - started,
    )
    on_line(
        f"{report.device}: copy {bandwidth / 1e9:.0f} GB/s; {report.shape}, {report.weight_format},"
        f" {report.dtype}, {report.weight_bytes / 1e9:.2f} GB a step;"
        f" ready {report.startup_s:.1f} s after its weights"
    )
    try:
        _run_parts(engine, options, report, on_line)
    finally:
        engine.close()
    return report


def _bytes_of_a_step(config: NetworkConfig, model: LoadedModel) -> int:
    """Bytes of weights that one row's step reads, as its products hold them."""
    if config.mixture is not None:
        return weight_bytes_read(config, model.weight_format, model.dtype.itemsize)
    return model.read_bytes(1)


def weight_bytes_read(config: NetworkConfig, weight_format: str, dense_bytes: int) -> int:
    """Bytes of weights that one decode step must read: all matrices but the embedding's rows.

    Of a mixture's experts those that one row is sent to: a batch reads more of them.
    """
    inner = num_linear_weights(config)
    if (mixture := config.mixture) is not None:
        expert = 3 * config.hidden_size * mixture.intermediate_size
        inner -= sum(mixture.is_sparse) * expert * (mixture.num_experts - mixture.num_active)
    head = config.vocab_size * config.hidden_size * dense_bytes
    bits = {"int4": 4, "int8": 8}.get(weight_format)
    if bits is None:
        return inner * dense_bytes + head
    # each group of columns has a scale and a zero, two bytes each
    return inner * bits // 8 + inner // GROUP_SIZE * 4 + head


def _kv_values(config: NetworkConfig) -> int:
    """Values that a token keeps in the cache, over all layers."""
    if config.latent is not None:
        return config.num_layers * config.latent.cached_dim
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim


def _section(options: DecodeOptions) -> EngineSection:
    num_seqs = max(*options.concurrencies, options.long_concurrency if options.long_tokens else 1)
    short = max(options.concurrencies) * (options.prompt_tokens + options.output_tokens)
    long = options.long_concurrency * (options.long_tokens + options.output_tokens)
    slack = num_seqs * 16
    return EngineSection(
        kv_cache_tokens=max(short, long if options.long_tokens else 0, options.max_model_len)
        + slack,
        max_num_seqs=num_seqs,
        enable_prefix_caching=False,
    )


def _run_parts(
    engine: NativeEngine,
    options: DecodeOptions,
    report: DecodeReport,
    on_line: Callable[[str], None],
) -> None:
    kv_bytes = _kv_values(SHAPES[options.shape]) * _itemsize(report.dtype)
    for name in options.samplings:
        for size in options.concurrencies:
            line = _decode_part(engine, options, report, (name, size, options.prompt_tokens), 0)
            report.decode.append(line)
            on_line(_decode_line(line))
    if options.long_tokens:
        part = (options.samplings[0], options.long_concurrency, options.long_tokens)
        report.long_context = _decode_part(engine, options, report, part, kv_bytes)
        on_line(_decode_line(report.long_context))
    if options.prefill_tokens:
        report.prefill = _prefill_part(engine, options)
        on_line(
            f"prefill of {options.prefill_tokens}: {report.prefill['tokens_per_s']:.0f} tokens/s,"
            f" {report.prefill['flops'] / 1e12:.0f} TFLOP/s, {report.prefill['share']:.2f} of the"
            f" {report.prefill['matmul_flops'] / 1e12:.0f} of a large product"
        )


def _decode_part(
    engine: NativeEngine,
    options: DecodeOptions,
    report: DecodeReport,
    part: tuple[str, int, int],
    kv_bytes_per_token: int,
) -> dict[str, Any]:
    """The median round. With `kv_bytes_per_token` the limit also reads the context's KV."""
    name, size, prompt_tokens = part
    rng = random.Random(f"{options.seed} {part}")
    _run_batch(engine, options, part, _WARM_UP_TOKENS, rng)
    with EnergyMeter() as meter:
        timings = [
            _run_batch(engine, options, part, options.output_tokens, rng)
            for _ in range(options.num_rounds)
        ]
    num_tokens = options.num_rounds * size * options.output_tokens
    rates = sorted(timing.num_decoded / timing.decode_s for timing in timings)
    rate = rates[len(rates) // 2]
    context = prompt_tokens + options.output_tokens / 2
    step_bytes = report.weight_bytes + kv_bytes_per_token * size * context
    return {
        "sampling": name,
        "concurrency": size,
        "prompt_tokens": prompt_tokens,
        "tokens_per_s": rate,
        "lowest": rates[0],
        "highest": rates[-1],
        "share": rate / size * step_bytes / report.copy_bandwidth,
        "step_ms": 1e3 * size / rate,
        "first_s": sorted(timing.first_s for timing in timings)[len(timings) // 2],
        "joules_per_token": {name: total / num_tokens for name, total in meter.joules.items()},
    }


def _decode_line(line: dict[str, Any]) -> str:
    readings = sorted(line["joules_per_token"].items())
    joules = (f", {value:.3g} J a token ({name})" for name, value in readings)
    return (
        f"{line['sampling']:10} × {line['concurrency']:<4} of {line['prompt_tokens']:<5}"
        f" {line['tokens_per_s']:9.1f} tokens/s ({line['lowest']:.0f}-{line['highest']:.0f}),"
        f" {line['step_ms']:.3f} ms a step, {line['share']:.3f} of the limit,"
        f" all first tokens after {line['first_s']:.3f} s{''.join(joules)}"
    )


def _prefill_part(engine: NativeEngine, options: DecodeOptions) -> dict[str, Any]:
    config, length = SHAPES[options.shape], options.prefill_tokens
    rng = random.Random(options.seed)
    part = ("greedy", 1, length)
    _run_batch(engine, options, part, 1, rng)
    seconds = min(_run_batch(engine, options, part, 1, rng).first_s for _ in range(5))
    head = config.vocab_size * config.hidden_size
    weights = weight_bytes_read(config, "dense", 1) - head
    width = config.num_heads * config.head_dim
    attention = config.num_layers * 2 * width * length * (length + 1)  # half of it is masked
    flops = (2 * (weights * length + head) + attention) / seconds
    matmul_flops = _matmul_flops(engine)
    return {
        "num_tokens": length,
        "seconds": seconds,
        "tokens_per_s": length / seconds,
        "flops": flops,
        "matmul_flops": matmul_flops,
        "share": flops / matmul_flops,
    }


def _run_batch(
    engine: NativeEngine,
    options: DecodeOptions,
    part: tuple[str, int, int],
    num_output: int,
    rng: random.Random,
) -> _Timing:
    name, size, prompt_tokens = part
    vocab_size = engine.info.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(size)]
    params = SamplingParams(max_tokens=num_output, ignore_eos=True, seed=1, **SAMPLINGS[name])
    begin_s = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.submit(f"decode-{index}", prompt, params)
    waiting = {f"decode-{index}" for index in range(size)}
    num_tokens = num_before = num_open = num_steps = 0
    num_open, first_s = size, begin_s
    while num_open:
        events = engine.step()
        now_s = time.perf_counter()
        num_steps += not waiting
        for event in events:
            if event.finish_reason not in (None, FinishReason.LENGTH):
                message = event.error.message if event.error else str(event.finish_reason)
                raise EngineError(f"the engine failed during the measurement: {message}")
            num_tokens += len(event.new_token_ids)
            num_open -= event.finish_reason is not None
        if waiting:
            waiting.difference_update(event.request_id for event in events)
            num_before, first_s = num_tokens, now_s
    return _Timing(first_s - begin_s, now_s - first_s, num_tokens - num_before, num_steps)


def _matmul_flops(engine: NativeEngine) -> float:
    """Rate of a large product of random matrices in the engine's type and on its device."""
    device = torch.device(engine.info.device)
    size = _MATMUL_SIZE_CPU if device.type == "cpu" else _MATMUL_SIZE
    dtype = getattr(torch, engine.info.dtype)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_of(lambda: left @ right, device)


def _best_of(run: Callable[[], object], device: torch.device, num_runs: int = 10) -> float:
    best = float("inf")
    for _ in range(num_runs):
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)
