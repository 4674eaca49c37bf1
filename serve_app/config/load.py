"""Loading the one YAML: the whole Serve config file is checked before anything starts.

Ray Serve ignores misspelt keys at every level of its file. Here each unknown key is an error that
names the nearest known one. `${NAME}` and `${NAME:-default}` in string values are replaced from the
environment; `section.key=value` overrides change the application's `args`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serve_app.config.schema import AppConfig, ModelReplicaUserConfig, PreprocessorUserConfig
from serve_app.config.sections_canary import IngressUserConfig
from serve_app.core.errors import ConfigError

IMPORT_PATH = "serve_app:build_app"
"""`import_path` of our application in a Serve config file."""

USER_CONFIGS: dict[str, type[BaseModel]] = {
    "Ingress": IngressUserConfig,
    "ModelReplica": ModelReplicaUserConfig,
    "Preprocessor": PreprocessorUserConfig,
}
"""Deployment name → schema of its `user_config`."""

POOL_PREFIX = "ModelReplica-"
"""Deployment names of the pools after the first begin with this; their pool's name follows."""


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Ray Serve 2.60's own keys; a test compares them with the installed Ray.
SERVE_KEYS: dict[str, frozenset[str]] = {
    "file": _keys(
        "proxy_location http_options grpc_options controller_options logging_config tracing_config"
        " applications target_capacity"
    ),
    "http_options": _keys(
        "host port root_path request_timeout_s keep_alive_timeout_s ssl_keyfile ssl_certfile"
        " ssl_keyfile_password ssl_ca_certs"
    ),
    "application": _keys(
        "name route_prefix import_path runtime_env args deployments logging_config host port"
        " autoscaling_policy external_scaler_enabled"
    ),
    "deployment": _keys(
        "name num_replicas max_ongoing_requests max_queued_requests backpressure_config user_config"
        " autoscaling_config graceful_shutdown_wait_loop_s graceful_shutdown_timeout_s"
        " health_check_period_s health_check_timeout_s ray_actor_options placement_group_bundles"
        " placement_group_strategy placement_group_bundle_label_selector"
        " max_replicas_per_node logging_config"
        " request_router_config gang_scheduling_config deployment_actors rolling_update_percentage"
        " max_surge_percent"
    ),
}

_MODEL_SUFFIXES = frozenset({".gguf", ".safetensors"})
_ENV_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_SectionT = TypeVar("_SectionT", bound=BaseModel)


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML readers drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A checked Serve config file. `document` is what to hand to Ray Serve, references replaced."""

    path: Path
    document: dict[str, Any]
    app: AppConfig
    app_name: str
    route_prefix: str
    host: str
    port: int
    proxy_location: str


def load_serve_file(
    path: str | Path, overrides: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> ServeFile:
    """Read and check a Serve config file that holds one XeRay application.

    `overrides` are `section.key=value` with YAML values. Raises ConfigError, one line with the fix.
    """
    path = Path(path)
    document = _read_yaml(path)
    document = expand_env(document, env)
    _check_serve_keys(document)
    application = _the_application(document, path)
    args = application.get("args") or {}
    if not isinstance(args, dict):
        raise ConfigError(f"applications[0].args: expected a mapping, got {type(args).__name__}")
    application["args"] = apply_overrides(args, overrides)
    app = validate_args(application["args"])
    http_options = document.get("http_options") or {}
    return ServeFile(
        path=path,
        document=document,
        app=app,
        app_name=str(application.get("name") or "default"),
        route_prefix=str(application.get("route_prefix", "/")),
        host=str(http_options.get("host", "0.0.0.0")),
        port=_port(http_options.get("port", 8000)),
        proxy_location=str(document.get("proxy_location", "EveryNode")),
    )


def validate_args(args: Mapping[str, Any]) -> AppConfig:
    """Return the application's `args` as their schema; ConfigError names each bad key and value."""
    return validate_section(AppConfig, expand_env(dict(args)), where="args")


def validate_section(schema: type[_SectionT], values: Any, where: str) -> _SectionT:
    """Return `values` as `schema`; ConfigError (one line) names what is wrong under `where`."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = [_describe(schema, item, where) for item in error.errors()]
        shown = "; ".join(problems[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ConfigError(shown + more, param=where) from None


def apply_overrides(args: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `args` with each `section.key=value` set; values are read as YAML."""
    result: dict[str, Any] = _deep_copy(dict(args))
    for override in overrides:
        dotted, separator, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not separator or not all(keys):
            raise ConfigError(f"override {override!r}: expected section.key=value")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            value = text
        node = result
        for key in keys[:-1]:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override {override!r}: {key} is not a section")
            node = child
        node[keys[-1]] = value
    return result


def expand_env(value: Any, env: Mapping[str, str] | None = None) -> Any:
    """Return `value` with `${NAME}` and `${NAME:-default}` replaced in every string, at any depth.

    A string that is one reference becomes what YAML reads from the variable: numbers stay numbers.
    """
    variables = os.environ if env is None else env
    if isinstance(value, dict):
        return {key: expand_env(item, variables) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [expand_env(item, variables) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    text = _ENV_REFERENCE.sub(lambda match: _variable(match, variables), value)
    return yaml.safe_load(text) if _ENV_REFERENCE.fullmatch(value) else text


def nearest(key: str, known: Collection[str]) -> str:
    """Return a hint: the known key nearest to `key`, or all of them where none is near."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known))}"


def _variable(match: re.Match[str], variables: Mapping[str, str]) -> str:
    name, default = match.group(1), match.group(2)
    value = variables.get(name)
    if value is None or (value == "" and default is not None):
        value = default
    if value is None:
        raise ConfigError(f"${{{name}}}: the environment variable {name} is not set", param=name)
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    try:
        document = yaml.load(content, _UniqueKeysLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        if path.suffix in _MODEL_SUFFIXES:
            problem = "a model, where a config is asked for; it goes with --model, or as model.path"
        raise ConfigError(f"{path}{where}: {problem}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a Serve config file with `applications:`")
    return document


def _check_serve_keys(document: dict[str, Any]) -> None:
    _check_keys(document, "file", "")
    _check_keys(document.get("http_options") or {}, "http_options", "http_options.")
    applications = document.get("applications") or []
    if not isinstance(applications, list):
        raise ConfigError("applications: expected a list")
    for index, application in enumerate(applications):
        where = f"applications[{index}]."
        _check_keys(application, "application", where)
        if application.get("import_path") != IMPORT_PATH:
            continue
        for position, deployment in enumerate(application.get("deployments") or []):
            _check_deployment(deployment, f"{where}deployments[{position}].")


def _check_deployment(deployment: Any, where: str) -> None:
    _check_keys(deployment, "deployment", where)
    name = deployment.get("name")
    is_pool = isinstance(name, str) and name.startswith(POOL_PREFIX)
    if name not in USER_CONFIGS and not is_pool:
        raise ConfigError(f"{where}name: unknown {name!r}; {nearest(str(name), USER_CONFIGS)}")
    user_config = deployment.get("user_config")
    if user_config is None:
        return
    schema = USER_CONFIGS["ModelReplica" if is_pool else name]
    validate_section(schema, user_config, f"{where}user_config")


def _check_keys(mapping: Any, level: str, where: str) -> None:
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where.rstrip('.') or 'file'}: expected a mapping")
    for key in mapping:
        if key not in SERVE_KEYS[level]:
            raise ConfigError(f"{where}{key}: unknown key; {nearest(str(key), SERVE_KEYS[level])}")


def _the_application(document: dict[str, Any], path: Path) -> dict[str, Any]:
    ours: list[dict[str, Any]] = [
        application
        for application in document.get("applications") or []
        if application.get("import_path") == IMPORT_PATH
    ]
    if len(ours) != 1:
        raise ConfigError(
            f"{path}: expected one application with import_path {IMPORT_PATH}, found {len(ours)}"
        )
    return ours[0]


def _port(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
        raise ConfigError(f"http_options.port: expected a port from 1 to 65535, got {value!r}")
    return value


def _describe(schema: type[BaseModel], item: ErrorDetails, where: str) -> str:
    path = ".".join([where, *(str(part) for part in item["loc"])])
    if item["type"] == "extra_forbidden":
        known = _fields_at(schema, item["loc"][:-1])
        return f"{path}: unknown key; {nearest(str(item['loc'][-1]), known)}"
    message = item["msg"].removeprefix("Value error, ")
    given = item["input"]
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    return f"{path}: {message[:1].lower()}{message[1:]}{shown}"


def _fields_at(schema: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Return the keys that the section at `loc` knows."""
    current = schema
    for part in loc:
        if isinstance(part, int):  # a place in a list of sections
            continue
        field = current.model_fields.get(str(part))
        candidates = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        current = inner[0]
    return list(current.model_fields)


def _deep_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _deep_copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_deep_copy(item) for item in value]
    return value
