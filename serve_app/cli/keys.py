"""`xeray keys`: make an API key, and check a key file."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from serve_app.api.keys import MAX_KEY_NAME_CHARS, KeyEntry, read_keys
from serve_app.core.errors import ConfigError

_PREFIX = "xr-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xeray keys`."""
    commands = parser.add_subparsers(dest="keys_command", metavar="COMMAND", required=True)
    new = commands.add_parser("new", help="make a key, and the entry for the file")
    new.add_argument("name", help="who will hold it")
    new.add_argument(
        "--scope",
        action="append",
        choices=("inference", "admin", "metrics"),
        help="what it may do; may be repeated (inference)",
    )
    new.add_argument("--file", type=Path, help="key file to append the entry to (made if absent)")
    new.add_argument("--json", action="store_true", help="print key and entry as JSON")
    new.set_defaults(run=run_new)
    check = commands.add_parser("check", help="check a key file")
    check.add_argument("file", type=Path, help="the key file")
    check.add_argument("--json", action="store_true", help="print the entries as JSON, no hashes")
    check.set_defaults(run=run_check)


def run_new(options: argparse.Namespace) -> int:
    """Print a fresh key once; only its SHA-256 is kept."""
    if not 1 <= len(options.name) <= MAX_KEY_NAME_CHARS:
        raise ConfigError(f"name: expected 1 to {MAX_KEY_NAME_CHARS} characters", param="name")
    key = _PREFIX + secrets.token_urlsafe(32)
    entry = KeyEntry(
        name=options.name,
        sha256=hashlib.sha256(key.encode()).hexdigest(),
        scopes=tuple(options.scope or ("inference",)),
    )
    row = entry.model_dump(mode="json", exclude_unset=True)
    if options.file is not None:
        _append(options.file, row)
    if options.json:
        print(json.dumps({"key": key, "entry": row, "file": _text(options.file)}, indent=2))
    elif options.file is None:
        print(f"key: {key}\nentry for auth.keys_file:")
        print(yaml.safe_dump([row], sort_keys=False), end="")
    else:
        print(f"key: {key}\nadded to {options.file}; it will not be shown again")
    return 0


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _append(path: Path, row: dict[str, object]) -> None:
    """Add an entry in one move; what the file says besides, its owner and its mode stay."""
    path = path.resolve()
    before = path.read_text(encoding="utf-8") if path.exists() else "keys:\n"
    entries = read_keys(path) if path.exists() else ()
    if any(entry.name == row["name"] for entry in entries):
        raise ConfigError(f"{path}: there is a key named {row['name']} already", param="name")
    rows = [entry.model_dump(mode="json", exclude_unset=True) for entry in entries]
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
        ) as draft:
            draft.write(_with_row(before, rows, row))
        _take_place(Path(draft.name), path)
    except OSError as error:
        raise ConfigError(f"--file: {path} cannot be written ({error.strerror})") from error


def _with_row(text: str, rows: list[dict[str, Any]], row: dict[str, object]) -> str:
    """Return the file's text with `row` at its end; written anew where that is no key file."""
    indents = re.findall(r"^( *)- ", text, re.MULTILINE)
    item = indent(yaml.safe_dump([row], sort_keys=False), indents[-1] if indents else "")
    longer = f"{text.rstrip()}\n{item}"
    wanted = {"keys": [*rows, row]}
    try:
        if yaml.safe_load(longer) == wanted:
            return longer
    except yaml.YAMLError:
        pass  # written in a line, or with something behind the list
    return yaml.safe_dump(wanted, sort_keys=False)


def _take_place(draft: Path, path: Path) -> None:
    """Put `draft` where `path` is, readable by whoever could read that; else by its owner alone."""
    try:
        if path.exists():
            state = path.stat()
            os.chown(draft, state.st_uid, state.st_gid)
            draft.chmod(stat.S_IMODE(state.st_mode))
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def run_check(options: argparse.Namespace) -> int:
    """List the keys of a file; ConfigError where it has an error."""
    entries = read_keys(options.file)
    if options.json:
        rows = [entry.model_dump(mode="json", exclude={"sha256"}) for entry in entries]
        print(json.dumps(rows, indent=2))
        return 0
    for entry in entries:
        limits = {
            "requests/min": entry.requests_per_minute,
            "tokens/min": entry.tokens_per_minute,
            "at a time": entry.max_concurrent_requests,
        }
        listed = ", ".join(f"{limit} {name}" for name, limit in limits.items() if limit)
        models = ", ".join(entry.models)
        print(f"{entry.name}: {', '.join(entry.scopes)}; models {models}; {listed or 'no limits'}")
    return 0
