"""`xeray config`: check a file, print the schema, the merged settings, the environment."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from serve_app.config.resources import find_config, packaged_configs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `xeray config validate | schema | show | list | env`."""
    actions = parser.add_subparsers(metavar="ACTION", title="actions", required=True)

    validate = actions.add_parser("validate", help="check a config file; exit 1 with the fix")
    validate.add_argument("file", help="config file, or the name of one that travels with XeRay")
    validate.add_argument("--json", action="store_true", help="print the result as JSON")
    validate.set_defaults(run=run_validate)

    schema = actions.add_parser("schema", help="print the JSON Schema of the application's args")
    schema.set_defaults(run=run_schema)

    show = actions.add_parser("show", help="print a config's args with the defaults filled in")
    show.add_argument("file", nargs="?", help="config file (default: the local one)")
    show.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one of the args first; may be repeated",
    )
    show.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    show.set_defaults(run=run_show)

    configs = actions.add_parser("list", help="list the configs that travel with XeRay")
    configs.add_argument("--json", action="store_true", help="print JSON instead of a table")
    configs.set_defaults(run=run_list)

    environment = actions.add_parser("env", help="list the environment variables that XeRay reads")
    environment.add_argument("--json", action="store_true", help="print JSON instead of a table")
    environment.set_defaults(run=run_env)


def run_validate(options: argparse.Namespace) -> int:
    """Check a file; 0 and one line when it is right, else ConfigError."""
    from serve_app.config.load import load_serve_file

    path = find_config(options.file)
    loaded = load_serve_file(path)
    if options.json:
        print(json.dumps({"file": str(path), "valid": True, "application": loaded.app_name}))
    else:
        print(f"{path}: valid; application {loaded.app_name} on {loaded.host}:{loaded.port}")
    return 0


def run_schema(_options: argparse.Namespace) -> int:
    """Print the schema of the application's `args`, descriptions included."""
    from serve_app.config.schema import AppConfig

    print(json.dumps(AppConfig.model_json_schema(), indent=2))
    return 0


def run_show(options: argparse.Namespace) -> int:
    """Print the `args` that hold: the file's, the overrides, and the defaults for the rest."""
    from serve_app.config.load import load_serve_file

    args: dict[str, Any] = load_serve_file(
        find_config(options.file), options.overrides
    ).app.model_dump(mode="json")
    print(
        json.dumps(args, indent=2) if options.json else yaml.safe_dump(args, sort_keys=False),
        end="",
    )
    if options.json:
        print()
    return 0


def run_list(options: argparse.Namespace) -> int:
    """Print each packaged config and for whom it is."""
    rows = [{"name": name, "for": _for_whom(find_config(name))} for name in packaged_configs()]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(f"{row['name']:<24} {row['for']}".rstrip())
    return 0


def run_env(options: argparse.Namespace) -> int:
    """Print each variable with its value or default, and what it does."""
    from serve_app.config.env import TABLE

    rows = [
        {
            "name": variable.name,
            "value": os.environ.get(variable.name),
            "default": variable.default,
            "description": variable.description,
        }
        for variable in TABLE
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        held = f"= {row['value']}" if row["value"] is not None else f"default: {row['default']}"
        print(f"{row['name']}  ({held})\n    {row['description']}")
    return 0


def _for_whom(path: Path) -> str:
    """Return the head comment's first clause: for whom the config is."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words += line.lstrip("#").split()
    return re.split(r"[.:;]( |$)", " ".join(words), maxsplit=1)[0]
