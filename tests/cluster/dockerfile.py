"""A reader of Dockerfiles and a builder without Docker: a root folder, chroot, the same order."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = frozenset(
    [
        "ARG",
        "CMD",
        "COPY",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "FROM",
        "HEALTHCHECK",
        "RUN",
        "SHELL",
        "USER",
        "WORKDIR",
    ]
)
_REFERENCE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name and the rest, continuation lines joined, comments left out."""

    name: str
    text: str


def parse(text: str) -> list[Instruction]:
    """Return the instructions of a Dockerfile; AssertionError on one that is not known here."""
    logical, pending = [], ""
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue  # inside a continued instruction too
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1]
            continue
        if (pending + line).strip():
            logical.append((pending + line).strip())
        pending = ""
    assert not pending, "the last line is continued"
    found = []
    for line in logical:
        name, _, rest = line.partition(" ")
        assert name in INSTRUCTIONS, f"unknown instruction {name}"
        found.append(Instruction(name, re.sub(r"\s{2,}", " ", rest.strip())))
    return found


def words(text: str) -> list[str]:
    """Return the exec form of CMD, ENTRYPOINT, SHELL or a health check as a list."""
    value = json.loads(text)
    assert isinstance(value, list)
    return value


def make_debian_root(folder: Path) -> None:
    """Make a root file system of Debian 12's packages. AssertionError where that fails."""
    command = ["mmdebstrap", "--variant=minbase", "--mode=root", "bookworm", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copy("/etc/resolv.conf", folder / "etc/resolv.conf")


@dataclass
class Image:
    """A root folder in which a Dockerfile is carried out."""

    root: Path
    build_args: Mapping[str, str] = field(default_factory=dict)
    build_env: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Path, ...] = ()
    args: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(
        default_factory=lambda: {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        }
    )
    user: str = "0:0"
    workdir: str = "/"
    network: str | None = None
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)

    def build(self, instructions: list[Instruction], context: Path) -> None:
        """Carry out all instructions. AssertionError with the output where a RUN fails."""
        for instruction in instructions:
            getattr(self, f"_{instruction.name.lower()}")(instruction.text, context)
            self.executed.append(instruction.name)

    def expand(self, text: str) -> str:
        """Replace `$NAME` and `${NAME}` from ENV and ARG, as Docker does outside of RUN."""
        values = {**self.args, **self.env}
        return _REFERENCE.sub(lambda match: values.get(match[1] or match[2], ""), text)

    def start(
        self, command: list[str], env: Mapping[str, str] | None = None, **more: object
    ) -> subprocess.Popen[str]:
        """Start a command in the root as the image's user; to be ended by `kill`."""
        variables = {**self.env, **(env or {})}
        binds = "".join(
            f"mkdir -p {shlex.quote(f'{self.root}{path}')};"
            f"mount --bind {path} {shlex.quote(f'{self.root}{path}')};"
            for path in self.mounts
        )
        root = shlex.quote(str(self.root))
        script = (
            f"mount --make-rprivate /; mount -t proc proc {root}/proc;"
            f"mount --rbind /dev {root}/dev;"
            f"mount --rbind /sys {root}/sys; {binds}"
            f"exec chroot --userspec={self.user} {root} /usr/bin/env -i -C {self.workdir}"
            f" {shlex.join(f'{k}={v}' for k, v in variables.items())} {shlex.join(command)}"
        )
        network = [] if self.network is None else ["ip", "netns", "exec", self.network]
        isolate = [
            *network,
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-ec",
            script,
        ]
        return subprocess.Popen(isolate, text=True, **more)  # type: ignore[call-overload]

    def kill(self, process: subprocess.Popen[str]) -> None:
        """End a started command with all that it started: they share a namespace of pids.

        Its first process must go: the kernel forgets unshare's --kill-child when chroot changes the
        user.
        """
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        process.kill()
        process.wait(timeout=60)

    def run(self, command: list[str], env: Mapping[str, str] | None = None) -> str:
        """Run a command to its end and return its output. AssertionError where it fails."""
        process = self.start(command, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=1500)
        assert process.returncode == 0, f"{shlex.join(command)}:\n{output[-6000:]}"
        return output

    def _arg(self, text: str, context: Path) -> None:
        name, _, value = text.partition("=")
        self.args[name] = self.build_args.get(name, self.expand(value.strip('"')))

    def _from(self, text: str, context: Path) -> None:
        assert (self.root / "etc/debian_version").exists(), "the root is no Debian"

    def _shell(self, text: str, context: Path) -> None:
        self.shell = words(text)

    def _run(self, text: str, context: Path) -> None:
        self.run([*self.shell, text], {**self.args, **self.build_env})

    def _copy(self, text: str, context: Path) -> None:
        *sources, target = self.expand(text).split()
        folder = self.root / target.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            shutil.copy(context / source, folder)
            os.chown(folder / Path(source).name, 0, 0)

    def _env(self, text: str, context: Path) -> None:
        for pair in shlex.split(self.expand(text)):
            name, _, value = pair.partition("=")
            self.env[name] = value

    def _user(self, text: str, context: Path) -> None:
        self.user = text

    def _workdir(self, text: str, context: Path) -> None:
        self.workdir = text

    def _expose(self, text: str, context: Path) -> None:
        assert text.isdecimal()

    def _healthcheck(self, text: str, context: Path) -> None:
        self.health = words(text.partition("CMD ")[2])

    def _entrypoint(self, text: str, context: Path) -> None:
        self.entrypoint = words(text)

    def _cmd(self, text: str, context: Path) -> None:
        self.command = words(text)
