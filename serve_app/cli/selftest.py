"""`xeray selftest`: does this machine compute what it should? A report to attach to a bug.

Every kernel beside its twin, the sampler beside the CPU's, a small model from start to end, the
device's copy bandwidth, and the versions of what takes part.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from serve_app import __version__
from serve_app.config.schema import EMBEDDED_MODEL, EngineSection, ModelSection
from serve_app.core.errors import ConfigError, XeRayError
from serve_app.core.sampling import SamplingParams
from serve_app.engine.devices import copy_bandwidth, device_name, resolve_device, resolve_dtype
from serve_app.engine.factory import create_engine
from serve_app.engine.native import NativeEngine
from serve_app.engine.protocol import Engine
from serve_app.engine.sampler import Sampler, SamplingPlan
from serve_app.engine.sequence import Sequence
from serve_app.models.config import NetworkConfig
from serve_app.models.kernels._triton import HAS_TRITON, disabled_kernels
from serve_app.models.kernels.verify import check_kernels
from serve_app.models.loading.random_source import make_random_model

_PACKAGES = ("triton", "pytorch-triton-xpu", "transformers", "openvino", "ray", "numpy")
_SHAPE = NetworkConfig(
    architecture="qwen2",
    hidden_size=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=768,
    vocab_size=4096,
    max_position=1024,
    rope_theta=1e6,
    rope_dim=32,
    qkv_bias=True,
)
_NUM_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    is_ok: bool
    detail: str


@dataclass(slots=True)
class Report:
    """What was found. `bandwidth`: bytes read and written a second by copies in the device."""

    device: str
    device_name: str
    bandwidth: float
    versions: dict[str, str]
    checks: list[Check] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether no check failed."""
        return all(check.is_ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "is_ok": self.is_ok}

    def text(self) -> str:
        """The report as lines."""
        lines = [f"{self.device} ({self.device_name}): copy {self.bandwidth / 1e9:.1f} GB/s"]
        lines += [f"{name} {version}" for name, version in self.versions.items()]
        lines += [line_of(check) for check in self.checks]
        failed = sum(not check.is_ok for check in self.checks)
        lines.append(f"{len(self.checks)} checks, {failed} failed")
        return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "xpu", "cuda"),
        help="what to check (auto: the best there is)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("xeray-selftest"), metavar="FOLDER",
        help="where selftest.json and selftest.txt go (xeray-selftest)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run every check; 1 if one failed. Raises ConfigError where the report cannot be written."""
    device = resolve_device(options.device)
    report = Report(str(device), device_name(device), copy_bandwidth(device), _versions(device))
    # The lines are the progress; beside JSON they go where they are in nobody's way.
    out = sys.stderr if options.json else sys.stdout
    head = f"{report.device} ({report.device_name}): copy {report.bandwidth / 1e9:.1f} GB/s"
    print(head, file=out, flush=True)
    for check in _all_checks(device):
        report.checks.append(check)
        print(line_of(check), file=out, flush=True)
    _write(report, options.output)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    failed = sum(not check.is_ok for check in report.checks)
    end = f"{len(report.checks)} checks, {failed} failed; report in {options.output}"
    print(end, file=out)
    return int(not report.is_ok)


def line_of(check: Check) -> str:
    """A check as one line."""
    return f"{'ok' if check.is_ok else 'FAILED':7}{check.name}: {check.detail}"


def _all_checks(device: torch.device) -> Iterator[Check]:
    dtype = resolve_dtype("auto", device)
    yield from _guarded("kernels", lambda: list(_kernel_checks(device, dtype)))
    yield from _guarded("sampler", lambda: [_sampler_check(device)])
    yield from _guarded("random model", lambda: [_random_model_check(device)])
    yield from _guarded("embedded model", lambda: [_embedded_model_check(device)])


def _guarded(name: str, run_checks: Callable[[], list[Check]]) -> list[Check]:
    try:
        return run_checks()
    except Exception as error:  # what breaks is what the report is for
        return [Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0][:300])]


def _kernel_checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    for checked in dict.fromkeys((dtype, torch.float32)):
        for found in check_kernels(device, checked):
            kind = "kernel" if found.is_kernel else "twin"
            name = str(checked).removeprefix("torch.")
            detail = f"{found.case}, {name}, {kind}: {found.difference:.1e} ≤ {found.limit:.0e}"
            yield Check(f"kernel {found.kernel}", found.is_ok, detail)


def _sampler_check(device: torch.device) -> Check:
    logits = torch.randn(32, 9000, generator=torch.Generator().manual_seed(0)) * 3
    drawn = [_draw(logits, where) for where in (device, torch.device("cpu"))]
    num_same = int((drawn[0] == drawn[1]).sum())
    greedy_same = torch.equal(drawn[0][::4], drawn[1][::4])
    detail = (
        f"{num_same} of 32 tokens as on the CPU, greedy ones {'' if greedy_same else 'not '}all"
    )
    return Check("sampler", greedy_same and num_same >= 31, detail)


def _draw(logits: torch.Tensor, device: torch.device) -> torch.Tensor:
    sampler = Sampler(logits.shape[1], logits.shape[0], device)
    sequences = []
    for row in range(logits.shape[0]):
        params = SamplingParams(
            temperature=0.8 if row % 4 else 0.0, top_p=0.9, top_k=200 if row % 3 else 0, seed=row,
            repetition_penalty=1.1, frequency_penalty=0.2,
        )  # fmt: skip
        sequence = Sequence(f"selftest-{row}", [1, 2, 3 + row], params, row)
        sequence.slot = row
        sampler.load(sequence)
        sequences.append(sequence)
    slots = torch.arange(logits.shape[0], device=device)
    plan = SamplingPlan.of(sequences)
    return sampler.sample(logits.to(device), slots, slots + 3, plan).token_ids.cpu()


def _random_model_check(device: torch.device) -> Check:
    """Batched, chunked and captured greedy output in float32 is one-by-one output on the CPU."""
    rng = random.Random(0)
    lengths = (3, 17, 40, 130, 5, 64)
    prompts = [[rng.randrange(_SHAPE.vocab_size) for _ in range(n)] for n in lengths]
    found, _ = _generate(_random_engine(device), prompts)
    expected = [_generate(_random_engine(torch.device("cpu")), [p])[0][0] for p in prompts]
    num_same = sum(a == b for a, b in zip(found, expected, strict=True))
    detail = f"{num_same} of {len(prompts)} sequences as on the CPU one by one"
    return Check("random model", num_same == len(prompts), detail)


def _random_engine(device: torch.device) -> NativeEngine:
    cpu = torch.device("cpu")  # the same weights everywhere
    model = make_random_model(_SHAPE, device=device, dtype="float32", seed=1, source_device=cpu)
    section = EngineSection(kv_cache_tokens=1024, max_num_seqs=8, max_num_batched_tokens=64)
    return NativeEngine(model, section)


def _embedded_model_check(device: torch.device) -> Check:
    section = EngineSection(device=device.type, kv_cache_tokens=512, max_num_seqs=4)
    try:
        engine = create_engine(ModelSection(path=EMBEDDED_MODEL), section)
    except ConfigError as error:
        return Check("embedded model", True, f"left out: {error.message}")
    prompts = [[1, 504, 3575, 282, 4649, 314], [1, 1780, 253, 655]]
    answers, seconds = _generate(engine, prompts)
    is_ok = all(len(answer) == _NUM_TOKENS for answer in answers)
    rate = sum(map(len, answers)) / seconds
    return Check("embedded model", is_ok, f"{rate:.0f} tokens/s at 2; first ids {answers[0][:8]}")


def _generate(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    params = SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS, ignore_eos=True)
    try:
        for index, prompt in enumerate(prompts):
            engine.submit(str(index), prompt, params)
        answers: list[list[int]] = [[] for _ in prompts]
        started, num_open = time.perf_counter(), len(prompts)
        while num_open:
            for event in engine.step():
                answers[int(event.request_id)] += event.new_token_ids
                num_open -= event.finish_reason is not None
                if event.error is not None:
                    raise XeRayError(event.error.message)
        return answers, time.perf_counter() - started
    finally:
        engine.close()


def _versions(device: torch.device) -> dict[str, str]:
    versions = {"xeray": __version__, "python": sys.version.split()[0]}
    versions["system"] = platform.platform()
    versions["torch"] = torch.__version__  # with the build, which metadata may lack
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch build"] = f"cuda {torch.version.cuda}, xpu {torch.version.xpu}"
    versions["kernels"] = "Triton" if HAS_TRITON else "PyTorch (no Triton)"
    if disabled_kernels():
        versions["kernels off"] = ", ".join(sorted(disabled_kernels()))
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        versions["device"] = str(properties)
    return versions


def _write(report: Report, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "selftest.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        (folder / "selftest.txt").write_text(report.text())
    except OSError as error:
        raise ConfigError(f"--output: {error.strerror}: {folder}", param="output") from error
