"""Cards and integrated GPUs that people ask about: memory, bandwidth, matrix rate, power.

Every value has its source beside it, and a value without one is left out (None). Where a page gives
a memory's transfer rate and not its bandwidth, ours is rate × 16 bytes of a 128-bit bus. Widely
copied tables get some of these wrong (A770 512 GB/s, Radeon 680M 112 GB/s, Apple M2 128 GB/s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SHARED_MEMORY_SHARE = 0.6
"""Share of the system's memory that a model on an integrated GPU may take: the rest is the system's
and the programs', and drivers refuse much more."""

REACHED_SHARE = (0.45, 0.65)
"""Part of the memory bandwidth that published results of batch-1 decoding reach on such cards."""

_ZINC = "https://zolotukhin.ai/zinc/docs/intel-gpu-reference/"
_ARCHITOSH = "https://architosh.com/2025/09/product-review-intel-arc-pro-b50-gpu"
_ASKGEEK_EN = "https://askgeek.io/en/cpus/Apple/M2-8-core-GPU"
_ASKGEEK_ES = "https://askgeek.io/es/cpus/Apple/M2-10-core-GPU"
_BEEBOM = "https://beebom.com/intel-announces-core-ultra-200v-lunar-lake/"
_CPUTRONIC = "https://cputronic.com/cpu/amd-ryzen-7-7840u"
_FPSBENCH_680M = "https://fpsbench.com/compare/gpu/amd-radeon-680m-vs-intel-arc-a550m"
_FPSBENCH_780M = "https://fpsbench.com/compare/gpu/amd-radeon-760m-vs-amd-radeon-780m"
_FPSBENCH_B580 = "https://fpsbench.com/compare/gpu/intel-arc-b580-vs-intel-uhd-graphics-730"
_HMC_TECH = "https://hmc-tech.com/gpu/intel-arc-pro-b50-vs-nvidia-rtx-pro-4000-blackwell"
_PCWORLD = "https://issuhub.com/view/index/28440?pageIndex=11"
_TECHNICAL_CITY = "https://technical.city/en/video/Iris-Plus-Graphics-650-vs-Arc-Pro-B50"
_DIGITBLUE = "https://www.digitblue.com/take-a-dip-in-intels-lunar-lake/"
_NOTEBOOKCHECK_6800U = (
    "https://www.notebookcheck.net/R7-6800U-vs-R5-5500U-vs-6920HQ_14088_12981_6976.247596.0.html"
)
_NOTEBOOKCHECK_XE = (
    "https://www.notebookcheck.se/"
    "Intel-Iris-Xe-G7-96EUs-benchmarks-prestanda-specifikationer.554577.0.html"
)
_SVETHARDWARE = (
    "https://www.svethardware.cz/intel-zverejnil-oficialni-specifikace-grafickych-karet-arc/58344"
)
_ZINC_B70 = (
    "https://zolotukhin.ai/blog/2026-05-18-intel-arc-pro-b70-deep-dive-and-zincs-t-intel-plan/"
)
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and the address of the page that it comes from; `how` says what was derived."""

    value: float
    source: str
    how: str = ""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One device. Memory in GiB (None: shared with the system), bandwidth in GB/s, power in W.

    `matrix`: dense INT8 TOPS of its matrix engines, None where it has none or nothing is sourced;
    `fp32`: TFLOPS. `served_by`: xpu, or what else takes it.
    """

    name: str
    vendor: Literal["Intel", "AMD", "Apple"]
    bandwidth: Figure
    memory: Figure | None = None
    matrix: Figure | None = None
    fp32: Figure | None = None
    power: Figure | None = None
    note: str = ""

    @property
    def is_integrated(self) -> bool:
        """Whether it shares the system's memory."""
        return self.memory is None

    @property
    def torch_device(self) -> str:
        """Type of the device for memory arithmetic; what has no Intel GPU is served on its CPU."""
        return "xpu" if self.vendor == "Intel" else "cpu"

    @property
    def pool(self) -> str:
        """`model_replica.pool` that serves it."""
        if self.vendor != "Intel":
            return "cpu"
        return "igpu" if self.is_integrated else "arc"

    def usable_bytes(self, system_bytes: int) -> int:
        """Bytes that a model may take: the card's own, or the share of `system_bytes`."""
        if self.memory is not None:
            return int(self.memory.value * _GIB)
        return int(system_bytes * SHARED_MEMORY_SHARE)


def _lpddr(megatransfers: int, source: str) -> Figure:
    return Figure(
        megatransfers * 16 / 1000, source, f"{megatransfers} MT/s × 16 bytes of a 128-bit bus"
    )


DEVICES: tuple[DeviceFacts, ...] = (
    DeviceFacts(
        "Arc A770",
        "Intel",
        memory=Figure(16, _SVETHARDWARE),
        bandwidth=Figure(560, _SVETHARDWARE),
        matrix=Figure(275, _SVETHARDWARE, "512 XMX × 256 INT8 op/clock × 2.1 GHz"),
        power=Figure(225, _SVETHARDWARE),
    ),
    DeviceFacts(
        "Arc B580",
        "Intel",
        memory=Figure(12, _FPSBENCH_B580),
        bandwidth=Figure(456, _FPSBENCH_B580),
        matrix=Figure(219, _ARCHITOSH, "20 Xe-cores × 4096 INT8 op/clock × 2.67 GHz"),
        fp32=Figure(13.67, _FPSBENCH_B580),
        power=Figure(190, _FPSBENCH_B580),
    ),
    DeviceFacts(
        "Arc Pro B50",
        "Intel",
        memory=Figure(16, _TECHNICAL_CITY),
        bandwidth=Figure(224, _TECHNICAL_CITY),
        matrix=Figure(170, _HMC_TECH),
        fp32=Figure(10.65, _TECHNICAL_CITY),
        power=Figure(70, _TECHNICAL_CITY),
    ),
    DeviceFacts(
        "Arc Pro B60",
        "Intel",
        memory=Figure(24, _ZINC),
        bandwidth=Figure(456, _ZINC),
        matrix=Figure(197, _ZINC),
        fp32=Figure(12.28, _ZINC),
        power=Figure(200, _ZINC, "120 W to 200 W by maker"),
    ),
    DeviceFacts(
        "Arc Pro B65",
        "Intel",
        memory=Figure(32, _ZINC),
        bandwidth=Figure(608, _ZINC),
        matrix=Figure(197, _ZINC),
        fp32=Figure(12.28, _ZINC),
        power=Figure(200, _ZINC),
    ),
    DeviceFacts(
        "Arc Pro B70",
        "Intel",
        memory=Figure(32, _ZINC_B70),
        bandwidth=Figure(608, _ZINC_B70),
        matrix=Figure(367, _ZINC_B70),
        fp32=Figure(22.94, _ZINC),
        power=Figure(230, _ZINC_B70),
    ),
    DeviceFacts(
        "Iris Xe 96 EU",
        "Intel",
        bandwidth=_lpddr(4266, _PCWORLD),
        fp32=Figure(2.07, _NOTEBOOKCHECK_XE, "768 lanes × 2 × 1.35 GHz"),
        power=Figure(28, _NOTEBOOKCHECK_XE, "of the whole processor, 15 W to 28 W"),
        note="Tiger Lake; no matrix engines",
    ),
    DeviceFacts(
        "Arc 140V",
        "Intel",
        bandwidth=_lpddr(8533, _BEEBOM),
        matrix=Figure(67, _DIGITBLUE),
        power=Figure(30, _BEEBOM, "of the whole processor with its memory"),
        note="Lunar Lake",
    ),
    DeviceFacts(
        "Radeon 680M",
        "AMD",
        bandwidth=_lpddr(6400, _NOTEBOOKCHECK_6800U),
        fp32=Figure(3.38, _FPSBENCH_680M),
        power=Figure(28, _NOTEBOOKCHECK_6800U, "of the whole Ryzen 7 6800U, 15 W to 28 W"),
        note="no matrix engines",
    ),
    DeviceFacts(
        "Radeon 780M",
        "AMD",
        bandwidth=_lpddr(7500, _CPUTRONIC),
        fp32=Figure(8.29, _FPSBENCH_780M, "with dual issue"),
        power=Figure(28, _CPUTRONIC, "of the whole Ryzen 7 7840U"),
    ),
    DeviceFacts(
        "Apple M2",
        "Apple",
        bandwidth=_lpddr(6400, _ASKGEEK_EN),
        fp32=Figure(3.58, _ASKGEEK_ES),
        note="10 GPU cores, at most 24 GB; no matrix engines in the GPU",
    ),
)
"""AMD's and Apple's GPUs are planned for; XeRay serves such a machine by its CPU engine, or through
torch's `cuda` device (ROCm), untested."""


def find_device(name: str) -> DeviceFacts | None:
    """The device of that name, upper and lower case alike, None where the table lacks it."""
    wanted = name.strip().lower()
    return next((each for each in DEVICES if each.name.lower() == wanted), None)
