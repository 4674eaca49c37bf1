import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.core.errors import ConfigError
from serve_app.hardware.card_lock import CardLock, acquire_all, acquire_free, lock_dir, release_all

HOLDER = """
import sys, time
from pathlib import Path
from serve_app.hardware.card_lock import CardLock
lock = CardLock(sys.argv[2], Path(sys.argv[1]))
print(lock.try_acquire(), flush=True)
time.sleep(60)
"""


def start_holder(folder: Path, name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), name], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "True"
    return process


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = CardLock("arc-0", tmp_path), CardLock("arc-0", tmp_path)

    assert first.try_acquire()
    assert first.try_acquire(), "the holder may ask again"
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()
    second.release()


def test_a_killed_holder_frees_its_card(tmp_path: Path) -> None:
    lock = CardLock("arc-0", tmp_path)
    for _ in range(3):
        holder = start_holder(tmp_path, "arc-0")
        assert not lock.try_acquire()
        assert f"pid {holder.pid} " in lock.holder()
        end(holder)
        assert lock.try_acquire()
        lock.release()


def test_a_child_with_the_descriptor_keeps_the_lock(tmp_path: Path) -> None:
    lock, other = CardLock("arc-0", tmp_path), CardLock("arc-0", tmp_path)
    assert lock.try_acquire()
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(lock.fileno(),),
    )

    lock.release()

    assert not other.try_acquire(), "the engine process still has the card"
    assert child.stdin is not None
    child.stdin.close()
    end(child)
    assert other.try_acquire()
    other.release()


def test_acquire_all_names_the_holder_and_keeps_nothing(tmp_path: Path) -> None:
    taken = CardLock("arc-1", tmp_path)
    assert taken.try_acquire()

    with pytest.raises(ConfigError, match=rf"arc-1 is in use by pid {os.getpid()}"):
        acquire_all(["arc-0", "arc-1"], timeout_s=0.0, folder=tmp_path)

    assert CardLock("arc-0", tmp_path).try_acquire()
    taken.release()


def test_acquire_all_waits_for_the_last_owner_to_end(tmp_path: Path) -> None:
    holder = start_holder(tmp_path, "arc-0")

    locks = acquire_all(["arc-0"], timeout_s=10.0, folder=tmp_path, sleep=lambda _: end(holder))

    assert [lock.name for lock in locks] == ["arc-0"]
    release_all(locks)


def test_acquire_free_takes_the_first_free_ones_or_none(tmp_path: Path) -> None:
    names = ["arc-0", "arc-1", "arc-2"]
    first = acquire_free(names, 1, 0.0, tmp_path)
    rest = acquire_free(names, 2, 0.0, tmp_path)

    assert [lock.name for lock in first + rest] == names
    release_all(rest[:1])
    with pytest.raises(ConfigError, match="only 1 came free"):
        acquire_free(names, 2, 0.0, tmp_path)
    assert [lock.name for lock in acquire_free(names, 1, 0.0, tmp_path)] == ["arc-1"]


def test_acquire_free_refuses_more_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 asked for, but this host has 1: arc-0"):
        acquire_free(["arc-0"], 3, 0.0, tmp_path)


def test_the_folder_is_shared_and_made_if_need_be(tmp_path: Path) -> None:
    folder = lock_dir({"XERAY_LOCK_DIR": str(tmp_path / "deep" / "locks")})

    assert folder.is_dir()
    assert lock_dir({"XERAY_LOCK_DIR": str(folder)}) == folder


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="XERAY_LOCK_DIR"):
        lock_dir({"XERAY_LOCK_DIR": str(tmp_path / "file" / "locks")})


def test_a_link_in_the_lock_folder_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / "arc-0.lock").symlink_to(target)

    with pytest.raises(ConfigError, match="cannot open the lock"):
        CardLock("arc-0", tmp_path).try_acquire()
    assert target.read_text() == "kept"
