"""What `prepare` leaves on a machine: HAProxy's launcher, no note of a head that was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.cli.cluster import node
from serve_app.cli.cluster.node_spec import NodeSpec
from serve_app.deployments.haproxy_instance import BINARY_VARIABLE


def spec_at(folder: Path, proxy: str = "haproxy") -> NodeSpec:
    values = {"name": "a", "cluster": "lab", "role": "head", "address": "h", "head": "h:1"}
    return NodeSpec.model_validate({**values, "folder": str(folder), "proxy": proxy})


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    binary = tmp_path / "real-haproxy"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o700)
    monkeypatch.setenv(BINARY_VARIABLE, str(binary))
    monkeypatch.setattr(node, "_ray", lambda: ["ray"])
    return binary


def test_the_launcher_stands_for_haproxy(tmp_path: Path, real: Path) -> None:
    spec = spec_at(tmp_path / "node")
    node.prepare(spec, "secret")

    launcher = Path(node.environment(spec)[BINARY_VARIABLE])
    assert launcher == spec.path / "haproxy"
    assert launcher.stat().st_mode & 0o777 == 0o700
    assert launcher.read_text().endswith(f"""'open' '{real}' "$@"\n""")


def test_asked_from_within_the_nodes_environment_it_stays(
    tmp_path: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_at(tmp_path / "node")
    node.prepare(spec, "secret")
    before = (spec.path / "haproxy").read_text()
    monkeypatch.setenv(BINARY_VARIABLE, str(spec.path / "haproxy"))
    node.prepare(spec, "secret")
    assert (spec.path / "haproxy").read_text() == before, "it would start itself for ever"


def test_without_haproxy_there_is_none(tmp_path: Path, real: Path) -> None:
    spec = spec_at(tmp_path / "node", proxy="python")
    node.prepare(spec, "secret")
    assert not (spec.path / "haproxy").exists()
    assert node.environment(spec)[BINARY_VARIABLE] == str(real)


@pytest.mark.parametrize(("noted", "is_kept"), [("h:1", False), ("h:2", True)])
def test_a_killed_head_may_start_again(
    noted: str, is_kept: bool, tmp_path: Path, real: Path
) -> None:
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    note.write_text(noted)
    spec = spec_at(tmp_path / "node")
    node.prepare(spec.model_copy(update={"environment": {"RAY_TMPDIR": str(tmp_path)}}), "secret")
    assert note.exists() == is_kept, "another cluster's is not ours to remove"
