from __future__ import annotations

import pytest

from serve_app.models.kernel_choices import KernelChoices, kernel_choices


def test_what_was_measured_is_there_at_the_next_start(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices = kernel_choices()
    assert choices.get("a") is None
    choices.put("a", 8)
    assert choices.get("a") == kernel_choices().get("a") == 8
    assert [path.suffix for path in (tmp_path / "xeray/kernels").iterdir()] == [".json"]


def test_two_processes_keep_each_others_measurements(tmp_path):
    one, other = KernelChoices(tmp_path / "c.json"), KernelChoices(tmp_path / "c.json")
    one.put("a", 1)
    other.put("b", 2)
    again = KernelChoices(tmp_path / "c.json")
    assert (again.get("a"), again.get("b")) == (1, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00\xff",
        '{"version": 0, "rows": {"a": 4}}',
        '{"version": 1, "rows": [4]}',
        '{"version": 1, "rows": {"a": "4"}}',
        '{"version": 1, "rows": {"a": -4}}',
        '{"version": 1, "rows": {"a": true}}',
    ],
)
def test_a_damaged_file_is_measured_anew(text, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    choices = KernelChoices(path)
    assert choices.get("a") is None
    choices.put("a", 16)
    assert KernelChoices(path).get("a") == 16


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_measurement(tmp_path):
    (tmp_path / "file").write_text("")
    choices = KernelChoices(tmp_path / "file" / "c.json")
    choices.put("a", 4)
    assert choices.get("a") == 4
