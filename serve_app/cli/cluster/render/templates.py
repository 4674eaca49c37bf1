"""The templates that travel in `cluster/templates`, and YAML as people read it."""

from __future__ import annotations

from typing import Any

import jinja2
import yaml

from serve_app.config.resources import data_folder

MADE_BY = "# Made by `xeray cluster render {kind}`; change the inventory, not this file.\n"


def fill(name: str, **values: Any) -> str:
    """Return the template `name` with `values` put in; a value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_folder("cluster") / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # units and Dockerfiles, no HTML
    )
    return environment.get_template(name).render(**values)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and lists indented below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _write_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)


def to_yaml(*documents: Any) -> str:
    """Return the documents as YAML, keys in the order given."""
    return yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=100, explicit_start=len(documents) > 1
    )
