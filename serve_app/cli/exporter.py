"""`xeray exporter`: this node's hardware as Prometheus text, one process per node."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from serve_app.cli.units import port_or_free
from serve_app.core.errors import ConfigError
from serve_app.hardware.telemetry.memory_traffic import MemoryTraffic
from serve_app.hardware.telemetry.sampler import HardwareSampler
from serve_app.observability.hardware_metrics import HardwareCollector

DEFAULT_PORT = 9410


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xeray exporter`."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1; no keys are asked)"
    )
    parser.add_argument(
        "--port",
        type=port_or_free,
        default=DEFAULT_PORT,
        help=f"port ({DEFAULT_PORT}); 0: a free one",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        help="folder under which sys and proc lie (/; in a container the host's, mounted)",
    )
    parser.add_argument("--json", action="store_true", help="print the URL as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until told to end, which is no failure. Raises ConfigError where the port is taken."""
    if not options.root.is_dir():
        raise ConfigError(f"--root: {options.root} is no folder", param="root")
    registry = CollectorRegistry()
    traffic = MemoryTraffic(options.root)
    registry.register(HardwareCollector(HardwareSampler(options.root, traffic=traffic)))
    try:
        server, thread = start_http_server(options.port, options.host, registry)
    except OSError as error:
        raise ConfigError(
            f"--port: {options.host}:{options.port} cannot be used ({error.strerror}); "
            "name a free one",
            param="port",
        ) from error
    # With --port 0 the system chose one.
    url = f"http://{options.host}:{server.server_port}/metrics"
    print(json.dumps({"url": url}) if options.json else f"hardware metrics on {url}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        traffic.close()
    raise AssertionError("unreachable")
