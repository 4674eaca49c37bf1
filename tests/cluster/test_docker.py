"""The Dockerfiles: linted, compared, and (XERAY_TEST_IMAGES=1) built and run without Docker.

The long form makes a root file system of Debian's packages, carries each instruction out in it,
and asks the command for /readyz; it takes minutes, root, and the network.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.cli.bootstrap import TORCH_WHEELS, is_reachable
from tests.cluster import dockerfile

FLAVOURS = ("cpu", "xpu")
VARIED = {"TORCH_INDEX", "DRIVER_PACKAGES"}
SWITCH = "XERAY_TEST_IMAGES"
ADDRESS = "10.213.0.2"
NETWORK = (
    "link set lo up",
    "link add eth0 type veth peer name far",
    f"address add {ADDRESS}/24 dev eth0",
    "link set far up",
    "link set eth0 up",
    "route add default via 10.213.0.1",
)
"""What a container has: loopback, and an interface with a default route."""


@pytest.fixture(scope="module")
def texts(repository: Path) -> dict[str, str]:
    folder = repository / "cluster/docker"
    return {name: (folder / f"{name}.Dockerfile").read_text() for name in FLAVOURS}


def test_the_images_differ_in_torch_index_and_driver_packages_only(texts: dict[str, str]) -> None:
    cpu, xpu = (dockerfile.parse(texts[name]) for name in FLAVOURS)

    assert len(cpu) == len(xpu)
    unlike = [(one, other) for one, other in zip(cpu, xpu, strict=True) if one != other]
    assert {one.text.partition("=")[0] for one, _ in unlike} == VARIED
    assert all(one.name == other.name == "ARG" for one, other in unlike)
    values = {one.text.partition("=")[0]: (one.text, other.text) for one, other in unlike}
    assert values["TORCH_INDEX"][0].endswith("/cpu")
    assert values["TORCH_INDEX"][1].endswith("/xpu")
    assert values["DRIVER_PACKAGES"][0] == 'DRIVER_PACKAGES=""'
    assert "libze-intel-gpu1" in values["DRIVER_PACKAGES"][1]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_image_is_not_root_and_says_how_it_is(texts: dict[str, str], flavour: str) -> None:
    instructions = dockerfile.parse(texts[flavour])
    by_name = {instruction.name: instruction.text for instruction in instructions}
    names = [instruction.name for instruction in instructions]

    user, _, group = by_name["USER"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert "/readyz" in by_name["HEALTHCHECK"]
    assert dockerfile.words(by_name["ENTRYPOINT"]) == ["/opt/xeray/bin/xeray"]
    assert dockerfile.words(by_name["CMD"])[:2] == ["serve", "cpu"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_hadolint_finds_nothing(repository: Path, flavour: str) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("no hadolint: it comes with the test extra, for x86-64 and ARM")
    done = subprocess.run(
        [hadolint, "--no-color", repository / f"cluster/docker/{flavour}.Dockerfile"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reader_joins_lines_and_drops_comments() -> None:
    found = dockerfile.parse("# a\nRUN one \\\n    # b\n    && two\n\nUSER 1:1\n")
    assert [(one.name, one.text) for one in found] == [("RUN", "one && two"), ("USER", "1:1")]
    with pytest.raises(AssertionError, match="unknown instruction ADD"):
        dockerfile.parse("ADD x y")


def _wheel(repository: Path, target: Path) -> None:
    source = target / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source / name)
    for name in ("serve_app", "configs", "cluster"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repository / name, source / name, ignore=ignored)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    (target / "dist").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(target / "dist")],
        cwd=source,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _pip_environment(root: Path) -> tuple[dict[str, str], tuple[Path, ...]]:
    """How this machine's pip finds packages: its settings, and the folders that they name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    settings = dict(re.findall(r"^(?::env:\.|global\.)([\w-]+)='(.*)'$", listed, re.MULTILINE))
    env = {f"PIP_{key.upper().replace('-', '_')}": value for key, value in settings.items()}
    if (certificates := Path(settings.get("cert", ""))).is_file():
        shutil.copy(certificates, root / "tmp/certificates")
        env["PIP_CERT"] = "/tmp/certificates"
    words = " ".join(settings.values()).split()
    paths = [Path(word.removeprefix("file://")) for word in words]
    folders = {path.parent if path.name == "simple" else path for path in paths if path.is_dir()}
    proxies = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    # An index that does not answer shall not hold the build up: what it has may be found locally.
    limits = {"PIP_DEFAULT_TIMEOUT": "15", "PIP_RETRIES": "1"}
    return {**env, **proxies, **limits}, tuple(sorted(folders))


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root file system of Debian's packages; each test copies it."""
    if os.environ.get(SWITCH) != "1":
        pytest.skip(f"takes minutes: set {SWITCH}=1")
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        pytest.skip("needs root and Debian's mmdebstrap")
    folder = tmp_path_factory.mktemp("debian")
    dockerfile.make_debian_root(folder)
    yield folder
    shutil.rmtree(folder)


def _build_args(flavour: str) -> dict[str, str]:
    """What stands in for Ubuntu's driver packages in Debian, and for an index out of reach."""
    driver = {"DRIVER_PACKAGES": "intel-opencl-icd libze1"} if flavour == "xpu" else {}
    if is_reachable(f"{TORCH_WHEELS}/{flavour}/torch/"):
        return driver
    return {**driver, "TORCH_INDEX": "https://pypi.org/simple"}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_image_builds_and_its_command_answers(
    debian: Path, texts: dict[str, str], repository: Path, flavour: str, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", debian, root], check=True)  # device nodes stay such
    _wheel(repository, tmp_path)
    env, mounts = _pip_environment(root)
    instructions = dockerfile.parse(texts[flavour])
    image = dockerfile.Image(root, _build_args(flavour), env, mounts)
    image.build(instructions, tmp_path)
    assert set(image.executed) == set(dockerfile.INSTRUCTIONS)

    assert image.run(["/usr/bin/id", "-u"]).strip() == "10001"
    assert "2.60.0" in image.run(["/bin/bash", "-lc", "ray --version"])
    if flavour == "xpu":
        assert "libze1" in (root / "var/lib/dpkg/status").read_text()
    _name_host(root)
    with _network() as image.network, contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w+"))
        service = image.start([*image.entrypoint, *image.command], stdout=log, stderr=log)
        try:
            _await_health(image, service, timeout_s=240)
        finally:
            image.kill(service)
            log.seek(0)
            print(log.read()[-3000:])
            shutil.rmtree(root, ignore_errors=True)


def _name_host(root: Path) -> None:
    """Write what Docker writes: the container's own name, so that nobody asks a name server."""
    hosts = f"127.0.0.1 localhost\n{ADDRESS} {socket.gethostname()}\n"
    (root / "etc/hosts").write_text(hosts)
    (root / "etc/resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")


@contextlib.contextmanager
def _network() -> Iterator[str]:
    """A network of its own: the image's port 8000 may be taken here."""
    name = f"image{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for command in NETWORK:
            subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def _await_health(
    image: dockerfile.Image, service: subprocess.Popen[str], timeout_s: float
) -> None:
    """Do as Docker does: run the health check, which asks for /readyz, until it succeeds."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        assert service.poll() is None, "the image's command ended"
        if image.start(image.health, stderr=subprocess.DEVNULL).wait(timeout=60) == 0:
            return
        time.sleep(1)
    raise AssertionError(f"/readyz did not answer 200 within {timeout_s} s")
