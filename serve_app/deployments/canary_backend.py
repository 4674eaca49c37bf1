"""The backend of a new version that runs as a second application, for as long as it is needed."""

from __future__ import annotations

import asyncio

from ray import serve
from ray.serve.exceptions import RayServeException

from serve_app.config.sections_canary import CanarySection
from serve_app.core.errors import ConfigError
from serve_app.deployments.canary import SplitBackend
from serve_app.deployments.options import PREPROCESSOR
from serve_app.deployments.pools import ModelPools, Pool
from serve_app.deployments.ray_backend import RayBackend
from serve_app.deployments.routing import ReplicaRouter

_POLL_S = 0.5


def canary_backend(section: CanarySection) -> RayBackend:
    """Return a backend over the deployments of another application, not started yet.

    Raises ConfigError where they do not exist (yet, or any more).
    """
    try:
        *handles, preprocessor = [
            serve.get_deployment_handle(name, section.application)
            for name in (*section.deployments, PREPROCESSOR)
        ]
    except (KeyError, RayServeException):
        raise ConfigError(f"canary.application: {section.application} does not run") from None
    pools = tuple(
        Pool(name, handle) for name, handle in zip(section.deployments, handles, strict=True)
    )
    return RayBackend(preprocessor, ModelPools(pools, ReplicaRouter()))


async def retire(split: SplitBackend, backend: RayBackend) -> None:
    """Stop a backend once none of its sequences runs here any more."""
    await asyncio.sleep(_POLL_S)  # what is between its prompt and its first token
    while split.num_open(backend):
        await asyncio.sleep(_POLL_S)
    await backend.stop()
