"""C++ sources of this folder as libraries: compiled where they run, and kept.

A source is compiled once per processor and compiler (some seconds) and kept in the user's cache
folder, where that can be written. Without g++, with another OpenMP than torch's, or where it does
not compile, there is none.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from serve_app.config.cache_folder import cache_folder
from serve_app.hardware.cpu import read_cpu_info

_LOG = logging.getLogger(__name__)
_HEADERS = sorted(Path(__file__).parent.glob("cpu_*.h"))
_FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fno-trapping-math", "-fPIC", "-shared", "-fopenmp"),
)
_COMPILE_TIMEOUT_S = 60.0


def load_library(source: Path) -> ctypes.CDLL | None:
    """The compiled source, made where it is not yet; None with one line in the log."""
    compiler = shutil.which("g++")
    if compiler is None:
        _LOG.info("g++ is not installed: %s is not used, ATen computes, slower", source.name)
        return None
    if not _shares_openmp():
        return None
    try:
        path = _library_path(compiler, source)
        if not path.is_file() and not _can_keep(path.parent):
            return _load_once(compiler, source)
        if not path.is_file():
            _compile(compiler, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        line = next((line for line in reason.splitlines() if line.strip()), type(error).__name__)
        _LOG.warning("%s cannot be compiled (%s): ATen computes, slower", source.name, line)
        return None


def _shares_openmp() -> bool:
    """Whether torch runs GCC's OpenMP: a second runtime's threads would fight for the cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return False
    return "libgomp.so.1" in maps and "libiomp5" not in maps


def _library_path(compiler: str, source: Path) -> Path:
    """A file per source, flags, processor and compiler: a copied cache never runs elsewhere."""
    info = read_cpu_info()
    stat = os.stat(compiler)
    sources = [path.read_bytes() for path in (source, *_HEADERS)]
    facts = (sources, _FLAGS, info.model_name, sorted(info.flags))
    digest = hashlib.sha256(repr((*facts, compiler, stat.st_size, stat.st_mtime_ns)).encode())
    return cache_folder("kernels") / f"{source.stem}-{digest.hexdigest()[:16]}.so"


def _can_keep(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _load_once(compiler: str, source: Path) -> ctypes.CDLL:
    """Compile for this process alone, which costs each start seconds: a home may be read-only."""
    with tempfile.TemporaryDirectory(prefix="xeray-kernels-") as folder:
        path = Path(folder) / f"{source.stem}.so"
        _compile(compiler, source, path)
        return ctypes.CDLL(str(path))


def _compile(compiler: str, source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *_FLAGS, "-o", name, str(source)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
        )
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
