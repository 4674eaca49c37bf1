"""Times each kernel beside its twin at Qwen2-7B's shapes.

`python -m serve_app.models.kernels.benchmark` prints the card's name and its measured copy
bandwidth, then a line a case: time, bytes that must move over that time and its share of the copy
bandwidth, the twin's time, and the relative difference of the two results. Exits with 1 if a
difference is larger than bfloat16 explains.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from serve_app.models.kernels._triton import HAS_TRITON, KERNEL_NAMES, disabled_kernels
from serve_app.models.kernels.activation import silu_and_mul, silu_and_mul_torch
from serve_app.models.kernels.gemv import skinny_linear
from serve_app.models.kernels.int4_gemv import dequantize_int4, int4_linear
from serve_app.models.kernels.int4_pack import (
    Int4Weight,
    dequantize_int4_torch,
    int4_linear_torch,
    pack_int4,
)
from serve_app.models.kernels.norm import rms_norm, rms_norm_torch
from serve_app.models.kernels.paged_decode import paged_decode, paged_decode_torch
from serve_app.models.kernels.rope import rope_and_cache, rope_and_cache_torch

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 3584, 28, 4, 128, 18944, 152064
BLOCK_SIZE, GROUP_SIZE = 16, 128
BATCHES = (1, 8, 32, 128)
MATRICES = {
    "qkv": ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "head": (VOCAB, HIDDEN),
}
MAX_DIFFERENCE = 2e-2
_ROTATED_BYTES = 256 << 20
_MAX_SETS = 12

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One line: `runs` and `twins` do the same on buffers of their own, moving `num_bytes` each."""

    kernel: str
    label: str
    num_bytes: int
    runs: list[Run]
    twins: list[Run]


def main() -> int:
    """Run the benchmark; 0, or 1 if a kernel differs from its twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", default=",".join(KERNEL_NAMES), help="names, by commas")
    names = set(parser.parse_args().kernels.split(","))
    unknown = names - set(KERNEL_NAMES)
    if unknown:
        parser.error(
            f"--kernels names {', '.join(sorted(unknown))}: choose from {', '.join(KERNEL_NAMES)}"
        )
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or not HAS_TRITON:
        print("no card, or no Triton: there is nothing to time")
        return 0
    device = torch.device(device.type, torch.accelerator.current_device_index())
    torch.manual_seed(0)
    gc.freeze()  # each capture collects garbage: spare it what the imports made
    module = torch.get_device_module(device)
    copy_bandwidth = measure_copy_bandwidth(device)
    print(f"{module.get_device_name(device)}: copy {copy_bandwidth / 1e9:.0f} GB/s (read + write)")
    print(f"{'kernel':14}{'case':26}{'us':>9}{'GB/s':>8}{'share':>7}{'twin us':>10}{'diff':>10}")
    worst = 0.0
    for case in all_cases(device, names - disabled_kernels()):
        worst = max(worst, report(case, copy_bandwidth, device))
        module.empty_cache()
    print(f"largest difference {worst:.1e} (limit {MAX_DIFFERENCE:.0e})")
    return int(worst > MAX_DIFFERENCE)


def all_cases(device: torch.device, names: set[str] | frozenset[str]) -> Iterator[Case]:
    """Yield the cases of the named kernels, each with buffers of its own."""
    generators = {
        "norm": _norms,
        "activation": _activations,
        "rope": _ropes,
        "paged_decode": _decodes,
        "gemv": _gemvs,
        "int4": _int4s,
    }
    for name, generate in generators.items():
        if name in names:
            yield from generate(device)


def report(case: Case, copy_bandwidth: float, device: torch.device) -> float:
    """Print a case's line; return its difference (NaN and infinities count as infinite)."""
    result, expected = case.runs[0]().double(), case.twins[0]().double()
    difference = float((result - expected).norm() / expected.norm())
    difference = difference if difference == difference else float("inf")
    seconds = measure(case.runs, device)
    twin_seconds = measure(case.twins, device)
    rate = case.num_bytes / seconds
    print(
        f"{case.kernel:14}{case.label:26}{seconds * 1e6:9.1f}{rate / 1e9:8.0f}"
        f"{rate / copy_bandwidth:7.2f}{twin_seconds * 1e6:10.1f}{difference:10.1e}",
        flush=True,
    )
    return difference


def measure(runs: list[Run], device: torch.device) -> float:
    """Return seconds of one run: events around replays of a graph that makes each run once.

    Where the device captures no graphs the runs are launched one by one.
    """
    module = torch.get_device_module(device)
    for run in runs[:2]:
        run()
    module.synchronize()
    replay = _captured(runs, module)
    replay()
    once = _timed(replay, 1, module)
    repeats = int(min(100, max(3, 0.01 / max(once, 1e-6))))
    return min(_timed(replay, repeats, module) for _ in range(3)) / len(runs)


def measure_copy_bandwidth(device: torch.device) -> float:
    """Return bytes read and written a second by the best of ten copies within the device.

    Of 4 GiB each, or a quarter of the free memory. Queued, not captured: a graph's copy node takes
    another way, which on one card reached 2.8 TB/s where this reaches 4.3.
    """
    module = torch.get_device_module(device)
    size = min(4 << 30, module.mem_get_info(device)[0] // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(_timed(lambda: target.copy_(source), 1, module) for _ in range(10))
    return float(2 * size / seconds)


def _captured(runs: list[Run], module: object) -> Callable[[], None]:
    graph_class = getattr(module, "CUDAGraph", None)
    if graph_class is None:

        def launch() -> None:
            for run in runs:
                run()

        return launch
    graph = graph_class()
    with module.graph(graph):  # type: ignore[attr-defined]
        for run in runs:
            run()
    return graph.replay


def _timed(replay: Callable[[], None], repeats: int, module: object) -> float:
    start, end = (module.Event(enable_timing=True) for _ in range(2))  # type: ignore[attr-defined]
    start.record()
    for _ in range(repeats):
        replay()
    end.record()
    module.synchronize()  # type: ignore[attr-defined]
    return start.elapsed_time(end) / 1e3 / repeats


def _num_sets(num_bytes: int) -> int:
    return max(2, min(_MAX_SETS, _ROTATED_BYTES // max(1, num_bytes)))


def _random(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def _norms(device: torch.device) -> Iterator[Case]:
    weight = _random(HIDDEN, device=device)
    for batch in BATCHES:
        shape = (batch, HIDDEN)
        sets = [
            (_random(*shape, device=device), _random(*shape, device=device).float())
            for _ in range(_MAX_SETS)
        ]
        runs: list[Run] = [lambda s=s: rms_norm(*s, weight, 1e-6)[0] for s in sets]
        twins: list[Run] = [lambda s=s: rms_norm_torch(*s, weight, 1e-6)[0] for s in sets]
        num_bytes = 2 * sum(tensor.nbytes for tensor in sets[0])
        yield Case("norm", f"B={batch}", num_bytes, runs, twins)


def _activations(device: torch.device) -> Iterator[Case]:
    for batch in BATCHES:
        sets = [_random(batch, 2 * INTERMEDIATE, device=device) for _ in range(_MAX_SETS)]
        runs: list[Run] = [lambda s=s: silu_and_mul(s) for s in sets]
        twins: list[Run] = [lambda s=s: silu_and_mul_torch(s) for s in sets]
        yield Case("activation", f"B={batch}", sets[0].nbytes * 3 // 2, runs, twins)


def _ropes(device: torch.device) -> Iterator[Case]:
    for batch in BATCHES:
        cache = _random(2, 512, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, device=device)
        sets = [_random(batch, MATRICES["qkv"][0], device=device) for _ in range(_MAX_SETS)]
        angles = torch.randn(batch, HEAD_DIM // 2, device=device)
        slots = torch.randperm(512 * BLOCK_SIZE, device=device)[:batch]
        rest = (angles.cos(), angles.sin(), slots, cache, NUM_HEADS)
        runs: list[Run] = [lambda s=s, r=rest: rope_and_cache(s, *r) for s in sets]
        twins: list[Run] = [lambda s=s, r=rest: rope_and_cache_torch(s, *r) for s in sets]
        yield Case("rope", f"B={batch}", 2 * sets[0].nbytes, runs, twins)


def _decodes(device: torch.device) -> Iterator[Case]:
    cases = [(batch, 192, 192, False) for batch in BATCHES]
    cases += [(8, 192, 8192, False), (1, 8192, 8192, False), (8, 8192, 8192, False)]
    cases += [(32, 8192, 8192, False), (8, 8192, 8192, True), (128, 192, 192, True)]
    for batch, context, maximum, is_invariant in cases:
        label = f"B={batch} ctx={context}/{maximum}" + (" inv" if is_invariant else "")
        yield _decode_case(device, batch, context, maximum, is_invariant, label)


def _decode_case(
    device: torch.device, batch: int, context: int, maximum: int, is_invariant: bool, label: str
) -> Case:
    width, used = maximum // BLOCK_SIZE, context // BLOCK_SIZE
    num_bytes = 4 * batch * context * NUM_KV_HEADS * HEAD_DIM
    lens = torch.full((batch,), context, device=device)
    scale = HEAD_DIM**-0.5
    sets = []
    for _ in range(_num_sets(num_bytes)):
        cache = _random(2, 1 + batch * used, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, device=device)
        tables = torch.zeros(batch, width, dtype=torch.int64, device=device)
        tables[:, :used] = 1 + torch.randperm(batch * used, device=device).view(batch, used)
        query = _random(batch, NUM_HEADS, HEAD_DIM, device=device)
        sets.append((query, cache, tables, lens, maximum, scale))
    runs: list[Run] = [lambda s=s: paged_decode(*s, batch_invariant=is_invariant) for s in sets]
    twins: list[Run] = [lambda s=s: paged_decode_torch(*s) for s in sets]
    return Case("paged_decode", label, num_bytes, runs, twins)


def _gemvs(device: torch.device) -> Iterator[Case]:
    for name, (size, depth) in MATRICES.items():
        count = _num_sets(2 * size * depth)
        weights = [_random(size, depth, device=device) for _ in range(count)]
        for batch in (1, 4):
            hidden = _random(batch, depth, device=device)
            runs: list[Run] = [lambda w=w, h=hidden: skinny_linear(h, w) for w in weights]
            twins: list[Run] = [lambda w=w, h=hidden: F.linear(h, w) for w in weights]
            yield Case("gemv", f"{name} B={batch}", weights[0].nbytes, runs, twins)


def _int4s(device: torch.device) -> Iterator[Case]:
    for name, (size, depth) in MATRICES.items():
        if name == "head":
            continue
        weights = _int4_weights(size, depth, device)
        num_bytes = weights[0].num_bytes
        for batch in BATCHES:
            hidden = _random(batch, depth, device=device)
            runs: list[Run] = [lambda w=w, h=hidden: int4_linear(h, w) for w in weights]
            twins: list[Run] = [lambda w=w, h=hidden: int4_linear_torch(h, w) for w in weights[:1]]
            yield Case("int4", f"{name} B={batch}", num_bytes, runs, twins)
        runs = [lambda w=w: dequantize_int4(w, torch.bfloat16) for w in weights[:2]]
        twins = [lambda w=w: dequantize_int4_torch(w, torch.bfloat16) for w in weights[:1]]
        yield Case("int4", f"{name} dequantize", num_bytes + 2 * size * depth, runs, twins)


def _int4_weights(size: int, depth: int, device: torch.device) -> list[Int4Weight]:
    quantized = torch.randint(0, 16, (size, depth), dtype=torch.uint8, device=device)
    shape = (depth // GROUP_SIZE, size)
    scales = torch.rand(shape, device=device) * 0.02 + 0.001
    zeros = torch.randint(0, 16, shape, device=device).float()
    weight = pack_int4(quantized, scales, zeros)
    copies = [
        Int4Weight(weight.words.clone(), weight.scale_zero.clone(), weight.group_size)
        for _ in range(_num_sets(weight.num_bytes) - 1)
    ]
    return [weight, *copies]


if __name__ == "__main__":
    sys.exit(main())
