"""Files that have to be right on a machine before its node's Ray starts."""

from __future__ import annotations

import os
from pathlib import Path

from serve_app.cli.cluster.node_spec import NodeSpec
from serve_app.deployments.haproxy_instance import BINARY_VARIABLE, find_haproxy, write_launcher


def write_haproxy_launcher(spec: NodeSpec) -> None:
    """Put HAProxy's launcher into the node's folder; it mends what Serve writes for HAProxy."""
    path = spec.path / "haproxy"
    given = {**os.environ, **spec.environment}.get(BINARY_VARIABLE)
    if spec.proxy != "haproxy" or given == str(path):  # asked from within the node's environment
        return
    binary = given or find_haproxy()
    if binary is not None:
        write_launcher(path, binary, loopback=False)


def forget_last_head(spec: NodeSpec) -> None:
    """Remove Ray's note of a head that was killed, so that it may start again with its state.

    `ray start --head` takes that head for a running one where any process of this machine names its
    address: a worker beside it, which waits for it. To be called when no such head runs.
    """
    if spec.role != "head":
        return
    base = {**os.environ, **spec.variables()}.get("RAY_TMPDIR", "/tmp")
    path = Path(base) / "ray" / "ray_current_cluster"
    try:
        if path.read_text().strip() == spec.head:
            path.unlink()
    except OSError:
        return  # none is there, or another user's: Ray then says what is wrong
