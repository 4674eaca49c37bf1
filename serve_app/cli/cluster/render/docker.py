"""Dockerfiles: one template; the images differ in torch's index and in the driver's packages."""

from __future__ import annotations

from serve_app import __version__
from serve_app.cli.bootstrap import EMBEDDED_MODEL, INDEX_NAMES, TORCH_VERSION, TORCH_WHEELS
from serve_app.cli.cluster.inventory import Inventory
from serve_app.cli.cluster.render.templates import fill
from serve_app.cli.cluster.render_settings import RAY_VERSION

DRIVER_PACKAGES = {
    "cpu": "",
    "xpu": "intel-opencl-icd libze1 libze-intel-gpu1",
}
"""Packages of the GPU's user-space driver, by Ubuntu's names: OpenCL, Level Zero, its driver."""

_TITLES = {
    "cpu": "XeRay on CPU cores: a server without a GPU, or a node that only prepares requests.",
    "xpu": "XeRay on Intel GPUs: run it with --device /dev/dri --group-add RENDER_GID.",
}


def render(inventory: Inventory) -> dict[str, str]:
    """Return `cpu.Dockerfile`, `xpu.Dockerfile` and the .dockerignore that both need."""
    del inventory  # an image fits every cluster
    files = {
        f"{flavour}.Dockerfile": fill(
            "Dockerfile.j2",
            flavour=flavour,
            title=_TITLES[flavour],
            version=__version__,
            torch=f"torch=={TORCH_VERSION}.*",
            torch_index=f"{TORCH_WHEELS}/{INDEX_NAMES[flavour]}",
            driver_packages=packages,
            ray=f"ray[serve]=={RAY_VERSION}",
            embedded_model=EMBEDDED_MODEL,
        )
        for flavour, packages in DRIVER_PACKAGES.items()
    }
    # BuildKit reads NAME.Dockerfile.dockerignore beside the Dockerfile: only the wheel is sent.
    for name in list(files):
        files[f"{name}.dockerignore"] = "*\n!dist/*.whl\n"
    return files
