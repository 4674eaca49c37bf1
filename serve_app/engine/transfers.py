"""Copies from the host to the device that run beside the device's work."""

from __future__ import annotations

from typing import Any

import torch


class Uploads:
    """Sends tensors on a stream of its own, from pinned memory, without the host waiting.

    A step's integers thus travel while the step before still computes; the stream that uses them
    waits for the copy on the device. On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = None
        if device.type != "cpu":
            self._module = torch.get_device_module(device)
            self._stream = self._module.Stream(device)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, ready for the stream that is current there."""
        if self._module is None:
            return tensor
        current = self._module.current_stream(self._device)
        with self._module.stream(self._stream):
            there = tensor.pin_memory().to(self._device, non_blocking=True)
        current.wait_stream(self._stream)
        # its memory is the side stream's: not to be given away while the current one reads it
        there.record_stream(current)
        return there
