"""`xeray eval`: perplexity of a model, and what it lost against the one that it was made from."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from serve_app.config.model_source import ModelSource, resolve_model
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.quantize.evaluate import (
    Measured,
    ModelFigures,
    Report,
    Thresholds,
    compare,
    score,
)
from serve_app.quantize.folder import folder_bytes
from serve_app.quantize.scoring import Scorer, open_scorer
from serve_app.quantize.texts import EVALUATION_TEXT, bundled_text, read_texts, windows
from serve_app.text.tokenizer import load_tokenizer

_DECODE_PROMPT = 64
_ADVICE = (
    "what helps: 8 bits (xeray quantize --bits 8, or --wide for some matrices), a larger model"
    " (a small one has more near ties), or a limit of your own: a small model is better judged by"
    " perplexity (--min-top1 0 --max-perplexity-increase 0.05)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `xeray eval`."""
    parser.add_argument("model", help="a Hugging Face folder, a .gguf file, or 'embedded'")
    parser.add_argument("--against", metavar="MODEL", help="the teacher: what it was made from")
    parser.add_argument(
        "--engine",
        choices=("native", "transformers", "openvino"),
        default="native",
        help="whose network",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xpu")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="compute type; the native engine's float32 is its reference",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help=".txt or .jsonl to read (a bundled novel of 1895)",
    )
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens of a window")
    parser.add_argument(
        "--windows", type=int, default=32, metavar="N", help="windows, spread over the text"
    )
    parser.add_argument(
        "--decode-tokens", type=int, default=64, metavar="N", help="timed greedy tokens (0: none)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--min-top1",
        type=float,
        default=0.97,
        metavar="SHARE",
        help="exit 1 below (0.97; small models miss that at 4 bits)",
    )
    parser.add_argument(
        "--max-perplexity-increase", type=float, metavar="SHARE", help="exit 1 above, such as 0.05"
    )
    parser.add_argument("--max-kl", type=float, metavar="NATS", help="exit 1 above")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table; 1 where a threshold does not hold."""
    if options.context < 2 or options.windows < 1 or options.decode_tokens < 0:
        raise ConfigError("--context, --windows, --decode-tokens: too small", param="context")
    source = resolve_model(ModelSection(path=options.model))
    teacher_source = resolve_model(ModelSection(path=options.against)) if options.against else None
    name, ids = _windows(options, source, teacher_source)
    model = _measured(source, options)
    teacher = _measured(teacher_source, options) if teacher_source else None
    limit = min(each.scorer.max_position for each in (model, teacher) if each)
    if options.context > limit:
        raise ConfigError(f"--context: the models end at {limit} positions", param="context")
    sums = score(model, teacher, ids, _show)
    own = _figures(model, sums.perplexity, ids, options)
    report = Report(name, sums.num_tokens, options.context, own)
    if teacher is not None:
        report.teacher = _figures(teacher, sums.teacher_perplexity, ids, options)
        report.comparison = compare(sums, own, report.teacher)
    failures = _failures(report, options)
    _print(report, failures)
    if options.json is not None:
        values = {**report.to_dict(), "failures": failures}
        options.json.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return 1 if failures else 0


def _windows(
    options: argparse.Namespace, source: ModelSource, teacher: ModelSource | None
) -> tuple[str, torch.Tensor]:
    if options.text is None:
        name, texts = EVALUATION_TEXT, [bundled_text(EVALUATION_TEXT)]
    else:
        name, texts = options.text.name, read_texts(options.text, "--text")
    ids = windows(texts, load_tokenizer(source), options.context, options.windows)
    if teacher is not None:
        theirs = windows(texts, load_tokenizer(teacher), options.context, options.windows)
        if not torch.equal(ids, theirs):
            raise ConfigError(
                f"--against: {teacher.name} cuts the text into other tokens than {source.name};"
                " only models of one vocabulary can be compared token by token",
                param="against",
            )
    return name, ids


def _measured(source: ModelSource, options: argparse.Namespace) -> Measured:
    scorer: Scorer = open_scorer(
        source.path, options.engine, device=options.device, dtype=options.dtype
    )
    size = folder_bytes(source.path) if source.path.is_dir() else source.path.stat().st_size
    return Measured(scorer, source.name, size)


def _figures(
    model: Measured, perplexity: float, ids: torch.Tensor, options: argparse.Namespace
) -> ModelFigures:
    rate = 0.0
    if options.decode_tokens:
        rate = model.scorer.decode_tokens_per_s(ids[0][:_DECODE_PROMPT], options.decode_tokens)
    return model.figures(perplexity, rate)


def _failures(report: Report, options: argparse.Namespace) -> list[str]:
    if report.comparison is None:
        return []
    limits = Thresholds(options.min_top1, options.max_perplexity_increase, options.max_kl)
    return limits.failures(report.comparison)


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} windows", end=end, file=sys.stderr, flush=True)


def _print(report: Report, failures: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    teacher = report.teacher
    table = Table(box=box.SIMPLE, title=None, pad_edge=False)
    table.add_column("")
    for each in (report.model, teacher):
        if each is not None:
            table.add_column(each.name, justify="right", overflow="fold")
    for label, write in (
        ("engine", lambda f: f"{f.engine}, {f.dtype}"),
        ("perplexity", lambda f: f"{f.perplexity:.3f}"),
        ("files", lambda f: f"{f.file_bytes / 1e6:,.1f} MB"),
        ("weights in memory", lambda f: f"{f.weights_bytes / 1e6:,.1f} MB"),
        ("prefill tokens/s", lambda f: f"{f.prefill_tokens_per_s:,.0f}"),
        ("decode tokens/s", lambda f: f"{f.decode_tokens_per_s:,.1f}"),
    ):
        table.add_row(label, *(write(each) for each in (report.model, teacher) if each))
    console = Console(highlight=False)
    console.print(
        f"{report.num_tokens} tokens of {report.text}, windows of {report.context}", markup=False
    )
    console.print(table)
    if (found := report.comparison) is not None:
        console.print(
            f"top-1 agreement {found.top1:.2%}, KL {found.kl:.4f} nats, perplexity"
            f" {found.perplexity_increase:+.2%}, files {found.size_share:.1%} of the teacher's,"
            f" decode × {found.decode_speedup:.2f}",
            markup=False,
        )
    for failure in failures:
        console.print(f"does not hold: {failure}", markup=False)
    if failures:
        console.print(_ADVICE, markup=False)
