"""`xeray profile` against a small server that answers as ours does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli import profile
from serve_app.cli.main import EXIT_ERROR, main

FIGURES: dict[str, Any] = {
    "replica_id": "r1", "host": "ws1", "device": "Arc A770", "num_steps": 20, "step_s": 0.012,
    "operators": [{"name": "gemm", "calls": 560, "seconds": 0.12, "share": 0.5}],
    "host_operators": [], "copied_bytes": 2048.0, "synchronisations": 1.0, "kernel_launches": 3.0,
    "operator_calls": 40.0, "idle_s": 0.003, "idle_share": 0.25, "read_bytes_per_s": 280e9,
    "bandwidth_share": 0.5, "captured_step_s": 0.012, "uncaptured_step_s": 0.03,
    "capture_speedup": 2.5,
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server: Any = self.server
        server.seen.append((self.path, body, self.headers.get("authorization")))
        if self.path == "/v1/completions":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"data: {}\n\n")
            server.has_stream.set()
            server.is_over.wait(10)
            return
        server.has_stream.wait(10)
        status, answer = server.answer
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        server.is_over.set()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    trace = tmp_path / "there.json"
    trace.write_text('{"traceEvents": []}')
    made.answer = (200, {**FIGURES, "trace": str(trace)})
    made.seen, made.has_stream, made.is_over = [], threading.Event(), threading.Event()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    made.url = f"http://127.0.0.1:{made.server_port}"
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_it_keeps_a_stream_running_and_prints_what_came(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "trace.json"
    options = ["--url", server.url, "--steps", "7", "--output", str(target), "--api-key", "k"]
    assert main(["profile", *options]) == 0
    printed = capsys.readouterr()
    assert "3 kernel launches, 1.0 waits for the device, 2048 B copied" in printed.out.replace(
        "2 KiB", "2048 B"
    )
    assert "280.0 GB/s, 50% of the measured copy bandwidth" in printed.out
    assert "3.00 ms a step without a kernel, 25% of the time" in printed.out
    assert "12.00 ms a step with, 30.00 ms without: 2.50 times as fast" in printed.out
    assert " 50.0%     560     120.00  gemm" in printed.out
    assert printed.err == "", "progress is for terminals"
    assert target.read_text() == '{"traceEvents": []}'
    sent = {path: (body, key) for path, body, key in server.seen}
    assert sent["/admin/profile"] == ({"steps": 7, "timeout_s": 30.0}, "Bearer k")
    assert sent["/v1/completions"][0]["stream"] is True


def test_json_and_a_trace_on_another_host(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = (200, {**FIGURES, "trace": "/nowhere/trace.json"})
    options = ["--url", server.url, "--output", str(tmp_path / "t.json")]
    assert main(["profile", *options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["saved"], figures["capture_speedup"]) == (None, 2.5)


def test_a_refusal_is_one_line(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.has_stream.set()
    server.answer = (500, {"error": {"message": "no step ran while it was profiled"}})
    assert main(["profile", "--url", server.url, "--streams", "0"]) == EXIT_ERROR
    assert capsys.readouterr().err.endswith("xeray: no step ran while it was profiled\n")
    assert [path for path, _, _ in server.seen] == ["/admin/profile"]


def test_no_server_is_one_line(free_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port}"
    assert main(["profile", "--url", url, "--streams", "0"]) == EXIT_ERROR
    assert f"--url: cannot reach {url}" in capsys.readouterr().err


def test_vtune_s_command_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile.vtune_command({**FIGURES}) is None or "vtune" in str(
        profile.vtune_command({**FIGURES})
    )
    monkeypatch.setattr(profile.shutil, "which", lambda name: f"/opt/{name}")
    assert "/opt/vtune -collect gpu-hotspots" in str(profile.vtune_command({**FIGURES}))
    on_cpu = {**FIGURES, "idle_share": None}
    assert "-collect hotspots" in str(profile.vtune_command(on_cpu))
