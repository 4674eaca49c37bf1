"""Commands on other machines through the system's OpenSSH: it never asks, nor waits for ever."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.cli.cluster.inventory import Inventory, Machine
from serve_app.core.errors import ConfigError

SSH_FAILED = 255
NOT_FOUND = (126, 127)
_ANSWER_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command on another machine printed, and its exit status."""

    status: int
    stdout: str
    stderr: str


class HostError(ConfigError):
    """A machine could not be reached, or what was asked of it failed there."""


def ssh_command(inventory: Inventory, machine: Machine, command: Sequence[str]) -> list[str]:
    """Return the argument list that runs `command` on `machine`."""
    ssh = inventory.ssh
    user, port, key = machine.user or ssh.user, machine.port or ssh.port, machine.key or ssh.key
    arguments = ["ssh", "-T", "-o", "BatchMode=yes"]
    arguments += ["-o", f"ConnectTimeout={ssh.connect_timeout_s}"]
    # A machine that is switched off meanwhile is noticed within half a minute.
    arguments += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
    for option in ssh.options:
        arguments += ["-o", option]
    if key is not None:
        arguments += ["-i", str(Path(key).expanduser()), "-o", "IdentitiesOnly=yes"]
    if port is not None:
        arguments += ["-p", str(port)]
    if user is not None:
        arguments += ["-l", user]
    return [*arguments, "--", machine.address, shlex.join(command)]


def run_on(
    inventory: Inventory,
    machine: Machine,
    command: Sequence[str],
    *,
    stdin: str = "",
    timeout_s: float | None = None,
) -> Answer:
    """Run `command` on `machine` and return what it said.

    Raises HostError where the machine cannot be reached or does not answer within `timeout_s`.
    """
    try:
        done = subprocess.run(
            ssh_command(inventory, machine, command),
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise HostError("no ssh on this machine: install openssh-client") from None
    except subprocess.TimeoutExpired:
        raise HostError(f"no answer within {timeout_s:.0f} s") from None
    if done.returncode == SSH_FAILED:
        raise HostError(_explain(done.stderr, inventory, machine))
    return Answer(done.returncode, done.stdout, done.stderr)


def ask_node(
    inventory: Inventory, machine: Machine, action: str, *options: str, token: str | None = None
) -> Any:
    """Run `xeray cluster node ACTION` on `machine` and return the JSON that it answers.

    The node's spec and the token travel on standard input, where no list of processes shows them.
    """
    spec = inventory.node_spec(machine)
    command = machine.command or inventory.cluster.command
    request = {"spec": spec.model_dump(mode="json"), "token": token}
    answer = run_on(
        inventory,
        machine,
        [command, "cluster", "node", action, *options],
        stdin=json.dumps(request),
        timeout_s=inventory.ssh.connect_timeout_s + spec.start_timeout_s + _ANSWER_GRACE_S,
    )
    if answer.status in NOT_FOUND:
        raise HostError(
            f"no XeRay at {command}: install it there, or set cluster.command in the inventory"
        )
    if answer.status != 0:
        said = (answer.stderr.strip() or answer.stdout.strip() or "nothing").splitlines()[-1]
        raise HostError(said.removeprefix("xeray: "))
    try:
        return json.loads(answer.stdout)
    except ValueError:
        first = answer.stdout.strip()[:200] or "nothing"
        raise HostError(
            f"expected JSON from {command}, got {first!r}; does a start-up file of the shell print?"
        ) from None


def _explain(stderr: str, inventory: Inventory, machine: Machine) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reason = (lines or ["ssh failed"])[-1]
    port = machine.port or inventory.ssh.port
    where = f"-p {port} {machine.address}" if port else machine.address
    if "Host key verification failed" in reason:
        return (
            f"its host key is not known: compare it and take it with"
            f" `ssh-keyscan {where} >> ~/.ssh/known_hosts`"
        )
    if "Permission denied" in reason:
        return f"{reason} (no password is ever asked: install a key there with ssh-copy-id)"
    return reason
