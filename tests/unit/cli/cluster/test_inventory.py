from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.cli.cluster.inventory import load_inventory, parse_inventory
from serve_app.cli.cluster.inventory_edit import add_machine, remove_machine
from serve_app.core.errors import ConfigError

TWO: dict[str, Any] = {
    "machines": [
        {"name": "a", "address": "10.0.0.1", "role": "head"},
        {"name": "b", "address": "10.0.0.2"},
    ]
}


def changed(**machine: Any) -> str:
    """The text of TWO with `machine` laid over its second machine."""
    first, second = TWO["machines"]
    return yaml.safe_dump({"machines": [first, {**second, **machine}]})


def test_the_example_is_valid(repository: Path) -> None:
    inventory = load_inventory(repository / "cluster/inventory.yaml")
    assert inventory.head.name == "server"
    assert [machine.name for machine in inventory.workers] == ["ws1", "ws2", "ws3"]


def test_the_common_settings_hold_where_a_machine_says_nothing() -> None:
    inventory = parse_inventory(yaml.safe_dump(TWO), "test")
    spec = inventory.node_spec(inventory.machines[1])
    assert (spec.head, spec.address, spec.role) == ("10.0.0.1:6379", "10.0.0.2", "worker")
    assert spec.folder == "~/.xeray/xeray/b"
    assert spec.resources is None


def test_a_name_is_made_from_the_address() -> None:
    text = "machines: [{address: WS3.example.org, role: head}]"
    assert parse_inventory(text, "test").head.name == "ws3-example-org"


def test_an_ipv6_head_is_bracketed() -> None:
    inventory = parse_inventory("machines: [{address: 'fd00::1', role: head}]", "test")
    assert inventory.node_spec(inventory.head).head == "[fd00::1]:6379"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(adress="x"), r"test\.machines\.1\.adress: unknown key; did you mean 'address'\?"),
        (changed(cards={"arc_gpus": 1}), r"cards\.arc_gpus: unknown key; did you mean 'arc_gpu'\?"),
        (changed(cards="all"), r"machines\.1\.cards: expected auto, or counts"),
        (changed(cards={"arc_gpu": -1}), r"cards\.arc_gpu: input should be greater than or equal"),
        (changed(role="head"), r"exactly one needs role: head; found a, b"),
        (changed(role="boss"), r"machines\.1\.role: input should be 'head' or 'worker'"),
        (changed(name="a"), r"name a appears twice"),
        (changed(address="10.0.0.1"), r"address 10\.0\.0\.1 appears twice"),
        (changed(address="-oProxyCommand=x"), r"address: expected a host name or an IP address"),
        (changed(port=70000), r"machines\.1\.port: input should be less than or equal to 65535"),
        (changed(name="B_1"), r"name: expected small letters, digits and '-'"),
        (changed(labels={"room": "b 12"}), r"label room=b 12: letters, digits"),
        (changed(environment={"A-B": "1"}), r"'A-B' is no name of an environment variable"),
        ("machines: []", r"test\.machines: tuple should have at least 1 item"),
        ("machines: [{address: a}]", r"exactly one needs role: head; found none"),
        ("machine: []", r"test\.machine: unknown key; did you mean 'machines'\?"),
        ("- a", r"test: expected a mapping"),
        ("machines: [", r"test, line 1"),
        ("cluster: {proxy: nginx}\nmachines: [{address: a, role: head}]", r"'haproxy' or 'python'"),
        ("machines: [{address: '${NO_SUCH_HOST}', role: head}]", r"NO_SUCH_HOST is not set"),
    ],
)
def test_errors_are_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_inventory(text, "test")
    assert "\n" not in caught.value.message


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/none\.yaml: No such file .*--inventory"):
        load_inventory(Path("/none.yaml"))


def test_machines_are_chosen_by_name_or_address() -> None:
    inventory = parse_inventory(yaml.safe_dump(TWO), "test")
    assert [m.name for m in inventory.select(("10.0.0.2", "b"))] == ["b"]
    assert len(inventory.select(())) == 2
    with pytest.raises(ConfigError, match=r"no machine 'c' in the inventory; it has a, b"):
        inventory.select(("c",))


COMMENTED = """\
# Ours.
machines:
  - name: a # the old one
    address: 10.0.0.1
    role: head
  # By the window.
  - name: b
    address: 10.0.0.2
    labels:
      room: b12

  - {name: c, address: 10.0.0.3}

# The end.
ssh: {user: ada}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "inventory.yaml"
    path.write_text(COMMENTED)
    path.chmod(0o640)
    return path


def test_adding_keeps_comments_and_mode(path: Path) -> None:
    inventory = add_machine(path, {"address": "10.0.0.4", "name": "d", "user": "bob"})

    assert [machine.name for machine in inventory.machines] == ["a", "b", "c", "d"]
    assert path.read_text() == COMMENTED.replace(
        "  - {name: c, address: 10.0.0.3}\n",
        "  - {name: c, address: 10.0.0.3}\n  - {address: 10.0.0.4, name: d, user: bob}\n",
    )
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("b", "  - name: b\n    address: 10.0.0.2\n    labels:\n      room: b12\n"),
        ("c", "  - {name: c, address: 10.0.0.3}\n"),
    ],
)
def test_removing_cuts_the_machine_and_nothing_else(path: Path, name: str, lines: str) -> None:
    inventory = remove_machine(path, name)
    assert name not in [machine.name for machine in inventory.machines]
    assert path.read_text() == COMMENTED.replace(lines, "")


def test_adding_and_removing_gives_the_text_back(path: Path) -> None:
    add_machine(path, {"address": "10.0.0.4", "name": "d"})
    remove_machine(path, "d")
    assert path.read_text() == COMMENTED


def test_a_change_that_makes_no_inventory_leaves_the_file_alone(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"address 10\.0\.0\.1 appears twice"):
        add_machine(path, {"address": "10.0.0.1", "name": "d"})
    with pytest.raises(ConfigError, match=r"a is the head"):
        remove_machine(path, "a")
    assert path.read_text() == COMMENTED


def test_a_list_in_one_line_is_not_edited(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yaml"
    path.write_text("machines: [{address: a, role: head}]\n")
    with pytest.raises(ConfigError, match=r"write machines: as a list of lines"):
        add_machine(path, {"address": "b"})


def test_a_file_without_a_last_newline_can_grow(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yaml"
    path.write_text("machines:\n- address: a\n  role: head")
    add_machine(path, {"address": "b"})
    assert path.read_text() == "machines:\n- address: a\n  role: head\n- {address: b}\n"
