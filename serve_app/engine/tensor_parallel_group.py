"""What every rank of a tensor-parallel engine does: choose its card, and meet the others."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from serve_app.core.errors import EngineError
from serve_app.models.linear import Reduce

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
"""torch.distributed's backend for each device type."""

_HOST = "127.0.0.1"
_MEETING_TIMEOUT = timedelta(minutes=10)


class RankLostError(EngineError):
    """A rank died or fell out of step: the engine cannot go on without its part."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} of the tensor-parallel engine was lost")


def rank_device(device_type: str, rank: int) -> torch.device:
    """The device of a rank: the card of its number among those that the process sees."""
    if device_type == "cpu":
        return torch.device("cpu")
    torch.get_device_module(device_type).set_device(rank)
    return torch.device(device_type, rank)


def meeting_point(num_ranks: int, port: int | None = None) -> Any:
    """The store where ranks meet, over loopback: a new one on a free port, or rank 0's at `port`.

    A torch.distributed.TCPStore, whose type torch does not export.
    """
    store = dist.TCPStore  # type: ignore[attr-defined]
    if port is None:
        return store(_HOST, 0, num_ranks, is_master=True, wait_for_workers=False)
    return store(_HOST, port, num_ranks, is_master=False)


def join(store: Any, rank: int, num_ranks: int, device: torch.device) -> Reduce:
    """Meet the other ranks at `store`; returns the sum over ranks."""
    rank_device(device.type, rank)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    dist.init_process_group(
        BACKENDS[device.type],
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=_MEETING_TIMEOUT,
    )

    def reduce(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    return reduce
