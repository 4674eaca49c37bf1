"""Adding and removing a machine in the inventory's text, comments and order left as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from serve_app.cli.cluster.inventory import Inventory, parse_inventory, read_text
from serve_app.core.errors import ConfigError


def add_machine(path: Path, machine: Mapping[str, Any]) -> Inventory:
    """Append a machine to the file and return the new inventory.

    Raises ConfigError, the file untouched, where the result would be no inventory.
    """
    text = read_text(path)
    parse_inventory(text, str(path))
    sequence = _machines(text, path)
    last = sequence.value[-1]
    entry = yaml.safe_dump([dict(machine)], sort_keys=False, default_flow_style=None, width=1000)
    indent = " " * _dash_column(text, last)
    lines = text.splitlines(keepends=True)
    at = _last_line(last) + 1
    if lines and not lines[at - 1].endswith("\n"):
        lines[at - 1] += "\n"
    lines[at:at] = [indent + line for line in entry.splitlines(keepends=True)]
    return _replace(path, "".join(lines))


def remove_machine(path: Path, name: str) -> Inventory:
    """Cut a machine out of the file and return the new inventory. Raises ConfigError."""
    text = read_text(path)
    inventory = parse_inventory(text, str(path))
    (machine,) = inventory.select((name,))
    if machine.role == "head":
        raise ConfigError(f"{name} is the head: give another machine its role first")
    index = [other.name for other in inventory.machines].index(machine.name)
    node = _machines(text, path).value[index]
    lines = text.splitlines(keepends=True)
    del lines[node.start_mark.line : _last_line(node) + 1]
    return _replace(path, "".join(lines))


def _machines(text: str, path: Path) -> yaml.SequenceNode:
    """Return the list of machines, with its place in the text. Raises ConfigError if inline."""
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(document, yaml.MappingNode)  # it was parsed as an inventory before
    for key, value in document.value:
        if key.value == "machines" and isinstance(value, yaml.SequenceNode):
            if value.flow_style:
                raise ConfigError(f"{path}: write machines: as a list of lines to have it changed")
            return value
    raise ConfigError(f"{path}: no list `machines:`")


def _dash_column(text: str, node: yaml.Node) -> int:
    line = text.splitlines()[node.start_mark.line]
    return len(line) - len(line.lstrip())


def _last_line(node: yaml.Node) -> int:
    """Return the last line of a list's item: comments and empty lines after it are not its own."""
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    end = node.end_mark
    is_block = not end.column and end.line > node.start_mark.line  # a text of several lines
    return end.line - 1 if is_block else end.line


def _replace(path: Path, text: str) -> Inventory:
    inventory = parse_inventory(text, str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(path.stat().st_mode & 0o777)
    temporary.replace(path)
    return inventory
