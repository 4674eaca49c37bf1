"""Streams that run on, one after the other, and what became of each: the counts of a fault test."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

CONNECT_TIMEOUT_S = 5.0  # as the openai client has it


@dataclass
class End:
    """How one request ended: `answered`, `typed` (an error of ours), `cut`, `refused` or `hung`.

    `refused` has reached nobody, so that a client or nginx may ask another machine.
    `number` is the user; `first_s` the time of its first text, 0 without any.
    """

    kind: str
    number: int
    began_s: float
    first_s: float
    ended_s: float
    text: str = ""
    detail: str = ""


@dataclass
class Load:
    """`num_streams` greedy streams at once against `urls` in turn, until `stop` is set.

    A request that gives nothing for `hung_s` counts as hung. The streams begin `stagger_s` apart.
    Times are monotonic seconds.
    """

    urls: list[str]
    num_streams: int
    max_tokens: int
    hung_s: float = 60.0
    stagger_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ends: list[End] = field(default_factory=list)
    num_sent: int = 0

    async def run(self) -> None:
        """Stream until told to stop; what runs then is finished."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(self.hung_s, connect=CONNECT_TIMEOUT_S)
        async with httpx.AsyncClient(
            timeout=timeout, limits=limits, headers=self.headers
        ) as client:
            await asyncio.gather(*(self._user(client, n) for n in range(self.num_streams)))

    def counts(self, since_s: float = 0.0) -> dict[str, int]:
        """Return how many requests ended how."""
        return dict(Counter(end.kind for end in self.ends if end.ended_s >= since_s))

    def num_wrong(self) -> int:
        """Return how many answers differ from the user's first one: greedy, they are all alike."""
        first: dict[int, str] = {}
        answered = [end for end in self.ends if end.kind == "answered"]
        return sum(end.text != first.setdefault(end.number, end.text) for end in answered)

    def seconds_until_normal(self, fault_s: float, quiet_s: float = 3.0) -> float | None:
        """Return when the last failure after the fault came: 0 without any, None if not the last.

        A failure within the last `quiet_s` of the run leaves that open.
        """
        bad = [e.ended_s for e in self.ends if e.kind != "answered" and e.ended_s >= fault_s]
        if not bad:
            return 0.0
        good_after = [e for e in self.ends if e.kind == "answered" and e.began_s > max(bad)]
        last = max(e.ended_s for e in self.ends)
        if not good_after or last - max(bad) < quiet_s:
            return None
        return max(bad) - fault_s

    async def _user(self, client: httpx.AsyncClient, number: int) -> None:
        await asyncio.sleep(number * self.stagger_s)
        while not self.stop.is_set():
            self.num_sent += 1
            url = self.urls[self.num_sent % len(self.urls)]
            end = await self._request(client, url, number)
            self.ends.append(end)
            if end.kind != "answered":
                await asyncio.sleep(0.5)  # as a client that heeds Retry-After would

    async def _request(self, client: httpx.AsyncClient, url: str, number: int) -> End:
        body = {
            "model": "any",
            "prompt": f"Stream {number}",
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        began_s, first_s, text, kind, detail = time.monotonic(), 0.0, "", "cut", ""
        try:
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raw = (await response.aread()).decode(errors="replace")
                    kind, detail = ("typed" if '"code"' in raw else "cut"), raw[:200]
                else:
                    async for line in response.aiter_lines():
                        if line == "data: [DONE]":
                            kind = "typed" if detail else "answered"
                        elif line.startswith("data: "):
                            event = json.loads(line.removeprefix("data: "))
                            if "error" in event:
                                detail = event["error"]["code"]
                            else:
                                text += "".join(c["text"] for c in event["choices"])
                                first_s = first_s or time.monotonic()
        except httpx.ReadTimeout as error:
            kind, detail = "hung", repr(error)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            kind, detail = "refused", repr(error)
        except httpx.HTTPError as error:
            detail = repr(error)
        return End(kind, number, began_s, first_s, time.monotonic(), text, detail)
