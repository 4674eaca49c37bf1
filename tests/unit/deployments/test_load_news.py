"""What a replica pushes to the ingress replicas, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from serve_app.core.requests import GenerateRequest, ReplicaLoad
from serve_app.core.sampling import SamplingParams
from serve_app.deployments.load_news import LoadNews
from serve_app.deployments.prefix_table import prefix_chain
from serve_app.deployments.relay_receiver import RelayReceiver
from serve_app.deployments.relay_sender import RelayLink, RelaySender
from serve_app.deployments.relay_wire import Chain


class Ingress:
    """One listening ingress, and what it has heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, ReplicaLoad, list[Chain]]] = []
        self.came = asyncio.Event()
        self.receiver = RelayReceiver(self._on_load)

    def _on_load(self, replica_id: str, load: ReplicaLoad, chains: Sequence[Chain]) -> None:
        self.heard.append((replica_id, load, list(chains)))
        self.came.set()

    async def next(self) -> tuple[str, ReplicaLoad, list[Chain]]:
        """Return the next news, waiting for it."""
        async with asyncio.timeout(10):
            while not self.heard:
                self.came.clear()
                await self.came.wait()
        return self.heard.pop(0)


class Replica:
    """The pushing side: a sender, its news, and a load that the test sets."""

    def __init__(self) -> None:
        self.sender = RelaySender(lambda: 0.0)
        self.load = ReplicaLoad()
        self.news = LoadNews("r1", self.sender.open_links, lambda: self.load)

    async def link_to(self, ingress: Ingress) -> RelayLink:
        """Return the open link to an ingress."""
        inbox = ingress.receiver.add()
        assert inbox is not None
        link = await self.sender.link_to(inbox.target)
        assert link is not None
        return link


@pytest.fixture
async def ingresses() -> AsyncIterator[list[Ingress]]:
    made = [Ingress(), Ingress()]
    for ingress in made:
        await ingress.receiver.start("127.0.0.1")
    yield made
    for ingress in made:
        ingress.receiver.close()
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    made = Replica()
    yield made
    made.news.close()
    made.sender.close()


def request_of(first: int, cache_salt: str | None = None) -> GenerateRequest:
    ids = tuple(range(first, first + 100))
    return GenerateRequest("q", ids, SamplingParams(cache_salt=cache_salt))


async def test_the_others_hear_of_a_prompt_and_all_of_the_load(
    ingresses: list[Ingress], replica: Replica
) -> None:
    mine, other = [await replica.link_to(ingress) for ingress in ingresses]
    request = request_of(7, cache_salt="of one user")
    replica.load = ReplicaLoad(num_streams=3, num_waiting_tokens=100, mean_service_s=0.5)

    replica.news.arrived(request, mine)

    chain = prefix_chain(request.prompt_token_ids, "of one user")
    assert await ingresses[0].next() == ("r1", replica.load, [])
    assert await ingresses[1].next() == ("r1", replica.load, [chain])
    assert len(chain) == 3

    replica.load = ReplicaLoad(num_streams=2)
    replica.news.arrived(request_of(500), other)
    replica.news.arrived(request_of(900), None)  # came without a relay: both hear of it
    assert [len(chains) for _, _, chains in [await ingresses[0].next()]] == [2]
    assert [len(chains) for _, _, chains in [await ingresses[1].next()]] == [1]


async def test_changes_gather_and_a_single_ingress_is_told_nothing(
    ingresses: list[Ingress], replica: Replica
) -> None:
    link = await replica.link_to(ingresses[0])
    replica.news.arrived(request_of(1), link)
    replica.news.changed()
    await asyncio.sleep(0.1)
    assert not ingresses[0].heard

    await replica.link_to(ingresses[1])
    for num_streams in range(50):
        replica.load = ReplicaLoad(num_streams=num_streams)
        replica.news.changed()
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    for ingress in ingresses:
        assert 1 <= len(ingress.heard) <= 3
        assert ingress.heard[-1][1].num_streams == 49
