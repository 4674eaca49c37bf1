"""The model replicas of all pools as one: their handles, their load, the choice among them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app.config.schema import AppConfig
from serve_app.core.requests import GenerateChunk, GenerateRequest, ReplicaHealth, ReplicaLoad
from serve_app.deployments.handles import call_all
from serve_app.deployments.precision import PrecisionPolicy
from serve_app.deployments.ray_private import with_own_request_id
from serve_app.deployments.relay_wire import Chain
from serve_app.deployments.routing import ReplicaRouter, Ticket


@dataclass(frozen=True, slots=True)
class Pool:
    """One deployment of model replicas; `can_sleep`: it may have no replica and start on demand."""

    name: str
    handle: DeploymentHandle
    can_sleep: bool = False


@dataclass(frozen=True, slots=True)
class RoutedCall:
    """A call that is on its way: its stream, and its place at the router (None without one).

    replica_id: where it was sent.
    """

    stream: DeploymentResponseGenerator
    ticket: Ticket | None
    replica_id: str | None = None

    def moved(self) -> asyncio.Future[None] | None:
        """Return what is done once the place is at another replica; None where there is no place.

        The stream is then to be cancelled, and the request sent after its place.
        """
        if self.ticket is None:
            return None
        future = asyncio.get_running_loop().create_future()
        self.ticket.on_moved = partial(_resolve, future)
        return future

    def note_first_chunk(self, chunk: GenerateChunk) -> None:
        """Tell the router that the prompt is computed, and how the replica now is."""
        if self.ticket is not None:
            if self.replica_id is not None:
                self.ticket.return_to(self.replica_id)
            self.ticket.note_first_token(chunk.load)

    def close(self) -> None:
        """Give its place back; more calls do nothing."""
        if self.ticket is not None:
            self.ticket.close()


@dataclass(slots=True)
class ModelPools:
    """The ranked pools of one model, best first. Without a router, Serve chooses in the first.

    With `precision` the pools are widths of the model, and one of them is chosen for each request.
    """

    pools: Sequence[Pool]
    router: ReplicaRouter | None = None
    precision: PrecisionPolicy | None = None

    @classmethod
    def single(cls, handle: DeploymentHandle) -> ModelPools:
        """Return one pool whose replicas Serve chooses itself."""
        return cls((Pool("default", handle),))

    @property
    def first(self) -> DeploymentHandle:
        """The best pool's handle."""
        return self.pools[0].handle

    @property
    def can_sleep(self) -> bool:
        """Whether a request may have to wake a replica up."""
        return any(pool.can_sleep for pool in self.pools)

    @property
    def handles(self) -> list[DeploymentHandle]:
        """The handles of all pools."""
        return [pool.handle for pool in self.pools]

    async def ask(self, timeout_s: float) -> list[ReplicaHealth]:
        """Return the health of every replica that answers; the router learns of it."""
        asked_s = time.monotonic()
        answers: list[list[Any]] = await asyncio.gather(
            *(call_all(pool.handle, "health", timeout_s) for pool in self.pools)
        )
        ranked = [(rank, health) for rank, group in enumerate(answers) for health in group]
        if self.router is not None:
            self.router.update(ranked, asked_s)
        if self.precision is not None:
            self.precision.update(ranked)
        return [health for _, health in ranked]

    def hear(self, replica_id: str, load: ReplicaLoad, chains: Sequence[Chain]) -> None:
        """Take over a replica's own news: its load, and prompts that others sent to it."""
        if self.router is not None:
            self.router.hear(replica_id, load, chains)

    def info_handle(self) -> DeploymentHandle:
        """Return a handle whose deployment has a replica, else the one that a call would wake."""
        if self.router is not None:
            ranks = [self.router.rank_of(i) for i in self.router.replica_ids]
            known = [rank for rank in ranks if rank is not None]
            if known:
                return self.pools[min(known)].handle
        return self._to_wake().handle

    def start(self, request: GenerateRequest, exclude: Collection[str] = ()) -> RoutedCall:
        """Send a request to the replica with the best expected start."""
        ticket = None
        if self.router is not None:
            exclude = self._without_other_widths(request, exclude)
            ticket = self.router.choose(
                request.request_id,
                request.prompt_token_ids,
                request.sampling.cache_salt,
                exclude,
            )
        if ticket is None:
            return RoutedCall(_send(self._to_wake().handle, request), None)
        return self.send(request, ticket)

    def send(self, request: GenerateRequest, ticket: Ticket) -> RoutedCall:
        """Send a request to where its place is: the first time, or after the place has moved."""
        assert self.router is not None
        pool = self.pools[self.router.rank_of(ticket.replica_id) or 0]
        sent = replace(
            request,
            target_replica=ticket.replica_id,
            num_expected_hit_tokens=ticket.num_hit_tokens,
        )
        return RoutedCall(_send(pool.handle, sent), ticket, ticket.replica_id)

    def _without_other_widths(
        self, request: GenerateRequest, exclude: Collection[str]
    ) -> Collection[str]:
        """Return `exclude` and the replicas of other widths; they stay where no other is left."""
        if self.precision is None or self.router is None:
            return exclude
        wanted = self.precision.choose_rank(len(request.prompt_token_ids))
        ranks = {i: self.router.rank_of(i) for i in self.router.replica_ids}
        others = {i for i, rank in ranks.items() if rank != wanted}
        return {*exclude, *others} if ranks.keys() - others - {*exclude} else exclude

    def _to_wake(self) -> Pool:
        return next((pool for pool in self.pools if pool.can_sleep), self.pools[0])


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _send(handle: DeploymentHandle, request: GenerateRequest) -> Any:
    generate = handle.options(stream=True).generate
    return with_own_request_id(lambda: generate.remote(request))


def model_pools(
    config: AppConfig,
    handles: Sequence[DeploymentHandle],
    registry: CollectorRegistry | None = None,
) -> ModelPools:
    """Return the pools of `config` over their handles, in the same order.

    `registry` gets the metrics of dynamic precision, where that is on.
    """
    names = [pool.name for pool in config.pools] or ["default"]
    configs = config.pool_configs()
    pools = tuple(
        Pool(name, handle, can_sleep=_can_sleep(pool_config))
        for name, handle, pool_config in zip(names, handles, configs, strict=True)
    )
    routing = config.routing
    if routing.policy == "power_of_two":
        return ModelPools(pools)
    router = ReplicaRouter(
        prefix_affinity=routing.prefix_affinity, is_bound_to_rank=config.precision.is_on
    )
    if not config.precision.is_on:
        return ModelPools(pools, router)
    return ModelPools(pools, router, PrecisionPolicy(names, config.precision, registry=registry))


def _can_sleep(config: AppConfig) -> bool:
    autoscaling = config.model_replica.autoscaling
    return autoscaling is not None and autoscaling.min_replicas == 0
