"""The application that `serve run`, `serve deploy` and `xeray serve` start."""

# No `from __future__ import annotations` here: Serve finds the schema of `args` by the parameter's
# annotation, which must be the class itself.

import logging
from collections.abc import Mapping
from typing import Any, Self

from ray import serve

from serve_app.config.load import validate_args
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError
from serve_app.deployments.autoscaling import capped_to_cluster
from serve_app.deployments.ingress import Ingress
from serve_app.deployments.model_replica import ModelReplica
from serve_app.deployments.options import (
    ingress_options,
    model_deployments,
    model_replica_options,
    preprocessor_options,
)
from serve_app.deployments.preflight import check_cluster, fail_serve_run
from serve_app.deployments.preprocessor import Preprocessor

logger = logging.getLogger(__name__)


class ServeArgs(AppConfig):
    """The application's `args`: AppConfig, whose errors are one line with the nearest key."""

    @classmethod
    def model_validate(cls, obj: Any, **_kwargs: Any) -> Self:
        """Return the checked args. Raises ConfigError, after telling a waiting `serve run`."""
        try:
            config = obj if isinstance(obj, AppConfig) else validate_args(obj)
        except ConfigError as error:
            fail_serve_run(error.message, lambda args: args == obj)
            raise
        return cls.model_construct(**_sections(config))


def build_app(args: ServeArgs) -> serve.Application:
    """Compose Ingress → Preprocessor, ModelReplica from `args`; import path `serve_app:build_app`.

    Raises ConfigError, one line with the fix, where the cluster cannot run it.
    """
    config = AppConfig.model_construct(**_sections(args))
    try:
        check_cluster(config)
        return compose(config)
    except Exception as error:
        failure = _one_line(error)
        fail_serve_run(failure.message, lambda other: _is_same(other, config))
        raise failure from error


def compose(config: AppConfig) -> serve.Application:
    """Return the bound deployments, with the options that follow from `config`."""
    preprocessor = serve.deployment(**preprocessor_options(config))(Preprocessor)
    models = [
        serve.deployment(**model_replica_options(pool, name))(ModelReplica).bind(pool, config)
        for name, pool in model_deployments(capped_to_cluster(config)).items()
    ]
    ingress = serve.deployment(**ingress_options(config))(Ingress)
    return ingress.bind(config, preprocessor.bind(config), *models)


def _one_line(error: Exception) -> ConfigError:
    """Return `error` as one line for whoever waits; `serve run` would wait for ever otherwise."""
    if isinstance(error, ConfigError):
        return error
    logger.error("the application could not be built", exc_info=error)
    text = next(iter(str(error).splitlines()), "")
    return ConfigError(f"the application could not be built: {type(error).__name__}: {text}")


def _sections(config: AppConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in AppConfig.model_fields}


def _is_same(args: Mapping[str, Any], config: AppConfig) -> bool:
    try:
        return validate_args(args) == config
    except ConfigError:
        return False
