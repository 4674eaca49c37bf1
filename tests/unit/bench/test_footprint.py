from __future__ import annotations

import os
from pathlib import Path

from serve_app.bench.footprint import Footprint, GrowthLimits, growths, read_footprint
from serve_app.bench.verdict import growth_lines

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20


def add_process(proc: Path, pid: int, pages: int, num_fds: int, num_threads: int) -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    for number in range(num_fds):
        (folder / "fd" / str(number)).touch()
    (folder / "statm").write_text(f"9999 {pages} 5 1 0 7 0\n")
    (folder / "status").write_text(f"Name:\tx\nThreads:\t{num_threads}\nSigQ:\t0/1\n")


def test_a_footprint_sums_the_processes_that_are_there(tmp_path: Path) -> None:
    add_process(tmp_path, 10, pages=100, num_fds=3, num_threads=2)
    add_process(tmp_path, 11, pages=50, num_fds=4, num_threads=1)
    add_process(tmp_path, 12, pages=7, num_fds=1, num_threads=1)

    seen = read_footprint([10, 11, 99], tmp_path)

    told = (seen.rss_bytes, seen.num_fds, seen.num_threads, seen.num_processes)
    assert told == (150 * PAGE, 7, 3, 2)


def samples(rss_mib: list[float], num_fds: list[int]) -> list[Footprint]:
    return [
        Footprint(float(at), int(rss * MIB), fds, 20, 5)
        for at, (rss, fds) in enumerate(zip(rss_mib, num_fds, strict=True))
    ]


def grown(rss_mib: list[float], num_fds: list[int]) -> dict[str, tuple[float, bool]]:
    found = growths(samples(rss_mib, num_fds), GrowthLimits())
    return {growth.name: (growth.grew, growth.is_held) for growth in found}


def test_what_grows_during_the_warm_up_is_no_growth() -> None:
    rss = [100.0 + 50 * min(place, 10) for place in range(30)]
    seen = grown(rss, [40] * 30)
    assert seen["rss_bytes"] == (0.0, True)
    assert seen["num_fds"] == (0.0, True)


def test_a_leak_is_seen_through_noise() -> None:
    noise = [(-1) ** place * 30.0 for place in range(300)]
    leaking = [1000.0 + 0.5 * place + noise[place] for place in range(300)]
    steady = [1000.0 + noise[place] for place in range(300)]
    assert not grown(leaking, [40] * 300)["rss_bytes"][1]
    assert grown(steady, [40] * 300)["rss_bytes"][1]
    assert not grown(steady, [40 + place // 10 for place in range(300)])["num_fds"][1]


def test_one_sample_tells_of_no_growth() -> None:
    assert all(growth.is_held for growth in growths(samples([10.0], [3]), GrowthLimits()))
    assert all(growth.is_held for growth in growths([], GrowthLimits()))


def test_lines_show_memory_in_mebibytes() -> None:
    rss = [1000.0 + 2 * place for place in range(300)]
    lines = {
        line.name: line for line in growth_lines(growths(samples(rss, [4] * 300), GrowthLimits()))
    }
    line = lines["growth of memory, MiB"]
    assert not line.is_held
    assert str(line) == "  FAIL  growth of memory, MiB: 398 (limit ≤ 48, from 1200)"
    assert lines["growth of fds"].is_held
