"""nftables for each machine: what Ray opens on all interfaces answers to the other nodes alone.

Ray takes most of its ports at random, so closing a list of them would not do: what is not named
here is closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from serve_app.cli.cluster.inventory import Inventory, Machine
from serve_app.cli.cluster.render.templates import MADE_BY, fill
from serve_app.core.errors import ConfigError

HAPROXY_METRICS_PORT = 9101
_SSH_PORT = 22
_FAMILIES = ((4, "ipv4", "ip"), (6, "ipv6", "ip6"))


def render(inventory: Inventory) -> dict[str, str]:
    """Return `xeray.nft`, the same for every machine. Raises ConfigError for one without address.

    nftables knows addresses only: a name would be looked up once, when the rules are loaded.
    """
    settings = inventory.firewall
    nodes = [_address(machine) for machine in inventory.machines]
    ssh_ports = {m.port or inventory.ssh.port or _SSH_PORT for m in inventory.machines}
    text = fill(
        "firewall.nft.j2",
        nodes=_rules([str(node) for node in nodes], ""),
        api=_rules(settings.clients, _ports([settings.service_port])),
        ssh=_rules(settings.administration, _ports(ssh_ports)),
        monitoring=_rules(
            settings.monitoring, _ports([settings.exporter_port, HAPROXY_METRICS_PORT])
        ),
        allowed=[
            f"{protocol} dport {_set(ports)} accept"
            for protocol, ports in (("tcp", settings.allowed_tcp), ("udp", settings.allowed_udp))
            if ports
        ],
    )
    return {"xeray.nft": MADE_BY.format(kind="firewall") + text}


def _address(machine: Machine) -> IPv4Address | IPv6Address:
    try:
        return ip_address(machine.ray_address)
    except ValueError:
        raise ConfigError(
            f"machines: {machine.name}: a firewall needs an address, not the name"
            f" {machine.ray_address}: set node_ip"
        ) from None


def _rules(networks: Sequence[str], condition: str) -> list[str]:
    """Return a rule per address family that accepts `condition` from the networks."""
    rules = []
    for version, family, keyword in _FAMILIES:
        found = [network for network in map(ip_network, networks) if network.version == version]
        if any(network.prefixlen == 0 for network in found):
            source = f"meta nfproto {family}"
        elif found:
            source = f"{keyword} saddr {_set(_short(str(network)) for network in found)}"
        else:
            continue
        rules.append(" ".join(filter(None, (source, condition, "accept"))))
    return rules


def _short(network: str) -> str:
    """Return a network of one address as that address."""
    return network.removesuffix("/32").removesuffix("/128")


def _ports(ports: Iterable[int]) -> str:
    return f"tcp dport {_set(sorted(ports))}"


def _set(values: Iterable[object]) -> str:
    return "{ " + ", ".join(map(str, values)) + " }"
