"""Checks of the processors and the memory: clocks, instruction sets, channels, errors, pages."""

from __future__ import annotations

import re
from collections.abc import Iterator

from serve_app.doctor.host import Host
from serve_app.doctor.result import CheckResult, failed, passed, skipped, warned
from serve_app.hardware.cpu import read_cpu_info
from serve_app.hardware.sysfs import read_int, read_text

_BYTES_PER_TRANSFER = 8  # a DDR channel is 64 bits wide
_PRESSURE = re.compile(r"^some .*\bavg60=([\d.]+)", re.MULTILINE)
_HIGH_PRESSURE = 50.0
_CONFIGURED_SPEED = re.compile(r"Configured (?:Memory|Clock) Speed: (\d+) M[TH]")


def check_governor(host: Host) -> Iterator[CheckResult]:
    """The frequency governor `performance` keeps the clock up between tokens."""
    name = "CPU governor"
    cpus = host.root / "sys/devices/system/cpu"
    governors = {
        text
        for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")
        if (text := read_text(path)) is not None
    }
    if not governors:
        yield skipped(name, "the kernel offers no frequency control here (a virtual machine?)")
    elif governors == {"performance"}:
        yield passed(name, "performance")
    else:
        yield warned(
            name,
            ", ".join(sorted(governors)),
            "sudo cluster/host-setup.sh --apply, or: echo performance | sudo tee "
            "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )


def check_instruction_sets(host: Host) -> Iterator[CheckResult]:
    """AMX and AVX-512, which decide the CPU engine's kernels."""
    cpu = read_cpu_info(host.root)
    name = "CPU instruction sets"
    evidence = f"{cpu.model_name}: {cpu.isa}, {cpu.num_physical_cores} cores"
    if cpu.has_amx or cpu.has_avx512:
        yield passed(name, evidence)
    else:
        yield warned(
            name,
            evidence,
            "prompts are slower without AVX-512 or AMX (Xeon W-2400/3400 and later have both)",
        )


def check_pressure(host: Host) -> Iterator[CheckResult]:
    """What else runs: each step of a CPU engine is as slow as the last of its threads."""
    name = "CPU pressure"
    found = _PRESSURE.search(read_text(host.root / "proc/pressure/cpu") or "")
    if found is None:
        yield skipped(
            name, "the kernel keeps no pressure information (its parameter psi=1 switches it on)"
        )
        return
    evidence = f"in {float(found[1]):.0f} % of the last minute a program waited for a processor"
    if float(found[1]) < _HIGH_PRESSURE:
        yield passed(name, evidence)
    else:
        yield warned(
            name,
            evidence,
            "end what `top` shows beside this service, or: sudo renice 19 -p PID",
            "busy-processor",
        )


def check_firmware(host: Host) -> Iterator[CheckResult]:
    """Microcode and firmware versions, to compare with the vendor's latest."""
    microcode = read_cpu_info(host.root).microcode
    dmi = host.root / "sys/class/dmi/id"
    bios = " ".join(
        text
        for part in ("bios_vendor", "bios_version", "bios_date")
        if (text := read_text(dmi / part))
    )
    if microcode or bios:
        yield passed("firmware", f"microcode {microcode or 'unknown'}; {bios or 'no DMI data'}")
    else:
        yield skipped("firmware", "neither microcode nor DMI data may be read")


def check_placement(host: Host) -> Iterator[CheckResult]:
    """NUMA nodes and the OpenMP variables that would fight with ours."""
    cpu = read_cpu_info(host.root)
    nodes = f"{cpu.num_sockets} socket(s), {len(cpu.numa_nodes)} NUMA node(s)"
    set_variables = [
        f"{variable}={host.env[variable]}"
        for variable in ("OMP_NUM_THREADS", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND")
        if host.env.get(variable)
    ]
    if set_variables:
        yield warned(
            "thread placement",
            f"{nodes}; {', '.join(set_variables)}",
            f"unset {' '.join(text.split('=')[0] for text in set_variables)}: "
            "each replica sets its own threads and cores",
        )
    else:
        yield passed("thread placement", nodes)


def check_memory_channels(host: Host) -> Iterator[CheckResult]:
    """Every memory channel should hold a module: bandwidth is what decoding lives on."""
    name = "memory channels"
    channels = _channels(host)
    if not channels:
        yield skipped(name, "no EDAC data; `sudo dmidecode -t memory` lists the modules")
        return
    empty = sorted(channel for channel, size in channels.items() if not size)
    if empty:
        yield warned(
            name,
            f"{len(channels) - len(empty)} of {len(channels)} populated; empty: {', '.join(empty)}",
            "put an equal module into each channel",
            "memory-channels",
        )
    else:
        yield passed(name, f"all {len(channels)} populated")


def expected_bandwidth(host: Host) -> float | None:
    """Return bytes per second that the populated channels carry, or None where it is not told."""
    populated = sum(1 for size in _channels(host).values() if size)
    output = host.run("dmidecode", "-t", "17")
    if not populated or output is None:
        return None
    speeds = [int(speed) for speed in _CONFIGURED_SPEED.findall(output.text)]
    return populated * min(speeds) * 1e6 * _BYTES_PER_TRANSFER if speeds else None


def _channels(host: Host) -> dict[str, int]:
    """Return "mcN channel M" → MiB of its modules, from EDAC."""
    channels: dict[str, int] = {}
    for dimm in sorted((host.root / "sys/devices/system/edac/mc").glob("mc*/dimm*")):
        found = re.search(r"channel (\d+)", read_text(dimm / "dimm_location") or "")
        if found:
            key = f"{dimm.parent.name} channel {found[1]}"
            channels[key] = channels.get(key, 0) + (read_int(dimm / "size") or 0)
    return channels


def check_memory_errors(host: Host) -> Iterator[CheckResult]:
    """ECC: corrected errors are a warning, uncorrected ones a failing module."""
    name = "memory errors (ECC)"
    controllers = sorted((host.root / "sys/devices/system/edac/mc").glob("mc[0-9]*"))
    if not controllers:
        yield skipped(name, "no EDAC driver: no ECC memory, or a virtual machine")
        return
    corrected = sum(read_int(folder / "ce_count") or 0 for folder in controllers)
    uncorrected = sum(read_int(folder / "ue_count") or 0 for folder in controllers)
    counts = f"{corrected} corrected, {uncorrected} uncorrected"
    fix = (
        "reseat or replace the module that /sys/devices/system/edac/mc/*/dimm*/dimm_ce_count names"
    )
    if uncorrected:
        yield failed(name, counts, fix, "ecc-errors")
    elif corrected:
        yield warned(name, counts, fix, "ecc-errors")
    else:
        yield passed(name, counts)


def check_huge_pages(host: Host) -> Iterator[CheckResult]:
    """Transparent huge pages spare the processor table walks over the weights."""
    name = "huge pages"
    text = read_text(host.root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen is None:
        yield skipped(name, "the kernel has no transparent huge pages")
    elif chosen[1] == "never":
        yield warned(
            name,
            "transparent huge pages: never",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    else:
        yield passed(name, f"transparent huge pages: {chosen[1]}")
