from pathlib import Path

import pytest

from serve_app.api.keys import KeyRing, read_keys
from serve_app.cli.main import main


def test_a_new_key_opens_what_its_entry_says(tmp_path: Path, capsys) -> None:
    path = tmp_path / "keys.yaml"
    assert main(["keys", "new", "alice", "--file", str(path)]) == 0
    key = capsys.readouterr().out.split("key: ")[1].split()[0]
    assert main(["keys", "new", "root", "--scope", "admin", "--file", str(path)]) == 0
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    ring = KeyRing(path, env={})
    assert ring.authenticate(key).name == "alice"
    capsys.readouterr()
    assert main(["keys", "check", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("root: admin;")


def test_a_name_is_taken_once(tmp_path: Path, capsys) -> None:
    path = tmp_path / "keys.yaml"
    assert main(["keys", "new", "alice", "--file", str(path)]) == 0
    assert main(["keys", "new", "alice", "--file", str(path)]) == 1
    assert "named alice already" in capsys.readouterr().err


def test_without_a_file_the_entry_is_printed(capsys) -> None:
    assert main(["keys", "new", "bob"]) == 0
    assert "- name: bob\n  sha256: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_a_name_that_no_file_may_have_is_refused(name: str, tmp_path: Path, capsys) -> None:
    assert main(["keys", "new", name, "--file", str(tmp_path / "keys.yaml")]) == 1
    assert "xeray: name: expected 1 to 64 characters" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_adding_a_key_keeps_comments_mode_and_the_other_keys(tmp_path: Path, capsys) -> None:
    path = tmp_path / "keys.yaml"
    digest = "0" * 64
    text = f"# of the team\nkeys:\n  - name: alice  # leaves in May\n    sha256: '{digest}'\n"
    path.write_text(text)
    path.chmod(0o640)
    assert main(["keys", "new", "bob", "--file", str(path)]) == 0
    assert path.read_text().startswith(text.rstrip())
    assert [entry.name for entry in read_keys(path)] == ["alice", "bob"]
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["keys: []\n", "{keys: []}\n", "keys:\n- {name: a, sha256: %s}\n"])
def test_adding_a_key_to_a_file_of_another_style(text: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text.replace("%s", "'" + "0" * 64 + "'"))
    before = [entry.name for entry in read_keys(path)]
    assert main(["keys", "new", "bob", "--file", str(path)]) == 0
    assert [entry.name for entry in read_keys(path)] == [*before, "bob"]
