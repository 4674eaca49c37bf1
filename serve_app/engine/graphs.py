"""Records a fixed sequence of device work once and replays it: one interface for all devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class StepGraphs(Protocol):
    """Turns a function over static buffers into one that repeats the same device work."""

    is_capturing: bool

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Return a replay of `function`; its result is the same tensor each time, overwritten."""
        ...


class EagerGraphs:
    """No capture: the function itself is the replay."""

    is_capturing = False

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Return `function`."""
        return function


class DeviceGraphs:
    """Capture with torch.cuda.CUDAGraph, or with its twin torch.xpu.XPUGraph (torch ≥ 2.11).

    All graphs share one memory pool: they never run at the same time. A captured function must read
    and write tensors that outlive it, and must not wait for the device.
    """

    is_capturing = True

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._graph_class: Any = getattr(
            self._module, "CUDAGraph" if device.type == "cuda" else "XPUGraph"
        )
        self._pool: Any = None
        self._graphs: list[Any] = []

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Run `function` twice on a side stream (libraries set themselves up), then record it."""
        side = self._module.Stream()
        side.wait_stream(self._module.current_stream())
        with self._module.stream(side):
            for _ in range(2):
                function()
        self._module.current_stream().wait_stream(side)
        self._module.synchronize()
        graph = self._graph_class()
        with self._module.graph(graph, pool=self._pool):
            result = function()
        if self._pool is None:
            self._pool = graph.pool()
        self._graphs.append(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def can_capture(device: torch.device) -> bool:
    """Whether this build of torch can capture on `device`."""
    if device.type == "cuda":
        return True
    return device.type == "xpu" and hasattr(torch.xpu, "XPUGraph")


def create_graphs(device: torch.device, capture_graphs: bool | None) -> StepGraphs:
    """Capture where asked for and possible; None means on for cuda, off elsewhere."""
    wanted = device.type == "cuda" if capture_graphs is None else capture_graphs
    return DeviceGraphs(device) if wanted and can_capture(device) else EagerGraphs()
