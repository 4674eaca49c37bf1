"""What is committed below cluster/ is what `xeray cluster render` makes of the example."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.cluster.command import RENDERED
from serve_app.cli.cluster.inventory import Inventory, load_inventory
from serve_app.cli.cluster.node_spec import HERE, NodeSpec
from serve_app.cli.cluster.render import RENDERERS, render
from serve_app.deployments.environment import serve_environment


@pytest.fixture(scope="module")
def inventory(repository: Path) -> Inventory:
    return load_inventory(repository / "cluster/inventory.yaml")


def test_the_command_names_every_kind() -> None:
    assert set(RENDERED) == set(RENDERERS)


@pytest.mark.parametrize("kind", sorted(RENDERERS))
def test_the_committed_files_are_what_render_makes(
    repository: Path, inventory: Inventory, kind: str, tmp_path: Path
) -> None:
    written = render(kind, inventory, tmp_path)
    committed = {
        str(path.relative_to(repository / "cluster" / kind)): path.read_text()
        for path in (repository / "cluster" / kind).rglob("*")
        if path.is_file()
    }
    made = {str(path.relative_to(tmp_path)): path.read_text() for path in written}
    assert made == committed, f"run: xeray cluster render {kind} -o cluster/{kind}"


def test_every_way_to_start_a_node_has_the_same_environment(inventory: Inventory) -> None:
    """Ray's own variables are in the NodeSpec only; each rendering carries or leads to them."""
    wanted = serve_environment("haproxy").items()
    for machine in inventory.machines:
        assert wanted <= inventory.node_spec(machine).variables().items()
    service = yaml.safe_load(RENDERERS["kubernetes"](inventory)["rayservice.yaml"])
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert wanted <= {pair["name"]: pair["value"] for pair in container["env"]}.items()


def test_units_read_valid_specs(inventory: Inventory) -> None:
    files = RENDERERS["systemd"](inventory)
    for machine in inventory.machines:
        spec = NodeSpec.model_validate(json.loads(files[f"nodes/{machine.name}.json"]))
        assert spec.folder == f"/var/lib/xeray/xeray/{machine.name}"
        same = {"folder": spec.folder}
        assert inventory.node_spec(machine).model_copy(update=same) == spec


@pytest.fixture(scope="module")
def ray_up(inventory: Inventory) -> dict[str, Any]:
    document = yaml.safe_load(RENDERERS["ray-up"](inventory)["cluster.yaml"])
    assert isinstance(document, dict)
    return document


def test_ray_accepts_the_ray_up_file(ray_up: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(ray_up))
    with pytest.raises(Exception, match="cluster_nam"):
        validate_config(prepare_config({**ray_up, "cluster_nam": "x"}))


def test_workers_of_ray_up_count_for_themselves(
    inventory: Inventory, ray_up: dict[str, Any], tmp_path: Path
) -> None:
    """The command of all workers, run here with a stand-in for xeray: it gets a spec to fill in."""
    (command,) = ray_up["worker_start_ray_commands"]
    xeray = tmp_path / "xeray"
    lines = ("#!/bin/sh", 'echo "$@" >>"$HOME/calls"', '[ "$3" = stop ] || cat "$5" >"$HOME/spec"')
    xeray.write_text("\n".join(lines) + "\n")
    xeray.chmod(0o755)
    script = tmp_path / ".xeray/ray-up/start-node.sh"
    script.parent.mkdir(parents=True)
    script.write_text(RENDERERS["ray-up"](inventory)["start-node.sh"])
    done = subprocess.run(
        ["sh", "-c", command.replace("/opt/xeray/bin/xeray", str(xeray))],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spec = NodeSpec.model_validate_json((tmp_path / "spec").read_text())
    assert (spec.name, spec.address, spec.role, spec.resources) == (HERE, HERE, "worker", None)
    stop, start = (tmp_path / "calls").read_text().splitlines()
    assert stop.startswith("cluster node stop --spec")
    assert start.endswith(f"--token-file {script.parent}/auth_token")


def test_the_head_of_ray_up_gets_the_autoscaling_file(ray_up: dict[str, Any]) -> None:
    (command,) = ray_up["head_start_ray_commands"]
    assert " head /opt/xeray/bin/xeray " in command
    assert "ray stop" not in json.dumps(ray_up)  # which would end every Ray on the host
