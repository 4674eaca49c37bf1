"""What holds for every command of `xeray`: help, examples, --json, exit codes, mistakes."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.cli.examples import EXAMPLES, HelpFormatter, listed_commands
from serve_app.cli.main import COMMANDS, EXIT_ERROR, EXIT_USAGE, build_parser, main

WITHOUT_JSON = {
    "config schema": "prints JSON in any case",
    "cluster probe": "prints JSON in any case",
    "cluster render": "writes files",
}
NOWHERE = "http://127.0.0.1:1"  # tcpmux: nobody listens there


def leaves(command: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Path and parser of what can be run at and below a command."""
    top = next(p for name, p, _ in listed_commands(build_parser(command)) if name == command)
    yield from _leaves(command, top)


def _leaves(
    path: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    if parser.get_default("run") is not None:
        yield path, parser
    for name, below, _ in listed_commands(parser):
        yield from _leaves(f"{path} {name}", below)


def words_of(example: str) -> list[str]:
    """What of an example reaches `xeray`."""
    words = shlex.split(example)
    words = words[words.index("xeray") + 1 :]
    return list(itertools.takewhile(lambda word: word not in ("<", ">"), words))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_does_with_an_example_that_holds(command: str) -> None:
    for path, parser in leaves(command):
        shown = parser.format_help()
        assert parser.description, path
        assert path in EXAMPLES, f"{path} has no example in serve_app/cli/examples.py"
        for example in EXAMPLES[path]:
            assert f"\n  {example}\n" in shown
            if "--help" not in example:
                assert build_parser(command).parse_args(words_of(example)).run is not None
        for action in parser._actions:
            is_told = action.help or isinstance(action, argparse._SubParsersAction)
            assert is_told, f"{path}: {action.option_strings or action.dest} has no help"


@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_reports_does_so_as_json_too(command: str) -> None:
    for path, parser in leaves(command):
        flags = {flag for action in parser._actions for flag in action.option_strings}
        assert ("--json" in flags) != (path in WITHOUT_JSON), path


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_line_and_exit_2(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, _ in leaves(command):
        words, rest = path.split(), words_of(EXAMPLES[path][0])[len(path.split()) :]
        with pytest.raises(SystemExit) as stop:
            main([*words, "--no-such-option", *rest])
        assert stop.value.code == EXIT_USAGE
        (line,) = capsys.readouterr().err.splitlines()
        assert "--no-such-option" in line
        assert "--help" in line


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("serve absent.yaml", "absent.yaml"),
        ("serve --model absent.gguf", "absent.gguf"),
        ("serve --set engine.max_num_sequences=3", "max_num_seqs"),
        (f"chat hello --url {NOWHERE}", NOWHERE),
        ("config validate absent.yaml", "absent.yaml"),
        ("config validate noise.bin", "noise.bin"),
        ("config show local --set nonsense", "nonsense"),
        ("plan absent.yaml", "absent.yaml"),
        ("plan --model absent", "absent"),
        ("plan --model noise.gguf", "noise.gguf"),
        ("rollout start absent.yaml", "absent.yaml"),
        ("keys check absent.yaml", "absent.yaml"),
        ("keys check noise.bin", "noise.bin"),
        ("keys new ann --file no/such/folder/keys.yaml", "no/such/folder"),
        ("doctor explain zzqqx", "xeray doctor explain"),
        ("exporter --root absent", "--root"),
        ("exporter --port TAKEN", "TAKEN"),
        ("exporter --host 192.0.2.1 --port 0", "192.0.2.1"),
        ("monitor --interval 0", "--interval"),
        ("monitor --inventory absent.yaml --port 0", "absent.yaml"),
        ("cluster up -i absent.yaml", "absent.yaml"),
        ("cluster down -i absent.yaml", "absent.yaml"),
        ("cluster status -i absent.yaml", "absent.yaml"),
        ("cluster exec -i absent.yaml -- ls", "absent.yaml"),
        ("cluster render systemd -i absent.yaml -o units", "absent.yaml"),
        (f"energy --url {NOWHERE} --requests 1", NOWHERE.removeprefix("http://")),
        ("energy --levels 2", "--levels"),
        (f"profile --url {NOWHERE}", NOWHERE),
        ("profile --url nonsense", "--url"),
        ("chat hello --url nonsense", "nonsense"),
        (f"bench serve --url {NOWHERE} --quick", NOWHERE.removeprefix("http://")),
        ("bench serve --config absent.yaml --quick", "absent.yaml"),
        ("bench baseline check --file absent.json", "absent.json"),
        ("bench baseline check --file noise.bin", "noise.bin"),
        ("quantize absent --output out", "absent"),
        ("eval absent", "absent"),
        ("eval embedded --context 1", "--context"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    line: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("noise.bin", "noise.gguf"):
        Path(name).write_bytes(bytes(range(256)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(shlex.split(line.replace("TAKEN", port))) == EXIT_ERROR
    error = capsys.readouterr().err
    (last,) = [text for text in error.splitlines() if not text.endswith("…")]
    assert last.startswith("xeray: ")
    assert told.replace("TAKEN", port) in last
    assert "Traceback" not in error


def test_what_is_printed_as_json_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = str(tmp_path / "keys.yaml")
    lines = [
        f"keys new ann --scope metrics --file {keys} --json",
        "keys new bob --json",
        f"keys check {keys} --json",
        "config list --json",
        "config env --json",
        "config show local --json",
        "config validate local --json",
        "plan --model embedded --device cpu --memory 16GiB --json",
        "doctor explain guides --json",
        f"monitor --render {tmp_path / 'files'} --json",
    ]
    told = {}
    for line in lines:
        assert main(shlex.split(line)) == 0
        captured = capsys.readouterr()
        told[line] = json.loads(captured.out)
        assert captured.err == ""
    assert told[lines[0]]["key"].startswith("xr-")
    assert told[lines[2]] == [{**told[lines[2]][0], "name": "ann", "scopes": ["metrics"]}], (
        "the file's one key, without its hash"
    )
    assert "sha256" not in told[lines[2]][0]
    assert any(row["name"].startswith("local") and row["for"] for row in told[lines[3]])


def test_help_keeps_the_lines_of_examples_and_fills_the_rest() -> None:
    parser = argparse.ArgumentParser(
        prog="x", epilog="one\ntwo\n\nexamples:\n  x   --far  apart", formatter_class=HelpFormatter
    )
    assert parser.format_help().endswith("one two\n\nexamples:\n  x   --far  apart\n")
