"""The profiles: AppArmor's parsed, SELinux' compiled, seccomp's loaded by a process that serves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.cli.cluster.inventory import parse_inventory
from serve_app.cli.cluster.render import RENDERERS
from serve_app.cli.cluster.render.seccomp import profile
from serve_app.core.errors import ConfigError

from . import seccomp

SELINUX_MAKEFILE = Path("/usr/share/selinux/devel/Makefile")
START_TIMEOUT_S = 30.0
EPERM, ENOSYS = 1, 38
INVENTORY = "machines: [{address: a, role: head}]\nsecurity: {model_folders: [/srv/our.models]}"


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return RENDERERS["security"](parse_inventory(INVENTORY, "test"))


def parse_apparmor(text: str, path: Path) -> subprocess.CompletedProcess[str]:
    parser = shutil.which("apparmor_parser", path="/usr/sbin:/sbin:/usr/bin")
    if parser is None:
        pytest.skip("no apparmor_parser: it comes with Debian's package apparmor")
    path.write_text(text)
    command = [parser, "--skip-kernel-load", "--skip-cache", "--warn=all", str(path)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_apparmor_accepts_the_profile_and_would_notice(
    files: dict[str, str], tmp_path: Path
) -> None:
    text = files["xeray.apparmor"]
    done = parse_apparmor(text, tmp_path / "good")
    assert done.returncode == 0, done.stderr
    assert "profile xeray /opt/xeray/bin/xeray" in text
    assert "  /srv/our.models/{,**} r," in text

    broken = parse_apparmor(
        text.replace("network netlink raw,", "network carrier pigeon,"), tmp_path / "bad"
    )
    assert broken.returncode != 0


def test_apparmor_grants_no_capability_and_no_mount(files: dict[str, str]) -> None:
    rules = {line.split()[0] for line in files["xeray.apparmor"].splitlines() if line.strip()}
    assert rules.isdisjoint({"capability", "capability,", "mount", "mount,", "change_profile"})


def test_selinux_compiles_and_labels_the_files(files: dict[str, str], tmp_path: Path) -> None:
    if not SELINUX_MAKEFILE.exists() or shutil.which("checkmodule") is None:
        pytest.skip("no SELinux tools: Debian's selinux-policy-dev, checkpolicy, semodule-utils")
    for name in ("xeray.te", "xeray.fc"):
        (tmp_path / name).write_text(files[name])
    command = ["make", "-f", str(SELINUX_MAKEFILE), "xeray.pp"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    command = ["semodule_unpackage", "xeray.pp", "xeray.mod", "contexts"]
    subprocess.run(command, cwd=tmp_path, check=True)
    lines = [line.split() for line in (tmp_path / "contexts").read_text().splitlines()]
    labels = {line[0]: line[-1].split(":")[2] for line in lines if line and line[0][0] == "/"}
    assert labels["/opt/xeray/bin/xeray"] == "xeray_exec_t"
    assert labels["/opt/xeray(/.*)?"] == "xeray_lib_t"
    assert labels[r"/srv/our\.models(/.*)?"] == "xeray_models_t"

    (tmp_path / "xeray.te").write_text(files["xeray.te"] + "allow xeray_t no_such_t:file read;\n")
    command = ["make", "-f", str(SELINUX_MAKEFILE), "xeray.pp"]
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode != 0


def test_a_folder_that_would_change_the_profile_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_folders"):
        parse_inventory(INVENTORY.replace("/srv/our.models", '"/srv/** rw, /etc"'), "test")


def allowed() -> set[str]:
    rules = [rule for rule in profile()["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW"]
    return {name for rule in rules for name in rule["names"]}


def test_seccomp_names_only_what_the_unit_allows_and_what_a_runtime_needs(
    repository: Path,
) -> None:
    """One policy in two forms: systemd's groups for the unit, names for containers."""
    unit = (repository / "cluster/systemd/xeray-node.service").read_text()
    (line,) = [x for x in unit.splitlines() if x.startswith("SystemCallFilter=@")]
    words = line.removeprefix("SystemCallFilter=").split()
    # Memory keys and residency: systemd 252 has them in no group that is called a service's.
    permitted = {"pkey_alloc", "pkey_free", "pkey_mprotect", "mincore"}
    for word in words:
        permitted |= expand(word)
    assert allowed() <= permitted


def expand(word: str) -> set[str]:
    if not word.startswith("@"):
        return {word}
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: it comes with Debian's package systemd")
    command = ["systemd-analyze", "syscall-filter", word]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines()[1:]]
    return {name for line in lines if line and line[0] != "#" for name in expand(line)}


def test_seccomp_refuses_what_attacks_begin_with() -> None:
    refused = {"ptrace", "mount", "keyctl", "add_key", "bpf", "unshare", "setns", "io_uring_setup"}
    refused |= {"userfaultfd", "perf_event_open", "init_module", "kexec_load", "pivot_root"}
    refused |= {"process_vm_readv", "process_vm_writev", "open_by_handle_at", "chroot", "clone3"}
    assert allowed().isdisjoint(refused)


@pytest.fixture(scope="module")
def confined(
    tmp_path_factory: pytest.TempPathFactory, find_free_port: Callable[[], int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The HTTP surface in a process under the profile: its URL, and what it could not do."""
    if seccomp.library() is None:
        pytest.skip("libseccomp is not installed")
    folder = tmp_path_factory.mktemp("seccomp")
    path = folder / "profile.json"
    path.write_text(json.dumps(profile()))
    here, port = Path(__file__).parent, find_free_port()
    command = [sys.executable, str(here / "seccomp.py"), str(path)]
    command += [sys.executable, str(here / "confined_service.py"), str(port)]
    with (folder / "found").open("w") as found:
        process = subprocess.Popen(command, stdout=found)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_ready(url):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        yield url, json.loads((folder / "found").read_text())
    finally:
        process.terminate()
        process.wait(timeout=20)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_service_under_seccomp_answers(confined: tuple[str, dict[str, Any]]) -> None:
    url, found = confined
    body = {"model": "any", "prompt": "x", "max_tokens": 3, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=10)
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "confined" * 3)
    assert found["works"] == ["child process", "thread", "product of matrices", "shared memory"]


def test_under_seccomp_forbidden_calls_fail(confined: tuple[str, dict[str, Any]]) -> None:
    """Each with arguments that would fail another way, or do nothing, if the call were made."""
    _, found = confined
    assert found["seccomp_mode"] == 2
    assert found["no_new_privileges"] == 1
    expected = dict.fromkeys(
        ("ptrace", "mount", "keyctl", "unshare", "io_uring_setup", "AF_ALG", "TIOCSTI"), EPERM
    )
    assert found["errors"] == {**expected, "clone3": ENOSYS}


def test_without_seccomp_the_same_calls_fail_otherwise() -> None:
    """So that the errors above are the profile's; mount is left out: who is not root gets EPERM."""
    script = str(Path(__file__).with_name("confined_service.py"))
    done = subprocess.run(
        [sys.executable, script, "probe"], check=True, capture_output=True, text=True
    )
    errors = json.loads(done.stdout)["errors"]
    assert errors["unshare"] == 0
    assert errors["ptrace"] not in (0, EPERM)
    assert errors["clone3"] not in (0, ENOSYS)
