"""`xeray bench`: the engine alone, what lies above it, HTTP, and all of them against the floors."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from serve_app.bench import floors
from serve_app.bench import options as common
from serve_app.bench.baseline import add_baseline
from serve_app.bench.compare import add_compare, run_compare
from serve_app.bench.isa import add_isa, run_isa
from serve_app.bench.overhead import OverheadOptions, measure_overhead
from serve_app.bench.overload import add_overload, run_overload
from serve_app.bench.preprocess import add_preprocess, run_preprocess
from serve_app.bench.rounds import measure_batches, rounds_table
from serve_app.bench.serve_command import add_serve, run_serve
from serve_app.bench.soak import add_soak, run_soak

_AIM = "aim: "
_Adder = Callable[[argparse.ArgumentParser], None]
_Runner = Callable[[argparse.Namespace], int]


def add_parsers(parser: argparse.ArgumentParser) -> None:
    """Give `xeray bench` its subcommands; without one it measures everything."""
    _add_all(parser)
    parser.set_defaults(run=run_all)
    commands = parser.add_subparsers(metavar="WHAT", title="what to measure")
    for name, (text, add_arguments, run) in _commands().items():
        command = commands.add_parser(
            name, help=text, description=f"Measure {text}.", argument_default=argparse.SUPPRESS
        )
        add_arguments(command)
        if run is not None:
            command.set_defaults(run=run)


def _commands() -> dict[str, tuple[str, _Adder, _Runner | None]]:
    """Return name → help, options and function; a command without one has subcommands."""
    return {
        "all": ("engine, HTTP and overhead, against the floors (default)", _add_all, run_all),
        "engine": ("the engine alone, in this process", _add_engine, run_engine),
        "serve": ("a service over HTTP under a chosen load", add_serve, run_serve),
        "decode": (
            "the native engine's decode and prefill speed, with random weights of a shape",
            _add_decode,
            run_decode,
        ),
        "overhead": (
            "the service above an engine that only keeps time",
            _add_overhead,
            run_overhead,
        ),
        "preprocess": (
            "prompts per second through chat template and tokenizer, by threads",
            add_preprocess,
            run_preprocess,
        ),
        "peers": ("the engine and the service beside other engines", _add_peers, run_peers),
        "compare": ("one model on each device of this machine", add_compare, run_compare),
        "isa": (
            "AMX against AVX-512 on this processor, proved by oneDNN's own log",
            add_isa,
            run_isa,
        ),
        "speculative": (
            "speculative decoding by prompt lookup against none",
            _add_speculative,
            run_speculative,
        ),
        "overload": (
            "refusals and admitted requests at ten times the capacity",
            add_overload,
            run_overload,
        ),
        "soak": (
            "a mixed load for minutes or hours, and what it leaves",
            add_soak,
            run_soak,
        ),
        "baseline": ("against figures that were recorded before", add_baseline, None),
    }


def _add_engine(parser: argparse.ArgumentParser) -> None:
    common.add_config(parser)
    common.add_rounds(parser)


def _add_peers(parser: argparse.ArgumentParser) -> None:
    from serve_app.bench.peers.command import add_arguments

    _add_engine(parser)
    add_arguments(parser)


def _add_speculative(parser: argparse.ArgumentParser) -> None:
    from serve_app.bench.speculative import add_arguments

    add_arguments(parser)


def run_speculative(options: argparse.Namespace) -> int:
    """Measure the engine with drafts and without, and print the table."""
    from serve_app.bench.speculative import run

    return run(options)


def _add_all(parser: argparse.ArgumentParser) -> None:
    _add_engine(parser)
    _add_report_only(parser)


def _add_report_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report-only",
        action="store_true",
        default=argparse.SUPPRESS,
        help="exit with 0 though a floor does not hold (another program may have been running)",
    )


def _add_overhead(parser: argparse.ArgumentParser) -> None:
    common.add_config(parser)
    _add_report_only(parser)
    parser.add_argument("--streams", type=int, help="streams at once (32)")
    parser.add_argument("--rate", type=float, help="tokens per second of each stream (30)")
    parser.add_argument("--duration", type=float, help="seconds that the streams last (10)")


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", help="whose sizes the network has (qwen2-7b)")
    parser.add_argument("--device", choices=("auto", "cpu", "xpu", "cuda"), help="where (auto)")
    parser.add_argument("--weight-format", choices=("auto", "int4", "int8"), help="(auto: dense)")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        help="columns that share a scale in int4 and int8 (32; GPTQ and AWQ files mostly have 128)",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="compute type (auto)"
    )
    parser.add_argument(
        "--precisions",
        action="store_true",
        help="float32, bfloat16 and INT4 in turn, one sequence each, and what INT4 saves",
    )
    parser.add_argument("--concurrency", type=int, nargs="+", help="batch sizes (1 8 32 128)")
    parser.add_argument("--prompt-tokens", type=int, help="tokens of each prompt (128)")
    parser.add_argument("--output-tokens", type=int, help="tokens of each answer (256)")
    parser.add_argument(
        "--sampling",
        nargs="+",
        choices=("greedy", "random", "top-p", "penalties"),
        help="how tokens are chosen (greedy); each adds what it names to the one before",
    )
    parser.add_argument("--long-tokens", type=int, help="prompt of the long part (8192; 0: none)")
    parser.add_argument("--prefill-tokens", type=int, help="prompt read alone (2048; 0: none)")
    parser.add_argument("--rounds", type=int, help="times that each size runs (3)")
    parser.add_argument("--seed", type=int, help="decides everything random (0)")
    common.add_json(parser)


def run_decode(options: argparse.Namespace) -> int:
    """Measure the native engine with random weights and print its share of the device's limit."""
    from serve_app.bench.decode import DecodeOptions, measure_decode

    names = {"concurrency": "concurrencies", "sampling": "samplings", "rounds": "num_rounds"}
    given = {
        names.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if value is not None and names.get(name, name) in DecodeOptions.__slots__
    }
    chosen = DecodeOptions(**given)
    if getattr(options, "precisions", False):
        from serve_app.bench.precision import measure_precisions

        precisions = measure_precisions(chosen, lambda line: print(line, flush=True))
        common.write_json(options, {"precisions": precisions.to_dict()})
        return 0
    report = measure_decode(chosen, lambda line: print(line, flush=True))
    common.write_json(options, {"decode": report.to_dict()})
    return 0


def run_engine(options: argparse.Namespace) -> int:
    """Measure the engine alone and print its table."""
    from serve_app.bench.engine_bench import measure_engine

    section = common.app_config(options)
    print(f"engine alone: {section.model.path}", flush=True)
    report = measure_engine(section, common.round_options(options), common.show_rate)
    print(rounds_table(report["engine"]))
    common.write_json(options, report)
    return 0


def run_peers(options: argparse.Namespace) -> int:
    """Measure engine and service beside other engines, and print each one's ratio to ours."""
    from serve_app.bench.peers.command import measure_peers, print_report

    report = measure_peers(
        common.config_path(options),
        common.overrides(options),
        common.round_options(options),
        venv=getattr(options, "venv", None),
        only=getattr(options, "only", None),
        on_line=lambda line: print(line, flush=True),
    )
    print_report(report)
    common.write_json(options, {**_machine(), **report})
    return 0


def run_overhead(options: argparse.Namespace) -> int:
    """Measure what the service above a fixed-rate engine delivers and costs; 1 below a floor."""
    names = {"streams": "num_streams", "rate": "tokens_per_s", "duration": "duration_s"}
    given = {n: getattr(options, o) for o, n in names.items() if getattr(options, o, None)}
    figures = measure_overhead(
        common.config_path(options),
        OverheadOptions(**given),
        common.host(options),
        tuple(common.overrides(options)),
    )
    _print_overhead(figures)
    lines = floors.overhead_lines(figures)
    print(*lines, sep="\n")
    common.write_json(options, {"overhead": figures})
    return _exit_code(options, lines)


def _print_overhead(figures: dict[str, Any]) -> None:
    hops = figures["cpu_us_per_token_by_process"]
    shares = (f"{name} {us:.0f}" for name, us in hops.items() if us >= 0.5)
    per_core = figures["tokens_per_s_per_ingress_core"]
    if per_core is not None:
        print(
            f"one ingress core carries {per_core:,.0f} tokens/s:"
            f" {figures['streams_per_ingress_replica']:,} streams of this rate a replica"
        )
    print(
        f"overhead: {figures['num_streams']} streams, {figures['output_throughput']:.0f} of"
        f" {figures['offered_throughput']:.0f} tokens/s delivered,"
        f" {figures['cpu_us_per_token']:.0f} µs CPU per token ({', '.join(shares)}),"
        f" first token {figures['median_first_token_ms']:.1f} ms after the engine's"
    )


def run_all(options: argparse.Namespace) -> int:
    """Measure engine, HTTP, engine, overhead; print tables and which floor holds; 1 below one."""
    rounds = common.round_options(options)
    report = {**_machine(), **common.engine_in_its_own_process(options, rounds)}
    print(flush=True)
    with common.service(options) as url:
        report["http"] = measure_batches(common.target(options, url), rounds, common.show_rate)
    print("over HTTP", rounds_table(report["http"]), "", sep="\n", flush=True)
    again = common.engine_in_its_own_process(options, rounds)["engine"]
    report["engine_again"] = again
    print(flush=True)
    report["overhead"] = measure_overhead(
        common.config_path(options),
        OverheadOptions(),
        common.host(options),
        tuple(common.overrides(options)),
    )
    _print_overhead(report["overhead"])
    lines = floors.engine_lines(report["engine"])
    share = floors.http_share_line([*report["engine"], *again], report["http"])
    aim = floors.http_aim_line([*report["engine"], *again], report["http"])
    lines += [line for line in (share, aim) if line is not None]
    lines += floors.overhead_lines(report["overhead"])
    print("", "floors (two cores, the embedded model)", *lines, sep="\n")
    common.write_json(options, {**report, "floors": [line.to_dict() for line in lines]})
    return _exit_code(options, lines)


def _exit_code(options: argparse.Namespace, lines: Sequence[floors.FloorLine]) -> int:
    """Return 1 where a floor (not an aim) does not hold, unless only a report was asked for."""
    is_held = all(line.is_held for line in lines if not line.name.startswith(_AIM))
    return 0 if is_held or getattr(options, "report_only", False) else 1


def _machine() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "num_cores": len(os.sched_getaffinity(0)),
    }
