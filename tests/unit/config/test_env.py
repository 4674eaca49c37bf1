from pathlib import Path

import pytest

from serve_app.config.env import (
    CARD_LOCK_TIMEOUT_S,
    LOCK_DIR,
    NUM_CORES,
    TABLE,
    read_count,
    read_path,
    read_seconds,
)
from serve_app.core.errors import ConfigError


def test_unset_and_empty_mean_the_default() -> None:
    for env in ({}, {variable.name: " " for variable in TABLE}):
        assert read_count(NUM_CORES, env) is None
        assert read_seconds(CARD_LOCK_TIMEOUT_S, env) == 30.0
        assert read_path(LOCK_DIR, env) is None


def test_values_are_read() -> None:
    assert read_count(NUM_CORES, {NUM_CORES.name: "4"}) == 4
    assert read_seconds(CARD_LOCK_TIMEOUT_S, {CARD_LOCK_TIMEOUT_S.name: "0.5"}) == 0.5
    assert read_path(LOCK_DIR, {LOCK_DIR.name: "/locks"}) == Path("/locks")


@pytest.mark.parametrize("text", ["-1", "1.5", "two", "٣x"])
def test_a_bad_count_names_its_variable(text: str) -> None:
    with pytest.raises(ConfigError, match="XERAY_NUM_CORES: expected a whole number"):
        read_count(NUM_CORES, {NUM_CORES.name: text})


@pytest.mark.parametrize("text", ["-1", "soon", "inf", "nan"])
def test_bad_seconds_name_their_variable(text: str) -> None:
    with pytest.raises(ConfigError, match="XERAY_CARD_LOCK_TIMEOUT_S: expected seconds"):
        read_seconds(CARD_LOCK_TIMEOUT_S, {CARD_LOCK_TIMEOUT_S.name: text})


def test_every_variable_is_ours_and_described() -> None:
    assert all(variable.name.startswith("XERAY_") and variable.description for variable in TABLE)
