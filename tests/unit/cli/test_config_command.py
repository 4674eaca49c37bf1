from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from serve_app.cli.main import EXIT_ERROR, main
from serve_app.config.env import TABLE
from serve_app.config.resources import data_folder, packaged_configs
from serve_app.config.schema import AppConfig

VALID = "applications:\n- name: llm\n  import_path: serve_app:build_app\n  args: {{{args}}}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(VALID.format(args="engine: {max_num_seqs: 3}"))
    return path


def test_a_right_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", str(config)]) == 0
    assert "valid; application llm" in capsys.readouterr().out


def test_a_right_file_as_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["valid"] is True


def test_an_unknown_key_names_the_nearest(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(VALID.format(args="engine: {max_num_seq: 3}"))

    assert main(["config", "validate", str(config)]) == EXIT_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "max_num_seq:" in error
    assert "'max_num_seqs'" in error


def test_every_config_that_travels_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    names = packaged_configs()
    assert "local.yaml" in names
    for name in names:
        assert main(["config", "validate", name]) == 0, capsys.readouterr().err


def test_the_schema_describes_each_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(AppConfig.model_fields)
    sections = schema["$defs"]
    assert "description" in sections["EngineSection"]["properties"]["max_num_seqs"]
    assert sections["EngineSection"]["additionalProperties"] is False


def test_show_fills_in_the_defaults(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["config", "show", str(config), "--set", "engine.block_size=32"]

    assert main(arguments) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["engine"]["max_num_seqs"] == 3
    assert shown["engine"]["block_size"] == 32
    assert shown["model"]["path"] == "embedded"


def test_what_show_prints_is_a_right_config(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["config", "show", str(config), "--json"])
    args = json.loads(capsys.readouterr().out)

    assert AppConfig.model_validate(args).engine.max_num_seqs == 3


def test_list_says_for_whom_each_config_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == packaged_configs()
    assert lines
    assert all(len(line.split()) > 3 for line in lines), data_folder("configs")


def test_env_lists_every_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TABLE[0].name, "2")

    assert main(["config", "env"]) == 0
    printed = capsys.readouterr().out
    assert f"{TABLE[0].name}  (= 2)" in printed
    assert all(variable.name in printed for variable in TABLE)

    assert main(["config", "env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["value"] == "2"


def test_an_action_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["config"])
    assert stop.value.code == 2
    assert "ACTION" in capsys.readouterr().err
