"""Host-wide exclusive locks: a card, or a CPU core, belongs to one holder at a time.

The kernel drops a lock with the last open descriptor of its holder, however that died. A child
process that gets the descriptor (`pass_fds`) keeps the lock as long as it lives, so a card is free
only when the engine on it is gone too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from serve_app.config.env import LOCK_DIR, read_path
from serve_app.core.errors import ConfigError

_RETRY_S = 0.05


def lock_dir(env: Mapping[str, str] | None = None) -> Path:
    """Return the host's lock folder, made if need be. Raises ConfigError where that fails."""
    chosen = read_path(LOCK_DIR, env)
    candidates = [chosen] if chosen else [Path("/run/lock/xeray"), _fallback_dir()]
    for path in candidates:
        if _make_shared_dir(path):
            return path
    raise ConfigError(
        f"{LOCK_DIR.name}: cannot write locks in {candidates[-1]}; set it to a folder of this host"
        " that every user of the cards may write",
        param=LOCK_DIR.name,
    )


def _fallback_dir() -> Path:
    return Path(tempfile.gettempdir()) / "xeray-locks"


def _make_shared_dir(path: Path) -> bool:
    try:
        path.mkdir(mode=0o777)
        path.chmod(0o1777)  # past the umask: other users' replicas lock here too
    except FileExistsError:
        pass
    except FileNotFoundError:
        try:
            path.mkdir(mode=0o777, parents=True, exist_ok=True)
        except OSError:
            return False
    except OSError:
        return False
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


class CardLock:
    """An exclusive lock on one name (`arc-0`, `core-3`, …) of this host.

    `fileno()` is the descriptor to hand to a child that shall share the lock.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.name = name
        self.path = (folder or lock_dir()) / f"{name}.lock"
        self._fd: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def fileno(self) -> int:
        """Return the lock's descriptor; only while it is held."""
        if self._fd is None:
            raise ValueError(f"the lock {self.name} is not held")
        return self._fd

    def try_acquire(self, *, notes_holder: bool = True) -> bool:
        """Take the lock if it is free; returns whether it is held now.

        notes_holder: write this process into the lock's file, for people who ask who holds it.
        """
        if self._fd is not None:
            return True
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        self._fd = fd
        if notes_holder:
            self._write_holder()
        return True

    def release(self) -> None:
        """Give the lock back; a child that shares it goes on holding it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def holder(self) -> str:
        """Return who took the lock last, as `pid 12 (name)`; '' where nobody wrote."""
        try:
            data = json.loads(self.path.read_text())
            return f"pid {data['pid']} ({data['name']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # no links: others may write the folder
        try:
            # Without O_CREAT first: in a sticky folder it fails on another user's file.
            return os.open(self.path, flags)
        except FileNotFoundError:
            fd = os.open(self.path, flags | os.O_CREAT, 0o666)
            if os.fstat(fd).st_uid == os.geteuid():
                os.fchmod(fd, 0o666)  # past the umask
            return fd
        except OSError as error:
            raise ConfigError(
                f"cannot open the lock {self.path} ({error.strerror}); set {LOCK_DIR.name} to a"
                " folder of this host that every user of the cards may write"
            ) from error

    def _write_holder(self) -> None:
        # For people who ask who holds a card; the lock itself is the kernel's.
        try:
            name = Path("/proc/self/comm").read_text().strip()
        except OSError:
            name = "unknown"
        fd = self.fileno()
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "name": name}).encode(), 0)


def acquire_all(
    names: Sequence[str],
    timeout_s: float,
    folder: Path | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> list[CardLock]:
    """Take every named lock, waiting at most `timeout_s` for those that are held.

    Raises ConfigError naming the first lock that stayed taken and its holder; none is held then.
    """
    locks = [CardLock(name, folder) for name in names]
    deadline = time.monotonic() + timeout_s
    for lock in locks:
        while not lock.try_acquire():
            if time.monotonic() >= deadline:
                release_all(locks)
                who = lock.holder() or "another process"
                raise ConfigError(
                    f"{lock.name} is in use by {who} after {timeout_s:g} s of waiting"
                )
            sleep(_RETRY_S)
    return locks


def acquire_free(
    names: Sequence[str],
    count: int,
    timeout_s: float,
    folder: Path | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> list[CardLock]:
    """Take `count` locks among `names`, the first that are free, waiting at most `timeout_s`.

    Raises ConfigError where there are too few names, or too few came free; none is held then.
    """
    if count > len(names):
        raise ConfigError(f"{count} asked for, but this host has {len(names)}: {', '.join(names)}")
    deadline = time.monotonic() + timeout_s
    while True:
        taken = _take_free(names, count, folder)
        if len(taken) == count:
            return taken
        # All or nothing: two claimants that each hold a part would wait for each other for ever.
        release_all(taken)
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"{count} of {', '.join(names)} asked for, but only {len(taken)} came free"
                f" within {timeout_s:g} s"
            )
        sleep(_RETRY_S)


def _take_free(names: Sequence[str], count: int, folder: Path | None) -> list[CardLock]:
    taken: list[CardLock] = []
    for name in names:
        if len(taken) == count:
            break
        lock = CardLock(name, folder)
        if lock.try_acquire():
            taken.append(lock)
    return taken


def release_all(locks: Iterable[CardLock]) -> None:
    """Release each lock that is held."""
    for lock in locks:
        lock.release()
