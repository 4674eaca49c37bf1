"""A ModelReplica's claim on its device: the card's lock, and its engine's environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.config.env import CARD_LOCK_TIMEOUT_S, SIMULATED_ARC_CARDS, read_seconds
from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError
from serve_app.deployments.cluster_resources import ARC_GPU, IGPU
from serve_app.deployments.environment import has_unit_instances
from serve_app.hardware.affinity import CoreClaim, claim_cores, physical_cores
from serve_app.hardware.card_lock import CardLock, acquire_all, acquire_free, release_all
from serve_app.hardware.cards import Card, list_cards
from serve_app.hardware.cpu import read_cpu_info
from serve_app.hardware.numa import cores_by_node

logger = logging.getLogger(__name__)

_CORE_WAIT_S = 1.0
_MIN_CORES_TO_SPLIT = 8
"""From this many cores on, an engine on CPU leaves the preprocessors' cores alone."""


@dataclass(frozen=True, slots=True)
class DeviceClaim:
    """A device that this replica, and the engine process that inherits `pass_fds`, alone hold.

    `device` is the torch device type for the engine; `env` must be set in the engine's process
    before torch is imported; `cpu_ids` are the cpus its threads may use (None: all).
    """

    device: str
    description: str
    env: dict[str, str] = field(default_factory=dict)
    card_indices: tuple[int, ...] = ()
    locks: tuple[CardLock, ...] = ()
    cores: CoreClaim | None = None
    cpu_ids: tuple[int, ...] | None = None

    @property
    def pass_fds(self) -> tuple[int, ...]:
        """Descriptors for the engine process, so that the locks live as long as it does."""
        return tuple(lock.fileno() for lock in self.locks)

    def release(self) -> None:
        """Give up this process's part of the claim."""
        release_all(self.locks)
        if self.cores is not None:
            self.cores.release()


def claim_device(config: AppConfig, assigned: Mapping[str, Sequence[int]]) -> DeviceClaim:
    """Claim what `model_replica.pool` says; blocks up to XERAY_CARD_LOCK_TIMEOUT_S.

    `assigned` has the unit numbers that the raylet gave this replica by resource (arc_gpu, igpu,
    GPU), empty where it numbers none: then the first free cards are taken. Raises ConfigError where
    a card does not exist or stays in use.
    """
    pool = config.model_replica.pool
    if pool == "cpu":
        return _claim_cpu(config)
    if pool == "cuda":
        return _claim_cuda(config, assigned.get("GPU", ()))
    resource = ARC_GPU if pool == "arc" else IGPU
    cards = list_cards().discrete if pool == "arc" else list_cards().integrated
    return _claim_intel(config, cards, assigned.get(resource, ()))


def numbered_resources(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return which of our card resources this node's raylet numbers."""
    variables = dict(os.environ if environ is None else environ)
    return tuple(name for name in (ARC_GPU, IGPU) if has_unit_instances(name, variables))


def _claim_intel(
    config: AppConfig, cards: tuple[Card, ...], assigned: Sequence[int]
) -> DeviceClaim:
    section = config.model_replica
    kind = "Arc cards" if section.pool == "arc" else "integrated GPUs"
    needed = max([section.num_cards, *(index + 1 for index in assigned)])
    if needed > len(cards):
        raise ConfigError(
            f"model_replica: Ray gave this replica {needed} {kind}, but this host has {len(cards)};"
            f" start Ray with the number that exists, or set {SIMULATED_ARC_CARDS.name}"
        )
    locks = _take_locks([card.lock_name for card in cards], section.num_cards, assigned)
    names = {lock.name for lock in locks}
    held = [card for card in cards if card.lock_name in names]
    indices = tuple(card.index for card in held)
    mask = ",".join(str(card.level_zero_index) for card in held)
    is_simulated = all(card.is_simulated for card in held)
    device = config.engine.device
    if device == "auto":
        device = "cpu" if is_simulated else "xpu"
    return DeviceClaim(
        device=device,
        description=", ".join(f"{card.name} ({card.pci_address})" for card in held),
        env={"ZE_AFFINITY_MASK": mask, "ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1"},
        card_indices=indices,
        locks=tuple(locks),
    )


def _claim_cuda(config: AppConfig, assigned: Sequence[int]) -> DeviceClaim:
    num_cards = config.model_replica.num_cards
    if len(assigned) < num_cards:
        raise ConfigError(
            f"model_replica: Ray gave this replica {len(assigned)} GPUs of {num_cards};"
            " start Ray with --num-gpus and the number that exists"
        )
    locks = _take_locks([f"cuda-{i}" for i in sorted(assigned)], num_cards, range(num_cards))
    ids = ",".join(str(index) for index in assigned)
    return DeviceClaim(
        device="cuda" if config.engine.device == "auto" else config.engine.device,
        description=f"CUDA device {ids}",
        env={"CUDA_VISIBLE_DEVICES": ids},
        card_indices=tuple(assigned),
        locks=tuple(locks),
    )


def _take_locks(names: list[str], count: int, assigned: Sequence[int]) -> list[CardLock]:
    timeout_s = read_seconds(CARD_LOCK_TIMEOUT_S)
    if assigned:
        return acquire_all([names[index] for index in assigned], timeout_s)
    return acquire_free(names, count, timeout_s)


def _claim_cpu(config: AppConfig) -> DeviceClaim:
    device = "cpu" if config.engine.device == "auto" else config.engine.device
    claim = _own_cores(config.engine.num_threads)
    if claim is not None:
        cpu_ids: tuple[int, ...] | None = claim.cpu_ids
    else:
        cpu_ids = _cores_beside_preprocessors(config)
    return DeviceClaim(device=device, description="CPU", cores=claim, cpu_ids=cpu_ids)


def _own_cores(num_threads: int | None) -> CoreClaim | None:
    """Claim as many cores as the engine has threads, on one NUMA node where one has so many.

    Preprocessors start from the other end. None where that fails.
    """
    if num_threads is None:
        return None
    order = cores_by_node(physical_cores(), read_cpu_info().numa_nodes, num_threads)
    try:
        return claim_cores(num_threads, role="engine", preferred=order, timeout_s=_CORE_WAIT_S)
    except ConfigError as error:
        logger.warning("the engine's threads share cores with another engine: %s", error.message)
        return None


def _cores_beside_preprocessors(config: AppConfig) -> tuple[int, ...] | None:
    cores = physical_cores()
    reserved = config.preprocessor.xeon_cores * config.preprocessor.num_replicas
    if len(cores) < _MIN_CORES_TO_SPLIT or reserved * 2 > len(cores):
        return None
    return tuple(sorted(cpu_id for core in cores[reserved:] for cpu_id in core.cpu_ids))
