"""`xeray profile`: what a running replica's engine steps spend their time on."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from serve_app.cli.chat import DEFAULT_URL
from serve_app.cli.units import count, format_bytes, positive_float, positive_int
from serve_app.core.errors import ConfigError, EngineError, XeRayError

_PROMPT = "Write a long story about a lighthouse."
_SPARE_S = 90.0
_SPARE_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `xeray profile`."""
    parser.add_argument("--url", default=DEFAULT_URL, help="server (default: %(default)s)")
    parser.add_argument("--model", default="default", help="model id of the requests it sends")
    parser.add_argument("--steps", type=positive_int, default=20, help="engine steps to trace (20)")
    parser.add_argument(
        "--streams", type=count, default=1,
        help="requests to send meanwhile; 0: profile what others send (1)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=positive_float, default=30.0, help="longest wait, seconds (30)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="copy the Chrome trace there, where the replica runs on this machine",
    )  # fmt: skip
    parser.add_argument("--api-key", help="admin key (default: XERAY_API_KEY)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Profile and print; 1 with one line where the server refuses or no step ran."""
    key = options.api_key or os.environ.get("XERAY_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(
            base_url=options.url, headers=headers, timeout=options.timeout + _SPARE_S
        ) as client:
            figures = _profile(client, options)
    except httpx.HTTPError as error:
        raise ConfigError(f"--url: cannot reach {options.url}: {error}", param="url") from None
    saved = None if options.output is None else _save(figures, options.output)
    vtune = vtune_command(figures)
    if options.json:
        print(json.dumps({**figures, "saved": saved, "vtune": vtune}, indent=2))
        return 0
    print("\n".join(report(figures)))
    if options.output is not None and saved is None:
        print(f"the trace lies on {figures['host']}: {figures['trace']}")
    elif saved is not None:
        print(f"trace: {saved} (open it in chrome://tracing or ui.perfetto.dev)")
    if vtune is not None:
        print(f"deeper, with VTune: {vtune}")
    return 0


def _profile(client: httpx.Client, options: argparse.Namespace) -> dict[str, Any]:
    """Send requests on threads of their own while the server traces its steps."""
    is_over = threading.Event()
    threads = [
        threading.Thread(target=_send_request, args=(client, options, is_over), daemon=True)
        for _ in range(options.streams)
    ]
    for thread in threads:
        thread.start()
    body = {"steps": options.steps, "timeout_s": options.timeout}
    try:
        with Console(stderr=True).status(f"tracing {options.steps} steps"):
            answer = client.post("/admin/profile", json=body)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    if answer.status_code != 200:
        raise _error_of(answer)
    figures: dict[str, Any] = answer.json()
    return figures


def _send_request(
    client: httpx.Client, options: argparse.Namespace, is_over: threading.Event
) -> None:
    """Keep one stream running until the profile is over; a faulty one shows in the profile."""
    body = {
        "model": options.model,
        "prompt": _PROMPT,
        "max_tokens": 3 * options.steps + _SPARE_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    while not is_over.is_set():
        try:
            with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    error = _error_of(response)
                    print(f"xeray: its request was refused: {error.message}", file=sys.stderr)
                    return
                for _ in response.iter_bytes():
                    if is_over.is_set():
                        return
        except httpx.HTTPError:
            return


def _error_of(answer: httpx.Response) -> XeRayError:
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {answer.status_code}"
    return EngineError(message)


def _save(figures: dict[str, Any], output: Path) -> str | None:
    """Copy the trace; None where it lies on another machine. Raises ConfigError."""
    source = Path(figures["trace"])
    if not source.is_file():
        return None
    try:
        shutil.copyfile(source, output)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error}", param="output") from None
    return str(output)


def vtune_command(figures: dict[str, Any]) -> str | None:
    """The command line that looks deeper, where VTune is installed here; None elsewhere."""
    vtune = shutil.which("vtune")
    if vtune is None:
        return None
    is_card = figures["idle_share"] is not None
    kind = "gpu-hotspots" if is_card else "hotspots"
    return f"{vtune} -collect {kind} -duration 20 -target-process python3 -result-dir xeray-vtune"


def report(figures: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    lines = [
        f"{figures['device']} ({figures['replica_id']} on {figures['host']}):"
        f" {figures['num_steps']} steps of {1000 * figures['step_s']:.2f} ms",
        f"per step: {figures['kernel_launches']:.0f} kernel launches,"
        f" {figures['synchronisations']:.1f} waits for the device,"
        f" {format_bytes(round(figures['copied_bytes']))} copied,"
        f" {figures['operator_calls']:.0f} operator calls",
        f"reads: {figures['read_bytes_per_s'] / 1e9:.1f} GB/s"
        + _share(figures["bandwidth_share"], " of the measured copy bandwidth"),
    ]
    if figures["idle_share"] is not None:
        lines.append(
            f"idle: {1000 * figures['idle_s']:.2f} ms a step without a kernel"
            + _share(figures["idle_share"], " of the time")
        )
    if figures["capture_speedup"] is not None:
        lines.append(
            f"capture: {1000 * figures['captured_step_s']:.2f} ms a step with,"
            f" {1000 * figures['uncaptured_step_s']:.2f} ms without:"
            f" {figures['capture_speedup']:.2f} times as fast"
        )
    lines += ["", f"{'share':>6}  {'calls':>6}  {'ms':>9}  operator (own time, all steps)"]
    lines += [
        f"{each['share']:>6.1%}  {each['calls']:>6}  {1000 * each['seconds']:>9.2f}  {each['name']}"
        for each in figures["operators"]
    ]
    rest = 1.0 - sum(each["share"] for each in figures["operators"])
    lines.append(f"{max(0.0, rest):>6.1%}  the rest: smaller ones")
    return [*lines, ""]


def _share(share: float | None, of_what: str) -> str:
    return "" if share is None else f", {share:.0%}{of_what}"
