"""What a model replica tells every ingress at once: its load, and the prompts that others sent.

An ingress knows what it has sent itself. What the other ingress replicas send it would learn from
the poll alone, a second late: two of them then choose the same idle replica, and neither finds the
prefixes that the other has brought into a cache. So a replica that several have a relay to pushes
its news over it: the first at once, what follows gathered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from serve_app.core.requests import GenerateRequest, ReplicaLoad
from serve_app.deployments.prefix_table import prefix_chain
from serve_app.deployments.relay_sender import RelayLink
from serve_app.deployments.relay_wire import Chain, pack_load
from serve_app.engine.wire import pack_frame

GATHER_S = 0.02
"""At most fifty frames a second go to each ingress, however many requests come and go."""
_MAX_CHAINS = 256
"""Prompts told of in one frame: older ones are left out, which costs a prefix hit at most."""


class LoadNews:
    """Pushes one replica's news. All calls come from one event loop.

    links: returns the open links, one per ingress. load: returns the load now.
    """

    def __init__(
        self,
        replica_id: str,
        links: Callable[[], Sequence[RelayLink]],
        load: Callable[[], ReplicaLoad],
    ) -> None:
        self._replica_id = replica_id
        self._links = links
        self._load = load
        self._arrived: list[tuple[RelayLink | None, Chain]] = []
        self._timer: asyncio.Handle | None = None
        self._last_flush_s = 0.0

    def arrived(self, request: GenerateRequest, origin: RelayLink | None) -> None:
        """Tell of a request's prompt, to all but the ingress that sent it, and of the load."""
        if len(self._links()) < 2:
            return
        chain = prefix_chain(request.prompt_token_ids, request.sampling.cache_salt)
        if chain:
            self._arrived = [*self._arrived[1 - _MAX_CHAINS :], (origin, chain)]
        self.changed()

    def changed(self) -> None:
        """Tell of the load, which has just changed."""
        if self._timer is None and len(self._links()) > 1:
            loop = asyncio.get_running_loop()
            due_s = self._last_flush_s + GATHER_S
            self._timer = loop.call_at(max(due_s, loop.time()), self._flush)

    def close(self) -> None:
        """Tell nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        self._timer = None
        self._last_flush_s = asyncio.get_running_loop().time()
        arrived, self._arrived = self._arrived, []
        load = pack_load(self._load())
        for link in self._links():
            chains = [chain for origin, chain in arrived if origin is not link]
            link.send(pack_frame("load", self._replica_id, load, chains))
