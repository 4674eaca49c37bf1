"""Runs the checks, and packs a support archive from which secrets are taken out."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from serve_app.doctor import cpu_checks, gpu_checks, port_checks, speed_checks, system_checks
from serve_app.doctor.host import Host
from serve_app.doctor.result import Check, CheckResult, Status, skipped
from serve_app.hardware.sysfs import read_text

QUICK_CHECKS: tuple[Check, ...] = (
    system_checks.check_versions,
    gpu_checks.check_driver,
    gpu_checks.check_device_nodes,
    gpu_checks.check_runtime_packages,
    gpu_checks.check_torch_xpu,
    gpu_checks.check_memory_window,
    gpu_checks.check_link,
    gpu_checks.check_slots,
    gpu_checks.check_core_dumps,
    cpu_checks.check_firmware,
    cpu_checks.check_governor,
    cpu_checks.check_instruction_sets,
    cpu_checks.check_placement,
    cpu_checks.check_pressure,
    cpu_checks.check_memory_channels,
    cpu_checks.check_memory_errors,
    cpu_checks.check_huge_pages,
    port_checks.check_listening,
    system_checks.check_disk,
    system_checks.check_clock,
    system_checks.check_ray_resources,
)
"""Checks that only read."""

SPEED_CHECKS: tuple[Check, ...] = (
    speed_checks.check_memory_bandwidth,
    speed_checks.check_products,
)
"""Checks that take seconds and a device."""

_FILES = (
    "proc/cpuinfo",
    "proc/meminfo",
    "proc/cmdline",
    "proc/version",
    "proc/modules",
    "etc/os-release",
)
_COMMANDS = (
    ("dmesg.txt", ("dmesg", "--ctime")),
    ("lspci.txt", ("lspci", "-nnk")),
    ("packages.txt", ("dpkg-query", "-W", "libze*", "intel-*", "libigc*", "linux-image-*")),
)
_SECRETS = (
    (re.compile(r"(?i)([\w-]*(?:key|token|secret|password)\s*[=:]\s*)\S+"), r"\1***"),
    (re.compile(r"(?i)(authorization:\s*)\S+(\s+\S+)?"), r"\1***"),
    (re.compile(r"\b(?:sk|hf|ghp|xr)[-_][A-Za-z0-9_-]{8,}"), "***"),
    (re.compile(r"\b(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}\b"), "**:**:**:**:**:**"),
    (re.compile(r"(?i)\b((?:serial|uuid)[\w ]*[=:]\s*)\S+"), r"\1***"),
    (re.compile(r"(/home/)[^/\s:]+"), r"\1***"),
)


def run_checks(
    host: Host,
    checks: Sequence[Check] = QUICK_CHECKS,
    on_check: Callable[[str], None] = lambda name: None,
) -> Iterator[CheckResult]:
    """Yield the results. A check that breaks is a SKIP that says so: the others still count.

    `on_check` is told the name of each check before it runs.
    """
    for check in checks:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        on_check(name)
        try:
            yield from check(host)
        except Exception as error:  # whatever a strange machine brings, the report goes on
            yield skipped(name, f"the check itself failed: {type(error).__name__}: {error}")


def exit_code(results: Sequence[CheckResult]) -> int:
    """Return 1 where anything FAILs, else 0."""
    return int(any(result.status is Status.FAIL for result in results))


def redact(text: str) -> str:
    """Return `text` without keys, tokens, serial numbers, hardware addresses and user names."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def write_bundle(path: Path, host: Host, results: Sequence[CheckResult]) -> list[str]:
    """Write a .tar.gz of the report, kernel messages and versions; returns the files' names.

    Each file is redacted. Nothing of prompts, answers or keys is read in the first place.
    """
    texts = {"report.json": json.dumps([asdict(result) for result in results], indent=2)}
    for name in _FILES:
        text = read_text(host.root / name)
        if text is not None:
            texts[name.replace("/", "-")] = text
    for name, command in _COMMANDS:
        output = host.run(*command)
        if output is not None:
            texts[name] = output.text
    with tarfile.open(path, "w:gz") as archive:
        for name, text in texts.items():
            data = redact(text).encode()
            member = tarfile.TarInfo(f"xeray-doctor/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return list(texts)
