"""What an interrupted run leaves, and who may take it up."""

from __future__ import annotations

import pytest

from serve_app.core.errors import ConfigError
from serve_app.quantize.state import RunState, source_identity

IDENTITY = {"recipe": {"bits": 4, "skip": ("lm_head",)}, "source": {"a": [1, 2]}}


def test_a_killed_run_keeps_finished_stages_and_says_what_is_done_again(tmp_path):
    output = tmp_path / "out"
    with RunState(output, IDENTITY) as state:
        assert state.describe() is None
        state.finish("source")
        state.path("kept.txt").write_text("x")
        state.begin("calibration")
        state.finish("calibration")
        state.begin("quantize")
    with RunState(output, IDENTITY) as again:
        assert again.done == ["source", "calibration"]
        assert again.describe() == (
            "continuing out.partial: source, calibration kept; quantize is done again from its"
            " beginning"
        )
        assert again.path("kept.txt").read_text() == "x"
        again.finish("quantize")
    with RunState(output, IDENTITY) as third:
        assert third.describe().endswith("going on with verify")
        third.redo("quantize")
        assert third.done == ["source", "calibration"]
        third.remove()
    assert not output.with_name("out.partial").exists()


def test_another_recipe_does_not_continue_but_may_restart(tmp_path):
    output = tmp_path / "out"
    with RunState(output, IDENTITY) as state:
        state.path("folder").mkdir()
        state.finish("source")
    other = {**IDENTITY, "recipe": {"bits": 8}}
    with pytest.raises(ConfigError, match="another recipe; add --restart"), RunState(output, other):
        pass
    with RunState(output, other, restart=True) as state:
        assert state.done == []
        assert not state.path("folder").exists()


def test_a_damaged_state_is_refused(tmp_path):
    output = tmp_path / "out"
    with RunState(output, IDENTITY) as state:
        state.path("state.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"), RunState(output, IDENTITY):
        pass


def test_two_runs_at_once_are_one_too_many(tmp_path):
    output = tmp_path / "out"
    with RunState(output, IDENTITY), pytest.raises(ConfigError, match="another xeray quantize"):
        RunState(output, IDENTITY).__enter__()
    with RunState(output, IDENTITY) as free:
        assert free.done == []


def test_the_source_is_known_by_its_files(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"12")
    before = source_identity(tmp_path)
    assert source_identity(tmp_path / "a.bin") == before
    (tmp_path / "a.bin").write_bytes(b"123")
    assert source_identity(tmp_path) != before
