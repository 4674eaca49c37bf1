from pathlib import Path

from serve_app.api.keys import KeyRing
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
