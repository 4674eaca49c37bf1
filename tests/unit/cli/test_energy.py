import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.cli.energy import LevelResult, recommend
from serve_app.cli.main import main

_EVENTS = (
    {"choices": [{"index": 0, "text": "a", "finish_reason": None}]},
    {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 8}},
)


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers each request with eight tokens at once."""
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        events = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in _EVENTS)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            + events
            + b"data: [DONE]\n\n"
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    listening = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    listening.close()
    loop.run_until_complete(listening.wait_closed())
    loop.close()


def write(root: Path, name: str, value: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with one card; returns its power limit's file."""
    monkeypatch.setenv("XERAY_LOCK_DIR", str(tmp_path / "locks"))
    pci = "sys/bus/pci/devices/0000:03:00.0"
    for name, value in (("vendor", "0x8086"), ("device", "0xe20b"), ("class", "0x030000")):
        write(tmp_path, f"{pci}/{name}", value)
    (tmp_path / "drivers/xe").mkdir(parents=True)
    (tmp_path / pci / "driver").symlink_to(tmp_path / "drivers/xe")
    (tmp_path / "sys/class/drm/card0").mkdir(parents=True)
    (tmp_path / "sys/class/drm/card0/device").symlink_to(tmp_path / pci)
    write(tmp_path, f"{pci}/hwmon/hwmon0/name", "xe")
    write(tmp_path, f"{pci}/hwmon/hwmon0/power1_max", 190_000_000)
    write(tmp_path, f"{pci}/hwmon/hwmon0/energy1_input", 0)
    return tmp_path / pci / "hwmon/hwmon0/power1_max"


def arguments(server: str, root: Path, *more: str) -> list[str]:
    return ["energy", "--url", server, "--requests", "4", "--root", str(root), "--json", *more]


def test_without_apply_nothing_is_written(server: str, card: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(server, tmp_path, "--levels", "0.5")) == 0
    output = capsys.readouterr()
    (row,) = json.loads(output.out)
    assert (row["level"], row["num_tokens"]) == (None, 32)
    assert "--apply would set, at 0.5: arc-0 power 95 W" in output.err
    assert card.read_text() == "190000000\n"


def test_each_level_is_measured_and_put_back(server: str, card: Path, tmp_path, capsys) -> None:
    assert main(arguments(server, tmp_path, "--apply", "--levels", "1", "0.5")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["limits"] for row in rows] == ["arc-0 power 190 W", "arc-0 power 95 W"]
    assert card.read_text() == "190000000"


def test_apply_without_a_card_is_one_line(tmp_path: Path, capsys) -> None:
    assert main(["energy", "--apply", "--root", str(tmp_path)]) == 1
    assert "no card of this machine" in capsys.readouterr().err


def test_without_a_source_it_says_why_and_takes_the_watts_of_a_meter(
    server: str, tmp_path: Path, capsys
) -> None:
    assert main(arguments(server, tmp_path)) == 0
    output = capsys.readouterr()
    (row,) = json.loads(output.out)
    assert (row["joules"], row["tokens_per_joule"]) == ({}, None)
    assert "this machine has no RAPL" in output.err
    assert "no Intel card" in output.err
    assert "--watts N takes the power" in output.err
    assert "offers a power limit to set" in output.err

    write(tmp_path, "sys/class/powercap/intel-rapl:0/name", "package-0")  # no counter: not ours
    assert main(arguments(server, tmp_path, "--watts", "50")) == 0
    output = capsys.readouterr()
    (row,) = json.loads(output.out)
    watts = row["joules"]["given"] * row["tokens_per_s"] / row["num_tokens"]
    assert watts == pytest.approx(50)
    assert row["tokens_per_joule"] == pytest.approx(row["tokens_per_s"] / 50)
    assert "no source" not in output.err


@pytest.mark.parametrize(
    "wrong",
    [["--requests", "0"], ["--concurrency", "-1"], ["--watts", "0"], ["--watts", "5", "--apply"]],
)
def test_wrong_numbers_are_refused_before_anything_runs(
    wrong: list[str], tmp_path: Path, capsys
) -> None:
    try:
        code = main(["energy", "--root", str(tmp_path), *wrong])
    except SystemExit as refused:
        code = refused.code
    assert code in (1, 2)
    assert wrong[0] in capsys.readouterr().err


def test_a_level_beyond_one_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["energy", "--levels", "1.5", "--root", str(tmp_path)]) == 1
    assert "--levels" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path, capsys) -> None:
    code = main(
        ["energy", "--url", "http://127.0.0.1:9", "--requests", "1", "--root", str(tmp_path)]
    )
    assert code == 1
    assert "nothing answers at" in capsys.readouterr().err


def test_the_recommendation_keeps_nine_tenths_of_the_speed() -> None:
    def result(tokens_per_s: float, joules: float) -> LevelResult:
        return LevelResult(1.0, "", tokens_per_s, {"arc-0": joules} if joules else {}, 100)

    full, saving, slow = result(100, 50), result(95, 25), result(50, 5)
    assert recommend([full, saving, slow]) is saving
    assert recommend([result(100, 0)]) is None
