"""What this host can offer to Ray: the custom resources to start its Ray node with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from serve_app.config.env import NUM_CORES, read_count
from serve_app.hardware.affinity import num_usable_cores
from serve_app.hardware.cards import list_cards

ARC_GPU = "arc_gpu"
IGPU = "igpu"
XEON_CORES = "xeon_cores"

UNIT_RESOURCES = (ARC_GPU, IGPU, XEON_CORES)
"""The resources whose units Ray shall number: a replica then learns which card is its own."""


def node_resources(
    root: Path = Path("/"), env: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Return this host's resources: `arc_gpu`, `igpu` (cards, real or simulated) and `xeon_cores`.

    Kinds that the host lacks are left out. Raises ConfigError on an environment variable that is no
    count.
    """
    cards = list_cards(root, env)
    num_cores = read_count(NUM_CORES, env)
    counts = {
        ARC_GPU: len(cards.discrete),
        IGPU: len(cards.integrated),
        XEON_CORES: num_usable_cores(root) if num_cores is None else num_cores,
    }
    return {name: float(count) for name, count in counts.items() if count}


def ray_start_command(resources: Mapping[str, float]) -> str:
    """Return the shell command that starts a Ray head node with `resources`."""
    counts = {name: int(count) for name, count in resources.items()}
    return f"ray start --head --resources='{json.dumps(counts)}'" if counts else "ray start --head"
