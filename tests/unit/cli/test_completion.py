from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from serve_app.cli import completion
from serve_app.cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def tree() -> completion.Node:
    return completion.command_tree()


@pytest.fixture(scope="module")
def script(tree: completion.Node, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "xeray.bash"
    path.write_text(completion.bash_script(tree))
    return path


def ask(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    line = " ".join(f"'{word}'" for word in ("xeray", *words))
    query = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _xeray;"
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", query], check=True, capture_output=True, text=True, cwd=script.parent
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_takes_the_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_commands_options_and_values_are_offered(script: Path) -> None:
    assert set(ask(script, "")) >= set(COMMANDS)
    assert ask(script, "pl") == ["plan"]
    assert {"--devices", "--model", "--json"} <= set(ask(script, "plan", "--"))
    assert ask(script, "plan", "--device", "c") == ["cpu", "cuda"]
    assert ask(script, "plan", "--model", "x", "--wei") == ["--weights"]
    assert set(ask(script, "completion", "")) >= {"bash", "zsh", "fish"}
    assert "serve" in ask(script, "bench", "s"), "and below a command"
    assert "--json" not in ask(script, "--"), "what a command has is not offered before it"


def test_a_file_is_offered_where_a_value_is_free(script: Path) -> None:
    assert ask(script, "plan", "--write", "xer") == ["xeray.bash"]
    assert ask(script, "serve", "xer") == ["xeray.bash"]


def test_hidden_options_stay_hidden(tree: completion.Node) -> None:
    energy = tree.commands["energy"]
    assert "--root" not in {flag for option in energy.options for flag in option.flags}


def test_commands_that_no_help_lists_are_not_offered(tree: completion.Node) -> None:
    cluster = tree.commands["cluster"].commands
    assert "up" in cluster
    assert "node" not in cluster
    assert all(node.help for node in tree.walk() if node.path)


def test_fish_and_zsh_have_every_command(tree: completion.Node) -> None:
    fish, zsh = completion.fish_script(tree), completion.zsh_script(tree)
    for name in COMMANDS:
        assert f" -a {name} " in fish
        assert name in zsh
    assert "-l devices" in fish
    assert zsh.startswith("autoload -U +X bashcompinit")
    assert "mapfile" not in zsh
    for shell, text in (("fish", fish), ("zsh", zsh)):
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=text, check=True, text=True)


def test_json_says_what_may_follow_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert "plan" in table["xeray"]
    assert "--devices" in table["xeray plan"]
