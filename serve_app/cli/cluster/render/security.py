"""Profiles for a node: AppArmor, SELinux, seccomp; what systemd guards is in its unit."""

from __future__ import annotations

from pathlib import PurePosixPath

from serve_app.cli.cluster.inventory import Inventory
from serve_app.cli.cluster.render import seccomp
from serve_app.cli.cluster.render.templates import MADE_BY, fill

SECCOMP_FILE = "xeray-seccomp.json"
_TEMPLATES = ("xeray.apparmor", "xeray.te", "xeray.fc")


def render(inventory: Inventory) -> dict[str, str]:
    """Return file name → text."""
    command = PurePosixPath(inventory.cluster.command)
    comment = MADE_BY.format(kind="security")
    files = {
        name: comment
        + fill(
            f"{name}.j2",
            command=str(command),
            prefix=str(command.parent.parent),  # of BIN/xeray: the virtual environment
            model_folders=inventory.security.model_folders,
        )
        for name in _TEMPLATES
    }
    return {**files, SECCOMP_FILE: seccomp.render()}
