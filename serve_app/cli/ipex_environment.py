"""Make the environment of `make test-ipex`: intel-extension-for-pytorch beside the torch it needs.

Run by the machine's own Python before anything is installed, like `bootstrap`, whose parts it uses.
The environment is apart from XeRay's own: the extension works only with torch 2.8.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `-I` leaves the script's folder out

from bootstrap import (  # type: ignore[import-not-found]
    EMBEDDED_MODEL,
    ROOT,
    TORCH_WHEELS,
    BootstrapError,
    Environment,
    is_reachable,
    make_venv,
    project_fingerprint,
    stage,
)

TORCH = "torch==2.8.*"
GIB = 1 << 30
# Unpacked, and the largest wheel beside it: torch with CUDA's libraries, or without them.
NEEDED_BYTES = {"PyPI": 9 * GIB, "PyTorch's index for CPU": 4 * GIB}
DOWNLOAD = {
    "PyPI": "about 3.5 GB (torch 2.8 with CUDA's libraries)",
    "PyTorch's index for CPU": "about 0.7 GB",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the environment unless it is there; 1 where it cannot be, 130 at Ctrl-C, in one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-ipex")
    options = parser.parse_args(argv)
    try:
        prepare(Environment(options.venv.absolute()))
    except BootstrapError as error:
        print(f"[xeray] {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n[xeray] interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def prepare(environment: Environment) -> None:
    """Install torch 2.8, the extension, the project and the tests' needs.

    Raises BootstrapError where the disk is too full or pip fails.
    """
    stamp = {"ipex": project_fingerprint()}
    if environment.python.exists() and environment.read_stamp() == stamp:
        return
    index = f"{TORCH_WHEELS}/cpu"
    origin = "PyTorch's index for CPU" if is_reachable(f"{index}/torch/") else "PyPI"
    check_disk(environment.path.parent, NEEDED_BYTES[origin])
    print(
        f"[xeray] {environment.path.name} will hold {TORCH} and intel-extension-for-pytorch 2.8"
        f" from {origin}: a download of {DOWNLOAD[origin]}",
        flush=True,
    )
    make_venv(environment)
    if origin != "PyPI":
        with stage(f"installing {TORCH}"):
            _install(environment, "--index-url", index, TORCH)
    with stage("installing the extension and the project"):
        _install(environment, "-e", f"{ROOT}[ipex,test]", EMBEDDED_MODEL)
    environment.write_stamp(stamp)


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise BootstrapError where `folder`'s file system has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise BootstrapError(
            f"{folder} has {free / GIB:.1f} GiB free, and the environment needs"
            f" {needed_bytes / GIB:.0f} GiB; make room, or name another place: --venv FOLDER"
        )


def _install(environment: Environment, *arguments: str) -> None:
    if not environment.pip(*arguments, is_large=True):
        raise BootstrapError("pip could not install it; its message is above")


if __name__ == "__main__":
    sys.exit(main())
