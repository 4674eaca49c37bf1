"""The `xeray` command: one subcommand per module, imported only when it is the one asked for.

Exit codes: 0 done; 1 an error of ours, one line on stderr; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from serve_app import __version__
from serve_app.cli.examples import add_examples
from serve_app.core.errors import XeRayError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: `module` has `add_arguments(parser)`, which sets the default `run`."""

    module: str
    help: str
    attribute: str = "add_arguments"


COMMANDS: dict[str, Command] = {
    "serve": Command(
        "serve_app.cli.serve", "start the application of a config and keep it running"
    ),
    "chat": Command("serve_app.cli.chat", "talk to a running server from the terminal"),
    "config": Command(
        "serve_app.cli.config_command", "check a config, print its schema or defaults"
    ),
    "plan": Command(
        "serve_app.cli.plan", "tell whether a model fits a device, with the arithmetic"
    ),
    "rollout": Command(
        "serve_app.cli.rollout", "bring a new version of a model in without a gap, or take it back"
    ),
    "keys": Command("serve_app.cli.keys", "make API keys, and check a file of them"),
    "doctor": Command(
        "serve_app.cli.doctor", "check this machine, and explain faults and copied guides"
    ),
    "exporter": Command(
        "serve_app.cli.exporter", "serve this node's hardware metrics to Prometheus"
    ),
    "monitor": Command(
        "serve_app.cli.monitor", "start Prometheus and Grafana with our rules and dashboards"
    ),
    "cluster": Command(
        "serve_app.cli.cluster.command", "join workstations to one Ray, over SSH or as units"
    ),
    "energy": Command(
        "serve_app.cli.energy", "measure tokens per joule, as it stands and under limits"
    ),
    "profile": Command(
        "serve_app.cli.profile", "trace engine steps of a running server, and say where time goes"
    ),
    "completion": Command(
        "serve_app.cli.completion", "print a completion script for bash, zsh or fish"
    ),
    "selftest": Command(
        "serve_app.cli.selftest", "check kernels, engine and bandwidth of this machine's device"
    ),
    "bench": Command(
        "serve_app.bench.main", "measure the engine, the overhead above it, and HTTP", "add_parsers"
    ),
    "quantize": Command(
        "serve_app.quantize.main", "write a model with 4 or 8 bits per weight, and check it"
    ),
    "eval": Command(
        "serve_app.quantize.eval_main",
        "measure a model's perplexity, and what it lost against its teacher",
    ),
}

Run = Callable[[argparse.Namespace], int | None]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that ends with where the help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; only the command `chosen` is imported and has its arguments."""
    parser = _Parser(
        prog="xeray",
        description="Serve language models on Intel workstations with Ray Serve.",
    )
    parser.add_argument("--version", action="version", version=f"xeray {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=f"{command.help}.")
        subparser.set_defaults(print_help=subparser.print_help)
        if name == chosen:
            getattr(importlib.import_module(command.module), command.attribute)(subparser)
            add_examples(subparser, name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A terminated command ends what it started, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    try:
        parser = build_parser(chosen)
        options = parser.parse_args(arguments)
        run: Run | None = getattr(options, "run", None)
        if run is None:
            getattr(options, "print_help", parser.print_help)(sys.stderr)
            return EXIT_USAGE
        return run(options) or 0
    except XeRayError as error:
        print(f"xeray: {' '.join(error.message.split())}", file=sys.stderr)
        return EXIT_ERROR
    except BrokenPipeError:
        # Whoever read our output has left; keep the interpreter from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        # Of a file that the command line named; without a name it is a bug.
        if error.filename is None:
            raise
        print(f"xeray: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("xeray: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
