"""Finding intel-extension-for-pytorch and letting it optimise a network.

The extension ended with 2.8 (its repository is archived), works only beside the torch of the same
minor version, and looks itself for a wrong one by ending the process. So versions are compared
before anything of it is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from typing import Any, Literal

import torch

from serve_app.core.errors import ConfigError

_LOG = logging.getLogger(__name__)
_MODULE = "intel_extension_for_pytorch"
_DISTRIBUTION = "intel-extension-for-pytorch"
_FIX = "run: pip install 'xeray[ipex]' in an environment of its own"

Optimizer = Literal["ipex.llm.optimize", "ipex.optimize"]


def import_ipex() -> Any:
    """Return the extension's module.

    Raises ConfigError, one line with the fix, where it is absent or made for another torch.
    """
    version = _version()
    if version is None:
        raise ConfigError(
            f"engine.kind: ipex needs {_DISTRIBUTION}, which is not installed; {_FIX}",
            param="engine.kind",
        )
    if _minor(version) != _minor(torch.__version__):
        raise ConfigError(
            f"engine.kind: {_DISTRIBUTION} {version} works only with torch {_minor(version)}, but"
            f" torch {torch.__version__} is installed; {_FIX}",
            param="engine.kind",
        )
    try:
        return importlib.import_module(_MODULE)
    except Exception as error:  # AttributeError and OSError among them: it loads libraries
        raise ConfigError(
            f"engine.kind: {_DISTRIBUTION} {version} cannot be loaded"
            f" ({type(error).__name__}: {_first_line(error)}); {_FIX}",
            param="engine.kind",
        ) from error


def optimize(ipex: Any, network: Any, dtype: torch.dtype) -> tuple[Any, Optimizer]:
    """Return the optimised network, and which of the extension's functions did it.

    `ipex.llm.optimize` knows some decoder families and replaces their layers by fused ones; what it
    refuses goes to `ipex.optimize`, which is said in the log and in the engine's facts. Raises
    ConfigError where neither takes the network.
    """
    try:
        return ipex.llm.optimize(network, dtype=dtype, inplace=True), "ipex.llm.optimize"
    except Exception as error:
        _LOG.warning("ipex.llm.optimize refused the network: %s", _first_line(error))
    try:
        # Prepacked bf16 weights need AVX-512 or avx_ne_convert; plain ones run everywhere.
        packs = dtype is torch.float32
        optimized = ipex.optimize(network, dtype=dtype, inplace=True, weights_prepack=packs)
    except Exception as error:
        raise ConfigError(
            f"engine.kind: neither ipex.llm.optimize nor ipex.optimize takes this network"
            f" ({_first_line(error)}); set engine.kind: auto",
            param="engine.kind",
        ) from error
    return optimized, "ipex.optimize"


def module_types(network: Any) -> str:
    """Qualified types of the network and of its first layer that the extension made, if any."""
    types = [type(module) for module in network.modules()]
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in types]
    replaced = next((name for name in names if name.startswith(_MODULE)), None)
    return names[0] if replaced is None or replaced == names[0] else f"{names[0]} with {replaced}"


def _version() -> str | None:
    module = sys.modules.get(_MODULE)
    if module is not None:
        return str(module.__version__)
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
