"""The virtual environment of the peers: beside XeRay's own, filled from the package index."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from serve_app.core.errors import ConfigError

_INSTALL_TIMEOUT_S = 1800.0
_TILE_CONFIG = Path(__file__).with_name("tile_config.h")


@dataclass(frozen=True, slots=True)
class PeerPackage:
    """What a peer needs: a requirement, the module that proves it, the build's environment."""

    requirement: str
    module: str
    build_environment: tuple[tuple[str, str], ...] = ()


LLAMA_CPP = PeerPackage(
    "llama-cpp-python>=0.3.30,<0.4",
    "llama_cpp",
    (
        ("CMAKE_ARGS", "-DGGML_NATIVE=ON"),
        ("CXXFLAGS", f"-include {_TILE_CONFIG}"),
        ("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0)))),
    ),
)
OPENVINO = PeerPackage("openvino-genai>=2026.2,<2027", "openvino_genai")


class PeerEnvironment:
    """A virtual environment at `path`; made when first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    def provide(self, package: PeerPackage) -> None:
        """Install `package` unless it is there. Raises ConfigError, with pip's last line."""
        if not self.python.exists():
            self._run([sys.executable, "-m", "venv", str(self.path)], {}, "python -m venv")
        code = f"import importlib.util as u; u.find_spec({package.module!r}).name"
        probe = [str(self.python), "-c", code]
        if subprocess.run(probe, check=False, capture_output=True).returncode == 0:
            return
        print(f"installing {package.requirement} into {self.path} …", flush=True)
        command = [str(self.python), "-m", "pip", "install", "--no-input", "-q"]
        # A wheel that pip built and kept for another machine would not run here.
        command += ["--disable-pip-version-check", "--no-cache-dir", package.requirement]
        self._run(command, dict(package.build_environment), f"pip install {package.requirement}")

    def _run(self, command: list[str], extra: dict[str, str], name: str) -> None:
        try:
            done = subprocess.run(
                command,
                check=False,
                env={**os.environ, **extra},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_INSTALL_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{name} did not end within {_INSTALL_TIMEOUT_S:g} s") from None
        if done.returncode != 0:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            raise ConfigError(f"{name} failed: {lines[-1] if lines else done.returncode}")


def default_environment() -> Path:
    """Return `.venv-peers` beside the environment that runs now."""
    return Path(sys.prefix).with_name(".venv-peers")
