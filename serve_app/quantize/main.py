"""`xeray quantize`: a model into a folder with 4 or 8 bits per weight, checked before the end."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.quantize.recipe import ALGORITHMS, BITS, GROUP_SIZES, PRESETS, Recipe, merged

_DEFAULT_PRESET = "balanced"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `xeray quantize`; None means: the preset's value."""
    parser.add_argument("model", help="a Hugging Face folder, a .gguf file, or 'embedded'")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default=_DEFAULT_PRESET, help="recipe to start from"
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, help="how values are rounded")
    parser.add_argument("--bits", type=int, choices=BITS, help="bits per weight")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, help="columns per scale")
    parser.add_argument(
        "--asymmetric",
        action="store_const",
        const=False,
        dest="is_symmetric",
        help="a zero point per group; XPU's kernels take symmetric groups alone",
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        metavar="PATTERN",
        help="matrices to leave as they are (lm_head); a regular expression searched for in the"
        " name, after first:N: or last:N: in the first or last N layers alone",
    )
    parser.add_argument(
        "--wide", nargs="*", metavar="PATTERN", help="matrices that get 8 bits; patterns likewise"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help=".txt or .jsonl (bundled)")
    parser.add_argument("--num-samples", type=int, metavar="N", help="calibration samples")
    parser.add_argument("--sample-tokens", type=int, metavar="N", help="tokens of each sample")
    parser.add_argument("--iterations", type=int, metavar="N", help="autoround's steps per block")
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples per autoround step")
    parser.add_argument(
        "--act-order",
        action="store_true",
        default=None,
        help="gptq: the columns of the largest activations first",
    )
    parser.add_argument("--seed", type=int, help="decides everything random")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or xpu: where to compute (cpu)")
    parser.add_argument("--restart", action="store_true", help="forget what a killed run left")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the preset with what the command line changes. Raises ConfigError on bad values."""
    changes = {
        name: getattr(options, name, None)
        for name in Recipe.__slots__
        if getattr(options, name, None) is not None
    }
    for name in ("skip", "wide"):
        if name in changes:
            changes[name] = tuple(changes[name])
    return merged(PRESETS[options.preset], **changes)


def run(options: argparse.Namespace) -> int:
    """Quantize and verify; 0 when the folder is whole."""
    recipe = recipe_of(options)
    source = resolve_model(ModelSection(path=options.model))
    from serve_app.quantize.pipeline import Job, run_job

    job = Job(
        source=source,
        output=options.output.expanduser(),
        recipe=recipe,
        calibration=_existing(options.calibration),
        device=options.device,
        restart=options.restart,
    )
    started = time.perf_counter()
    with _progress(sys.stderr if options.json else sys.stdout) as (on_line, on_block):
        result = run_job(job, on_line, on_block)
    share = result.output_bytes / result.source_bytes
    if options.json:
        facts = {
            "output": str(result.output),
            "output_bytes": result.output_bytes,
            "source_bytes": result.source_bytes,
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(json.dumps(facts, indent=2))
        return 0
    print(
        f"{result.output}: {result.output_bytes / 1e6:,.1f} MB, {100 * share:.1f} % of the source's"
        f" {result.source_bytes / 1e6:,.1f} MB, after {time.perf_counter() - started:.0f} s"
    )
    print(f"judge it: xeray eval {result.output} --against {options.model}")
    return 0


def _existing(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise ConfigError(f"--calibration: {path} is no file", param="calibration")
    return path


@contextmanager
def _progress(out: IO[str]) -> Iterator[tuple]:  # type: ignore[type-arg]
    """Lines as they come, and a bar of blocks on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # The libraries' own output is sent elsewhere for a while: keep to the stream of now.
    console = Console(file=out, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task("blocks", total=None, visible=False)

        def on_line(line: str) -> None:
            console.print(line, markup=False)

        def on_block(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield on_line, on_block
