"""Debian's nginx over two services: the primary dies under streams, and comes back."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.cli.cluster.inventory import parse_inventory
from serve_app.cli.cluster.render import nginx as render_nginx

from .load import Load

NUM_STREAMS = 16
MAX_TOKENS = 20
RATE = 20.0
FAIL_TIMEOUT_S = 2
INVENTORY = """
machines:
  - {name: one, address: 10.0.0.1, role: head, num_cpus: 0, cards: {arc_gpu: 0}}
  - {name: two, address: 10.0.0.2, cards: {arc_gpu: 2, igpu: 1}}
  - {name: three, address: "fd00::3", cards: auto, nginx_weight: 4}
nginx: {backup: "10.1.0.1:8000", server_name: ai.example.org}
"""


def test_weights_follow_the_cards_and_one_backup_stands_by() -> None:
    text = render_nginx.render(parse_inventory(INVENTORY, "inventory"))["xeray.conf"]

    servers = re.findall(r"server (\S+) (?:weight=(\d+)|(backup))", text)
    assert servers == [
        ("10.0.0.1:8000", "1", ""),
        ("10.0.0.2:8000", "3", ""),
        ("[fd00::3]:8000", "4", ""),
        ("10.1.0.1:8000", "", "backup"),
    ]
    assert "proxy_next_upstream_tries 4;" in text


def test_the_example_is_what_is_rendered(repository: Path) -> None:
    inventory = parse_inventory((repository / "cluster/inventory.yaml").read_text(), "example")

    (text,) = render_nginx.render(inventory).values()

    assert (repository / "cluster/nginx/xeray.conf").read_text() == text


@pytest.fixture
def nginx() -> str:
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip("nginx is not installed")
    return found


class Program:
    """A process that is killed at the end, whatever happens."""

    def __init__(self, *command: str) -> None:
        self.command = command
        self.process = subprocess.Popen(command)

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(timeout=20)


def wait_for(is_true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def services(
    nginx: str, tmp_path: Path, find_free_port: Callable[[], int]
) -> Iterator[dict[str, Any]]:
    """Two services, and nginx with the rendered file in front: `url`, and `start(name)`."""
    ports = {name: find_free_port() for name in ("home", "standby", "front")}
    text = (
        f"machines: [{{name: home, address: 127.0.0.1, role: head, cards: {{arc_gpu: 1}}}}]\n"
        f"nginx: {{listen: '127.0.0.1:{ports['front']}', service_port: {ports['home']},"
        f" backup: '127.0.0.1:{ports['standby']}', fail_timeout_s: {FAIL_TIMEOUT_S}}}\n"
    )
    rendered = render_nginx.render(parse_inventory(text, "test"))["xeray.conf"]
    (tmp_path / "xeray.conf").write_text(rendered)
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\ndaemon off;\nworker_processes 1;\n"
        "events { worker_connections 512; }\n"
        f"http {{ access_log off; {folders} include {tmp_path}/xeray.conf; }}\n"
    )
    command = (nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"))
    log = ("-e", str(tmp_path / "error.log"))
    subprocess.run([*command, *log, "-t", "-q"], check=True)
    programs: list[Program] = []

    def start(name: str) -> Program:
        script = str(Path(__file__).with_name("paced_service.py"))
        programs.append(Program(sys.executable, script, str(ports[name]), name, str(RATE)))
        return programs[-1]

    try:
        started = {name: start(name) for name in ("home", "standby")}
        for name in started:
            wait_for(lambda name=name: answers(f"http://127.0.0.1:{ports[name]}"))
        programs.append(Program(*command, *log))
        url = f"http://127.0.0.1:{ports['front']}"
        wait_for(lambda: answers(url))
        yield {"url": url, "start": start, "ports": ports, "programs": programs, **started}
    finally:
        for program in reversed(programs):
            is_nginx = program.command[0] == nginx
            program.end(signal.SIGTERM if is_nginx else signal.SIGKILL)


def who_answers(url: str) -> str:
    body = {"model": "any", "prompt": "Who?", "max_tokens": 1, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=10)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def test_the_standby_takes_over_and_gives_back(services: dict[str, Any]) -> None:
    url = services["url"]
    assert await asyncio.to_thread(who_answers, url) == "home"
    load = Load([url], NUM_STREAMS, MAX_TOKENS, hung_s=20.0, stagger_s=1.0 / NUM_STREAMS)
    running = asyncio.create_task(load.run())
    while len(load.ends) < NUM_STREAMS:
        await asyncio.sleep(0.05)

    services["home"].end()
    killed_s = time.monotonic()
    while not any("standby" in e.text for e in load.ends):
        await asyncio.sleep(0.02)
    first = next(e for e in load.ends if "standby" in e.text)
    await asyncio.sleep(2.0)
    services["start"]("home")
    wait = f"http://127.0.0.1:{services['ports']['home']}"
    await asyncio.to_thread(wait_for, lambda: answers(wait))
    back_s = time.monotonic()
    while not any("home" in e.text and e.began_s > back_s for e in load.ends):
        await asyncio.sleep(0.02)
    home = next(e for e in load.ends if "home" in e.text and e.began_s > back_s)
    load.stop.set()
    await asyncio.wait_for(running, 30)

    counts = load.counts()
    print(
        f"sent {load.num_sent}, {counts}, to the standby {first.first_s - killed_s:.2f} s,"
        f" home again {home.first_s - back_s:.2f} s"
    )
    assert sum(counts.values()) == load.num_sent
    assert "hung" not in counts
    # Those that were under way end with the connection; every other one is answered.
    assert 0 < counts.get("cut", 0) + counts.get("typed", 0) <= NUM_STREAMS
    assert {e.text for e in load.ends if e.kind == "answered"} == {
        "home" * MAX_TOKENS,
        "standby" * MAX_TOKENS,
    }
    assert first.first_s - killed_s < 2.0
    assert home.first_s - back_s < 2 * FAIL_TIMEOUT_S

    # And with no machine at all, nginx says so as the service would.
    for program in services["programs"]:
        if "paced_service" in program.command[1]:
            program.end()
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{url}/v1/completions", json={"prompt": "x"})
        admin = await client.post(f"{url}/admin/drain")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
    assert answer.headers["retry-after"] == "2"
    assert (admin.status_code, admin.json()["error"]["code"]) == (404, "not_found")
