"""OpenVINO and OpenVINO GenAI: imported where they are installed, and only when they are needed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType

from serve_app.core.errors import ConfigError

_DEVICES = {"auto": "CPU", "cpu": "CPU", "xpu": "GPU"}


def is_openvino_installed() -> bool:
    """Whether the library is there; imports nothing."""
    return importlib.util.find_spec("openvino_genai") is not None


def openvino_version() -> str:
    """Return the version of OpenVINO GenAI. Raises ConfigError where it is not installed."""
    try:
        return importlib.metadata.version("openvino-genai")
    except importlib.metadata.PackageNotFoundError:
        raise _missing("it is not installed") from None


def import_openvino() -> tuple[ModuleType, ModuleType]:
    """Return the modules `openvino` and `openvino_genai`. Raises ConfigError where they fail."""
    # `import openvino` sends a usage event to a server of its vendor, unless that module is absent.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("openvino"), importlib.import_module("openvino_genai")
    except ImportError as error:
        raise _missing(str(error)) from None


def openvino_device(name: str) -> str:
    """Return OpenVINO's name of `engine.device`; of several GPUs the process sees only its own.

    Raises ConfigError for a device that OpenVINO does not drive or that is not there.
    """
    if name not in _DEVICES:
        raise ConfigError(
            f"engine.device: the openvino engine does not run on {name}; set engine.device: cpu"
            " or xpu, or engine.kind: native",
            param="engine.device",
        )
    device = _DEVICES[name]
    openvino, _ = import_openvino()
    found = openvino.Core().available_devices
    if not any(entry.split(".")[0] == device for entry in found):
        raise ConfigError(
            f"engine.device: OpenVINO finds no {device} here, only {', '.join(found) or 'nothing'};"
            " install the device's driver, or set engine.device: cpu",
            param="engine.device",
        )
    return device


def _missing(why: str) -> ConfigError:
    return ConfigError(
        f"engine.kind: the openvino engine needs openvino-genai ({' '.join(why.split())}); run:"
        " pip install openvino-genai, or set engine.kind: native",
        param="engine.kind",
    )
