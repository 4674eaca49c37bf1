"""What was measured about kernels on this machine, kept for the next start.

One small JSON file per processor, number of threads and version of torch, in the user's cache
folder. A file that is missing, damaged or not writable costs a second of measuring, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import torch

from serve_app.config.cache_folder import cache_folder
from serve_app.hardware.cpu import read_cpu_info

_VERSION = 1


class KernelChoices:
    """Row counts by key, read from `path` once; `put` writes the file anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = _read(path)

    def get(self, key: str) -> int | None:
        """What was measured under `key`, or None."""
        return self._rows.get(key)

    def put(self, key: str, num_rows: int) -> None:
        """Keep a measurement, beside those that other processes have written meanwhile."""
        self._rows = _read(self._path) | self._rows | {key: num_rows}
        text = json.dumps({"version": _VERSION, "rows": self._rows}, indent=1, sort_keys=True)
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(self._path)


def kernel_choices() -> KernelChoices:
    """The file of this processor, number of threads and version of torch."""
    info = read_cpu_info()
    facts = (info.model_name, *sorted(info.flags), torch.__version__, torch.get_num_threads())
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return KernelChoices(cache_folder("kernels") / f"cpu-{name}.json")


def _read(path: Path) -> dict[str, int]:
    """The file's row counts; nothing where it cannot be read or is not what `put` writes."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, dict) or content.get("version") != _VERSION:
        return {}
    return {key: value for key, value in rows.items() if type(value) is int and value >= 0}
