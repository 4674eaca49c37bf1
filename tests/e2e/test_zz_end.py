"""Ends the service: last in the folder by its name, since no other test can use it afterwards."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import httpx


async def test_the_end_drains_and_leaves_nothing(service: Any) -> None:
    """SIGTERM, as an init system sends it; Ctrl-C is in tests/deployments/test_starts.py."""
    assert len(service.processes()) > 3
    body = {"model": "x", "prompt": "Hello", "ignore_eos": True, "max_tokens": 400}
    url = f"{service.url}/v1/completions"
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream("POST", url, json=body | {"stream": True}) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        begin_s = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while (refused := await http.get(f"{service.url}/readyz")).status_code == 200:
                await asyncio.sleep(0.02)
        assert refused.json()["error"]["code"] == "draining"
        late = await http.post(url, json=body | {"max_tokens": 1})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in late.headers
        rest = [line async for line in lines]

    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in "".join(rest)
    await asyncio.to_thread(service.await_end)
    assert time.monotonic() - begin_s < 30
    assert service.exit_code == 0, service.output
    assert service.leftovers == []
    assert service.processes() == []
    assert "Traceback" not in service.output
