"""One Ray and one Serve for the whole folder; applications come and go on it, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

RAY_ENV = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "XERAY_SIMULATED_ARC_CARDS": "2",
    "XERAY_SIMULATED_IGPUS": "1",
}
"""What the processes that Ray starts see."""

FAST_ARGS: dict[str, Any] = {
    "model": {"aliases": ["*"]},
    "engine": {"fixed_rate_tokens_per_s": 100, "watchdog_min_s": 1.0},
    "ingress": {"num_replicas": 1, "num_cpus": 0.1},
    "preprocessor": {"xeon_cores": 1},
    "model_replica": {
        "num_cpus": 0.1,
        "health_check_period_s": 0.5,
        "graceful_shutdown_timeout_s": 5,
    },
}
"""An application that is up within seconds: the engine is a clock, nothing loads torch."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pass one warning of Ray's: the variables that it names are read nowhere in Ray 2.60."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings(
                    "ignore:The `metrics_interval_s` field:DeprecationWarning"
                )
            )


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, section by section."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


@dataclass
class App:
    """An application on the shared Serve."""

    url: str
    name: str
    document: dict[str, Any]
    handles: dict[str, Any] = field(default_factory=dict)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until /health answers 200."""
        deadline_s = time.monotonic() + timeout_s
        answer = ""
        while time.monotonic() < deadline_s:
            with contextlib.suppress(httpx.HTTPError):
                response = httpx.get(f"{self.url}/health", timeout=5)
                if response.status_code == 200:
                    return
                answer = response.text
            time.sleep(0.1)
        raise AssertionError(f"{self.name} was not ready within {timeout_s} s: {answer}")

    def handle(self, deployment: str) -> Any:
        """Return the handle of a deployment."""
        from ray import serve

        if deployment not in self.handles:
            self.handles[deployment] = serve.get_deployment_handle(deployment, self.name)
        return self.handles[deployment]

    def states(self, deployment: str, method: str = "state") -> list[Any]:
        """Return what each replica of a deployment answers; [] while there is none."""
        from ray.serve.exceptions import RayServeException

        try:
            results = (
                self.handle(deployment)
                .broadcast(method)
                .results(timeout_s=10, return_exceptions=True)
            )
        except (RayServeException, TimeoutError):
            return []
        return [result for result in results if not isinstance(result, BaseException)]

    def wait_states(
        self,
        deployment: str,
        is_right: Callable[[list[Any]], bool],
        timeout_s: float = 30.0,
        method: str = "state",
    ) -> list[Any]:
        """Wait until what the replicas answer is right, and return it."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            states = self.states(deployment, method)
            if is_right(states):
                return states
            time.sleep(0.1)
        raise AssertionError(f"{deployment}: {states}")

    def one(self, deployment: str, method: str = "state") -> Any:
        """Return what the only replica answers; one in a change may take time."""
        (state,) = self.wait_states(deployment, lambda s: len(s) == 1, method=method)
        return state

    def any(self, deployment: str, method: str = "state") -> Any:
        """Return what one of the deployment's replicas answers."""
        return self.wait_states(deployment, bool, method=method)[0]

    def reconfigure(self, deployment: str, user_config: dict[str, Any]) -> None:
        """Deploy the same file again with other run-time toggles, as `serve deploy` does."""
        from serve_app.deployments.ray_private import deploy_document

        application = self.document["applications"][0]
        others = [d for d in application.get("deployments", []) if d["name"] != deployment]
        application["deployments"] = [*others, {"name": deployment, "user_config": user_config}]
        deploy_document(self.document)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one of the application's own processes."""
        os.kill(pid, number)

    def chat(self, **changes: Any) -> httpx.Response:
        """Ask one question, not streamed."""
        body = {
            "model": "any",
            "messages": [{"role": "user", "content": "Say something."}],
            "max_tokens": 8,
            **changes,
        }
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)

    def start_streams(self, count: int, max_tokens: int) -> Future[list[str]]:
        """Run `count` streams at once, beside the test; the result tells how each ended."""
        executor = ThreadPoolExecutor(1)
        future = executor.submit(asyncio.run, self._streams(count, max_tokens))
        executor.shutdown(wait=False)
        return future

    def run_streams(self, count: int, max_tokens: int) -> list[str]:
        """Run `count` streams at once; returns how each ended."""
        return self.start_streams(count, max_tokens).result(timeout=120)

    async def _streams(self, count: int, max_tokens: int) -> list[str]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(timeout=90, limits=limits) as client:
            return await asyncio.gather(*(self._stream(client, max_tokens) for _ in range(count)))

    async def _stream(self, client: httpx.AsyncClient, max_tokens: int) -> str:
        """Return how a stream ended: done, the error's code, or cut."""
        body = {"model": "any", "prompt": "Go", "max_tokens": max_tokens, "stream": True}
        text = ""
        try:
            async with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
                async for piece in response.aiter_text():
                    text += piece
        except httpx.HTTPError as error:
            return f"cut: {type(error).__name__}"
        for code in ("internal_error", "queue_full", "no_replica", "model_loading"):
            if f'"{code}"' in text:
                return code
        return "done" if text.endswith("data: [DONE]\n\n") else f"cut: {text[-80:]}"

    def delete(self) -> None:
        """Take the application down."""
        from ray import serve

        if self.name in serve.status().applications:
            serve.delete(self.name)


@dataclass
class SharedServe:
    """The folder's Serve."""

    port: int
    folder: Path
    num_apps: int = 0
    current: App | None = None

    def deploy(
        self,
        args: dict[str, Any] | None = None,
        *,
        base: dict[str, Any] = FAST_ARGS,
        wait: bool = True,
    ) -> App:
        """Start an application with `args` laid over `base`."""
        from serve_app.deployments.ray_private import deploy_document

        if self.current is not None:  # a file replaces what runs, and its route answers on
            self.current.delete()
        self.num_apps += 1
        name = f"app{self.num_apps}"
        application = {
            "name": name,
            "route_prefix": "/",
            "import_path": "serve_app:build_app",
            "args": merged(base, args or {}),
        }
        app = App(f"http://127.0.0.1:{self.port}", name, {"applications": [application]})
        self.current = app
        deploy_document(app.document)
        if wait:
            app.wait_ready()
        return app


@pytest.fixture(scope="package")
def ray_folder() -> Iterator[Path]:
    """A short folder: Ray puts Unix sockets into it, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="xr-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="package")
def shared_serve(ray_folder: Path) -> Iterator[SharedServe]:
    """The folder's Ray, with two simulated cards and one simulated iGPU, and Serve on it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENV.items():
            patch.setenv(name, value)
        patch.setenv("RAY_TMPDIR", str(ray_folder))
        patch.setenv("XERAY_LOCK_DIR", str(ray_folder / "locks"))
        from serve_app.deployments.environment import serve_environment

        for name, value in serve_environment("python").items():
            patch.setenv(name, value)
        yield from _run_serve(ray_folder)


def _run_serve(folder: Path) -> Iterator[SharedServe]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own use of pydantic
        import ray
        from ray import serve

    from serve_app.deployments.cluster_resources import node_resources

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    ray.init(
        address="local",
        namespace="serve",
        num_cpus=8,  # what Ray counts, not what there is: these replicas mostly wait
        resources=node_resources(),
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"log_level": "ERROR"},
    )
    yield SharedServe(port, folder)
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def shared_app(shared_serve: SharedServe) -> Iterator[App]:
    """One application for a module's first tests; the next `deployed` one takes its place."""
    app = shared_serve.deploy({"engine": {"max_num_seqs": 64}})
    yield app
    app.delete()


@pytest.fixture
def deployed(shared_serve: SharedServe) -> Iterator[Callable[..., App]]:
    """`deployed(args)` starts an application; it is gone after the test."""
    apps: list[App] = []

    def start(*args: Any, **kwargs: Any) -> App:
        app = shared_serve.deploy(*args, **kwargs)
        apps.append(app)
        return app

    yield start
    for app in apps:
        app.delete()
