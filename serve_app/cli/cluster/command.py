"""The arguments of `xeray cluster`, and what each of its commands prints."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve_app.cli.cluster import bring_up, inventory_edit, node, probe
from serve_app.cli.cluster.bring_up import Outcome
from serve_app.cli.cluster.inventory import (
    DEFAULT_INVENTORY,
    Inventory,
    Machine,
    load_inventory,
)
from serve_app.cli.cluster.node_spec import NodeSpec
from serve_app.cli.cluster.ssh import run_on
from serve_app.cli.units import port_number
from serve_app.config.load import validate_section
from serve_app.core.errors import ConfigError

RENDERED = (
    "systemd",
    "ray-up",
    "docker",
    "kubernetes",
    "nginx",
    "haproxy",
    "firewall",
    "security",
)
_REMOVE_DRAIN_S = 60.0
_NODES_TIMEOUT_S = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands of `xeray cluster`."""
    commands = parser.add_subparsers(dest="cluster_command", metavar="COMMAND", title="commands")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> Any:
        subparser = commands.add_parser(name, help=text, description=f"{text}.")
        subparser.set_defaults(run=run)
        return subparser

    up = add("up", "start Ray on all machines, or on those named", run_up)
    down = add("down", "stop Ray on all machines, or on those named", run_down)
    status = add("status", "tell which machines run and count as alive", run_status)
    new = add("add", "add a machine to the inventory and start it", run_add)
    remove = add("remove", "drain a machine, stop it, take it out of the inventory", run_remove)
    execute = add("exec", "run a command on each machine, with its node's environment", run_exec)
    render = add("render", "write files that start nodes, or stand before them", run_render)
    facts = add("probe", "print this machine's facts as JSON", run_probe)
    facts.set_defaults(json=True)
    for subparser in (up, down, status, new, remove, execute, render):
        subparser.add_argument(
            "-i",
            "--inventory",
            type=Path,
            default=Path(DEFAULT_INVENTORY),
            metavar="FILE",
            help=f"the machines ({DEFAULT_INVENTORY})",
        )
    for subparser in (up, down, status, new, remove, execute):
        subparser.add_argument("--json", action="store_true", help="print the result as JSON")
    for subparser in (up, down):
        subparser.add_argument("names", nargs="*", metavar="NAME", help="machines (all)")
    for subparser, default_s in ((down, 0.0), (remove, _REMOVE_DRAIN_S)):
        subparser.add_argument(
            "--drain",
            type=float,
            default=default_s,
            metavar="SECONDS",
            help=f"time for replicas to move to other machines first ({default_s:g})",
        )
    _add_machine_arguments(new)
    remove.add_argument("name", metavar="NAME", help="the machine")
    execute.add_argument("--on", action="append", default=[], metavar="NAME", help="machine (all)")
    execute.add_argument("words", nargs="+", metavar="COMMAND", help="after `--`: what to run")
    render.add_argument("kind", choices=RENDERED, help="what to write")
    render.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where")
    _add_node(commands)


def _add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="its host name or address for SSH")
    parser.add_argument("--name", help="its name (made from the address)")
    parser.add_argument("--user", help="user there")
    parser.add_argument("--port", type=port_number, help="port of its sshd")
    parser.add_argument("--key", help="private key file")
    parser.add_argument("--no-start", action="store_true", help="only write it down")


def _add_node(commands: Any) -> None:
    """Declare `node`, which other machines and units call; it is in no list of commands."""
    parser = commands.add_parser("node")
    parser.add_argument("action", choices=tuple(_NODE_ACTIONS))
    parser.add_argument("--spec", type=Path, metavar="FILE", help="the node (standard input)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="Ray's token")
    parser.add_argument("--drain", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--ray-arg", action="append", default=[], help="option of ray start")
    parser.add_argument("words", nargs="*", metavar="COMMAND")
    parser.set_defaults(run=run_node)


def run_up(options: argparse.Namespace) -> int:
    """Start; 1 where one machine did not."""
    return _report(options, bring_up.up(_load(options), options.names, _teller(options)))


def run_down(options: argparse.Namespace) -> int:
    """Stop; 1 where one machine did not."""
    inventory = _load(options)
    outcomes = bring_up.down(inventory, options.names, _teller(options), drain_s=options.drain)
    return _report(options, outcomes)


def run_status(options: argparse.Namespace) -> int:
    """Tell; 1 where one machine is not alive."""
    return _report(options, bring_up.status(_load(options), _teller(options)))


def run_add(options: argparse.Namespace) -> int:
    """Write the machine down, then start it."""
    given = {name: getattr(options, name) for name in ("name", "address", "user", "port", "key")}
    machine = {name: value for name, value in given.items() if value is not None}
    before = {other.name for other in _load(options).machines}
    inventory = inventory_edit.add_machine(options.inventory, machine)
    (name,) = (other.name for other in inventory.machines if other.name not in before)
    print(f"{name} is in {options.inventory}", file=sys.stderr)
    if options.no_start:
        return 0
    return _report(options, bring_up.up(inventory, [name], _teller(options)))


def run_remove(options: argparse.Namespace) -> int:
    """Drain, stop, forget. A machine that is gone is forgotten too, with exit code 1."""
    inventory = _load(options)
    (machine,) = inventory.select((options.name,))
    if machine.role == "head":
        raise ConfigError(f"{machine.name} is the head: give another machine its role first")
    outcomes = bring_up.down(inventory, [machine.name], _teller(options), drain_s=options.drain)
    inventory_edit.remove_machine(options.inventory, machine.name)
    print(f"{machine.name} is no longer in {options.inventory}", file=sys.stderr)
    return _report(options, outcomes)


def run_exec(options: argparse.Namespace) -> int:
    """Run the command everywhere at once; 1 where it failed on one machine."""
    inventory = _load(options)
    lock = threading.Lock()

    def execute(machine: Machine) -> Outcome:
        command = machine.command or inventory.cluster.command
        request = json.dumps({"spec": inventory.node_spec(machine).model_dump(mode="json")})
        words = [command, "cluster", "node", "exec", "--", *options.words]
        try:
            answer = run_on(inventory, machine, words, stdin=request)
        except ConfigError as error:
            return Outcome(machine.name, machine.role, False, "failed", error.message)
        with lock:
            _print_prefixed(machine.name, answer.stdout, sys.stdout, as_is=options.json)
            _print_prefixed(machine.name, answer.stderr, sys.stderr, as_is=options.json)
        ok = answer.status == 0
        facts = {"status": answer.status, "stdout": answer.stdout, "stderr": answer.stderr}
        word = "done" if ok else f"status {answer.status}"
        return Outcome(machine.name, machine.role, ok, word, facts=facts)

    def tell(outcome: Outcome) -> None:
        if not outcome.ok and not options.json:
            print(outcome.line(), file=sys.stderr, flush=True)

    return _report(options, bring_up.on_each(inventory, options.on, execute, tell))


def run_render(options: argparse.Namespace) -> int:
    """Write the files and name them."""
    from serve_app.cli.cluster.render import render

    for path in render(options.kind, _load(options), options.output):
        print(path)
    return 0


def run_probe(options: argparse.Namespace) -> int:
    """Print the facts."""
    print(json.dumps(probe.probe().as_dict(), indent=2))
    return 0


def run_node(options: argparse.Namespace) -> int:
    """Do what another machine, or a unit, asks of this one; the answer is JSON."""
    spec, token = _read_request(options.spec)
    spec = node.resolve(spec)
    if options.token_file is not None:
        token = _read_token(options.token_file)
    return _NODE_ACTIONS[options.action](spec, token, options)


def _read_request(path: Path | None) -> tuple[NodeSpec, str | None]:
    """Return the spec and the token: from a spec's file, else from standard input."""
    try:
        document = json.loads(sys.stdin.read() if path is None else path.read_text("utf-8"))
        values, token = (
            (document["spec"], document.get("token")) if path is None else (document, None)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path or 'standard input'}: no node's spec ({error})") from None
    return validate_section(NodeSpec, values, "spec"), token


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"--token-file: cannot read {path}", param="token_file") from None
    if not token:
        raise ConfigError(f"--token-file: {path} is empty", param="token_file")
    return token


def _run_in_foreground(spec: NodeSpec, token: str | None, options: argparse.Namespace) -> int:
    node.run(spec, token, options.ray_arg)


def _list_nodes(spec: NodeSpec, token: str | None, options: argparse.Namespace) -> int:
    # Of a head that hangs Ray would wait for ever, long after whoever asked has gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_NODES_TIMEOUT_S)
    return _answer(node.cluster_nodes(spec))


def _answer(value: Any) -> int:
    print(json.dumps(value))
    return 0


_NODE_ACTIONS: dict[str, Callable[[NodeSpec, str | None, argparse.Namespace], int]] = {
    "probe": lambda spec, _token, _options: _answer(node.facts(spec).as_dict()),
    "token": lambda spec, _token, _options: _answer({"token": node.read_or_make_token(spec)}),
    "start": lambda spec, token, options: _answer(node.start(spec, token, options.ray_arg)),
    "stop": lambda spec, _token, options: _answer(node.stop(spec, drain_s=options.drain)),
    "status": lambda spec, _token, _options: _answer(node.status(spec)),
    "nodes": _list_nodes,
    "drain": lambda spec, _token, options: _answer(node.drain(spec, options.drain)),
    "exec": lambda spec, _token, options: node.execute(spec, options.words),
    "run": _run_in_foreground,
}


def _load(options: argparse.Namespace) -> Inventory:
    return load_inventory(options.inventory)


def _teller(options: argparse.Namespace) -> Callable[[Outcome], None]:
    def tell(outcome: Outcome) -> None:
        if not options.json:
            print(outcome.line(), flush=True)

    return tell


def _report(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> int:
    if options.json:
        print(json.dumps([outcome.as_dict() for outcome in outcomes], indent=2))
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _print_prefixed(name: str, text: str, out: Any, *, as_is: bool) -> None:
    if not as_is:
        for line in text.splitlines():
            print(f"{name}: {line}", file=out, flush=True)
