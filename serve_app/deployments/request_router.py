"""Serve's part of routing: hands a request to the replica that the ingress chose for it.

Two ways were open in Ray 2.60's public API. A RequestRouter that scores by itself sees one
deployment only, so it cannot rank pools, and it learns of replicas through the controller, at most
every few seconds. So the ingress chooses (deployments.routing, deployments.pools), over all pools
and with its own requests in flight counted at once, and this small class carries the choice out:
`choose_replicas` puts the wanted replica first, Serve's own queue limits still hold, and a replica
that is gone or full is replaced by the shorter of two random queues, as Serve does by default.
"""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve_app.core.requests import GenerateRequest


class TargetedRequestRouter(RequestRouter):
    """Ranks a request's `target_replica` first, then two random others."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the ranks to try, best first; called again after a pause while all are full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        target = _target_of(pending_request)
        wanted = [r for r in candidate_replicas if r.replica_id.unique_id == target]
        others = [r for r in candidate_replicas if r.replica_id.unique_id != target]
        return [wanted, random.sample(others, min(2, len(others)))]


def _target_of(pending_request: PendingRequest | None) -> str | None:
    for argument in pending_request.args if pending_request is not None else ():
        if isinstance(argument, GenerateRequest):
            return argument.target_replica
    return None
