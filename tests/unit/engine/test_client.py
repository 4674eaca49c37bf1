from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import ClientError, ConfigError, EngineError, OverloadedError
from serve_app.core.events import BatchingMode, BatchingOptions, FinishReason, TokenEvent
from serve_app.core.sampling import SamplingParams
from serve_app.engine import watchdog
from serve_app.engine.client import EngineClient
from serve_app.engine.fixed_rate import token_id_at
from serve_app.engine.token_stream import TokenStream

VOCAB_SIZE = 320


@pytest.fixture
def clock_client(tiny_folder: Path) -> Callable[..., EngineClient]:
    """Make a client of a fixed-rate engine: a real process without torch."""

    def make(rate: float = 200.0, **settings: object) -> EngineClient:
        watchdog_min_s = settings.pop("watchdog_min_s", 3.0)
        section = EngineSection(
            fixed_rate_tokens_per_s=rate, max_num_seqs=8, watchdog_min_s=watchdog_min_s
        )
        return EngineClient(ModelSection(path=str(tiny_folder)), section, **settings)

    return make


async def read(stream: TokenStream) -> tuple[list[int], TokenEvent]:
    """All ids and the one terminal event."""
    events = [event async for batch in stream for event in batch]
    terminal = [event for event in events if event.finish_reason is not None]
    assert len(terminal) == 1
    assert events[-1] is terminal[0]
    return [i for event in events for i in event.new_token_ids], terminal[0]


async def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def expected_ids(last_prompt_id: int, count: int) -> list[int]:
    return [token_id_at(last_prompt_id, place, VOCAB_SIZE) for place in range(count)]


async def test_streams_do_not_mix_and_stats_add_up(clock_client):
    client = clock_client()
    info = await client.start()
    assert info.engine == "fixed_rate"
    assert info.engine_reason == "engine.fixed_rate_tokens_per_s is set"
    streams = [
        client.submit(f"r{i}", (5, 10 + i), SamplingParams(max_tokens=10 + i)) for i in range(12)
    ]
    results = await asyncio.gather(*(read(stream) for stream in streams))
    for i, (ids, end) in enumerate(results):
        assert ids == expected_ids(10 + i, 10 + i)
        assert end.finish_reason is FinishReason.LENGTH
    stats = await client.stats()
    assert stats.num_generation_tokens_total == sum(10 + i for i in range(12))
    assert stats.num_running == stats.num_waiting == 0
    await client.close()
    assert client.state == "dead"


async def test_abort_and_close_end_a_stream_once(clock_client):
    client = clock_client()
    await client.start()
    params = SamplingParams(max_tokens=250)
    aborted, closed = client.submit("a", (5,), params), client.submit("b", (5,), params)
    await anext(aborted)
    client.abort("a")
    ids, end = await read(aborted)
    assert end.finish_reason is FinishReason.ABORTED
    assert len(ids) < 250
    closed.close()
    assert [batch async for batch in closed] == []
    while (await client.stats()).num_running:
        pass
    assert client.last_stats.num_aborted_total == 2
    await client.close()


async def test_toggles_change_the_same_process(clock_client):
    client = clock_client()
    await client.start()
    pid = client.pid
    stats = await client.configure(BatchingOptions(BatchingMode.OFF))
    assert stats.mode == "off"
    streams = [client.submit(f"r{i}", (5,), SamplingParams(max_tokens=5)) for i in range(4)]
    await asyncio.gather(*(read(stream) for stream in streams))
    assert (await client.stats()).max_num_running == 1
    with pytest.raises(ConfigError, match="max_num_seqs"):
        await client.configure(BatchingOptions(max_num_seqs=9))
    assert client.pid == pid
    await client.close()


async def test_pause_holds_streams_and_the_watchdog(clock_client):
    client = clock_client(watchdog_min_s=0.2)
    await client.start()
    pid = client.pid
    stream = client.submit("a", (5,), SamplingParams(max_tokens=40))
    await anext(stream)
    assert (await client.pause()).is_paused
    await asyncio.sleep(0.5)  # longer than the watchdog allows a busy engine
    assert client.pid == pid
    assert client.last_progress_age_s == 0.0
    await client.resume()
    _, end = await read(stream)
    assert end.finish_reason is FinishReason.LENGTH
    await client.close()


async def test_requests_are_checked_before_they_are_sent(clock_client):
    client = clock_client()
    with pytest.raises(OverloadedError) as loading:
        client.submit("a", (5,), SamplingParams())
    assert loading.value.code == "model_loading"
    await client.start()
    with pytest.raises(ClientError):
        client.submit("a", (), SamplingParams())
    with pytest.raises(ClientError):
        client.submit("a", (VOCAB_SIZE,), SamplingParams())
    await client.close()


async def test_kill_ends_streams_with_a_typed_error_and_the_engine_comes_back(clock_client):
    states: list[str] = []
    client = clock_client(on_state_change=lambda state, detail: states.append(state))
    await client.start()
    await client.configure(BatchingOptions(BatchingMode.STATIC))
    first_pid = client.pid
    assert first_pid is not None
    streams = [client.submit(f"r{i}", (5,), SamplingParams(max_tokens=250)) for i in range(6)]
    await anext(streams[0])
    os.kill(first_pid, signal.SIGKILL)
    for _, end in await asyncio.gather(*(read(stream) for stream in streams)):
        assert end.finish_reason is FinishReason.ERROR
        assert end.error is not None
        assert end.error.is_retryable
    await wait_for(lambda: client.state == "ready")
    assert client.pid != first_pid
    assert states == ["ready", "dead", "loading", "ready"]
    ids, _ = await read(client.submit("again", (7,), SamplingParams(max_tokens=5)))
    assert ids == expected_ids(7, 5)
    await wait_for(lambda: client.last_stats.mode == "static")
    await client.close()


async def test_watchdog_kills_a_hanging_engine(clock_client, monkeypatch):
    monkeypatch.setenv("XERAY_FAULT_INJECTION", "1")
    states: list[str] = []
    client = clock_client(
        watchdog_min_s=0.5, on_state_change=lambda state, detail: states.append(state)
    )
    await client.start()
    client.inject_fault("hang")
    _, end = await read(client.submit("a", (5,), SamplingParams(max_tokens=5)))
    assert end.error is not None
    assert "no progress" in end.error.message
    await wait_for(lambda: client.state == "ready")
    assert states == ["ready", "stuck", "loading", "ready"]
    assert await client.canary(5.0)
    await client.close()


async def test_the_watchdog_waits_for_an_engine_that_gets_no_cpu(clock_client, monkeypatch):
    monkeypatch.setenv("XERAY_FAULT_INJECTION", "1")
    frozen_s = None
    monkeypatch.setattr(
        watchdog, "thread_cpu_waits", lambda pid: {"1": frozen_s or time.monotonic()}
    )
    client = clock_client(watchdog_min_s=0.4)
    await client.start()
    pid = client.pid
    client.inject_fault("hang")
    stream = client.submit("a", (5,), SamplingParams(max_tokens=5))

    await asyncio.sleep(1.6)
    assert (client.pid, client.state) == (pid, "ready")

    frozen_s = time.monotonic()  # it has a CPU, and does nothing with it
    _, end = await read(stream)
    assert "no progress" in end.error.message
    await wait_for(lambda: client.state == "ready")
    await client.close()


async def test_a_halt_of_the_machine_is_no_hang(clock_client):
    """The engine and its watchdog stand still together, and go on together."""
    client = clock_client(watchdog_min_s=0.4)
    await client.start()
    pid = client.pid
    assert pid is not None
    stream = client.submit("a", (5,), SamplingParams(max_tokens=200))
    await anext(stream)

    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)  # this process's event loop, with the watchdog in it, stands as well
    await asyncio.sleep(0.15)  # the watchdog comes first
    assert (client.pid, client.state) == (pid, "ready")
    os.kill(pid, signal.SIGCONT)

    _, end = await read(stream)
    assert end.finish_reason is FinishReason.LENGTH
    await client.close()


async def test_faults_need_the_switch(clock_client, monkeypatch):
    monkeypatch.delenv("XERAY_FAULT_INJECTION", raising=False)
    client = clock_client()
    await client.start()
    client.inject_fault("crash")
    assert await client.canary(5.0)
    await client.close()


async def test_a_failed_start_raises_the_childs_error(tmp_path):
    client = EngineClient(ModelSection(path=str(tmp_path / "none.gguf")), EngineSection())
    with pytest.raises(ConfigError, match="does not exist"):
        await client.start()
    assert client.state == "dead"
    await client.close()


async def test_a_start_that_takes_too_long_names_the_setting(clock_client, tiny_folder):
    section = EngineSection(fixed_rate_tokens_per_s=1.0, startup_timeout_s=0.01)
    client = EngineClient(ModelSection(path=str(tiny_folder)), section)
    with pytest.raises(EngineError, match="startup_timeout_s"):
        await client.start()
    await client.close()


async def test_close_aborts_what_is_open(clock_client):
    client = clock_client()
    await client.start()
    pid = client.pid
    stream = client.submit("a", (5,), SamplingParams(max_tokens=250))
    await anext(stream)
    await client.close()
    _, end = await read(stream)
    assert end.finish_reason is FinishReason.ABORTED
    assert not Path(f"/proc/{pid}").exists()


async def test_the_child_dies_with_its_parent(tiny_folder):
    script = (
        "import asyncio, sys\n"
        "from serve_app.config.schema import EngineSection, ModelSection\n"
        "from serve_app.engine.client import EngineClient\n"
        "async def main():\n"
        "    section = EngineSection(fixed_rate_tokens_per_s=10)\n"
        "    client = EngineClient(ModelSection(path=sys.argv[1]), section)\n"
        "    await client.start()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_folder)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(await asyncio.to_thread(parent.stdout.readline))
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    await asyncio.to_thread(parent.wait)
    parent.stdout.close()
    await wait_for(lambda: not is_running(child))


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


async def test_the_native_engine_serves_over_a_process(tiny_folder, reference):
    stages: list[str] = []
    section = EngineSection(
        device="cpu", dtype="float32", kv_cache_tokens=1024, max_num_seqs=4, num_threads=1
    )
    client = EngineClient(
        ModelSection(path=str(tiny_folder)),
        section,
        on_progress=lambda stage, seconds: stages.append(stage),
    )
    info = await client.start()
    assert (info.engine, info.details["num_threads"]) == ("native", "1")
    assert stages[:2] == ["starting torch", "loading weights"]
    prompts = [[5, 6, 7 + i] for i in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, prompt_logprobs=0)
    streams = [client.submit(f"r{i}", p, params) for i, p in enumerate(prompts)]
    for prompt, (ids, _) in zip(
        prompts, await asyncio.gather(*(read(stream) for stream in streams)), strict=True
    ):
        assert ids == reference.generate(prompt, 12)
    stats = await client.stats()
    free = stats.num_free_blocks + stats.num_cached_blocks
    assert (free, stats.num_used_blocks) == (stats.num_blocks, 0)
    assert await client.canary(5.0)
    await client.close()


async def test_passed_descriptors_stay_open_in_the_child(clock_client, tmp_path):
    fd = os.open(tmp_path / "card.lock", os.O_RDWR | os.O_CREAT)
    client = clock_client(pass_fds=(fd,))
    await client.start()
    target = os.readlink(f"/proc/{client.pid}/fd/{fd}")
    assert target == str(tmp_path / "card.lock")
    os.close(fd)
    await client.close()


def test_the_parents_side_needs_no_torch():
    script = "import sys, serve_app.engine.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


async def test_a_reload_starts_another_process_and_ends_what_ran_with_an_error(clock_client):
    client = clock_client(rate=50.0)
    await client.start()
    try:
        before = client.pid
        running = client.submit("r", (5,), SamplingParams(max_tokens=1000))
        info = await client.reload()

        _, terminal = await read(running)
        assert terminal.finish_reason is FinishReason.ERROR
        assert info.engine == "fixed_rate"
        assert client.state == "ready"
        assert client.pid not in (None, before)
        again = client.submit("s", (5,), SamplingParams(max_tokens=3))
        assert (await read(again))[0] == expected_ids(5, 3)
    finally:
        await client.close()
