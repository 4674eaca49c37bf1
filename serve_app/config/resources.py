"""Where the data that travels with XeRay is: beside the checkout, or inside the installed wheel."""

from __future__ import annotations

from pathlib import Path

import serve_app
from serve_app.core.errors import ConfigError

DEFAULT_CONFIG = "local.yaml"


def data_folder(name: str) -> Path:
    """Return the folder `configs` or `cluster`: the wheel's copy, else the checkout's."""
    package = Path(serve_app.__file__).resolve().parent
    packaged = package / "_data" / name
    return packaged if packaged.is_dir() else package.parent / name


def packaged_configs() -> list[str]:
    """Return the names of the configs that travel with XeRay, sorted."""
    return sorted(path.name for path in data_folder("configs").glob("*.yaml"))


def find_config(name: str | None) -> Path:
    """Return the config file for what the user named.

    A path that exists is taken as it is; else `arc`, `arc.yaml` and `configs/arc.yaml` name the one
    that travels with XeRay; None is the local one. Raises ConfigError where there is no such file.
    """
    path = None if name is None else Path(name).expanduser()
    if path is not None and path.exists() and not path.is_dir():
        return path
    wanted = Path(name or DEFAULT_CONFIG)
    if wanted.name and wanted.parent in (Path(), Path("configs")):
        packaged = data_folder("configs") / wanted.with_suffix(".yaml").name
        if packaged.is_file():  # also where a folder has its name, as `cluster` in a checkout
            return packaged
    if path is not None and path.is_dir():
        raise ConfigError(f"config: {name} is a folder; name a YAML file", param="config")
    raise ConfigError(
        f"config: {name or DEFAULT_CONFIG} does not exist; name a YAML file, or one that travels"
        f" with XeRay: {', '.join(packaged_configs()) or 'none is installed'}",
        param="config",
    )
