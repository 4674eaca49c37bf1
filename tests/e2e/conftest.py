"""One real service for the folder: `xeray serve configs/local.yaml`, the embedded model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
MARK = "XERAY_TEST_SERVICE"


@dataclass
class Service:
    """A running `xeray serve`: everything that it started carries its mark in the environment."""

    process: subprocess.Popen[bytes]
    port: int
    mark: str
    log: Path
    exit_code: int | None = None
    leftovers: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The base URL, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Every live process that was started by it, however far down and wherever it moved to."""
        return [each for each in psutil.process_iter() if self._is_ours(each)]

    def log_lines(self) -> list[dict[str, Any]]:
        """What our loggers have written in all its processes."""
        files = set()
        for process in self.processes():
            with contextlib.suppress(OSError):
                files.add(Path(f"/proc/{process.pid}/fd/2").readlink())
        texts = [file.read_text(errors="replace") for file in files if file.suffix == ".err"]
        lines = [line for text in texts for line in text.splitlines() if line.startswith("{")]
        return [json.loads(line) for line in lines]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return process.environ().get(MARK) == self.mark
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def wait_until_ready(self) -> None:
        """Wait for /readyz; AssertionError with the output when it ends or takes too long."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, f"it ended:\n{self.output}"
            try:
                # Its own word too: on a shared machine a port may answer that is another's.
                if (
                    httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
                    and " is ready after " in self.output
                ):
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.25)
        raise AssertionError(f"not ready within {START_TIMEOUT_S} s:\n{self.output}")

    def interrupt(self) -> None:
        """Send what Ctrl-C sends, wait for the end, and note what was left running."""
        if self.exit_code is not None:
            return
        self.process.send_signal(signal.SIGINT)
        self.await_end()

    def await_end(self) -> None:
        """Wait until it has ended, and note what was left running."""
        try:
            self.exit_code = self.process.wait(STOP_TIMEOUT_S)
        finally:
            self._end_what_is_left()

    def _end_what_is_left(self) -> None:
        # Ray's own helpers notice the end of their parent within a moment.
        _, alive = psutil.wait_procs(self.processes(), timeout=5)
        self.leftovers = [f"{each.pid} {each.name()}" for each in alive if each.is_running()]
        for each in alive:
            each.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module", autouse=True)
def _users_environment(clean_environment: dict[str, str]) -> Iterator[None]:
    """What a user's shell holds: nothing of the Ray that other folders' tests share."""
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(clean_environment):
            patch.delenv(name)
        yield


@pytest.fixture(scope="package")
def service(
    repository: Path,
    find_free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
    clean_environment: dict[str, str],
) -> Iterator[Service]:
    """The service, ready. It is ended by its process id."""
    log = tmp_path_factory.mktemp("service") / "output"
    port, mark = find_free_port(), uuid.uuid4().hex
    command = [str(Path(sys.executable).with_name("xeray")), "serve", "configs/local.yaml"]
    command += ["--set", "logging.encoding=JSON", "--set", "logging.level=DEBUG"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=repository,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**clean_environment, MARK: mark},
            start_new_session=True,
        )
    running = Service(process, port, mark, log)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.interrupt()


@pytest.fixture(scope="package")
def model(service: Service) -> str:
    """The id of the model that the service serves."""
    return str(httpx.get(f"{service.url}/v1/models").json()["data"][0]["id"])


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """The openai client as the README shows it; without retries, so that no error is hidden."""
    with openai.OpenAI(
        base_url=f"{service.url}/v1", api_key="unused", max_retries=0, timeout=120
    ) as made:
        yield made
